"""Live values of a run: in the record, for trackers, and the same after an interruption."""

import json

import numpy as np
import pytest
from memory_tracker import KEPT, MemoryTracker
from stopped_runs import StopAt
from tiny_config import get_config

from qkd_jax import experiment
from qkd_jax.experiment import live_values, orchestrate
from qkd_jax.record import trackers
from qkd_jax.record.metrics_log import read_metrics
from qkd_jax.training.loop import Preempted


def config_of():
    config = get_config()
    config.log.live = ("ranges", "oscillating", "grad_norms", "agreement")
    config.log.codes_every_steps = 4
    config.track.trackers = ("memory",)
    config.schedule = ("calibrate", "self_study", "co_study")
    return config


def test_a_run_with_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "memory", MemoryTracker)
    monkeypatch.setattr(orchestrate, "GracefulStop", lambda: StopAt(5))
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        experiment.run(config_of(), folder, report=False, verbose=False)
    monkeypatch.undo()
    monkeypatch.setitem(trackers.TRACKERS, "memory", MemoryTracker)
    experiment.run(config_of(), folder, report=False, verbose=False)

    rows = read_metrics(folder)
    points, figures = KEPT[str(folder)]
    assert list(points.values()) == [trackers.points_of(row) for row in rows]
    assert {"report/curves", "report/student_weight_quantizers"} <= set(figures)
    assert all(png.startswith(b"\x89PNG") for png in figures.values())

    last = {row["split"]: row["values"] for row in rows if row["stage"] == "co_study"}
    for group in ("weights", "plain", "quant"):
        assert last["train"][f"student/grad_norm_{group}"] > 0
    assert 0 <= last["train"]["student/agreement_teacher"] <= 1
    assert 0 <= last["train"]["student/oscillating"] <= 1
    assert "teacher/oscillating" not in last["train"]
    # Ranges and codes of the checkpoint, from the step sizes by hand: 4 bits, narrow for weights.
    run = experiment.restore(folder)
    variables = run.variables["student"]
    step = np.asarray(variables["quant"]["dense2"]["weight_quantizer"]["step"])
    ends = [last["ranges"][f"student/dense2/weight_quantizer/{end}"] for end in ("low", "high")]
    assert ends[1] == pytest.approx(7 * step.max(), rel=1e-6)
    assert ends[0] == pytest.approx(-ends[1], rel=1e-6) or ends[0] == pytest.approx(
        -8 / 7 * ends[1]
    )
    kernel = np.asarray(variables["params"]["dense2"]["kernel"])
    found = np.clip(np.round(kernel / step), ends[0] / step.min(), 7)
    values, counts = np.unique(found, return_counts=True)
    codes = {k: v for k, v in last["codes"].items() if k.startswith("student/dense2/")}
    assert codes == {
        f"student/dense2/{int(v)}": n for v, n in zip(values, counts.tolist(), strict=True)
    }
    # Trackers may come and go with a run; what is measured may not.
    config = config_of()
    config.track.trackers = ()
    experiment.run(config, folder, report=False, verbose=False)
    # One that came too late, or was lost, gets all of a finished run; the log is left as it is.
    damaged = (folder / "metrics.jsonl").read_bytes().replace(b"\n", b"\ntorn\n", 1)
    (folder / "metrics.jsonl").write_bytes(damaged)
    points.clear()
    figures.clear()
    experiment.run(config_of(), folder, report=False, verbose=False)
    assert list(points.values()) == [trackers.points_of(row) for row in rows]
    assert "report/curves" in figures and (folder / "metrics.jsonl").read_bytes() == damaged
    config.log.live = ()
    with pytest.raises(ValueError, match=r"log\.live"):
        experiment.run(config, folder, report=False, verbose=False)
    assert json.loads((folder / "results.json").read_text())["rows"] == []
    assert live_values.ranges(run.nets["teacher"], run.variables["teacher"]) == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("log.live", ("range",), "Did you mean 'ranges'"),
        ("log.codes_every_steps", -1, r"config\.log\.codes_every_steps is -1"),
        ("track.trackers", ("wandbb",), "Did you mean 'wandb'"),
        ("track.project", "", r"config\.track\.project is ''; give a name"),
        ("track.project", "team/nets", "without any of"),
    ],
)
def test_what_is_not_known_is_refused(field, value, message):
    config = get_config()
    node, key = field.split(".")
    config[node][key] = value
    with pytest.raises(ValueError, match=message):
        experiment.inspect(config, verbose=False)


def test_what_is_watched_is_in_the_overview_and_ranges_need_an_interval():
    config = config_of()
    config.track.trackers = ("tensorboard",)
    text = experiment.inspect(config, verbose=False)
    assert "trackers: tensorboard\n" in text
    assert "live values: ranges, oscillating, grad_norms, agreement, codes\n" in text
    assert "trackers" not in experiment.inspect(get_config(), verbose=False)
    config.log.quant_every_steps = 0
    with pytest.raises(ValueError, match=r"'ranges'.*quant_every_steps.*is 0; give an interval"):
        experiment.inspect(config, verbose=False)
