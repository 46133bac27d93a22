"""Layers of bfloat16 and float16: codes of float32 weights, float32 sums, one cast at the end."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qkd_jax.deploy import convert, integer_apply
from qkd_jax.numerics import Spec, widened
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate

HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
WEIGHT, INPUT = Spec(8, granularity="channel"), Spec(8, signed=False, symmetric=False)


def calibrated(model, x, rules):
    net = quantize(model, rules)
    return net, calibrate(net, net.init(jax.random.key(0), x), [x])


def three_ways(net, variables, x):
    """The net one operation at a time, compiled, and as integers."""
    integer = convert(net, variables, x)
    found = net.apply(variables, x), jax.jit(net.apply)(variables, x), integer_apply(integer, x)
    return [np.asarray(y) for y in found]


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("dtype", HALF)
def test_the_layer_is_its_integers_scaled_once_and_cast_once(dtype, bits):
    # Sums of 300 products of 8-bit codes are far from what 8 or 11 digits hold.
    x = jax.random.normal(jax.random.key(1), (16, 300)).astype(dtype)
    spec = Spec(bits, signed=False, symmetric=False)
    model = nn.Dense(6, use_bias=False, dtype=dtype)
    net, variables = calibrated(model, x, [Rule(".*", weight=WEIGHT, input=spec)])
    own = variables["quant"]
    kernel = np.asarray(variables["params"]["kernel"])  # the float32 master, not what it rounds to
    w_scale = np.asarray(own["weight_quantizer"]["scale"])
    scale, zero = (np.asarray(own["input_quantizer"][k]) for k in ("scale", "zero_point"))
    wide = np.asarray(x).astype(np.float32)
    codes_x = np.clip(np.rint(wide * (np.float32(1) / scale)) + zero, 0, 2**bits - 1) - zero
    codes_w = np.clip(np.rint(kernel * (np.float32(1) / w_scale)), -127, 127)
    sums = (codes_x.astype(np.float64) @ codes_w.astype(np.float64)).astype(np.float32)
    assert np.abs(sums).max() < 2**24
    wanted = (sums * (scale * w_scale)).astype(HALF[dtype])
    for found in three_ways(net, variables, x):
        assert found.dtype == HALF[dtype]
        np.testing.assert_array_equal(found, wanted)


class Kinds(nn.Module):
    """One layer of every kind, attention's products among them, and an output with a grid."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, dtype=self.dtype, name="conv")(x)
        x = nn.relu(nn.ConvTranspose(8, (2, 2), dtype=self.dtype, name="up")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="attention")(x)
        x = nn.Dense(8, use_bias=False, dtype=self.dtype, name="summed")(x)
        x = nn.Einsum((8, 5), "bsd,de->bse", dtype=self.dtype, name="einsum")(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(x.max(1))


KINDS = [
    Rule("attention/(query_key|weights_value)", input=Spec(8), other=Spec(8)),
    Rule("up", weight=Spec(8), input=Spec(8)),
    Rule("summed", weight=WEIGHT, input=Spec(8), output=Spec(8)),
    Rule("einsum", weight=WEIGHT),
    Rule(".*", weight=WEIGHT, input=INPUT),
]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_layers_of_every_kind_agree_with_their_integers_to_the_bit(dtype):
    """Not one operation at a time: XLA itself rounds a softmax of bfloat16 elsewhere then."""
    x = jax.random.normal(jax.random.key(1), (4, 4, 4, 3))
    net, variables = calibrated(Kinds(dtype), x, KINDS)
    compiled = jax.jit(net.apply)(variables, x)
    assert compiled.dtype == HALF[dtype] and np.any(compiled != 0)
    np.testing.assert_array_equal(compiled, integer_apply(convert(net, variables, x), x))


class Behind(nn.Module):
    """A quantized layer behind one that is not: a product of bfloat16 is what it reads."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(40, use_bias=False, dtype=self.dtype, name="float")(x)
        return nn.Dense(5, dtype=self.dtype, name="quantized")(x)


@pytest.mark.parametrize("dtype", HALF)
def test_a_quantizer_reads_what_its_input_was_rounded_to(dtype):
    x = jax.random.normal(jax.random.key(1), (64, 90))
    rules = [Rule("float"), Rule(".*", weight=WEIGHT, input=Spec(8))]
    net, variables = calibrated(Behind(dtype), x, rules)
    eager, compiled, integer = three_ways(net, variables, x)
    np.testing.assert_array_equal(eager, compiled)
    np.testing.assert_array_equal(eager, integer)
    # So do its statistics: XLA leaves out roundings between operations that it compiles together.
    floats = nn.Dense(40, use_bias=False, dtype=dtype).apply(
        {"params": variables["params"]["float"]}, x
    )
    largest = np.abs(np.asarray(floats).astype(np.float32)).max()
    scale = variables["quant"]["quantized"]["input_quantizer"]["scale"]
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_widening_keeps_every_number(dtype):
    bits = np.arange(2**16, dtype=np.uint16).view(HALF[dtype])
    with np.errstate(invalid="ignore"):
        wanted = bits.astype(np.float32)
    wanted = wanted[normal := np.isfinite(wanted) & ((wanted == 0) | (np.abs(wanted) > 1e-37))]
    for function in (widened, jax.jit(widened)):
        np.testing.assert_array_equal(function(jnp.asarray(bits[normal])), wanted)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_dorefa_of_8_bits_converts(granularity):
    """Its odd codes reach 255, for which bfloat16 has no digit to spare."""
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))
    spec = Spec(8, quantizer="dorefa", granularity=granularity)
    model = nn.Conv(16, (3, 3), dtype="bfloat16")
    net, variables = calibrated(model, x, [Rule(".*", weight=spec, input=Spec(8))])
    eager, compiled, integer = three_ways(net, variables, x)
    np.testing.assert_array_equal(compiled, integer)
    np.testing.assert_array_equal(eager, integer)


def test_codes_of_16_bits_survive_the_backward_pass():
    """bfloat16 rounds the highest code to 32768, which int16 does not hold."""
    x = jnp.full((2, 3), 1.0, jnp.bfloat16)
    rules = [Rule(".*", weight=Spec(8), input=Spec(16))]
    net, variables = calibrated(nn.Dense(1, dtype=jnp.bfloat16), x, rules)
    loss = lambda p: net.apply({**variables, "params": p}, x).sum().astype(jnp.float32)
    grads = jax.grad(loss)(variables["params"])["kernel"]
    np.testing.assert_allclose(grads, 2.0, rtol=2**-8)


def test_integer_only_refuses_a_product_that_is_rounded_to_bfloat16():
    x = jax.random.normal(jax.random.key(1), (16, 6))
    model = nn.Sequential([nn.Dense(4, use_bias=False, dtype=jnp.bfloat16), nn.Dense(2)])
    rules = [Rule(".*", weight=WEIGHT, input=Spec(8), output=Spec(8))]
    net, variables = calibrated(model, x, rules)
    with pytest.raises(ValueError, match=r"integer_only.*rounds to bfloat16"):
        convert(net, variables, x, integer_only=True)


@pytest.mark.parametrize(("bits", "narrow"), [(8, True), (12, False)])
def test_a_layer_of_bfloat16_multiplies_codes_of_8_bits_as_such(bits, narrow):
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))
    spec = Spec(bits, signed=False, symmetric=False)
    model = nn.Sequential(
        [nn.Conv(4, (3, 3), dtype="bfloat16"), nn.DenseGeneral(4, dtype="bfloat16")]
    )
    net, variables = calibrated(model, x, [Rule(".*", weight=WEIGHT, input=spec)])
    text = jax.jit(net.apply).lower(variables, x).as_text()
    for product in ("stablehlo.convolution", "stablehlo.dot_general"):
        (line,) = (line for line in text.splitlines() if product in line)
        operands, result = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16>") == (2 if narrow else 0), line
        assert "xf32>" in result, line
