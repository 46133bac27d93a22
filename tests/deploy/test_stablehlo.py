"""StableHLO: one file for three platforms and any batch, run where qkd_jax is not imported."""

import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import convert, integer_apply, load_stablehlo, save_stablehlo
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule

FRESH = """
import sys
import jax
import numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], exported.call(np.load(sys.argv[2])))
assert "qkd_jax" not in sys.modules and exported.platforms == ("cpu", "cuda", "tpu")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("hlo") / "model.stablehlo"
    integer = convert(*small_nets.case("w2a2"))
    assert save_stablehlo(integer, path) == path.stat().st_size
    return path, integer


def test_the_same_bits_without_qkd_jax_at_any_batch(saved, tmp_path):
    path, integer = saved
    for batch in (1, 5):
        images = small_nets.images(batch)
        np.testing.assert_array_equal(load_stablehlo(path)(images), integer_apply(integer, images))
    np.save(tmp_path / "images.npy", images)
    out = tmp_path / "logits.npy"
    command = [sys.executable, "-c", FRESH, path, tmp_path / "images.npy", out]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_array_equal(np.load(out), integer_apply(integer, images))


def test_the_record_beside_it(saved):
    path, _ = saved
    card = json.loads((path.parent / "model.stablehlo.json").read_text())
    assert card["platforms"] == ["cpu", "cuda", "tpu"] and card["jax"] and card["jaxlib"]
    assert card["inputs"] == [{"dtype": "float32", "shape": ["batch", *small_nets.IMAGES]}]
    assert card["outputs"] == [{"dtype": "float32", "shape": ["batch", 5]}]
    assert b".py" not in path.read_bytes()  # no paths of source files


@pytest.mark.parametrize("integer_only", [False, True])
def test_products_of_an_integer_only_net_are_on_integers_everywhere(tmp_path, integer_only):
    grids = Rule(".*", weight=Spec(8), input=Spec(8), output=Spec(8))
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    net, variables = small_nets.calibrated(nn.Dense(3), [grids], x)
    save_stablehlo(convert(net, variables, x, integer_only=integer_only), tmp_path / "x")
    module = jax.export.deserialize(bytearray((tmp_path / "x").read_bytes())).mlir_module()
    products = [line for line in module.splitlines() if "stablehlo.dot_general" in line]
    assert products and any("f32" in line for line in products) != integer_only


@pytest.mark.parametrize("signed", [True, False])
def test_accelerators_have_no_integer_convolution_but_of_int8(tmp_path, signed):
    """XLA refuses others on CUDA. Nothing runs here: the text that would be compiled is read."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
            return nn.Conv(3, (3, 3), name="b")(x).mean((1, 2))

    rules = [
        Rule("a", weight=Spec(8), input=Spec(8, symmetric=signed, signed=signed)),
        Rule("b", weight=Spec(8), input=Spec(8, signed=signed)),
    ]
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    integer = convert(*small_nets.calibrated(Two(), rules, x), x)
    save_stablehlo(integer, tmp_path / "x", platforms=["cuda"])
    module = jax.export.deserialize(bytearray((tmp_path / "x").read_bytes())).mlir_module()
    products = [line for line in module.splitlines() if "stablehlo.convolution" in line]
    kinds = [re.findall(r"x([a-z]+[0-9]+)>", line.rpartition(" : ")[2]) for line in products]
    assert kinds == [["i8", "i8", "i32"] if signed else ["f32"] * 3] * 2


def test_the_cpu_holds_codes_in_float_layer_by_layer(tmp_path):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="small")(nn.relu(nn.Dense(4, name="wide")(x)))

    rules = [Rule("wide", weight=Spec(13), input=Spec(13)), Rule("small", Spec(8), Spec(8))]
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    integer = convert(*small_nets.calibrated(Two(), rules, x), x)
    save_stablehlo(integer, tmp_path / "x", platforms=["cpu"])
    module = jax.export.deserialize(bytearray((tmp_path / "x").read_bytes())).mlir_module()
    products = [line for line in module.splitlines() if "stablehlo.dot_general" in line]
    assert ["xf32>" in line for line in products] == [False, True]
    # Numbers of the order of 1: with constants inside, XLA may round sum * multiplier + bias once.
    found, wanted = load_stablehlo(tmp_path / "x")(x), integer_apply(integer, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7)


def test_what_is_refused(saved, tmp_path):
    path, integer = saved
    with pytest.raises(ValueError, match="platform is 'gpu'"):
        save_stablehlo(integer, tmp_path / "x", platforms=["gpu"])
    with pytest.raises(ValueError, match="platforms is empty"):
        save_stablehlo(integer, tmp_path / "x", platforms=[])
    with pytest.raises(ValueError, match=r"x\.json cannot be read"):
        load_stablehlo(tmp_path / "x")
    card = json.loads((path.parent / "model.stablehlo.json").read_text())
    (tmp_path / "x").write_bytes(path.read_bytes()[:-1])
    (tmp_path / "x.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"its SHA-256 is not that of x\.json"):
        load_stablehlo(tmp_path / "x")
    (tmp_path / "x.json").write_text(json.dumps({**card, "version": 2}))
    with pytest.raises(ValueError, match="not of version 1"):
        load_stablehlo(tmp_path / "x")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="no record of a"):
        load_stablehlo(tmp_path / "x")
