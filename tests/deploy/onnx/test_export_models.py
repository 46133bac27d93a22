"""Every model of MODELS as an ONNX file, float and quantized, on ONNX Runtime; and its idioms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets
import small_vision

from qkd_jax import models
from qkd_jax.deploy import onnx_session, to_onnx
from qkd_jax.models import MODELS
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# Fields that make a model small. The other ResNets have the blocks of these.
TINY = {
    "mobilenet": dict(width=4, stem_stride=1),
    "mobilenet_v2": dict(width=4, stem_stride=1),
    "mlp": dict(hidden=(16, 8), batch_norm=True),
    "vit": dict(depth=1, width=16, heads=2),
    "resnet8": dict(width=4),
    "resnet18": dict(width=4, blocks=(1, 1)),
}
OTHERS = {f"resnet{depth}" for depth in (14, 20, 32, 44, 56, 110, "8x4", "32x4")}
OTHERS |= {"resnet34", "resnet50"}


def logits(path, images):
    given = np.moveaxis(np.asarray(images), -1, 1) if images.ndim > 3 else np.asarray(images)
    session = onnx_session(path)
    return session.run(None, {session.get_inputs()[0].name: given})[0]


def exported(model, rules, images, path, **options):
    """Returns (file, largest difference from the net over its largest logit)."""
    make = small_nets.calibrated if rules else _float
    net, variables = make(model, rules, images)
    written = to_onnx(net, variables, images[:2], path, **options)
    wanted = np.asarray(jax.jit(net.apply)(variables, images))
    difference = np.abs(logits(path, images) - wanted).max() / np.abs(wanted).max()
    return written, float(difference)


def _float(model, rules, images):
    return small_nets.float_net(model, images, rules)


def test_every_model_is_exported_here():
    published = set(small_vision.FIELDS) | set(small_vision.SAME)  # in tests/models
    assert set(MODELS) == set(TINY) | OTHERS | published


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_model(tmp_path, name):
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    model = models.create(name, 5, **TINY[name])
    written, difference = exported(model, (), images, tmp_path / "f.onnx")
    assert difference < 1e-5
    assert {"ReduceMax", "Sqrt"}.isdisjoint(written.operations)
    # A class token asks for the batch's size; nothing else is gathered.
    assert written.operations.get("Gather", 0) == written.operations.get("Shape", 0) <= 1
    rules = presets.rules("static")
    written, difference = exported(model, rules, images, tmp_path / "q.onnx")
    # One code of 255 may differ where a value lies at a border, and its error grows with depth.
    assert difference < 0.03
    assert set(written.stored.values()) <= {("int8", "int8")}
    shared = ("key", "value", "shortcut")  # they read what another layer reads
    own = [layer for layer in written.stored if not layer.endswith(shared)]
    assert written.operations["QuantizeLinear"] == len(own) + (2 if "vit" in name else 0) * 2
    moves = written.operations.get("Transpose", 0) + written.operations.get("Reshape", 0)
    # Patches to tokens; per block three splits into heads and one joining, each with a turn.
    assert moves == (2 + 8 if name.startswith("vit") else 0)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("approximate", [False, True])
def test_idioms_are_one_node(tmp_path, approximate, opset):
    class Idioms(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(name="fast")(x)
            x = nn.gelu(x, approximate=approximate) + x
            centred = x - x.mean(-1, keepdims=True)
            var = (centred**2).mean(-1, keepdims=True)
            x = (
                self.param("scale", nn.initializers.ones, (1, 1, 12))
                * centred
                / jnp.sqrt(var + 1e-5)
            )
            x = nn.LayerNorm(use_bias=False, use_fast_variance=False, name="slow")(x)
            x = nn.softmax(2 * x) + nn.softmax(x, axis=1)
            return nn.LayerNorm(use_scale=False, use_bias=False, epsilon=0.1, name="bare")(x)

    x = 3 * jax.random.normal(jax.random.key(0), (5, 7, 12)) + 1
    written, difference = exported(Idioms(), (), x, tmp_path / "m.onnx", opset=opset)
    assert difference < 1e-5
    assert written.operations["Softmax"] == 2
    assert written.operations["LayerNormalization"] == 3
    if opset == 21:
        assert written.operations["Gelu"] == 1


def test_what_only_looks_like_an_idiom_stays_as_it_is(tmp_path):
    class Almost(nn.Module):
        @nn.compact
        def __call__(self, x):
            half = x * 0.5 * (1 + jax.lax.erf(x / 1.5))  # not the square root of 2
            powers = jnp.exp(x)
            shares = powers / (powers.sum(-1, keepdims=True) + 1)
            norm = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(
                (x**2).mean(-1, keepdims=True) + 1
            )
            return half + shares + norm + powers

    x = jax.random.normal(jax.random.key(0), (5, 12))
    written, difference = exported(Almost(), (), x, tmp_path / "m.onnx", opset=21)
    assert difference < 1e-5
    assert {"Gelu", "Softmax", "LayerNormalization"}.isdisjoint(written.operations)


@pytest.mark.parametrize("case", ["w2a2", pytest.param("w4a4", marks=pytest.mark.slow)])
def test_weights_of_few_bits_as_int4(tmp_path, case):
    """The trained net's logits, as from int8 codes, in half the bytes a code."""
    net, variables, images = small_nets.case(case)
    wide = to_onnx(net, variables, images[:2], tmp_path / "wide.onnx", opset=21)
    packed = to_onnx(net, variables, images[:2], tmp_path / "int4.onnx", opset=21, int4=True)
    right = np.asarray(jax.jit(net.apply)(variables, images))
    for file in (wide, packed):  # sums of integers in one, of floats in the other
        assert np.abs(logits(file.path, images) - right).max() < 1e-6 * np.abs(right).max()
    inner = [layer for layer in packed.stored if layer not in ("stem", "head")]
    bits = int(case[1])
    for layer in inner:
        assert packed.stored[layer] == (f"int{bits}", "int4")
        assert wide.stored[layer] == (f"int{bits}", "int8")
        count = variables["params"][layer]["kernel"].size
        assert _bytes(wide, layer) == count and _bytes(packed, layer) == count // 2
    with pytest.raises(ValueError, match="opset is 17, and ONNX has int4 since 21"):
        to_onnx(net, variables, images[:2], tmp_path / "m.onnx", int4=True)


def _bytes(written, layer):
    stored = {i.name: i for i in onnx.load(written.path).graph.initializer}
    return len(stored[f"{layer}/weight"].raw_data)


def test_quantized_attention_products(tmp_path):
    model = models.create("vit", 5, depth=1, width=16, heads=2)
    rules = [Rule(".*", weight=Spec(8, granularity="channel"), input=Spec(8, symmetric=False))]
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    written, difference = exported(model, rules, images, tmp_path / "m.onnx")
    assert difference < 0.03
    # stem, query/key/value, both operands of both products, out, mlp1, mlp2, head
    assert written.operations["QuantizeLinear"] == 10


class Token(nn.Module):
    """A learned row before those of the input, as transformers have it."""

    @nn.compact
    def __call__(self, x):
        token = self.param("token", nn.initializers.normal(), (1, 1, x.shape[-1]))
        row = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1]))
        return nn.Dense(2)(jnp.concatenate([row, x], 1))


def test_a_constant_beside_the_input_at_the_oldest_opset(tmp_path):
    x = jax.random.normal(jax.random.key(0), (5, 3, 4))
    _, difference = exported(Token(), (), x, tmp_path / "m.onnx", opset=13)
    assert difference < 1e-5


@pytest.mark.parametrize("spec", [Spec(4), Spec(4, quantizer="qil")], ids=lambda s: s.quantizer)
def test_codes_that_are_rounded_down(tmp_path, spec):
    x = jax.random.normal(jax.random.key(0), (32, 6))
    down = dataclasses.replace(spec, rounding="floor")
    rules = [Rule(".*", weight=Spec(8), input=down)]
    _, difference = exported(nn.Dense(3), rules, x, tmp_path / "m.onnx")
    assert difference < 1e-5
