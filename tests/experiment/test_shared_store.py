"""Runs that take the stages which they share with another: the bytes of runs made alone."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_config import get_config

from qkd_jax import experiment
from qkd_jax.experiment import shared_prefix
from qkd_jax.experiment.shared_store import SharedStages
from qkd_jax.experiment.sweep_list import SHARED, Entry
from qkd_jax.experiment.sweep_plan import plan_runs
from qkd_jax.experiment.sweep_worker import run_task, step_caches
from qkd_jax.experiment.sweeps import run_one
from qkd_jax.record.environment import code_sha256
from qkd_jax.record.restoring import read_latest
from qkd_jax.training.loop import Preempted

BITS = {
    "w4": "w4a4",
    "w2": "w2a2:dsq",  # its float training is the same, its stages from `calibrate` on are not
}


def config_of(entry):
    config = get_config("seed=3").unlock()
    for net in ("student", "qat_only"):
        config.nets[net].rules = BITS[entry.name[:2]]
    if entry.name.endswith("slow"):
        config.stages.tutor.optim.student.lr = 0.001
    return config.lock()


def plan(*names):
    return plan_runs([Entry(name, {}) for name in names], config_of)


def stages_of(folder):
    stages = json.loads((folder / "timings.json").read_text())["stages"]
    return {name: stages[name] for name in get_config().schedule if name in stages}


def assert_same(alone: Path, swept: Path):
    for name in ("results.json", "metrics.jsonl", "config.json"):
        assert (alone / name).read_bytes() == (swept / name).read_bytes(), name
    files = lambda folder: {p.relative_to(folder) for p in (folder / "model").rglob("*")}
    assert files(alone) == files(swept) != set()
    nets = [json.loads((f / "run.json").read_text())["starts"][-1]["nets"] for f in (alone, swept)]
    assert nets[0] == nets[1]
    (one, _), (other, _) = (read_latest(folder / "checkpoints") for folder in (alone, swept))
    assert one.tree.keys() == other.tree.keys() and one.step == other.step
    for name, leaf in one.tree.items():
        np.testing.assert_array_equal(leaf, other.tree[name], err_msg=name)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three runs of a sweep, and its folder: `w4` and `w4_slow` part late, `w2` early."""
    folder = tmp_path_factory.mktemp("sweep")
    runs = plan("w4", "w2", "w4_slow")
    for run in runs:
        assert run_one(run, folder) == 0
    return folder, runs


def test_what_two_runs_share_is_trained_once(swept):
    folder, runs = swept
    order = list(get_config().schedule)
    early, late = order.index("calibrate"), order.index("tutor")
    counts = {run.name: [count for count, _ in run.points] for run in runs}
    # Up to `calibrate` no rules are read. The cosine of `tutor` begins in `self_study`, but its
    # rate is the stage's own.
    assert counts == {"w4": [early, late], "w2": [early], "w4_slow": [early, late]}
    assert list(stages_of(folder / "w4")) == order
    assert list(stages_of(folder / "w2")) == order[early:]
    assert list(stages_of(folder / "w4_slow")) == order[late:]
    kept = {p.name for p in (folder / SHARED).iterdir() if p.is_dir()}
    assert kept == {key for run in runs for _, key in run.points} and len(kept) == 2


@pytest.mark.parametrize("name", ["w4", "w2", "w4_slow"])
def test_a_run_that_took_stages_has_the_bytes_of_one_made_alone(swept, tmp_path, name):
    folder, _ = swept
    experiment.run(config_of(Entry(name, {})), tmp_path / name, verbose=False)
    assert_same(tmp_path / name, folder / name)


def test_the_record_says_what_was_taken_from_whom(swept):
    folder, runs = swept
    start = json.loads((folder / "w2" / "run.json").read_text())["starts"][-1]
    ((count, key),) = runs[1].points
    stages = list(get_config().schedule[:count])
    assert start["shared"] == [{"sha256": key, "run": "w4", "stages": stages}]
    (entry,) = json.loads((folder / "w2" / "timings.json").read_text())["shared"]
    assert entry["run"] == "w4" and entry["sha256"] == key
    page = (folder / "w2" / "report.html").read_text()
    assert f"{', '.join(stages)} ran in w4 of the sweep, whose seconds are there." in page
    # The seconds are those of the run that spent them.
    spent = stages_of(folder / "w4")
    assert entry["stages"] == {name: spent[name] for name in stages}


@pytest.mark.parametrize(
    "damage",
    ["flipped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "half", "no record"))],
)
def test_damaged_stages_are_trained_again(swept, tmp_path, damage):
    folder, runs = swept
    copy = tmp_path / "sweep"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "w2")
    ((_, key),) = runs[1].points
    kept = copy / SHARED / key
    if damage == "half":
        shutil.rmtree(kept / "checkpoint")
    elif damage == "no record":
        (kept / "shared.json").unlink()
    else:
        file = kept / "metrics.jsonl"
        data = file.read_bytes()
        file.write_bytes(data[:-9] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert run_one(runs[1], copy) == 0
    assert list(stages_of(copy / "w2")) == list(get_config().schedule)
    for name in ("results.json", "metrics.jsonl"):
        assert (copy / "w2" / name).read_bytes() == (folder / "w2" / name).read_bytes()
    assert run_one(runs[1], copy) == 0  # it is finished
    assert (kept / "shared.json").exists()  # and kept again


def short_config_of(entry):
    config = get_config("seed=3,steps=4").unlock()
    config.nets.student.rules = BITS[entry.name]
    config.schedule = ("pretrain_student", "calibrate")
    return config.lock()


@pytest.mark.parametrize("edited", [False, True])
def test_what_other_code_has_begun_is_not_kept_for_others(monkeypatch, tmp_path, edited):
    plan = lambda: plan_runs([Entry(name, {}) for name in BITS], short_config_of)
    first = plan()[0]
    shared = SharedStages(tmp_path / SHARED, first.points, name="w4", basis=first.basis)
    stop = SimpleNamespace(requested=True)  # after one step
    with pytest.raises(Preempted):
        experiment.run(first.config, tmp_path / "w4", shared=shared, stop=stop, verbose=False)
    if edited:
        monkeypatch.setattr(shared_prefix, "code_sha256", lambda: "of the file as it is now")
    again = plan()
    assert (again[0].points == first.points) != edited
    for run in again:
        assert run_one(run, tmp_path) == 0
    # The first run has a step by the code as it was: the second may take none of its state.
    assert list(stages_of(tmp_path / "w2")) == ["pretrain_student", "calibrate"][not edited :]


@pytest.mark.parametrize("code", ["as the launcher has it", "edited since"])
def test_a_worker_with_other_code_than_its_launcher_keeps_nothing(tmp_path, code):
    run = plan_runs([Entry(name, {}) for name in BITS], short_config_of)[0]
    task = {"name": "w4", "config": run.config, "folder": str(tmp_path / "w4")}
    task |= {"store": str(tmp_path / SHARED), "points": run.points, "basis": run.basis}
    same = code != "edited since"
    task["code"] = code_sha256() if same else code
    assert run_task(task, None, step_caches()) == (0, False)
    assert any((tmp_path / SHARED).glob("*/shared.json")) == same
