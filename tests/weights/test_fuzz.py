"""Damaged files of weights: a ValueError with the name, or arrays of a file that is whole."""

import io
import json
import random
import shutil
import zipfile

import numpy as np
import pytest
from mutation import COUNT, accepted, mutated, mutated_json, mutated_text

from qkd_jax import weights
from qkd_jax.quantize import load_float
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.record.restoring import quiet_orbax
from qkd_jax.trees import flatten
from qkd_jax.weights.files import npz_bytes, safetensors_bytes

TREE = {
    "params": {"stem": {"kernel": np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4)}},
    "batch_stats": {"stem_bn": {"mean": np.ones(4, np.float32), "var": np.ones(4, np.float32)}},
}
SHAPES = {name: array.shape for name, array in flatten(TREE).items()}
TORCH = {
    "conv1.weight": np.ones((4, 1, 3, 3), np.float32),
    "bn1.running_mean": np.ones(4, np.float32),
    "bn1.num_batches_tracked": np.array(3),
    "fc.weight": np.ones((5, 4), np.float32),
}


def fits(found):
    """Loads variables into the net they are of; a flipped name or shape is of another net."""
    try:
        loaded = flatten(load_float(TREE, found))
    except ValueError as error:
        assert "does not fit the net" in str(error) or "lacks the collection" in str(error)
        return False
    assert {name: array.shape for name, array in loaded.items()} == SHAPES
    return True


def header(whole, rng):
    """A safetensors file whose header is damaged and has its right length."""
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length], whole[8 + length :]
    if rng.random() < 0.5:
        text = mutated(text, rng)
    else:
        text = json.dumps(mutated_json(json.loads(text), rng)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(whole, rng):
    """A .npz file in which one entry is damaged, with its right checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            # What lies behind the first 128 bytes are numbers.
            new.writestr(name, mutated(data[:128], rng) + data[128:] if name == chosen else data)
    return out.getvalue()


@pytest.mark.parametrize("damage", [mutated, header])
def test_safetensors(damage, tmp_path):
    path = tmp_path / "net.safetensors"
    weights.save(path, TREE)
    taken = sum(map(fits, accepted(path, lambda: weights.load(path), damage=damage)))
    assert taken < COUNT / 2  # bits of a weight have no checksum


def test_an_index_of_parts(tmp_path):
    """Bytes and JSON of the index; the parts are files as above."""
    path = tmp_path / "net.safetensors.index.json"
    weights.save(tmp_path / "net.safetensors", TREE)
    path.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "net.safetensors")}))
    as_json = lambda whole, rng: json.dumps(mutated_json(json.loads(whole), rng)).encode()
    for damage in (mutated, as_json):
        found = accepted(path, lambda: weights.load(path), damage=damage, named=tmp_path)
        assert all(map(fits, found))  # a part must have just the arrays that the index says


@pytest.mark.parametrize("damage", [mutated, entry])
def test_npz(damage, tmp_path):
    path = tmp_path / "net.npz"
    weights.save(path, TREE)
    wanted = flatten(TREE)
    for found in accepted(path, lambda: weights.load(path), damage=damage):
        if fits(found) and damage is mutated:  # bytes of an array have a checksum
            for name, array in flatten(found).items():
                np.testing.assert_array_equal(array, wanted[name])


VIT = {
    "cls_token": np.ones((1, 1, 4), np.float32),
    "pos_embed": np.ones((1, 5, 4), np.float32),
    "blocks.0.attn.qkv.weight": np.ones((12, 4), np.float32),
    "blocks.0.attn.proj.weight": np.ones((4, 4), np.float32),
    "head.bias": np.ones(3, np.float32),
}


@pytest.mark.parametrize("state", [TORCH, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_names_of_pytorch(ending, state, tmp_path):
    path = tmp_path / f"torch.{ending}"
    data = npz_bytes(state) if ending == "npz" else safetensors_bytes(state, {"format": "pt"})
    path.write_bytes(data)
    for found in accepted(path, lambda: weights.load(path)):
        assert set(found) <= {"params", "batch_stats"}


@pytest.mark.slow
# Orbax leaves coroutines behind that it has not awaited when another one failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_of_other_programs(tmp_path, capfd):
    """They have no digest; Orbax and TensorStore parse them."""
    import orbax.checkpoint as ocp

    folder = tmp_path / "orbax"
    quiet_orbax()
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, TREE)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        damage = mutated_text if path.name in ("_METADATA", "_CHECKPOINT_METADATA") else mutated
        if path.stat().st_size:
            load = lambda: weights.load(folder)
            for found in accepted(path, load, damage=damage, named=folder, count=COUNT // 10):
                fits(found)
    capfd.readouterr()  # TensorStore's threads print what they find


@pytest.mark.slow
def test_a_fuzzed_checkpoint_gives_the_weights_or_nothing(tmp_path):
    """Its own SHA-256 guards every bit, so what is read is what was saved."""
    good, bad, rng = tmp_path / "good", tmp_path / "bad", random.Random(0)
    with Checkpoints(good / "checkpoints") as checkpoints:
        checkpoints.save(3, {"nets": {"student": TREE}}, {}, blocking=True)
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.stat().st_size and p.is_file())
    shutil.copytree(good, bad)
    taken = 0
    for number in range(max(COUNT, 5 * len(files))):
        path = bad / files[number % len(files)]
        for found in accepted(
            path,
            lambda: weights.load(f"{bad}#student"),
            damage=lambda whole, _: mutated(whole, rng),
            named=bad,
            count=1,
        ):
            taken += 1
            for name, array in flatten(TREE).items():
                np.testing.assert_array_equal(flatten(found)[name], array)
    assert taken
