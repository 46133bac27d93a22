"""The run folder's files: config, starts, metrics, results, the lock, and hashes of trees."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from qkd_jax.record.environment import git_state
from qkd_jax.record.folder import RunFolder
from qkd_jax.record.json_files import plain, read_json, write_json
from qkd_jax.record.metrics_log import read_metrics
from qkd_jax.trees import tree_sha256

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


def test_metrics_are_strict_json_and_whole(tmp_path):
    run = RunFolder(tmp_path)
    assert read_metrics(tmp_path) == [] and run.metrics.lines == 0
    run.metrics.log(
        1, "a", "train", {"loss": float("nan"), "top1": np.float32(0.5), "n": np.int32(3)}
    )
    run.metrics.log(2, "a", "test", {"loss": float("-inf"), "x": jnp.float32(2)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.metrics.lines == 2
    assert read_metrics(tmp_path)[0] == {
        "step": 1,
        "stage": "a",
        "split": "train",
        "values": {"loss": None, "n": 3, "top1": 0.5},
    }


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def log(run, steps, stage="a"):
        for step in steps:
            run.metrics.log(step, stage, "train", {"loss": 1 / (step + 1)})

    with RunFolder(tmp_path) as run:
        log(run, range(1, 8))
        run.metrics.log(7, "b", "test", {"top1": 0.5})
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"step":8,"stage":"b","spl')
    with RunFolder(tmp_path) as run:
        assert run.metrics.lines == 8 and len(read_metrics(tmp_path)) == 8
        run.metrics.truncate(5, lines=5)
        assert run.metrics.lines == 5
        log(run, range(6, 8))
        run.metrics.log(7, "b", "test", {"top1": 0.5})
        assert path.read_bytes() == whole
        run.metrics.truncate(7, lines=7)
        assert [row["stage"] for row in read_metrics(tmp_path)] == ["a"] * 7
        run.metrics.log(9, "c", "train", {})
        run.metrics.truncate(0)
        assert path.read_bytes() == b"" and run.metrics.lines == 0
    path.unlink()
    with RunFolder(tmp_path) as run:
        run.metrics.truncate(3)
        assert not path.exists()


def test_a_torn_line_is_mended_also_without_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    RunFolder(tmp_path).metrics.log(1, "a", "train", {"loss": 1.0})
    with open(path, "ab") as file:
        file.write(b'{"step":2')
    RunFolder(tmp_path).metrics.log(3, "a", "train", {"loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    with open(path, "ab") as file:
        file.write(b"\xff\xfe\n[1]\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_results_and_timings_are_deterministic(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_results() is None and read_json(tmp_path / "timings.json") is None
    run.write_results({"rows": [{"top1": np.float32(0.5), "net": "student"}], "schema": 1})
    first = (tmp_path / "results.json").read_bytes()
    run.write_results({"schema": 1, "rows": ({"net": "student", "top1": 0.5},)})
    assert (tmp_path / "results.json").read_bytes() == first
    assert run.read_results()["rows"][0]["top1"] == 0.5
    run.write_timings({"stages": {"a": {"seconds": 1.5}}})
    assert read_json(tmp_path / "timings.json") == {"stages": {"a": {"seconds": 1.5}}}
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


def test_an_array_of_a_device_can_be_logged(tmp_path):
    with RunFolder(tmp_path) as run:
        run.metrics.log(
            1, "a", "quant", {"net0/stem/weight_quantizer/step": jnp.asarray([0.5, 0.25])}
        )
        row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["values"] == {"net0/stem/weight_quantizer/step": [0.5, 0.25]}
