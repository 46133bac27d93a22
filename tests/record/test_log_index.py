"""Lines found by their beginnings are those that reading the whole log finds."""

import json

import pytest

from qkd_jax.record.log_index import index_log, last_rows, read_lines
from qkd_jax.record.metrics_log import FILE, MetricsLog, read_log


@pytest.fixture
def folder(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 40):
        log.log(step, 'a "stage"' if step % 2 else "b", "train", {"net/loss": 1 / step})
        if step % 10 == 0:
            log.log(step, "b", "test", {"net/top1": step / 40, "net/loss": None})
    return tmp_path


def through_the_index(folder):
    found, damaged = index_log(folder)
    rows = {split: read_lines(folder, lines.offsets) for split, lines in found.items()}
    for split, lines in found.items():
        assert [row["step"] for row in rows[split]] == lines.steps.tolist()
    return rows, damaged


def whole(folder):
    rows, damaged = read_log(folder)
    return {s: [r for r in rows if r["split"] == s] for s in {r["split"] for r in rows}}, damaged


def test_the_index_finds_what_reading_finds(folder):
    rows, damaged = through_the_index(folder)
    assert (rows, damaged) == whole(folder)
    assert len(rows["train"]) == 39 and rows["test"][-1]["values"]["net/top1"] == 0.75
    assert last_rows(folder)[-1]["step"] == 39


def test_other_spellings_and_damaged_and_torn_lines(folder):
    path = folder / FILE
    first, second, *rest = path.read_text().splitlines()
    spelled = json.dumps(json.loads(second))  # with spaces, as another writer would
    path.write_text("\n".join([first, spelled, "{}", "\0", *rest, '{"split":"train","sta']))
    rows, damaged = through_the_index(folder)
    assert (rows, damaged) == whole(folder) and damaged == 2
    assert last_rows(folder)[-1]["step"] == 39


def test_a_line_damaged_behind_its_beginning_is_none(folder):
    path = folder / FILE
    path.write_bytes(path.read_bytes().replace(b'{"net/loss":1.0}', b'{"net/loss":1.0]', 1))
    found, _ = index_log(folder)
    rows = read_lines(folder, found["train"].offsets)
    assert rows[0] is None and rows[1]["values"] == {"net/loss": 0.5}


def test_no_log_and_an_empty_one(tmp_path):
    assert index_log(tmp_path) == ({}, 0) and last_rows(tmp_path) == []
    (tmp_path / FILE).write_bytes(b"")
    assert index_log(tmp_path) == ({}, 0) and last_rows(tmp_path) == []
