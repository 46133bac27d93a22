"""The run folder's files, the progress line and the stop flag."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from rich.console import Console

from qkd_jax.record.folder import (
    RunFolder,
    environment,
    git_state,
    plain,
    read_metrics,
    tree_sha256,
    write_json,
)
from qkd_jax.record.progress import EXIT_INTERRUPTED, GracefulStop, Progress, duration

CONFIG = {"data": {"name": "digits", "augment": ("shift:1",)}, "seed": 1, "nets": {"student": {}}}


def test_a_config_comes_back_and_guards_the_folder(tmp_path):
    run = RunFolder(tmp_path / "runs" / "a")
    assert run.check_config(CONFIG) is False
    run.write_config(CONFIG)
    assert run.check_config(CONFIG) is True
    assert run.read_config()["data"] == {"augment": ["shift:1"], "name": "digits"}
    other = {"data": {"name": "mnist", "augment": ("shift:1",)}, "nets": {"teacher": {"a": 1}}}
    with pytest.raises(ValueError) as error:
        run.check_config(other)
    text = str(error.value)
    assert '  data.name: "digits" in the folder, "mnist" now' in text
    assert "  seed: 1 in the folder, (not there) now" in text
    assert "  nets.teacher.a: (not there) in the folder, 1 now" in text
    assert "  nets.student: {} in the folder, (not there) now" in text
    assert "another --workdir" in text and "augment" not in text
    assert run.check_config({**CONFIG, "seed": 2}, ignore=["seed"]) is True
    renamed = {**CONFIG, "data": {"name": "mnist"}}
    assert run.check_config(renamed, ignore=["data"]) is True


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        RunFolder(tmp_path / "absent", create=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file; it must be a folder"):
        RunFolder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no config\.json"):
        RunFolder(tmp_path, create=False).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        RunFolder(tmp_path).read_config()


def test_every_start_is_recorded(tmp_path):
    RunFolder(tmp_path).write_run(seed=1)
    run = RunFolder(tmp_path)
    run.write_run(seed=1, resumed_from=np.int64(40), nets={"teacher": "aa"})
    run.write_run(nets={"student": "bb"})
    first, second = RunFolder(tmp_path).read_run()["starts"]
    assert first["seed"] == 1 and "resumed_from" not in first
    assert second["resumed_from"] == 40
    assert second["nets"] == {"teacher": "aa", "student": "bb"}
    assert second["versions"]["jax"] == jax.__version__
    assert second["devices"]["count"] == jax.device_count()
    assert second["argv"] == sys.argv
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", second["started"])


def test_git_state_of_a_checkout_and_outside_of_one(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    assert git_state(tmp_path) == {"revision": None, "dirty": None}
    git("init", "-q")
    inside = tmp_path / "env"
    inside.mkdir()
    (inside / "code.py").write_text("a = 1")
    (tmp_path / "own.py").write_text("a = 1")
    git("add", "own.py")
    git("commit", "-q", "-m", "first")
    state = git_state(tmp_path)
    assert len(state["revision"]) == 40 and state["dirty"] is False
    (tmp_path / "own.py").write_text("a = 2")
    assert git_state(tmp_path)["dirty"] is True
    assert git_state(inside) == {"revision": None, "dirty": None}
    assert set(environment()["git"]) == {"revision", "dirty"}


def test_metrics_are_strict_json_and_whole(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() == [] and run.lines == 0
    run.log(1, "a", "train", {"loss": float("nan"), "top1": np.float32(0.5), "n": np.int32(3)})
    run.log(2, "a", "test", {"loss": float("-inf"), "x": jnp.float32(2)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.lines == 2
    assert run.read_metrics()[0] == {
        "step": 1,
        "stage": "a",
        "split": "train",
        "values": {"loss": None, "n": 3, "top1": 0.5},
    }


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def log(run, steps, stage="a"):
        for step in steps:
            run.log(step, stage, "train", {"loss": 1 / (step + 1)})

    with RunFolder(tmp_path) as run:
        log(run, range(1, 8))
        run.log(7, "b", "test", {"top1": 0.5})
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"step":8,"stage":"b","spl')
    with RunFolder(tmp_path) as run:
        assert run.lines == 8 and len(run.read_metrics()) == 8
        run.truncate(5, lines=5)
        assert run.lines == 5
        log(run, range(6, 8))
        run.log(7, "b", "test", {"top1": 0.5})
        assert path.read_bytes() == whole
        run.truncate(7, lines=7)
        assert [row["stage"] for row in run.read_metrics()] == ["a"] * 7
        run.log(9, "c", "train", {})
        run.truncate(0)
        assert path.read_bytes() == b"" and run.lines == 0
    path.unlink()
    with RunFolder(tmp_path) as run:
        run.truncate(3)
        assert not path.exists()


def test_a_torn_line_is_mended_also_without_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    RunFolder(tmp_path).log(1, "a", "train", {"loss": 1.0})
    with open(path, "ab") as file:
        file.write(b'{"step":2')
    RunFolder(tmp_path).log(3, "a", "train", {"loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    with open(path, "ab") as file:
        file.write(b"\xff\xfe\n[1]\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_results_and_timings_are_deterministic(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_results() is None and run.read_timings() is None
    run.write_results({"rows": [{"top1": np.float32(0.5), "net": "student"}], "schema": 1})
    first = (tmp_path / "results.json").read_bytes()
    run.write_results({"schema": 1, "rows": ({"net": "student", "top1": 0.5},)})
    assert (tmp_path / "results.json").read_bytes() == first
    assert run.read_results()["rows"][0]["top1"] == 0.5
    run.write_timings({"stages": {"a": {"seconds": 1.5}}})
    assert run.read_timings() == {"stages": {"a": {"seconds": 1.5}}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "timings.json"]


def test_plain_takes_what_a_run_has_and_refuses_the_rest(tmp_path):
    value = {1: (np.float32(0.5), np.nan), "p": Path("a/b"), "a": np.arange(3), "s": {"b", "a"}}
    assert plain(value) == {"1": [0.5, None], "p": "a/b", "a": [0, 1, 2], "s": ["a", "b"]}
    assert plain(np.bool_(True)) is True and plain(True) is True
    with pytest.raises(ValueError, match=r"cannot write .* \(object\) as JSON"):
        plain({"a": object()})
    with pytest.raises(ValueError, match="bytes"):
        write_json(tmp_path / "a.json", b"x")
    assert not (tmp_path / "a.json").exists()


def test_one_process_holds_a_folder(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    run.lock()
    with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()}\)"):
        RunFolder(tmp_path).lock()
    run.close()
    with RunFolder(tmp_path) as other:
        other.lock()


def test_tree_sha256_sees_names_dtypes_shapes_and_bits():
    tree = {"a": np.arange(6, dtype=np.float32), "b": {"c": jnp.ones(2, jnp.bfloat16)}}
    hashes = {
        tree_sha256(other)
        for other in (
            tree,
            {**tree, "a": tree["a"].reshape(2, 3)},
            {**tree, "a": tree["a"].view(np.int32)},
            {**tree, "a": -tree["a"]},  # differs in the sign of zero too
            {"x": tree["a"], "b": tree["b"]},
            {**tree, "k": jax.random.key(0)},
            {**tree, "k": jax.random.key(1)},
            {**tree, "k": jax.random.key_data(jax.random.key(1))},
        )
    }
    assert len(hashes) == 8
    assert tree_sha256(FrozenDict(jax.tree.map(jnp.asarray, tree))) == tree_sha256(tree)
    assert tree_sha256({"a": np.arange(6.0).reshape(2, 3).T}) == tree_sha256(
        {"a": np.ascontiguousarray(np.arange(6.0).reshape(2, 3).T)}
    )


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def progress(stream, clock, **kwargs):
    console = Console(file=stream, width=200)
    return Progress("co_study", 100, 32, console=console, clock=clock, **kwargs)


def test_plain_lines_at_a_low_rate_and_rates_without_compilation():
    stream, clock = io.StringIO(), Clock()
    with progress(stream, clock) as line:
        clock.now += 20  # compilation
        line.update(1, waited=3.0)
        for step in range(2, 101):
            clock.now += 0.1
            if step == 50:
                clock.now += 2
                line.paused(2.0)
            line.update(step, loss=1.0 / step, waited=0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("co_study 1/100 | first step 20.0 s")
    assert "10 steps/s | 320 examples/s | ETA 0:05" in lines[1]
    last = lines[-1]
    assert last.startswith("co_study 100/100 | loss 0.0100 | 10 steps/s | 320 examples/s")
    assert "data wait 10 %" in last and "total 0:32" in last and "ETA" not in last
    numbers = line.summary()
    assert numbers["steps"] == 100
    assert numbers["first_step_seconds"] == pytest.approx(20)
    assert numbers["train_seconds"] == pytest.approx(9.9)
    assert numbers["outside_seconds"] == 2.0
    assert numbers["examples_per_second"] == pytest.approx(320)
    assert numbers["data_wait_fraction"] == pytest.approx(0.1)


def test_stages_without_steps_resumed_stopped_and_silent():
    stream, clock = io.StringIO(), Clock()
    with progress(stream, clock, start=100) as line:
        pass
    assert stream.getvalue() == "co_study 100/100\n"
    assert line.summary()["steps_per_second"] == 0
    with pytest.raises(KeyError), progress(stream, clock, start=40) as line:
        line.update(41, loss=float("nan"))
        raise KeyError
    assert stream.getvalue().splitlines()[-1].endswith("(stopped)")
    assert line.summary()["steps"] == 1
    silent = io.StringIO()
    with progress(silent, clock, enabled=False) as line:
        line.update(1)
        clock.now += 60
        line.update(2)
    assert silent.getvalue() == "" and line.summary()["steps_per_second"] == pytest.approx(1 / 60)
    assert [duration(s) for s in (7, 200.4, 3723)] == ["0:07", "3:20", "1:02:03"]


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=150)
    with Progress("tutor[x]", 3, 32, console=console) as line:
        for step in (1, 2, 3):
            line.update(step, loss=0.25)
    text = stream.getvalue()
    assert "3/3" in text and "loss 0.2500" in text and "steps/s" in text


@pytest.fixture
def default_interrupt():
    # A shell starts background jobs with SIGINT ignored, and then a second one does nothing.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("default_interrupt")
def test_the_first_signal_asks_and_the_second_acts(request):
    # A shell starts jobs in the background with SIGINT ignored.
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert EXIT_INTERRUPTED == 75


def test_the_flag_outside_the_main_thread():
    found = []

    def work():
        with GracefulStop() as stop:
            stop.request()
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


def test_an_array_of_a_device_can_be_logged(tmp_path):
    with RunFolder(tmp_path) as run:
        run.log(1, "a", "quant", {"net0/stem/weight_quantizer/step": jnp.asarray([0.5, 0.25])})
        row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["values"] == {"net0/stem/weight_quantizer/step": [0.5, 0.25]}
