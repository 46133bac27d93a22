"""The ladder of post-training methods as an experiment: configs/ptq.py."""

import json

import pytest

from configs import ptq
from qkd_jax import experiment


def config(rungs="", **fields):
    text = dict(width=4, train_examples=128, epochs=2, steps=20, examples=64) | fields
    text |= {"rungs": rungs} if rungs else {}
    return ptq.get_config(",".join(f"{k}={v}" for k, v in text.items()))


def test_every_rung_starts_from_the_one_float_net():
    found = config()
    rungs = [name for name in found.nets if name != "float"]
    assert len(rungs) == 13 and all(found.nets[r].init_from == "float" for r in rungs)
    assert found.schedule[0] == "pretrain" and found.schedule[-1] == "evaluate"
    kinds = {found.stages[s].kind for s in found.schedule}
    methods = {"fold_bn", "equalize", "correct_bias", "gptq", "adaround", "brecq", "qdrop"}
    assert methods <= kinds
    assert "pretrain" not in config(init_from="run#net").schedule
    experiment.read(found)


def test_rungs_stand_in_the_order_of_what_they_cost():
    order = "dynamic minmax percentile mse entropy equalize correct_bias adaround brecq qdrop qat"
    methods = list(config().stages.evaluate.nets)
    assert [m for m in methods if m in order.split()] == order.split()
    # Bias is corrected on top of equalization.
    stages = [s for s in config().schedule if s.startswith("correct_bias")]
    assert stages == [f"correct_bias_{s}" for s in ("equalize", "calibrate", "correct_bias")]


def test_wrong_rungs_and_fields_are_named():
    with pytest.raises(ValueError, match="unknown rung 'adaronud'"):
        config("adaronud")
    for field, value, message in (
        ("steps", 0, "stages.adaround_adaround.steps is 0"),
        ("examples", 0, "stages.adaround_adaround.examples is 0"),
        ("stepz", 5, "Did you mean 'steps'"),
    ):
        found = config("adaround").unlock()
        found.stages.adaround_adaround[field] = value
        with pytest.raises(ValueError, match=message):
            experiment.read(found)
    found = config("correct_bias").unlock()
    found.stages.correct_bias_correct_bias.how = "emprical"
    with pytest.raises(ValueError, match=r"how is 'emprical'.*empirical"):
        experiment.read(found)


@pytest.mark.slow
def test_the_ladder_runs_and_repeats_itself(tmp_path):
    rungs = "dynamic+entropy+correct_bias+gptq+adaround"
    rows = []
    for name in ("one", "two"):
        experiment.run(config(rungs), tmp_path / name, report=name == "one", verbose=False)
        rows.append(json.loads((tmp_path / name / "results.json").read_text())["rows"])
    assert rows[0] == rows[1]
    methods = [row["method"] for row in rows[0]]
    assert methods == ["float", "dynamic", "static entropy", "correct_bias", "gptq", "adaround"]
    assert all(row["weight_bits"] == 4 and row["activation_bits"] == 8 for row in rows[0][1:])
    assert all(row["agreement"] > 0.5 for row in rows[0][1:])
    assert len({row["loss"] for row in rows[0]}) == len(rows[0])  # every rung did something


@pytest.mark.slow
def test_a_net_cannot_start_from_the_weights_of_a_folded_one(tmp_path):
    found = config("mse").unlock()
    found.nets.late = dict(found.nets.mse.to_dict(), init_from="mse", rules="w2a2")
    found.stages.late = dict(kind="calibrate", nets=("late",))
    found.schedule = (*found.schedule, "late")
    with pytest.raises(ValueError, match=r"nets.late.init_from is 'mse'.*folded"):
        experiment.run(found, tmp_path / "run", report=False, verbose=False)
