"""Damaged files of a run folder: every mode reports or refuses them in words, and none hangs."""

import json
import random
import shutil

import pytest
from mutation import COUNT, mutated, mutated_json
from tiny_config import get_config

from qkd_jax import experiment

FILES = ("config.json", "run.json", "results.json", "timings.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    experiment.run(get_config("steps=4"), folder, report=False, verbose=False)
    return folder


def damage(folder, name, rng):
    path = folder / name
    whole = path.read_bytes()
    if name.endswith(".jsonl"):
        lines = whole.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(mutated_json(json.loads(lines[at]), rng)).encode()
        by_value = b"\n".join([*lines, b""])
    else:
        by_value = json.dumps(mutated_json(json.loads(whole), rng)).encode()
    path.write_bytes(by_value if rng.random() < 0.7 else mutated(whole, rng))
    return whole


def one_line(mode, capsys, **arguments):
    """Runs a mode; returns its exit code. What it says holds no traceback and no escape."""
    try:
        code = experiment.main(mode, **{"config": None, **arguments})
    except ValueError as error:
        assert str(error) and "Traceback" not in str(error)
        code = 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    return code


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_readers_of_damaged_files(name, finished, tmp_path, capsys, monkeypatch):
    """A damaged config is refused by the checkpoint's digest, so `eval` computes nothing here."""
    monkeypatch.setattr(experiment.modes, "write_report", lambda folder, say: None)
    folder, rng, codes = tmp_path / "run", random.Random(name), set()
    shutil.copytree(finished, folder)
    results = (finished / "results.json").read_bytes()
    for _ in range(COUNT):
        whole = damage(folder, name, rng)
        mode = "eval" if name == "config.json" else "report"
        codes.add(one_line(mode, capsys, workdir=folder))
        (folder / name).write_bytes(whole)
    assert (codes <= {0, 2} and 2 in codes) or name in ("timings.json", "run.json", "metrics.jsonl")
    assert (folder / "results.json").read_bytes() == results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "run.json", "results.json", "metrics.jsonl"])
def test_a_finished_run_started_again_over_a_damaged_file(name, finished, tmp_path, capsys):
    """It refuses, or ends with the same results; it never takes a damaged file for its own."""
    folder, rng = tmp_path / "run", random.Random(name)
    whole = json.loads((finished / "results.json").read_text())
    for _ in range(max(COUNT // 20, 1)):
        shutil.copytree(finished, folder)
        if name != "results.json":
            (folder / "results.json").unlink()
        damage(folder, name, rng)
        code = one_line("run", capsys, config=get_config("steps=4"), workdir=folder)
        found = folder / "results.json"
        if name != "results.json" and code == 0:
            assert json.loads(found.read_text()) == whole
        shutil.rmtree(folder)
