"""Weights in and out: PyTorch's logits from PyTorch's layout, round trips, and what is refused."""

import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from formula_weights import fill

from qkd_jax import models, weights
from qkd_jax.quantize import load_float, quantize
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.trees import flatten
from qkd_jax.weights.__main__ import main
from qkd_jax.weights.files import read_npz, read_safetensors, safetensors_bytes

GOLDEN = json.loads(
    pathlib.Path(__file__).parents[1].joinpath("golden", "torchvision.json").read_text()
)
SHAPE = (2, 3, 37, 33)
OURS = {
    "torchvision_basic": models.ImageNetResNet(blocks=(2, 1, 1, 1), num_classes=5),
    "torchvision_bottleneck": models.ImageNetResNet((1, 2, 1, 1), True, num_classes=5),
    "repdistiller": models.ResNet(depth=14, width=8, num_classes=5),
    "repdistiller_x4": models.ResNet(depth=8, width=16, stem_width=8, num_classes=5),
}


def state_dict(name):
    shapes = GOLDEN[name]["shapes"]
    return {n: fill(n, shape, i) for i, (n, shape) in enumerate(shapes.items())}


def variables(name="repdistiller_x4"):
    return weights.from_torch(state_dict(name))


def same(one, other):
    one, other = flatten(one), flatten(other)
    assert list(sorted(one)) == list(sorted(other))
    for name, array in one.items():
        assert np.asarray(array).dtype == np.asarray(other[name]).dtype
        np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "vision" in n else ()) for n in OURS]
)
def test_a_pytorch_checkpoint_gives_pytorchs_logits(name, tmp_path):
    state = state_dict(name) | {"bn1.num_batches_tracked": np.array(7)}
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors_bytes({f"module.{k}": v for k, v in state.items()}, {}))
    net = quantize(OURS[name])
    images = jnp.asarray(np.moveaxis(fill("images.weight", SHAPE, 0) * 40, 1, -1))
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    loaded = load_float(shapes, weights.load(path))
    logits = jax.jit(net.apply, compiler_options={"xla_backend_optimization_level": 0})(
        loaded, images
    )
    # float32 here, float64 there, sums of thousands of terms
    np.testing.assert_allclose(logits, GOLDEN[name]["logits"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", OURS)
def test_the_way_back_gives_the_same_arrays(name):
    state = state_dict(name)
    back = weights.to_torch(weights.from_torch(state))
    same(back, state)
    assert all(array.flags["C_CONTIGUOUS"] for array in back.values())


def test_every_format_gives_back_what_it_got(tmp_path):
    tree = variables()
    tree["quant"] = {"stem": {"weight_quantizer": {"step": np.float32(0.5)}}}
    tree["params"]["stem"]["kernel"] = jnp.asarray(tree["params"]["stem"]["kernel"], jnp.bfloat16)
    weights.save(tmp_path / "net.safetensors", tree)
    same(weights.load(tmp_path / "net.safetensors"), tree)
    tree["params"]["stem"]["kernel"] = np.asarray(tree["params"]["stem"]["kernel"], np.float32)
    weights.save(tmp_path / "net.npz", tree)
    same(weights.load(str(tmp_path / "net.npz")), tree)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, {"nets": {"student": tree}}, {}, blocking=True)
    same(weights.load(f"{tmp_path}/run#student"), tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    same(weights.load(tmp_path / "orbax"), tree)
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        manager.save(1, args=ocp.args.StandardSave({"variables": tree}))
    same(weights.load(tmp_path / "manager" / "1"), tree)


def test_the_command_converts_both_ways(tmp_path, capsys):
    weights.save(tmp_path / "ours.npz", variables())
    there, back = str(tmp_path / "torch.safetensors"), str(tmp_path / "back.npz")
    assert main([str(tmp_path / "ours.npz"), there, "--layout=torch"]) == 0
    arrays, metadata = read_safetensors(there)
    assert "layer1.0.downsample.1.running_mean" in arrays and metadata == {"format": "pt"}
    assert main([there, back]) == 0
    same(weights.load(back), variables())
    assert main(["nowhere", back]) == 2
    assert "there are no weights at 'nowhere'" in capsys.readouterr().err
    assert main([there, str(tmp_path / "x.bin")]) == 2
    assert "allowed: '.npz', '.safetensors'" in capsys.readouterr().err


def test_the_command_starts_as_a_module():
    command = [sys.executable, "-m", "qkd_jax.weights", "--help"]
    assert "SOURCE" in subprocess.run(command, capture_output=True, text=True).stdout.upper()


@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(ending):
    with pytest.raises(ValueError, match=r"weights_only=True.*save_file.*'net\.safetensors'"):
        weights.load(f"some/net.{ending}")


def test_pickled_objects_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"nothing is unpickled"):
        weights.load(tmp_path / "x.npz")


def test_what_npz_cannot_keep_is_refused_both_ways(tmp_path):
    for array in (np.zeros(2, ml_dtypes.bfloat16), np.array(["a"])):
        np.savez(tmp_path / "x.npz", **{"params/a": array})
        with pytest.raises(ValueError, match=r"only arrays of plain numbers.*\.safetensors file"):
            weights.load(tmp_path / "x.npz")
    half = {"params": {"a": jnp.zeros(2, jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"'params/a' is bfloat16.*ending '\.safetensors'"):
        weights.save(tmp_path / "y.npz", half)
    weights.save(tmp_path / "y.safetensors", half)
    assert weights.load(tmp_path / "y.safetensors")["params"]["a"].dtype == jnp.bfloat16


def test_a_file_of_another_net_is_not_taken_for_a_resnet(tmp_path):
    # Its first convolution has a ResNet's name, and one spatial axis.
    state = {"conv1.weight": np.zeros((8, 2, 3)), "conv1.bias": np.zeros(8)}
    state |= {f"lstm.{name}": np.zeros((8, 8)) for name in ("weight_ih", "weight_hh")}
    (tmp_path / "voice.safetensors").write_bytes(safetensors_bytes(state, {}))
    with pytest.raises(ValueError, match=r"2 of 4 arrays have names of no known layer: lstm.*anot"):
        weights.load(tmp_path / "voice.safetensors")


def test_layers_are_counted_past_nine():
    kernel, gain = np.arange(24.0).reshape(2, 3, 2, 2), np.arange(2.0)
    state = {"layer1.0.conv10.weight": kernel, "layer1.11.bn12.weight": gain}
    found = weights.from_torch({"module." + name: array for name, array in state.items()})
    here = found["params"]["stage1_block0"]["conv10"]["kernel"]
    np.testing.assert_array_equal(here, np.moveaxis(kernel, (0, 1), (3, 2)))
    np.testing.assert_array_equal(found["params"]["stage1_block11"]["bn12"]["scale"], gain)
    back = weights.to_torch(found)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_names_of_no_known_layer_are_listed(tmp_path):
    state = state_dict("repdistiller") | {"classifier.weight": np.zeros((2, 2), np.float32)}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(state, {}))
    with pytest.raises(ValueError, match=r"x\.safetensors: 1 of \d+ .* layer: classifier\.weight"):
        weights.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"conv1\.weight has shape \(3,\); it must have 4 axes"):
        weights.from_torch({"conv1.weight": np.zeros(3)})
    twice = {"bn1.bias": np.zeros(3), "module.bn1.bias": np.ones(3)}
    with pytest.raises(ValueError, match=r"'module.bn1.bias' is the array of .*came already"):
        weights.from_torch(twice)
    with pytest.raises(ValueError, match="params/extra/kernel, which the ResNets"):
        weights.to_torch({"params": {"extra": {"kernel": np.zeros((2, 2))}}})
    with pytest.raises(ValueError, match="folded into multipliers"):
        weights.to_torch({"params": {}, "quant": {"stem": {"folded": {"multiplier": np.ones(1)}}}})
    np.savez(tmp_path / "y.npz", kernel=np.zeros(3))
    with pytest.raises(ValueError, match="arrays named kernel"):
        weights.load(tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", **{"params/a": np.zeros(3), "params/a/b": np.zeros(3)})
    with pytest.raises(ValueError, match="lies under another array"):
        weights.load(tmp_path / "z.npz")


def test_a_checkpoint_of_another_tree_is_refused(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"weights": np.zeros(3)})
    with pytest.raises(ValueError, match=r"wanted is a tree with 'params'"):
        weights.load(tmp_path / "orbax")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a run folder nor an Orbax checkpoint"):
        weights.load(tmp_path / "empty")


def lying_safetensors(shape, offsets, data=b"\0" * 8):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 10**15) + b"{}",
        lying_safetensors([10**12], [0, 4 * 10**12]),
        lying_safetensors([2**62, 4], [0, 8]),
        lying_safetensors([2], [0, 4]),
        lying_safetensors([-2], [0, 8]),
        lying_safetensors([2], [0, 8])[:-1],
        lying_safetensors([2], [0, 8]) + b"\0",
    ],
)
def test_lying_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} is no file to rely on")):
        read_safetensors(path)


def test_a_lying_npz_takes_no_memory(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    text = header.ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    with pytest.raises(ValueError, match=r"declares float32 \(1000000000000,\) for 0 bytes"):
        read_npz(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="there is no file"):
        read_npz(tmp_path / "y.npz")


@pytest.mark.parametrize("parts", [101, 50_000])
def test_a_name_of_very_many_parts_costs_nothing(tmp_path, parts):
    path = tmp_path / "deep.safetensors"
    path.write_bytes(safetensors_bytes({"params/" + "/".join("a" * parts): np.ones(1)}, {}))
    tracemalloc.start()
    with pytest.raises(ValueError, match="is no path of an array"):
        weights.load(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 * path.stat().st_size + 1_000_000


def npz_of(path, shape, data=b"", method=zipfile.ZIP_STORED):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(path, "w", method) as archive:
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
        archive.writestr("params/a.npy", start + header + data)


def safetensors_of(path, shape, data=b""):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"params/a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("shape", [[1] * 70, [0, 2**62], [0, 2**63], [0, 2**40, 2**40]])
@pytest.mark.parametrize("write", [npz_of, safetensors_of])
def test_shapes_that_numpy_cannot_hold(write, shape, tmp_path):
    path = tmp_path / ("x.npz" if write is npz_of else "x.safetensors")
    write(path, tuple(shape) if write is npz_of else shape, b"" if 0 in shape else b"1234")
    with pytest.raises(
        ValueError, match=rf"{path.name} is no file to rely on: .* declares float32"
    ):
        weights.load(path)


def test_a_small_zip_that_unpacks_to_very_much(tmp_path):
    path = tmp_path / "x.npz"
    npz_of(path, (2**24,), bytes(2**26), zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.npz .* claim 67,108,\d+ bytes, and the file has"):
        weights.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "orbax"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    path = tmp_path / name
    if name == "orbax":
        path.mkdir()
        (path / "_METADATA").write_text("{}")
    os.mkfifo(path / "data" if name == "orbax" else path)
    with pytest.raises(ValueError, match=r"is no file|there is no file"):
        weights.load(path)


def test_a_pipe_in_a_checkpoint_is_damage(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"nets": {"a": {"params": {"k": np.ones(3)}}}}, {}, blocking=True)
    for part in ("tree/_METADATA", "meta/metadata"):
        place = tmp_path / "checkpoints" / "3" / part
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(ValueError, match=r"all checkpoints .* are damaged .* is no file"):
            weights.load(f"{tmp_path}#a")
