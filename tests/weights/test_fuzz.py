"""Damaged files of weights: a ValueError, or arrays of the shapes that were saved."""

import random
import shutil

import numpy as np
import pytest
from mutation import mutated

from qkd_jax import weights
from qkd_jax.quantize import load_float
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.trees import flatten

TREE = {
    "params": {"stem": {"kernel": np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4)}},
    "batch_stats": {"stem_bn": {"mean": np.ones(4, np.float32), "var": np.ones(4, np.float32)}},
}
SHAPES = {name: array.shape for name, array in flatten(TREE).items()}


def check(path):
    """Loads a file into the net it is of; returns whether it was accepted."""
    try:
        found = weights.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return False
    try:
        loaded = flatten(load_float(TREE, found))
    except (
        ValueError
    ) as error:  # a flipped name or shape gives a file that is whole, of another net
        assert "does not fit the net" in str(error) or "lacks the collection" in str(error)
        return False
    assert {name: array.shape for name, array in loaded.items()} == SHAPES
    return True


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_fuzzed_files(ending, tmp_path):
    path, rng = tmp_path / f"net.{ending}", random.Random(0)
    weights.save(path, TREE)
    whole, accepted = path.read_bytes(), 0
    for _ in range(1000):
        path.write_bytes(mutated(whole, rng))
        accepted += check(path)
    # Bits of a weight have no checksum in safetensors; in a .npz they have.
    assert accepted < (500 if ending == "safetensors" else 200)


@pytest.mark.slow
def test_a_fuzzed_checkpoint_gives_the_weights_or_nothing(tmp_path):
    """Its own SHA-256 guards every bit, so what is read is what was saved."""
    good, bad, rng = tmp_path / "good", tmp_path / "bad", random.Random(0)
    with Checkpoints(good / "checkpoints") as checkpoints:
        checkpoints.save(3, {"nets": {"student": TREE}}, {}, blocking=True)
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    shutil.copytree(good, bad)
    accepted = 0
    for _ in range(1000):
        file = rng.choice(files)
        whole = (good / file).read_bytes()
        if not whole:
            continue
        (bad / file).write_bytes(mutated(whole, rng))
        try:
            found = flatten(weights.load(f"{bad}#student"))
        except ValueError as error:
            assert "bad" in str(error)
        else:
            accepted += 1
            for name, array in flatten(TREE).items():
                np.testing.assert_array_equal(found[name], array)
        for name in files:  # a damaged step is moved aside
            (bad / name).parent.mkdir(parents=True, exist_ok=True)
            if not (bad / name).is_file() or name == file:
                shutil.copy(good / name, bad / name)
        for path in bad.rglob("*"):
            if path.is_file() and path.relative_to(bad) not in files:
                path.unlink()
    assert 0 < accepted < 900
