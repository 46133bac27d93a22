"""The list of a sweep: names and overrides that are refused, and `sweep.json`."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from qkd_jax.experiment.sweep_list import (
    Entry,
    base_of,
    command_of,
    entries_of,
    write_list,
)

TWO = [("a", {"seed": 0}), ("b", {"seed": 1})]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "must return a list of"),
        ([], "must return a list of"),
        ([("a", {}), "b"], "entry 1 of get_sweep is 'b'"),
        ([("a", {1: 2})], "must be a pair"),
        ([("a/b", {})], "'a/b'; it names files too"),
        ([("", {})], "it names files too"),
        ([("logs", {})], "a folder of the sweep's own"),
        ([("Logs", {})], "a folder of the sweep's own"),
        ([("a", {}), ("a", {"seed": 1})], "two entries of the name 'a'"),
        ([("A", {}), ("a", {"seed": 1})], "('A' is the same folder where case does not count)"),
        ([("a", {"seed": None})], "entry 'a' of get_sweep: seed is None"),
        ([("a", {"config.schedule": [[1]]})], "config.schedule is"),
        ([("a", {"config.x": 1})], "--config.x is given for every run, and entry 'a'"),
    ],
)
def test_wrong_lists_are_refused(found, message):
    with pytest.raises(ValueError) as error:
        entries_of(found, {"config.x": "2"})
    assert message in str(error.value)


def test_arguments_and_fields_become_a_command_line():
    base = base_of("configs/f.py:seeds=8,bits=w4a4,fast", {"seeds"})
    assert base == "configs/f.py:bits=w4a4,fast=true"
    overrides = {"bits": "w2a2", "seed": 3, "config.a.b": (1, "x"), "config.c": True}
    text, fields = command_of(base, Entry("r", overrides))
    assert text == "configs/f.py:bits=w2a2,fast=true,seed=3"
    assert fields == {"config.a.b": "(1, 'x')", "config.c": "true"}
    with pytest.raises(ValueError, match="holds no comma"):
        command_of(base, Entry("r", {"rungs": (1, 2)}))


def test_a_list_is_extended_and_never_cut_or_changed(tmp_path):
    folder = tmp_path / "sweep"
    write = lambda text, found: write_list(folder, text, entries_of(found, {}), own={"seeds"})
    write("f.py:seeds=2", TWO)
    first = (folder / "sweep.json").read_bytes()
    assert json.loads(first) == {
        "config": "f.py:seeds=2",
        "runs": [{"name": n, "overrides": o} for n, o in TWO],
    }
    write("f.py:seeds=2", TWO)
    assert (folder / "sweep.json").read_bytes() == first
    more = [("c", {"rates": (0.1, 0.2)}), *TWO]  # a tuple is a list in JSON
    write("f.py:seeds=3", more)
    write("f.py:seeds=3", more)
    assert [r["name"] for r in json.loads((folder / "sweep.json").read_text())["runs"]] == [
        "c",
        "a",
        "b",
    ]
    for text, found, message in [
        ("f.py:seeds=1", TWO, "the run 'c', which this one lacks"),
        ("f.py:seeds=3", [*more[:2], ("b", {"seed": 7})], "run 'b' has the overrides"),
        ("f.py:bits=w4a4", more, "holds the sweep of 'f.py:seeds=3'"),
        ("g.py", more, "holds the sweep of"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(text, found)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is the folder of a run"):
        write_list(tmp_path / "run", "f.py", entries_of(TWO, {}))


@pytest.mark.parametrize("name", ["logs", "shared", "a"])
def test_nothing_is_written_through_a_link_in_the_folder(tmp_path, name):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "sweep"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link"):
        write_list(folder, "f.py", entries_of(TWO, {}))
    assert [path.name for path in folder.iterdir()] == [name]
    (elsewhere / "results.json").write_text("{}")  # a run that is done is only read
    if name == "a":
        write_list(folder, "f.py", entries_of(TWO, {}))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("logs", "", "logs is a file; a sweep has a folder there"),
        ("sweep.json", '{"config": "f.py", "runs": [{"name": [], "overrides": {}}]}', "is not the"),
        ("sweep.json", '{"config": "f.py", "ru', "is not valid JSON"),
    ],
)
def test_a_folder_with_damaged_files_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_list(tmp_path, "f.py", entries_of(TWO, {}))
    assert (tmp_path / name).read_text() == text


def _write(folder, count):
    runs = [(f"r{k}", {"seed": k}) for k in range(count)]
    write_list(folder, f"f.py:seeds={count}", entries_of(runs, {}), own={"seeds"})


def test_tasks_of_an_array_may_write_it_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_write, [tmp_path / "s"] * 8, [300] * 8))
    assert len(json.loads((tmp_path / "s" / "sweep.json").read_text())["runs"]) == 300
