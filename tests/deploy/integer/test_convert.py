"""The integer model against the fake-quantized net: equal codes, equal logits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import convert, integer_apply
from qkd_jax.numerics import Spec
from qkd_jax.ptq import fold_bn
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantizers import QUANTIZERS


def fake_quantized(net, variables, images):
    """Logits of the net, and the codes of every quantized layer input."""
    codes = {}

    def note(next_fun, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        spec = net.spec_of(path, "input")
        if context.method_name == "__call__" and spec and isinstance(module, nn.Conv | nn.Dense):
            params = module.scope.get_variable("params", "input_quantizer")
            quantizer = QUANTIZERS[spec.quantizer]
            scale, zero_point, _ = quantizer.integer_view(params, spec)
            centred = jnp.round(quantizer.fake_quant(args[0], params, spec) * (1 / scale))
            codes[f"{path}/input"] = (centred + zero_point).astype(jnp.int32)
        return next_fun(*args, **kwargs)

    @jax.jit
    def run(variables, images):
        codes.clear()
        with nn.intercept_methods(note):
            return net.apply(variables, images), dict(codes)

    return run(variables, images)


def head_by_hand(net, variables, codes):
    """The head's logits from its input's codes in float64, rounded once and rounded twice.

    sum * multiplier + bias is one rounding where a compiler fuses the two, which XLA does in one
    program and not in another, and even in a part of an array; nothing else is left to it.
    """
    layer, states = variables["params"]["head"], variables["quant"]["head"]
    grids = {}
    for operand in ("input", "weight"):
        spec, params = net.spec_of("head", operand), states[f"{operand}_quantizer"]
        grids[operand] = QUANTIZERS[spec.quantizer].integer_view(params, spec)[:2]
    (input_scale, zero_point), (weight_scale, _) = grids["input"], grids["weight"]
    spec = net.spec_of("head", "weight")
    kernel = QUANTIZERS[spec.quantizer].fake_quant(
        layer["kernel"], states["weight_quantizer"], spec
    )
    weight = np.round(np.float64(kernel) / np.float64(weight_scale))
    sums = (np.float64(codes) - np.float64(zero_point)) @ weight
    multiplier = np.asarray(weight_scale * input_scale).reshape(-1)
    once = (sums * np.float64(multiplier) + np.float64(layer["bias"])).astype(np.float32)
    return once, np.float32(sums) * multiplier + np.asarray(layer["bias"])


def differing(a, b):
    assert set(a) == set(b)
    return sum(int((a[k] != b[k]).sum()) for k in a)


@pytest.mark.parametrize(
    "case",
    small_nets.ONE_FAST,
)
def test_every_code_is_that_of_the_fake_quantized_net(case):
    net, variables, example = small_nets.case(case)
    images = small_nets.images(40, seed=3)
    integer = convert(net, variables, example)
    folded = fold_bn(net, variables, example)
    logits, codes = fake_quantized(net, folded, images)
    once, twice = head_by_hand(net, folded, codes["head/input"])
    assert np.all((logits == once) | (logits == twice))
    for formulation in ("int32", "float32"):
        out, found = integer_apply(integer, images, capture=True, formulation=formulation)
        assert differing(codes, found) == 0
        assert np.all((out == once) | (out == twice))
    if case == "w4a4":
        # Folding moves the rounding of floats by an ulp: a code of the unfolded net may flip.
        _, unfolded = fake_quantized(net, variables, images)
        assert differing(unfolded, found) <= 1e-4 * sum(c.size for c in found.values())


def test_the_model_is_small_and_a_pytree():
    net, variables, example = small_nets.case("w2a2")
    integer = convert(net, variables, example)
    kernels = {
        p: variables["params"][p]["kernel"].size for p in ("stem", "grouped", "hidden", "head")
    }
    sizes = {layer.path: layer.bytes for layer in integer.program.layers}
    assert sizes["grouped"] == kernels["grouped"] // 4
    assert sizes["hidden"] == kernels["hidden"] // 4
    assert sizes["stem"] == kernels["stem"] * 7 // 8
    # No array is as large as a float kernel: only codes, scales, biases and steps are left.
    floats = [a for a in integer.arrays.values() if a.dtype == jnp.float32]
    assert max(a.size for a in floats) <= 12
    assert integer.arrays["hidden/weight"].dtype == jnp.uint8
    assert integer.nbytes == sum(a.nbytes for a in jax.tree.leaves(integer))
    assert "grouped" in integer.report() and "int2" in integer.report()
    apply = jax.jit(functools.partial(integer_apply, formulation="int32"))
    whole = integer_apply(integer, example, formulation="int32")
    np.testing.assert_allclose(apply(integer, example[:3]), whole[:3], rtol=1e-6)


class Other(nn.Module):
    """An affine first input, an output quantizer, a layer in float, one used twice, a transpose."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True, name="up")(x)
        twice = nn.Conv(4, (1, 1), name="twice")
        x = nn.relu(twice(twice(x)))
        x = nn.Conv(4, (3, 3), name="left")(x).mean((1, 2))
        x = nn.Dense(3, name="weight_only")(x)
        return nn.Dense(3, name="affine")(x)


@pytest.mark.slow
def test_unusual_layers():
    both = Spec(8, symmetric=False)
    rules = [
        Rule("left"),
        Rule("weight_only", weight=Spec(4, granularity="channel"), output=Spec(8)),
        Rule("affine", weight=Spec(6, symmetric=False, signed=False), input=both),
        Rule("up|twice", weight=Spec(8, granularity="channel"), input=both),
    ]
    x = small_nets.images(5)
    net, variables = small_nets.calibrated(Other(), rules, x)
    integer = convert(net, variables, x)
    logits, captured = integer_apply(integer, x, capture=True)
    np.testing.assert_array_equal(logits, jax.jit(net.apply)(variables, x))
    assert set(captured) == {
        "up/input", "twice/input", "twice/input#2", "weight_only/output", "affine/input",
    }  # fmt: skip
    assert "left/kernel" in integer.arrays and "weight_only/kernel" not in integer.arrays
    assert [layer.path for layer in integer.program.layers].count("twice") == 1
    assert integer.arrays["weight_only/weight"].nbytes == 6  # 12 codes of 4 bits


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 8, name="embed")(x)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x, deterministic=True)
        return nn.Einsum((3, 8), "btf,of->bto", name="einsum")(nn.LayerNorm(name="norm")(x))


@pytest.mark.slow
def test_attention_embedding_and_einsum():
    net = quantize(
        Attention(),
        [
            Rule(".*", weight=Spec(8, granularity="channel"), input=Spec(8)),
        ],
    )
    tokens = jnp.array([[0, 3, 6, 2], [5, 1, 1, 4]])
    net, variables = small_nets.calibrated(net.model, net.rules, tokens)
    integer = convert(net, variables, tokens)
    wanted = jax.jit(net.apply)(variables, tokens)
    found = integer_apply(integer, tokens, formulation="int32")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))
    floats = [k for k, a in integer.arrays.items() if a.dtype == jnp.float32 and a.size > 24]
    assert floats == []


def test_sums_that_int32_cannot_hold_are_refused():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="wide", kernel_init=nn.initializers.ones)(x)

    x = jax.random.normal(jax.random.key(0), (2, 64))
    net, variables = small_nets.calibrated(
        Wide(), [Rule("wide", weight=Spec(16), input=Spec(16))], x
    )
    with pytest.raises(ValueError, match=r"'wide' can reach [\d,]+, beyond int32"):
        convert(net, variables, x)
    net, variables = small_nets.calibrated(
        Wide(), [Rule("wide", weight=Spec(13), input=Spec(13))], x
    )
    integer = convert(net, variables, x)
    with pytest.raises(ValueError, match="float32 is exact up to 16,777,216"):
        integer_apply(integer, x, formulation="float32")
    assert integer_apply(integer, x).shape == (2, 1)
    with pytest.raises(ValueError, match="formulation is 'int8'"):
        integer_apply(integer, x, formulation="int8")


class Large(nn.Module):
    """A convolution and a dense layer of integer weights, whose scale is 1."""

    window: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        shape = (*self.window, x.shape[-1])
        kernel = 128 - 2 ** np.random.default_rng(1).integers(0, 3, (*shape, 3))
        fields = dict(use_bias=False, name="layer")
        if x.ndim == 2:
            return nn.Dense(3, kernel_init=lambda *_: jnp.float32(kernel[0, 0]), **fields)(x)
        return nn.Conv(3, self.window, kernel_init=lambda *_: jnp.float32(kernel), **fields)(x)


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
def test_sums_beyond_float32_are_cut_into_pieces(window):
    """Codes near the ends of their ranges, whose sums are odd and beyond 2^24: no bit is lost."""
    rng = np.random.default_rng(0)
    x = (256 - 2 ** rng.integers(0, 3, (2, 3000) if window == (1, 1) else (2, 3, 3, 331))) * 1.0
    x = x.astype(np.float32)
    rules = [Rule("layer", weight=Spec(8), input=Spec(8, signed=False))]
    net = quantize(Large(window), rules)
    x.flat[0] = 255  # the grids are those of the integers
    variables = calibrate(net, net.init(jax.random.key(0), x), [x], observer="minmax")
    integer = convert(net, variables, x)
    (step,) = (s for s in integer.program.steps if hasattr(s, "pieces"))
    kernel = np.asarray(variables["params"]["layer"]["kernel"]).astype(np.int64)
    assert step.bound == int(np.abs(kernel).reshape(-1, 3).sum(0).max()) * 255 > 4 * 2**24
    assert step.pieces == -(-step.bound // 2**24)
    if window == (1, 1):
        sums = x.astype(np.int64) @ kernel
    else:
        padded = np.pad(x.astype(np.int64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(1, 2))
        sums = np.einsum("nyxcij,ijco->nyxo", windows, kernel)
    assert np.any(sums % 2) and np.abs(sums).max() > 2**24
    for formulation in ("float32", "int32"):
        found = integer_apply(integer, x, formulation=formulation)
        np.testing.assert_array_equal(found, sums.astype(np.float32))


def test_a_float_net_is_refused():
    x = small_nets.images(2)
    net, variables = small_nets.float_net(small_nets.Mixed(), x, small_nets.rules(4, 4))
    with pytest.raises(ValueError, match="calibrate it first"):
        convert(net, variables, x)


class StandardizedConv(nn.Conv):
    """Its codes lie behind a mean over 27 weights, whose sum is divided by a number."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        centred = value - value.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(centred).mean((0, 1, 2), keepdims=True)
        return centred / jnp.sqrt(variance * 27 + 1e-4)


class Standardized(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.relu(StandardizedConv(1024, (3, 3), name=name)(x[..., :3]))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_weights_that_are_computed_from_variables_have_the_nets_codes():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    spec = Spec(12, granularity="channel")  # many codes, so that some lie at a border
    rules = (Rule(".*", weight=spec, input=Spec(8)),)
    net, variables = small_nets.calibrated(Standardized(), rules, x)
    found = integer_apply(convert(net, variables, x), x)
    np.testing.assert_array_equal(found, jax.jit(net.apply)(variables, x))
