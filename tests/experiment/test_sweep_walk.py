"""Sweeps as processes: failures, signals, locks and kills leave the numbers of an undisturbed one.

`SWEEP_KILLS=20 pytest tests/experiment/test_sweep_walk.py` kills that often.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.sweep_list import Entry
from qkd_jax.experiment.sweep_plan import Planned
from qkd_jax.experiment.sweep_walk import next_run
from qkd_jax.record.folder import RunFolder, holder

ROOT = Path(__file__).parents[2]
FILE = """
from tiny_config import get_config


def get_sweep(arg=""):
    return RUNS
"""
SLOW_TUTOR = {"config.stages.tutor.optim.student.lr": 0.001}
NAN = {
    "config.stages.qat_only.optim.qat_only.lr": 1e6,
    "config.stages.qat_only.learn.qat_only.ce.weight": 1e30,
}


@pytest.fixture
def config(tmp_path):
    """Writes a config file whose sweep has these runs; returns its path."""

    def write(**runs):
        path = tmp_path / "swept.py"
        path.write_text(FILE.replace("RUNS", repr(list(runs.items()))))
        return path

    return write


def start(config, folder, *flags, arg="", **popen):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    flags = flags if any(f.startswith("--sweep_index") for f in flags) else ("--sweep", *flags)
    return subprocess.Popen(
        [sys.executable, "launch.py", f"--config={config}:{arg}", f"--workdir={folder}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def finish(process, code=0):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def numbers(folder):
    """{file: bytes} of everything in a sweep that is the same however it came about."""
    wanted = ("results.json", "metrics.jsonl", "config.json")
    paths = (p for p in folder.glob("*/*") if p.name in wanted)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_waits_for_what_another_makes_for_it():
    stage = Stage("s", "train", {}, 0, 0, 10, ())
    runs = [
        Planned(Entry(name, {}), {}, (stage,) * 3, points)
        for name, points in [("a", ((2, "A"),)), ("b", ((2, "A"), (3, "B"))), ("c", ())]
    ]
    a, b, c = runs
    none, all_kept = (lambda key: False), (lambda key: True)
    assert next_run(runs, [], none) is a
    assert next_run([b, c], [(a, 19)], none) is c  # b comes when A is there
    assert next_run([b], [(a, 19)], none) is None
    assert next_run([b, c], [(a, 0)], all_kept) is b
    assert next_run([b, c], [(a, 20)], none) is b  # a is past these stages: nobody else makes A
    assert next_run([], [(a, 0)], none) is None


def test_a_failed_run_does_not_stop_the_others(config, tmp_path):
    folder = tmp_path / "sweep"
    path = config(a={}, bad=NAN, b=SLOW_TUTOR, c={"seed": 1})
    said = finish(start(path, folder, "--jobs=2"), code=3)
    assert "3 of 4 runs are done" in said and "bad: failed, exit code 3" in said
    assert re.search(r"bad: exit code 3, not finite; its last lines:\n.*not finite", said, re.S)
    done = {p.parent.name for p in folder.glob("*/results.json")}
    assert done == {"a", "b", "c"}
    listed = finish(start(path, folder, "--mode=inspect"))
    assert listed.count("done") == 4 and "failed: exit code 3" in listed  # and "3 of 4 ... done"
    # `a` trained what `b` shares with it; `c`, of another seed, shares nothing.
    taken = {n: "taken from run" in (folder / "logs" / f"{n}.txt").read_text() for n in "abc"}
    assert taken == {"a": False, "b": True, "c": False}
    start_of = json.loads((folder / "c" / "run.json").read_text())["starts"][0]
    assert "--sweep" in start_of["argv"]
    again = finish(start(path, folder), code=3)
    assert "4 runs, 3 of them done" in again


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("runs", "flags", "message"),
    [
        ({"a": {"sed": 1}}, [], "run 'a' of the sweep: unknown config argument 'sed'"),
        ({"a": {}, "b": {"config.sed": 1}}, [], "Did you mean 'seed'?"),
        slow({"a": {}, "b": {"config.nets.student.model": "mlq"}}, [], "run 'b' of the sweep"),
        slow({"a": {}, "b": {"seed": "x"}}, [], "must be an integer"),
        slow({"a": {}}, ["--jobs=0"], "--jobs is 0"),
        ({"a": {}}, ["--sweep_index=1"], "--sweep_index is 1, and the sweep has 1 runs"),
        ({"a": {}}, ["--mode=eval"], "--sweep goes with --mode=run"),
    ],
)
def test_mistakes_are_found_before_anything_runs(config, tmp_path, runs, flags, message):
    said = finish(start(config(**runs), tmp_path / "sweep", *flags), code=2)
    assert said.startswith("error: ") and message in said and "Traceback" not in said
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_the_tasks_of_an_array_run_one_each(config, tmp_path):
    path, folder = config(a={}, b={"seed": 1}), tmp_path / "sweep"
    tasks = [start(path, folder, f"--sweep_index={k}") for k in range(2)]
    for task in tasks:
        finish(task)
    assert {p.parent.name for p in folder.glob("*/results.json")} == {"a", "b"}
    assert len(json.loads((folder / "sweep.json").read_text())["runs"]) == 2
    assert "2 runs, 2 of them done" in finish(start(path, folder))


@pytest.mark.slow
def test_a_locked_run_is_waited_for_and_not_doubled(config, tmp_path):
    path, folder = config(a={}, b={"seed": 1}), tmp_path / "sweep"
    with RunFolder(folder / "a") as other:
        other.lock()
        assert holder(folder / "a") == str(os.getpid())
        process = start(path, folder)
        wait_for((folder / "b" / "results.json").exists, process)
        time.sleep(1.5)
        assert process.poll() is None and not (folder / "a" / "metrics.jsonl").exists()
    said = finish(process)  # the other process has left it undone: it is run here
    assert f"a: process {os.getpid()} is running it already; this sweep waits for it" in said
    assert (folder / "a" / "results.json").exists() and holder(folder / "a") is None


@pytest.mark.slow
def test_sigterm_is_passed_on_and_the_same_command_goes_on(config, tmp_path):
    long = "steps=3000"
    path, folder = config(a={}, b={"seed": 1}), tmp_path / "sweep"
    process = start(path, folder, "--jobs=2", arg=long)
    wait_for(lambda: min(logged(folder / name) for name in "ab") > 3, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, code=75)
    assert "0 of 2 runs are done" in said and "the same command goes on" in said
    listed = finish(start(path, folder, "--mode=inspect", arg=long))
    assert listed.count("interrupted at step") == 2


@pytest.mark.slow
def test_a_full_disk_ends_one_run_and_no_other(config, tmp_path):
    if os.getuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    path, folder = config(a={}, full={"seed": 1}, c={"seed": 2}), tmp_path / "sweep"
    (folder / "full").mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "qkd_jax-test", folder / "full"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        said = finish(start(path, folder), code=74)
    finally:
        subprocess.run(["umount", "-l", folder / "full"], check=True)
    assert "2 of 3 runs are done" in said and "No space left on device" in said


def kill(pid):
    try:
        os.kill(int(pid), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
        return False
    return True


@pytest.mark.slow
def test_a_run_that_a_signal_ended_is_reported_and_resumed(config, tmp_path):
    path, folder, arg = config(a={}, b={"seed": 1}), tmp_path / "sweep", "steps=600,save_steps=40"
    process = start(path, folder, arg=arg)
    wait_for(lambda: logged(folder / "a") > 500, process)
    assert kill(holder(folder / "a"))
    said = finish(process, code=1)
    assert "a: failed, ended by SIGKILL; the others go on." in said
    assert "1 of 2 runs are done" in said and (folder / "b" / "results.json").exists()
    finish(start(path, folder, arg=arg))
    assert "resuming from the checkpoint" in (folder / "logs" / "a.txt").read_text()


@pytest.mark.slow
def test_kills_of_launcher_and_runs_leave_the_numbers_as_they_are(config, tmp_path):
    runs = dict(a={}, b=SLOW_TUTOR, c={"seed": 1}, d={"seed": 2})
    path, arg = config(**runs), "steps=600,save_steps=40"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(path, whole, arg=arg))
    total = sum(logged(whole / name) for name in runs)
    rng, kills = random.Random(0), int(os.environ.get("SWEEP_KILLS", "2"))
    hit = {"launcher": 0, "run": 0}
    for count in range(kills):
        process = start(path, killed, "--jobs=2", arg=arg)
        goal = total * (count + 0.5) / (kills + 1)
        wait_for(lambda goal=goal: sum(logged(killed / n) for n in runs) >= goal, process)
        # The launcher imports for seconds before it starts anything.
        time.sleep(rng.random() * (8 if count % 2 else 0.3))
        alone = rng.random() < 0.5  # its runs go on; the next launcher starts none of them twice
        process.kill()
        process.communicate()
        hit["launcher"] += 1
        if not alone:
            hit["run"] += sum(kill(pid) for n in runs if (pid := holder(killed / n)))
    said = finish(start(path, killed, "--jobs=2", arg=arg))
    assert "4 of 4 runs are done" in said
    assert numbers(whole) == numbers(killed) and len(numbers(whole)) == 12
    resumed = "".join(p.read_text() for p in (killed / "logs").glob("*.txt"))
    print(f"{hit} killed; {resumed.count('resuming from')} resumed")
