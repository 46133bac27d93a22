"""Formats without integer products: groups, floats, code books, MX and NVFP4, converted and saved.

What they stand for is multiplied in float, so that the outputs are those of the compiled net, bit
for bit, where the stored bits are codes and scales alone.
"""

import copy
import json
import math
import os
import random
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets
from mutation import accepted
from test_saved_model import files, leaves, sealed

from qkd_jax import deploy
from qkd_jax.deploy import convert, integer_apply
from qkd_jax.deploy.integer.pack import unpack
from qkd_jax.numerics import IntFormat, Spec
from qkd_jax.quantize import Rule, inspection, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.trees import find
from qkd_jax.weights.files import parse_safetensors


class Net(nn.Module):
    """A grouped convolution, a table that is looked up and tied, attention and a head."""

    @nn.compact
    def __call__(self, x, ids):
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=2, name="conv")(x)).mean(1)
        table = nn.Embed(6, 16, name="table")
        x = x + table(ids)
        x = nn.LayerNorm(name="norm")(nn.MultiHeadDotProductAttention(2, name="attention")(x))
        return nn.Dense(5, name="head")(x), table.attend(x)


IMAGES = np.random.default_rng(0).normal(0.1, 1, (3, 3, 4, 16)).astype(np.float32)
IDS = np.array([[0, 1, 2, 5]] * 3)
ARGS = IMAGES, IDS


def floats(bits=4, **options):
    return dict(bits=bits, quantizer="float", options=options)


def blocks(fields, size=8):
    return dict(fields, granularity=size, dynamic=True)


MX, NV = dict(scale_format="e8m0"), dict(scale_format="e4m3fn")
INT8 = dict(bits=8)
GROUPS = dict(granularity=8)
# name: (weight, input or None, bits of a weight, bits of a scale)
CASES = {
    "int4 g8": (dict(bits=4, **GROUPS), None, 4, 32),
    "int4 g8, int8 inputs": (dict(bits=4, **GROUPS), INT8, 4, 32),
    "int3 g4, float16 scales": (
        dict(bits=3, granularity=4, options=dict(scale_format="float16")),
        INT8,
        3,
        16,
    ),
    "int5 g8, bfloat16 scales": (
        dict(bits=5, **GROUPS, options=dict(scale_format="bfloat16")),
        None,
        5,
        16,
    ),
    "affine int4 g8": (dict(bits=4, symmetric=False, **GROUPS), None, 4, 40),
    "learned int2 g4": (dict(bits=2, quantizer="lsq", granularity=4), INT8, 2, 32),
    "nf4 g8": (dict(bits=4, quantizer="codebook", **GROUPS), INT8, 4, 32),
    "3-bit code book": (dict(bits=3, quantizer="codebook", granularity="channel"), None, 3, 32),
    "apot": (dict(bits=4, quantizer="apot"), dict(bits=4, quantizer="apot"), 4, 32),
    "normalized apot": (
        dict(bits=3, quantizer="apot", options=dict(normalize=True), granularity="channel"),
        None,
        3,
        32,
    ),
    "fp8": (floats(8) | dict(granularity="channel"), floats(8), 8, 32),
    "e5m2, dynamic": (
        floats(8, format="e5m2"),
        floats(8, format="e5m2") | dict(dynamic=True, granularity="token"),
        8,
        32,
    ),
    "bf16": (floats(16), None, 16, 32),
    "mxfp8": (floats(8, **MX) | GROUPS, blocks(floats(8, **MX)), 8, 8),
    "mxfp6": (floats(6, **MX) | GROUPS, blocks(floats(6, **MX)), 6, 8),
    "mxfp6 e2m3": (floats(6, format="e2m3", **MX) | GROUPS, None, 6, 8),
    "mxfp4": (floats(4, **MX) | GROUPS, blocks(floats(4, **MX)), 4, 8),
    "mxint8": (dict(bits=8, options=MX, **GROUPS), blocks(dict(bits=8, options=MX)), 8, 8),
    "nvfp4": (floats(4, **NV) | GROUPS, blocks(floats(4, **NV)), 4, 8),
    "nvfp4, dynamic weights": (blocks(floats(4, **NV)), None, 4, 8),
    "ternary g8": (dict(bits=2, quantizer="ternary", **GROUPS), None, 2, 32),
    "binary g8": (dict(bits=1, quantizer="binary", **GROUPS), INT8, 1, 32),
    "dorefa g8": (dict(bits=4, quantizer="dorefa", **GROUPS), None, 4, 32),
}
FAST = ("int4 g8, int8 inputs", "nf4 g8", "mxfp4", "nvfp4")


def rules(weight, inputs):
    weight, inputs = Spec(**weight), inputs and Spec(**inputs)
    # Attention's values are summed over tokens, along which there are no blocks.
    values = inputs
    if inputs is not None and inputs.dynamic:
        values = Spec(8, quantizer="float", dynamic=True, granularity="token")
    return [
        Rule("attention/weights_value", input=values),
        Rule(".*", weight=weight, input=inputs),
    ]


def made(case):
    net = quantize(Net(), rules(*CASES[case][:2]))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *ARGS)
    return net, calibrate(net, small_nets.trained_like(shapes), [ARGS], observer="minmax")


def is_equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES]
)
def test_a_format_is_converted_saved_and_read(case, tmp_path):
    weight, _, bits, scale_bits = CASES[case]
    net, variables = made(case)
    integer = convert(net, variables, ARGS)
    is_equal(integer_apply(integer, ARGS), jax.jit(net.apply)(variables, *ARGS))
    other = (IMAGES[:2] * 1.5, IDS[:2])  # another batch
    is_equal(integer_apply(integer, other), jax.jit(net.apply)(variables, *other))
    deploy.save(integer, tmp_path)
    is_equal(integer_apply(deploy.load(tmp_path), other), integer_apply(integer, other))
    # Codes and scales, and nothing else of a weight; the tied table lies there once.
    params = variables["params"]
    kernels = {
        path: find(params, path) for path in ("conv/kernel", "table/embedding", "head/kernel")
    }
    layers = {layer.path: layer for layer in integer.program.layers}
    assert len(layers) == 7  # and attention's four
    for name, kernel in kernels.items():
        path = name.split("/")[0]
        stored = layers[path]
        assert stored.bytes == math.ceil(kernel.size * bits / 8)
        assert integer.arrays[f"{path}/weight"].nbytes == stored.bytes
        size = weight.get("granularity", "tensor")
        if isinstance(size, int):  # the window of a convolution shares the scale of a group
            count = kernel.size // size // (9 if path == "conv" else 1)
            second = 4 if "nvfp4" in case else 0
            assert stored.scale_bytes == count * scale_bits // 8 + second
    largest = max(a.size for a in integer.arrays.values() if a.dtype == jnp.float32)
    # int4 with groups of 8 has a float32 scale for each 8 weights.
    assert largest <= max(k.size for k in kernels.values()) // 4
    assert integer.weight_bytes == sum(v.bytes + v.scale_bytes for v in layers.values())


def test_captured_codes_of_blocks_are_bit_patterns():
    net, variables = made("mxfp4")
    _, captured = integer_apply(convert(net, variables, ARGS), ARGS, capture=True)
    codes = captured["head/input"]
    assert codes.shape == (3, 4, 16) and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() <= 15 and len(np.unique(codes)) > 8


@pytest.mark.parametrize("case", ["int4 g8, int8 inputs", "nf4 g8", "mxfp4"])
def test_integer_only_needs_integers(case):
    net, variables = made(case)
    message = r"integer_only: .* (no integer codes|finds its range at run time)"
    with pytest.raises(ValueError, match=message):
        convert(net, variables, ARGS, integer_only=True)


class Wide(nn.Module):
    """A million weights and a few more."""

    @nn.compact
    def __call__(self, x):
        for width in (768, 768, 384):
            x = nn.relu(nn.Dense(width, use_bias=False)(x))
        return x


WIDE = {
    "int4 g32": (dict(bits=4, granularity=32), 4 + 32 / 32),
    "int4 g32, float16 scales": (
        dict(bits=4, granularity=32, options=dict(scale_format="float16")),
        4.5,
    ),
    "int3 g64": (dict(bits=3, granularity=64), 3.5),
    "int5": (dict(bits=5, granularity="channel"), 5),
    "int6 g128": (dict(bits=6, granularity=128), 6.25),
    "int7": (dict(bits=7), 7),
    "nf4 g64": (dict(bits=4, quantizer="codebook", granularity=64), 4.5),
    "mxfp8": (floats(8, **MX) | dict(granularity=32), 8.25),
    "mxfp6": (floats(6, **MX) | dict(granularity=32), 6.25),
    "mxfp4": (floats(4, **MX) | dict(granularity=32), 4.25),
    "nvfp4": (floats(4, **NV) | dict(granularity=16), 4.5),
    "ternary": (dict(bits=2, quantizer="ternary"), 2),
    "binary": (dict(bits=1, quantizer="binary"), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE)
def test_files_are_as_small_as_their_rules_imply(case, tmp_path):
    """A net of 1,376,256 weights: at most 1.03 of the bits of weights and scales, JSON included."""
    spec, bits = WIDE[case]
    net = quantize(Wide(), [Rule(".*", weight=Spec(**spec))])
    x = np.ones((1, 640), np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = calibrate(net, small_nets.trained_like(shapes), [x], observer="minmax")
    count = sum(a.size for a in jax.tree.leaves(variables["params"]))
    sizes = deploy.save(convert(net, variables, x), tmp_path)
    ratio = sum(sizes.values()) / (count * bits / 8)
    print(f"\n{case}: {count:,} weights, {sizes}, {ratio:.4f} of {bits} bits a weight")
    assert count >= 10**6 and ratio <= 1.03
    implied = inspection.size(net, variables, x)
    assert abs(implied.bytes / (count * bits / 8) - 1) < 0.01


FORMATS = ("mxfp4", "nvfp4", "nf4 g8", "affine int4 g8", "int3 g4, float16 scales")


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="body")(x)))

    x = IMAGES[0, 0]
    made = {}
    for case in FORMATS:
        weight, inputs, *_ = CASES[case]
        net = quantize(
            Small(), [Rule(".*", weight=Spec(**weight), input=inputs and Spec(**inputs))]
        )
        shapes = jax.eval_shape(net.init, jax.random.key(0), x)
        variables = calibrate(net, small_nets.trained_like(shapes), [x])
        folder = tmp_path_factory.mktemp("small")
        integer = convert(net, variables, x)
        deploy.save(integer, folder)
        made[case] = folder, integer_apply(integer, x)
    return made, x


ODD = (None, True, -1, 0, 1, 2, 3, 7, 10**12, 0.5, float("inf"), "", "x", [], {}, [1], [0, 4])
ODD = (*ODD, "e8m0", "e4m3fn", {"is": "x"}, {"is": "int_format", "bits": 4})
COUNT = int(os.environ.get("QKD_JAX_MUTATIONS", 40))


@pytest.mark.slow
@pytest.mark.parametrize("case", FORMATS)
def test_fuzzed_programs_with_right_hashes(case, small_files, tmp_path):
    """A changed value: refused with a ValueError, or a model that gives logits of that shape."""
    folder, wanted = small_files[0][case]
    content, text = files(folder)
    tensors, _ = parse_safetensors(content, "x")
    body = json.loads(text)
    del body["tensors"]
    steps = [i for i, s in enumerate(body["program"]["steps"]) if s["is"] in ("weight", "quantize")]
    places = [
        p
        for p in leaves(body)
        if p[:1] == ("arrays",) or (p[:2] == ("program", "steps") and p[2:3] and p[2] in steps)
    ]
    rng = random.Random(case)
    refused = 0
    for number in range(COUNT):
        changed, place = copy.deepcopy(body), rng.choice(places)
        at = changed
        for key in place[:-1]:
            at = at[key]
        if rng.random() < 0.1:
            del at[place[-1]]
        else:
            at[place[-1]] = rng.choice(ODD)
        try:
            model = deploy.load(sealed(tmp_path, changed, tensors))
        except ValueError as error:
            assert str(tmp_path) in str(error), (number, place)
            refused += 1
            continue
        found = jax.eval_shape(integer_apply, model, small_files[1])
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, (number, place)
    assert refused > COUNT / 2


@pytest.mark.parametrize("case", FORMATS)
def test_damaged_bytes_of_codes_and_scales_are_noticed(case, small_files, tmp_path):
    folder, _ = small_files[0][case]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    assert not list(accepted(path, lambda: deploy.load(tmp_path), named=tmp_path, count=COUNT))


@pytest.mark.parametrize("case", FORMATS)
def test_stablehlo_gives_the_same_logits(case, small_files, tmp_path):
    """At other batch sizes too, of a model that was read from its files.

    To the last bits of logits of the order of 1: with constants inside, XLA adds in another order.
    """
    integer, x = deploy.load(small_files[0][case][0]), small_files[1]
    # Codes, scales and code, and no table of all 65,536 half-precision numbers.
    assert deploy.save_stablehlo(integer, tmp_path / "x") < 2**16
    for images in (x[:1] * 1.5, np.concatenate([x, -x])[:7]):
        found = deploy.load_stablehlo(tmp_path / "x")(images)
        np.testing.assert_allclose(found, integer_apply(integer, images), rtol=0, atol=1e-6)


def test_version_1_is_read(tmp_path):
    """Its codes of 5 to 7 bits lie one to a byte."""

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(x)

    x = IMAGES[0, 0]
    net = quantize(Dense(), [Rule("head", weight=Spec(6), input=Spec(8))])
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    integer = convert(net, calibrate(net, small_nets.trained_like(shapes), [x]), x)
    deploy.save(integer, tmp_path)
    content, text = files(tmp_path)
    tensors = dict(parse_safetensors(content, "x")[0])
    body = json.loads(text)
    (step,) = (s for s in body["program"]["steps"] if s["is"] == "weight")
    codes = unpack(integer.arrays["head/weight"], tuple(step["shape"]), IntFormat(6))
    assert codes.dtype == jnp.int8 and codes.min() < -16
    # As version 1 joins small arrays: by type, sorted by name.
    body["version"] = 1
    entry = body["arrays"]["head/weight"]
    assert entry == {"dtype": "uint8", "shape": [36], "tensor": "uint8", "start": 0}
    body["arrays"]["head/weight"] = dict(dtype="int8", shape=[16, 3], tensor="int8", start=0)
    del tensors["uint8"]
    tensors["int8"] = np.asarray(codes).reshape(-1)
    loaded = deploy.load(sealed(tmp_path / "old", body, tensors))
    np.testing.assert_array_equal(loaded.arrays["head/weight"], integer.arrays["head/weight"])
    is_equal(integer_apply(loaded, x), integer_apply(integer, x))
