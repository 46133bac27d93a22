"""Runs with hygiene, with bits that fall in rungs and with inputs that are quantized late."""

import json
import re

import numpy as np
import pytest
from stopped_runs import StopAt, checkpoint_of
from test_experiment import lines, same
from tiny_config import get_config

from configs import common, dynamic, qat, static, weight_only
from qkd_jax import experiment, report
from qkd_jax.experiment import orchestrate
from qkd_jax.experiment.run_state import Run
from qkd_jax.quantize import presets
from qkd_jax.training.hygiene import HYGIENE_FIELDS
from qkd_jax.training.loop import Preempted
from qkd_jax.trees import nested


def healthy(**fields):
    """A float net, then quantized training with hygiene in a stage and in one that continues it."""
    config = get_config("steps=12,save_steps=5").unlock()
    config.log = dict(every_steps=3, eval_every_steps=0, quant_every_steps=4)
    given = dict(freeze=0.3, freeze_end=0.1, momentum=0.3, dampen=0.01, max_ratio=4.0) | fields
    stages = config.stages
    stages.qat_only.optim.qat_only.lr = 1.0  # for codes to swing within a dozen steps
    stages.qat_only.hygiene = dict(qat_only=common.hygiene(**given))
    stages.more = dict(stages.qat_only.to_dict())
    stages.more.optim.qat_only.continues = "qat_only"
    stages.diagnose = common.diagnose("qat_only")
    config.schedule = ("pretrain_student", "calibrate", "qat_only", "more", "diagnose")
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    experiment.run(healthy(), folder, report=False, verbose=False)
    return folder


def test_every_field_of_hygiene_is_in_the_config():
    assert common.HYGIENE == HYGIENE_FIELDS
    stages = qat.get_config().stages
    assert stages.pretrain.hygiene.net.to_dict() == HYGIENE_FIELDS
    # Steps that are learned are kept from falling to 0; bits without any have nothing to keep.
    assert stages.qat.hygiene.net.to_dict() == {**HYGIENE_FIELDS, "max_ratio": 8.0}
    static = qat.get_config("bits=w8a8:static").stages
    assert static.qat.hygiene.net.to_dict() == HYGIENE_FIELDS
    with pytest.raises(ValueError, match=r"\['frieze'\]"):
        common.hygiene(frieze=0.1)


def test_freezing_reaches_the_log_the_diagnosis_and_the_report(finished):
    rows = lines(finished)
    frozen = [r["values"]["qat_only/frozen"] for r in rows if "qat_only/frozen" in r["values"]]
    assert frozen[0] < max(frozen) <= 1 and len(frozen) == 8
    # A stage that continues the optimizer starts its own hygiene: nothing is pinned at first.
    assert frozen[4] < frozen[3]
    shares = [r for r in rows if r["split"] == "oscillating"]
    assert [r["stage"] for r in shares] == 3 * ["qat_only"] + 3 * ["more"]
    layers = {"qat_only/dense1", "qat_only/dense2", "qat_only/head"}
    assert all(set(r["values"]) == layers for r in shares)
    assert any(value > 0 for r in shares for value in r["values"].values())

    found = json.loads((finished / "diagnosis.json").read_text())["diagnose"]["qat_only"]
    operands = [(d["path"], d["operand"]) for d in found]
    layers = ("dense1", "dense2", "head")
    assert operands == [(path, o) for path in layers for o in ("input", "weight")]
    for d in found:
        wanted = shares[-1]["values"][f"qat_only/{d['path']}"] if d["operand"] == "weight" else None
        assert d["oscillating"] == wanted
    # Steps are kept within a factor of 4 of what they were when their stage began.
    steps = [r["values"] for r in rows if r["split"] == "quant" and r["stage"] != "calibrate"]
    for key in steps[0]:
        values = [row[key] for row in steps]
        assert max(values) / min(values) < 16.001

    page = report.write(finished).read_text()
    table = page[page.index("<h2>Quantizers</h2>") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 1 + len(found) and "oscillating" in table
    assert re.search(r"dense2.*weight.*int4 lsq", table)


def test_the_plan_is_shown_and_the_same_run_is_not_refused(finished):
    text = " ".join(experiment.inspect(healthy(), verbose=False).split())
    assert "freeze=0.3 to 0.1, momentum=0.3" in text and "max_ratio=4" in text
    with pytest.raises(ValueError, match=r"hygiene\.qat_only\.freeze: 0\.3.*0\.5"):
        experiment.run(healthy(freeze=0.5), finished, verbose=False)


@pytest.mark.parametrize("stop", [20, pytest.param(29, marks=pytest.mark.slow)])
def test_stopped_while_freezing_it_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(orchestrate, "GracefulStop", lambda: StopAt(stop))
    with pytest.raises(Preempted, match="qat_only" if stop == 20 else "more"):
        experiment.run(healthy(), tmp_path, report=False, verbose=False)
    monkeypatch.undo()
    experiment.run(healthy(), tmp_path, report=False, verbose=False)
    same(finished, tmp_path)
    assert_same_diagnosis(finished, tmp_path)


class Killed(Exception):
    """Stands for a kill: nothing is saved on the way out."""


def test_killed_while_freezing_it_goes_on_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    log = Run.log

    def dying(run, stage, step, split, values):
        log(run, stage, step, split, values)
        if (stage.name, step, split) == ("more", 9, "train"):
            raise Killed

    monkeypatch.setattr(Run, "log", dying)
    with pytest.raises(Killed):
        experiment.run(healthy(), tmp_path, report=False, verbose=False)
    monkeypatch.undo()
    assert checkpoint_of(tmp_path).meta["stage_step"] == 5
    experiment.run(healthy(), tmp_path, report=False, verbose=False)
    same(finished, tmp_path)
    assert_same_diagnosis(finished, tmp_path)


def test_a_later_stage_that_does_not_track_leaves_no_shares_of_an_earlier_one(tmp_path):
    config = healthy()
    config.stages.more.hygiene = dict(qat_only=common.hygiene(max_ratio=4.0))
    experiment.run(config, tmp_path, report=False, verbose=False)
    found = json.loads((tmp_path / "diagnosis.json").read_text())["diagnose"]["qat_only"]
    assert found and all(d["oscillating"] is None for d in found)


def assert_same_diagnosis(folder, other):
    assert (folder / "diagnosis.json").read_bytes() == (other / "diagnosis.json").read_bytes()


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("qat_only", dict(freez=0.1), r"stages.qat_only: unknown field.*Did you mean 'freeze'"),
        ("qat_only", dict(freeze=3.0), r"stages.qat_only: hygiene.qat_only.freeze is 3"),
        ("qat_only", dict(anneal=("temperature:9",)), r"qat_only.anneal.temperature: .* are lsq"),
        ("qat_only", dict(anneal=("temperature",)), r"give texts, such as \('temperature:32',\)"),
        ("qat_only", dict(anneal="temperature:9"), r"give texts"),
        ("qat_only", dict(size_bytes=10.0), r"stages.qat_only.hygiene.qat_only.size_bytes"),
        ("pretrain_student", dict(track=True), r"stages.pretrain_student.*Calibrate before"),
        ("pretrain_teacher", dict(max_ratio=2.0), r"stages.pretrain_teacher.*has a learned step"),
    ],
)
def test_wrong_hygiene_is_refused_before_anything_runs(stage, fields, message):
    config = get_config().unlock()
    (net,) = config.stages[stage].learn
    config.stages[stage].hygiene = {net: fields}
    with pytest.raises(ValueError, match=message):
        experiment.read(config)
    config.stages[stage].hygiene = {net: 0.1}
    with pytest.raises(ValueError, match=rf"hygiene.{net} is 0.1; it must be a dict"):
        experiment.read(config)


def test_quantizers_that_bend_weights_are_refused_before_anything_runs():
    config = healthy(max_ratio=0.0)
    config.nets.student.rules = config.nets.qat_only.rules = "w4a4:qil"
    with pytest.raises(ValueError, match=r"stages.qat_only.hygiene.qat_only.*quantizer 'qil'"):
        experiment.read(config)
    # A net copied from a calibrated one is calibrated, so the stage itself is no obstacle.
    config = healthy()
    assert config.nets.qat_only.init_from == "student" and experiment.read(config)
    config.nets.qat_only.rules = "w3a3"
    with pytest.raises(ValueError, match="Calibrate before this stage"):
        experiment.read(config)


def test_a_dynamic_weight_has_no_codes_to_track():
    config = healthy()
    dynamic = (dict(pattern=".*", weight=dict(bits=4, dynamic=True)),)
    for net in ("student", "qat_only"):
        config.nets[net] = {**config.nets[net].to_dict(), "rules": dynamic}
    with pytest.raises(ValueError, match=r"hygiene.qat_only: track.*no weight of the net"):
        experiment.read(config)


@pytest.mark.parametrize("kind", ["adaround", "brecq", "qdrop", "gptq", "correct_bias"])
def test_a_float_net_has_nothing_to_round(kind):
    config = healthy()
    config.stages[kind] = dict(kind=kind, nets=("teacher",))
    config.schedule = ("pretrain_teacher", kind)
    with pytest.raises(ValueError, match=rf"stages.{kind}.nets has 'teacher'.*rules='w4a4'"):
        experiment.read(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(observer_options=dict(power=2.4)),
            r"observer_options came with observer=N",
        ),
        (dict(observer="minmax", observer_options=dict(power=2.4)), r"minmax', which has none"),
        (dict(observer="mse", observer_options=dict(powr=2.4)), r"Did you mean 'power'"),
        (dict(observer="mse", observer_options=dict(power=0.0)), r"option power is 0"),
        (dict(observer="mse", observer_options=("powr:2.4",)), r"Did you mean 'power'"),
        (dict(observer="mse", observer_options=("power",)), r"such as \('power:2.4',\)"),
        (dict(observer="mse", observer_options=2.4), r"give texts.*or a dict"),
    ],
)
def test_wrong_options_of_an_observer_are_refused_before_anything_runs(fields, message):
    config = healthy()
    config.stages.calibrate = dict(kind="calibrate", nets=("student",), **fields)
    with pytest.raises(ValueError, match=message):
        experiment.read(config)


def test_a_float_net_has_nothing_to_diagnose(tmp_path):
    config = healthy()
    config.schedule = ("pretrain_student", "diagnose")
    with pytest.raises(ValueError, match=r"stages.diagnose.nets has 'qat_only', which is float"):
        experiment.run(config, tmp_path / "run", verbose=False)
    config.stages.diagnose.nets = ("teacher",)
    with pytest.raises(ValueError, match="whose rules are float"):
        experiment.read(config)
    config.stages.diagnose = dict(common.diagnose("qat_only"), examples=-1)
    with pytest.raises(ValueError, match=r"stages.diagnose.examples is -1"):
        experiment.read(config)


# --- configs/qat.py ------------------------------------------------------------------------------


def small(arg, until):
    """configs/qat.py on an MLP with BatchNorm, cut off after a stage."""
    given = "data=synthetic,model=mlp,width=0,train_examples=96,epochs=2"
    config = qat.get_config(f"{given},{arg}").unlock()
    for net in config.nets.values():
        net.hidden, net.batch_norm = (12, 12), True
    config.log = dict(every_steps=1, eval_every_steps=0, quant_every_steps=1)
    config.eval_batch_size = 128
    config.schedule = config.schedule[: config.schedule.index(until) + 1]
    return config


@pytest.mark.slow
def test_each_rung_starts_from_the_net_before_it(tmp_path):
    config = small("progressive=8+4+2", "calibrate")
    results = experiment.run(config, tmp_path, report=False, verbose=False)
    rows = [(r["net"], r["method"], r["weight_bits"]) for r in results["rows"]]
    assert rows == [
        ("net_w8a8", "float", 32),
        ("net_w8a8", "calibrated", 8),
        ("net_w8a8", "QAT", 8),
        ("net_w4a4", "calibrated", 4),
        ("net_w4a4", "QAT", 4),
    ]
    nets = nested(checkpoint_of(tmp_path).tree)["nets"]
    # The last one has just been calibrated: weights and statistics are those of the rung before.
    for collection in ("params", "batch_stats"):
        for layer, leaves in nets["net"][collection].items():
            for name, leaf in leaves.items():
                np.testing.assert_array_equal(leaf, nets["net_w4a4"][collection][layer][name])
    kernel = nets["net"]["params"]["dense2"]["kernel"]
    assert np.any(kernel != nets["net_w8a8"]["params"]["dense2"]["kernel"])
    # Its steps are those of 2 bits, from the weights (LSQ, 2 mean|w| / sqrt(qmax)).
    step = nets["net"]["quant"]["dense2"]["weight_quantizer"]["step"]
    np.testing.assert_allclose(step, 2 * np.mean(np.abs(kernel)) / np.sqrt(1), rtol=1e-5)


def test_rungs_share_the_epochs_and_take_the_quantizer_of_bits():
    found = experiment.read(qat.get_config("progressive=w4a8+3+2,bits=w2a2:lsq_plus,epochs=9"))
    assert [n.rules[-1].weight.bits for n in found.nets.values()] == [4, 3, 2]
    assert [n.rules[-1].input.bits for n in found.nets.values()] == [8, 3, 2]
    assert {n.rules[-1].weight.quantizer for n in found.nets.values()} == {"lsq_plus"}
    whole = experiment.read(qat.get_config("epochs=9"))
    steps = lambda settings: {s.name: s.steps for s in settings.stages if s.trains}
    rungs = [n for name, n in steps(found).items() if name.startswith("qat")]
    assert len(rungs) == 3 and abs(sum(rungs) - steps(whole)["qat"]) <= 1
    with pytest.raises(ValueError, match=r"progressive is '4\+4\+2'.*once"):
        qat.get_config("progressive=4+4+2")
    with pytest.raises(ValueError, match=r"bits of rules 'w9a9' is 9"):
        experiment.read(qat.get_config("progressive=9+4"))


@pytest.mark.slow
def test_inputs_are_quantized_late_and_the_schedule_goes_on(tmp_path):
    config = small("delay=0.5,bits=w4a4", "evaluate")
    results = experiment.run(config, tmp_path, report=False, verbose=False)
    rows = lines(tmp_path)
    kinds = {
        stage: {key.split("/")[-2] for r in found for key in r["values"]}
        for stage in ("qat_weights", "qat")
        if (found := [r for r in rows if r["stage"] == stage and r["split"] == "quant"])
    }
    assert kinds == {
        "qat_weights": {"weight_quantizer"},
        "qat": {"weight_quantizer", "input_quantizer"},
    }
    # One cosine over both parts, and the weights' quantizers go on where they were.
    whole = experiment.read(small("bits=w4a4", "evaluate"))
    total = next(s.steps for s in whole.stages if s.name == "qat")
    trained = [r for r in rows if r["stage"].startswith("qat") and r["split"] == "train"]
    rates = [r["values"]["net/lr"] for r in trained]
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(total) / total)) / 2
    np.testing.assert_allclose(rates, cosine, rtol=1e-5, atol=1e-9)
    path = "net/dense2/weight_quantizer/step"
    steps = {r["stage"]: r["values"][path] for r in rows if path in r["values"]}
    assert steps["calibrate_inputs"] == steps["qat_weights"] != steps["qat"]
    assert results["rows"][-1]["student_steps"] == total
    assert "optimizers" not in nested(checkpoint_of(tmp_path).tree)
    # What deployment is compared with is the float net, not the one between the two calibrations.
    with np.load(tmp_path / "model" / "net_float.npz") as kept:
        trained = nested(checkpoint_of(tmp_path).tree)["nets"]["net"]["params"]["dense2"]["kernel"]
        assert np.any(kept["params/dense2/kernel"] != trained)


@pytest.mark.parametrize("delay", [-0.1, 1.0])
def test_a_delay_that_is_no_share_is_refused(delay):
    with pytest.raises(ValueError, match=r"argument delay is .*in \[0, 1\)"):
        qat.get_config(f"delay={delay}")


# --- the kinds that are asked for by name --------------------------------------------------------

KINDS = {"static": static, "dynamic": dynamic, "weight_only": weight_only}


def test_each_kind_is_a_preset_and_a_config():
    names = {"static": "static", "dynamic": "dynamic", "weight_only": "int8_weight_only"}
    for kind, preset in names.items():
        rules = KINDS[kind].get_config().nets.net.rules
        assert presets.rules(rules) == presets.rules(preset)
    assert presets.rules(qat.get_config().nets.net.rules) == presets.rules("w2a2")
    for kind, arg in (("weight_only", "rules=int4_weight_only:8"), ("dynamic", "granularity=8")):
        assert "deploy" in KINDS[kind].get_config(arg).schedule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arg"),
    [
        ("static", "bits=w8a8"),
        ("dynamic", "bits=w8a8"),
        ("weight_only", "rules=int8_weight_only"),
        ("weight_only", "rules=int4_weight_only:4"),
        ("weight_only", "rules=nf4"),
        ("weight_only", "rules=mxfp4"),
        ("weight_only", "rules=nvfp4"),
    ],
)
def test_each_kind_runs_from_the_float_net_to_the_report(tmp_path, kind, arg):
    given = f"data=synthetic,model=mlp,width=0,train_examples=96,epochs=2,{arg}"
    config = KINDS[kind].get_config(given).unlock()
    for net in config.nets.values():
        net.hidden, net.batch_norm = (64, 64) if "4" in arg else (12, 12), True
    config.eval_batch_size = 128
    config.stages.deploy.latency_rounds = 0
    floats, found = experiment.run(config, tmp_path, verbose=False)["rows"]
    assert floats["weight_bits"] == 32 and found["weight_bytes"] < floats["weight_bytes"] / 2
    blocks = "fp4" in arg
    assert found["weight_bits"] == (4 if "4" in arg else 8)
    assert found["activation_bits"] == (4 if blocks else 32 if kind == "weight_only" else 8)
    assert found["agreement"] > (0.8 if "4" in arg else 0.95)
    assert found["integer"]["argmax_agreement"] == found["export"]["argmax_agreement"] == 1
    operands = json.loads((tmp_path / "diagnosis.json").read_text())["diagnose"]["net"]
    wanted = {"weight"} if kind == "weight_only" and not blocks else {"weight", "input"}
    assert {d["operand"] for d in operands} == wanted
    assert "<h2>Quantizers</h2>" in (tmp_path / "report.html").read_text()


def test_a_step_that_training_carries_below_zero_is_said_and_recorded(tmp_path, capsys):
    config = get_config("steps=3").unlock()
    config.log = dict(every_steps=3, eval_every_steps=0, quant_every_steps=2)
    config.stages.qat_only.optim.qat_only.quant_lr = 1e3
    config.schedule = ("calibrate", "qat_only")
    experiment.run(config, tmp_path, report=False, verbose=True)
    rows = [r for r in lines(tmp_path) if r["split"] in ("quant", "collapsed")]
    means = {k: v for r in rows if r["split"] == "quant" for k, v in r["values"].items()}
    found = [r for r in rows if r["split"] == "collapsed"]
    assert found and found[-1]["stage"] == "qat_only" and found[-1]["step"] == rows[-1]["step"]
    below = {name for name, mean in means.items() if name.endswith("/step") and mean <= 0}
    assert below and set(found[-1]["values"]) == below
    out = capsys.readouterr().out
    assert "qat_only, step 3: a grid's size is not above 0" in out
    assert all(name in out for name in below)
