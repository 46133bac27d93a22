"""Runs of several processes on one machine: two with a device each, stopped and killed."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qkd_jax import experiment
from qkd_jax.record.folder import RunFolder
from qkd_jax.record.restoring import read_latest

ROOT = Path(__file__).parents[2]
TINY = "tests/tiny_config.py:steps=24,save_steps=2"
# Two training stages with one between them that process 0 does alone.
SHORT = "--config.schedule=('pretrain_student','evaluate_float','calibrate','qat_only')"


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def launch(folder, count=2, *, own=(), devices=1, timeout=120):
    """Starts the processes of a run; what process i says goes into <folder>.<i>.txt."""
    port, started = free_port(), []
    environment = dict(os.environ, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3")
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    for index in range(count):
        flags = [f"--config={TINY}", SHORT, f"--workdir={folder}", "--config.parallel.devices=0"]
        if count > 1:
            flags += [f"--coordinator=localhost:{port}", f"--processes={count}"]
            flags += [f"--process={index}", "--peer_timeout=20", f"--start_timeout={timeout}"]
        with open(f"{folder}.{index}.txt", "w", encoding="utf-8") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, "launch.py", *flags, *(own[index] if own else ())],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def said(folder, index=0):
    return Path(f"{folder}.{index}.txt").read_text(encoding="utf-8")


def codes(started, timeout=240):
    """Exit codes of all processes; none may hang."""
    try:
        return [process.wait(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()


def lines(folder):
    path = Path(folder) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(started, folder, count, *, resumes=False):
    """Waits until a launch has written so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(p.poll() is None for p in started):
        begun = not resumes or "resuming from" in said(folder)
        if begun and lines(folder) >= count:
            return
        time.sleep(0.01)
    codes(started, 1)
    raise AssertionError(f"ended or stuck before line {count}:\n{said(folder)}")


def tree_of(folder):
    saved, damaged = read_latest(Path(folder) / "checkpoints")
    assert not damaged
    return saved.tree


def assert_near(folder, other):
    one, two = tree_of(folder), tree_of(other)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, two[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("together") / "whole"
    assert codes(launch(folder)) == [0, 0], said(folder)
    return folder


def test_two_processes_with_different_configs_are_told_what_differs(tmp_path):
    folder = tmp_path / "run"
    own = [(), ("--config.seed=5", "--config.stages.qat_only.batch_size=8")]
    assert codes(launch(folder, own=own)) == [2, 2]
    for index in (0, 1):
        text = said(folder, index)
        assert "process 1 (" in text and "Traceback" not in text, text
        assert "config.seed is 5, in process 0 0" in text
        assert "config.stages.qat_only.batch_size is 8, in process 0 16" in text
        assert text.count("in process 0") == 3  # the synthetic data depend on the seed too
    assert not folder.exists()


def test_flags_of_a_cluster_go_with_a_run():
    command = [sys.executable, "launch.py", "--mode=eval", "--workdir=x", "--processes=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--processes goes with --mode=run" in done.stderr


@pytest.mark.slow
def test_one_of_two_killed_at_random_moments_ends_with_the_same_bits(tmp_path, whole):
    """As two undisturbed processes, which to 1e-5 are one process with their devices."""
    killed, one = tmp_path / "killed", tmp_path / "one"
    assert said(whole, 1).count("\n") <= 2  # process 0 alone prints
    rng, total = random.Random(0), lines(whole)
    for kill in range(2):
        started = launch(killed)
        wait_for(started, killed, round(total * (kill + 0.5) / 3), resumes=kill > 0)
        time.sleep(0.3 * rng.random())
        victim = kill % 2
        started[victim].kill()
        begin = time.monotonic()
        assert codes(started)[1 - victim] == experiment.EXIT_INTERRUPTED, said(killed, 1 - victim)
        assert time.monotonic() - begin < 20 + 10  # the stated time, and what it takes to say so
        assert re.search(rf"process {victim} \(\S+\) has died", said(killed, 1 - victim))
    assert codes(launch(killed)) == [0, 0], said(killed)
    assert (killed / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name, array in tree_of(whole).items():
        np.testing.assert_array_equal(tree_of(killed)[name], array, err_msg=name)
    assert codes(launch(one, 1, devices=2)) == [0]
    assert_near(whole, one)


@pytest.mark.slow
def test_stopped_by_one_it_resumes_on_one_process_and_on_two_again(tmp_path, whole):
    """It is the undisturbed run of two, which is one process to 1e-5 (above), to 1e-5."""
    folder = tmp_path / "run"
    steps = []
    for count, devices, at, victim in ((2, 1, 3, 1), (1, 2, 12, 0)):
        started = launch(folder, count, devices=devices)
        wait_for(started, folder, at, resumes=bool(steps))
        started[victim].send_signal(signal.SIGTERM)
        assert codes(started) == [experiment.EXIT_INTERRUPTED] * count, said(folder)
        assert "the same command resumes" in said(folder)
        steps.append(read_latest(folder / "checkpoints")[0].step)
    assert steps == sorted(set(steps)), steps
    assert codes(launch(folder)) == [0, 0], said(folder)
    assert_near(folder, whole)


@pytest.mark.slow
def test_a_locked_folder_and_a_process_that_never_comes_end_with_a_message(tmp_path):
    folder = tmp_path / "run"
    with RunFolder(folder) as held:
        held.lock()
        assert codes(launch(folder)) == [2, 2]
    for index in (0, 1):
        assert "is in use by another run" in said(folder, index)
    alone, other = launch(folder, timeout=5)
    other.kill()  # while it imports
    codes([other])
    assert codes([alone]) == [experiment.EXIT_INTERRUPTED]
    assert "process 1 of 2 has not come within 5 s" in said(folder)
