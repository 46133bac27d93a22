"""Means and paired intervals over seeds, against numbers worked by hand."""

from __future__ import annotations

import json

import pytest
from mutation import accepted, mutated_text

from qkd_jax.report.seeds import collect, markdown, paired_interval


def test_interval_of_a_textbook_example():
    # Differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3).
    mean, low, high = paired_interval([3, 5, 7], [2, 3, 4])
    assert mean == pytest.approx(2)
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


def run(path, qkd, qat):
    path.mkdir()
    rows = [
        {"net": "student", "method": "QKD", "top1": qkd, "loss": 0.1},
        {"net": "qat_only", "method": "QAT alone", "top1": qat, "loss": 0.2},
    ]
    (path / "results.json").write_text(json.dumps({"rows": rows}))
    return path


def test_table_over_three_runs(tmp_path):
    folders = [
        run(tmp_path / str(i), q, a)
        for i, (q, a) in enumerate([(0.97, 0.96), (0.96, 0.94), (0.98, 0.95)])
    ]
    text = markdown(collect(folders), against="QKD")
    assert "| student: QKD | 97.00 +- 1.00 | 0.100 +- 0.000 |" in text
    assert "| qat_only: QAT alone | +2.00 [-0.48, +4.48] |" in text


def test_severity_is_shown_where_there_is_a_tree(tmp_path):
    severities = [(1.5, 2.0), (2.0, 3.0), (None, 3.5)]
    folders = []
    for i, (ours, theirs) in enumerate(severities):
        folder = run(tmp_path / str(i), 0.9, 0.8)
        results = json.loads((folder / "results.json").read_text())
        results["rows"][0]["severity"], results["rows"][1]["severity"] = ours, theirs
        (folder / "results.json").write_text(json.dumps(results))
        folders.append(folder)
    text = markdown(collect(folders), against="QKD")
    assert "| net: method | top-1 % | severity | cross-entropy |" in text
    # Seeds without a mistake have no severity: two values, and two pairs.
    assert "| student: QKD | 90.00 +- 0.00 | 1.750 +- 0.354 (2 seeds) |" in text
    assert "| 2.833 +- 0.764 |" in text
    assert "| -0.750 [-3.927, +2.427] |" in text  # t(0.975, 1) = 12.706205, sd 0.353553


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no results\.json"):
        collect([tmp_path])
    with pytest.raises(ValueError, match="two at least"):
        paired_interval([1.0], [2.0])


def test_damaged_results(tmp_path):
    rows = [{"net": "a", "method": "x", "top1": 0.5, "loss": 1.0, "severity": None}]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"rows": rows}))
    folders = [tmp_path / "second", tmp_path / "first"]
    read = lambda: markdown(collect(folders), against="x")
    path = folders[1] / "results.json"
    for text in accepted(path, read, damage=mutated_text):
        assert text.startswith("2 seeds")
