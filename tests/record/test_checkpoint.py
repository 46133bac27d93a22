"""Checkpoints keep bits, survive kills and damage, and say what is wrong."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qkd_jax.record.checkpoint import Checkpoints, SaveError
from qkd_jax.record.restoring import Restored, read_latest
from qkd_jax.trees import flatten, tree_sha256, unflatten_like


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


@flax.struct.dataclass
class State:
    step: jax.Array
    nets: dict
    opt: tuple


def small(value: float = 0.0) -> dict:
    return {"nets": {"net0": {"params": {"kernel": np.full((3, 4), value, np.float32)}}}}


def mixed() -> dict:
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    rows = jnp.arange(16.0).reshape(8, 2)
    return {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "bfloat16": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "float8": jnp.ones((3,), jnp.float8_e4m3fn),
        "int4": jnp.asarray([-8, 7, 0], jnp.int4),
        "uint8": rng.integers(0, 255, (2, 3)).astype(np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "int": 3,
        "float": 0.1,
        "bool": True,
        "scalar": jnp.int32(7),
        "special": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "transposed": np.asarray(rng.normal(size=(3, 4))).T,
        "sharded": jax.device_put(rows, NamedSharding(mesh, PartitionSpec("batch"))),
        "replicated": jax.device_put(rows, NamedSharding(mesh, PartitionSpec())),
        "large": rng.normal(size=(300_000,)).astype(np.float32),
        "net": {"a/b": np.float32(1.5), "c": (np.int64(2), [np.uint16(9)])},
    }


def same_bits(a, b) -> bool:
    if jax.dtypes.issubdtype(getattr(a, "dtype", np.dtype(float)), jax.dtypes.prng_key):
        assert jax.random.key_impl(a) == jax.random.key_impl(b)
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def latest(directory, report=lambda line: None) -> Restored | None:
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_latest(report=report)


def test_every_kind_of_leaf_keeps_dtype_and_bits(tmp_path):
    tree = mixed()
    meta = {
        "stage": 2,
        "name": "co_study",
        "rows": [{"top1": np.float32(0.5)}],
        "nan": None,
        "by_step": {9: 1, 10: 2},
    }
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.restore_latest() is None
        checkpoints.save(5, tree, meta, score=0.25)
        restored = checkpoints.restore_latest()
    assert (restored.step, restored.score) == (5, 0.25)
    assert restored.meta == {
        "stage": 2,
        "name": "co_study",
        "rows": [{"top1": 0.5}],
        "nan": None,
        "by_step": {"9": 1, "10": 2},
    }
    flat = flatten(tree)
    assert set(restored.tree) == set(flat) and "net/c/1/0" in flat
    for name, leaf in flat.items():
        assert same_bits(restored.tree[name], leaf), name
    assert tree_sha256(restored.tree) == tree_sha256(tree)
    again = unflatten_like(restored.tree, tree)
    assert again["int"] == 3 and type(again["int"]) is int and again["bool"] is True
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["5"]


def test_rebuilds_states_of_optax_and_flax():
    params = FrozenDict({"stem": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros((3,))}})
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    state = State(jnp.int32(4), {"net0": params}, (optimizer.init(params), Pair(1, None)))
    flat = {name: np.asarray(leaf) + 1 for name, leaf in flatten(state).items()}
    assert "nets/net0/stem/kernel" in flat and "opt/1/left" in flat
    assert any(name.endswith("mu/stem/kernel") for name in flat)
    back = unflatten_like(flat, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    np.testing.assert_array_equal(back.nets["net0"]["stem"]["kernel"], np.full((2, 3), 2.0))


def test_a_tree_that_does_not_fit_is_listed():
    flat = flatten({"a": np.ones(3), "b": np.ones(2), "c": np.ones(2), "k": jax.random.key(0)})
    target = {"a": np.ones(4), "b": np.ones(2, np.float32), "d": 1.0, "k": jax.random.key(0)}
    with pytest.raises(ValueError) as error:
        unflatten_like(flat, target)
    text = str(error.value)
    assert "missing from the saved tree: d" in text
    assert "in the saved tree only: c" in text
    assert "a saved (3,), wanted (4,)" in text
    assert "b saved float64, wanted float32" in text
    struct = jax.eval_shape(lambda: {"k": jax.random.key(0, impl="rbg")})
    with pytest.raises(ValueError, match=r"k saved key<fry>|k saved \(\), wanted"):
        unflatten_like({"k": jax.random.key(0)}, struct)


def test_names_that_meet_and_leaves_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="two leaves named 'a/b'"):
        flatten({"a/b": 1, "a": {"b": 2}})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="leaf 'name' is a str"):
            checkpoints.save(0, {"name": "resnet"}, {})
        with pytest.raises(ValueError, match="meta cannot be written as JSON"):
            checkpoints.save(0, small(), {"array": np.ones(3)})
        with pytest.raises(ValueError, match="step is -1"):
            checkpoints.save(-1, small(), {})
        assert checkpoints.steps() == []


def test_keeps_the_newest_and_the_best_also_after_opening_again(tmp_path):
    scores = [0.1, 0.9, 0.3, float("nan"), 0.2]
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in enumerate(scores):
            checkpoints.save(step, small(step), {}, score=score)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 4], 1)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 4], 1)
        checkpoints.save(5, small(5), {}, score=0.5)
        checkpoints.save(6, small(6), {})
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "5", "6"]
        checkpoints.save(7, small(7), {}, score=0.9)  # the newest of equal scores
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([6, 7], 7)
        assert checkpoints.restore(6).tree["nets/net0/params/kernel"][0, 0] == 6
        with pytest.raises(ValueError, match="holds checkpoints of steps 6, 7"):
            checkpoints.restore(1)


def test_a_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, small(1), {"stage": 0}, score=1.0)
        checkpoints.save(3, small(2), {"stage": 1})
        checkpoints.save(2, small(5), {"stage": 1})  # older than the newest
        restored = checkpoints.restore_latest()
        assert checkpoints.best() is None
    assert restored.meta == {"stage": 1}
    assert restored.tree["nets/net0/params/kernel"][0, 0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_killed_while_a_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, small(1), {})
    (tmp_path / "3").rename(tmp_path / "3.replaced")
    (tmp_path / "3.orbax-checkpoint-tmp-17" / "tree").mkdir(parents=True)
    assert latest(tmp_path).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_the_caller_may_change_the_tree_after_save(tmp_path):
    tree = {"a": np.zeros(1000), "b": jnp.zeros(1000), "c": np.zeros(300_000)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        tree["a"][:] = 1
        tree["c"][:] = 1
        jax.jit(lambda x: x + 1, donate_argnums=0)(tree["b"])
        restored = checkpoints.restore_latest()
    assert all(not leaf.any() for leaf in restored.tree.values())


def damages(path: Path):
    """Every file of a checkpoint, flipped in the middle, cut in half, emptied and removed."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        data = file.read_bytes()
        if data:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
            yield file, "flipped", flipped, data
            yield file, "cut", data[:middle], data
            yield file, "emptied", b"", data
        yield file, "removed", None, data


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_any_file_gives_wrong_numbers(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"stage": 1})
        checkpoints.save(2, {**small(2), "large": np.ones(300_000, np.float32)}, {"stage": 2})
    found = set()
    for file, kind, new, old in list(damages(tmp_path / "2")):
        file.unlink() if new is None else file.write_bytes(new)
        lines = []
        restored = latest(tmp_path, lines.append)
        assert restored.meta["stage"] == restored.step
        assert restored.tree["nets/net0/params/kernel"][0, 0] == restored.step
        if restored.step == 1:
            found.add(kind)
            assert "checkpoint of step 2" in lines[0] and "step 1" in lines[1], lines
            (tmp_path / "2.broken").rename(tmp_path / "2")
        else:
            assert lines == [], (file, kind)
        file.write_bytes(old)
        assert latest(tmp_path).step == 2
    assert found == {"flipped", "cut", "emptied", "removed"}


def test_a_broken_newest_one_is_moved_aside_and_its_step_saved_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {}, score=float(step))
    (tmp_path / "3" / "meta" / "metadata").write_text('{"format": 1, "meta"')
    lines = []
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(report=lines.append).step == 2
        assert "step 3" in lines[0] and "meta/metadata cannot be read" in lines[0]
        assert checkpoints.steps() == [2] and checkpoints.best() == 2
        checkpoints.save(3, small(33), {})
    assert latest(tmp_path).tree["nets/net0/params/kernel"][0, 0] == 33
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "3.broken"]


def test_looking_at_a_folder_changes_nothing_in_it(tmp_path):
    assert read_latest(tmp_path / "absent") == (None, [])
    assert not (tmp_path / "absent").exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.save(2, small(2), {})
    (tmp_path / "2" / "meta" / "metadata").unlink()
    (tmp_path / "3.orbax-checkpoint-tmp-17").mkdir()
    restored, damaged = read_latest(tmp_path, report=lambda line: None)
    assert (restored.step, damaged) == (1, [2])
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["1", "2", "3.orbax-checkpoint-tmp-17"]


def test_all_broken_is_an_error_again_and_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.save(2, small(2), {})
    for step in ("1", "2"):
        (tmp_path / step / "meta" / "metadata").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"all checkpoints .*step 2: .* is missing; step 1"):
            latest(tmp_path)


def test_the_error_of_a_background_save_comes_with_the_next_call(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {}, score=0.5, blocking=True)
    noise = {"large": np.random.default_rng(0).normal(size=1_000_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # a full disk, nearly
    try:
        checkpoints.save(2, noise, {}, score=1.0)
        with pytest.raises(SaveError, match=r"\(File too large\); kept steps: 1\.") as error:
            checkpoints.save(3, small(3), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "[source" not in str(error.value) and "\n" not in str(error.value)
    assert (checkpoints.steps(), checkpoints.best()) == ([1], 1)
    checkpoints.save(2, noise, {})
    assert checkpoints.restore_latest().step == 2
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_replacement_leaves_the_step_it_would_replace(tmp_path):
    resource = pytest.importorskip("resource")
    noise = {"large": np.random.default_rng(0).normal(size=1_000_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {}, blocking=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(SaveError, match=r"\(File too large\); kept steps: 1\."):
                checkpoints.save(1, noise, {}, blocking=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoints.restore_latest().tree["nets/net0/params/kernel"][0, 0] == 1


@pytest.mark.parametrize("damage", ["empty", "file", "no meta", "no tree", "no digest", "list"])
def test_damaged_folders(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        checkpoints.save(2, small(2), {})
    folder = tmp_path / "2"
    record = folder / "meta" / "metadata"
    if damage in ("empty", "file"):
        shutil.rmtree(folder)
        folder.mkdir() if damage == "empty" else folder.write_text("?")
    elif damage == "no digest":
        record.write_text(record.read_text().replace('"sha256"', '"sha265"'))
    elif damage == "list":
        record.write_text("[1, 2]")
    else:
        shutil.rmtree(folder / damage.removeprefix("no "))
    lines = []
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(lines.append).step == 1
        checkpoints.save(2, small(2), {})
        assert checkpoints.restore_latest(lines.append).step == 2
    assert len(lines) == (0 if damage == "file" else 2)


VICTIM = """
import sys, numpy as np
from qkd_jax.record.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
restored = checkpoints.restore_latest(report=lambda line: print("DAMAGED", line, flush=True))
step = 0 if restored is None else restored.step
if restored is not None:
    assert all((leaf == step).all() for leaf in restored.tree.values())
print("from", step, flush=True)
while True:
    step += 1
    tree = {f"layer{i}": np.full((50, 40), step, np.float32) for i in range(20)}
    checkpoints.save(step, tree | {"large": np.full(400_000, step, np.float32)}, {}, score=-step)
    checkpoints.save(step, tree, {"again": True})
    print("saved", step - 1, flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    chance = random.Random(0)
    saved = 0
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        ) as process:
            first = process.stdout.readline()
            assert first.startswith("from "), first + process.stderr.read()
            assert int(first.split()[1]) >= saved
            time.sleep(chance.uniform(0.05, 0.6))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split("\n")
        saved = max([saved, *(int(line.split()[1]) for line in lines if "saved" in line)])
    assert saved > 5
    lines = []
    restored = latest(tmp_path, lines.append)
    assert restored.step >= saved and lines == []
