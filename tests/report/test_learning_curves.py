"""Curves over seeds, against means and intervals of the same numbers by scipy."""

import numpy as np
import pytest
from made_up_runs import row, run
from scipy import stats

from qkd_jax.record.metrics_log import FILE, MetricsLog
from qkd_jax.report.arms import read_runs
from qkd_jax.report.learning_curves import MAX_POINTS, read_curves


def arms_of(folder, steps):
    for seed, last in enumerate(steps):
        rows = [row("student", "QAT", (30, 50))]
        run(folder, f"a_seed{seed}", seed=seed, lr=0.1, rows=rows, steps=last)
    return read_runs(folder).arms


def test_mean_and_band(tmp_path):
    found = read_curves(arms_of(tmp_path, (50, 50, 50)))
    curve = found.found["loss"]["student"]["a"]
    assert curve.steps.tolist() == [10, 20, 30, 40, 50] and curve.seeds == 3
    values = np.array([[1 / step + seed for step in curve.steps] for seed in range(3)])
    low, high = stats.t.interval(0.95, 2, loc=values.mean(0), scale=stats.sem(values))
    assert curve.mean == pytest.approx(values.mean(0))
    assert curve.half == pytest.approx((high - low) / 2)
    assert found.found["top1"]["student"]["a"].mean == pytest.approx([0.51] * 5)
    assert found.notes == () and found.spans == {"a": [("train", 0, 50)]}


def test_steps_that_only_some_seeds_have_are_left_out_and_said(tmp_path):
    arms = arms_of(tmp_path, (50, 30, 50))
    MetricsLog(tmp_path / "a_seed0").log(30, "train", "test", {"student/top1": None})
    with (tmp_path / "a_seed2" / FILE).open("a") as file:
        file.write("{}\n")
    found = read_curves(arms)
    assert found.found["loss"]["student"]["a"].steps.tolist() == [10, 20, 30]
    assert "a, train: 2 steps" in found.notes[1] and "1 lines" in found.notes[0]


def test_one_seed_has_no_band_and_no_log_no_curve(tmp_path):
    arms = arms_of(tmp_path, (20,))
    assert read_curves(arms).found["loss"]["student"]["a"].half is None
    (tmp_path / "a_seed0" / FILE).unlink()
    found = read_curves(arms)
    assert found.found == {"loss": {}, "top1": {}} and "a_seed0" in found.notes[0]


def test_a_line_that_only_begins_well_is_said_of_a_single_seed_too(tmp_path):
    arms = arms_of(tmp_path, (30,))
    path = tmp_path / "a_seed0" / FILE
    line = b'"step":20,"values":{"student/loss":'
    path.write_bytes(path.read_bytes().replace(line, line + b"?"))
    found = read_curves(arms)
    assert found.found["loss"]["student"]["a"].steps.tolist() == [10, 30]
    assert found.notes == ("a_seed0: 1 lines of metrics.jsonl, train, are damaged.",)


def test_a_long_log_is_thinned(tmp_path):
    arms = arms_of(tmp_path, (10,))
    lines = [
        f'{{"split":"train","stage":"train","step":{step},"values":{{"student/loss":{step}.0}}}}\n'
        for step in range(1, 5 * MAX_POINTS)
    ]
    (tmp_path / "a_seed0" / FILE).write_text("".join(lines))
    curve = read_curves(arms).found["loss"]["student"]["a"]
    assert len(curve.steps) <= MAX_POINTS + 1 and curve.steps[-1] == 5 * MAX_POINTS - 1
    assert curve.mean.tolist() == curve.steps.tolist()
