"""Scales with a format of their own: MX and NVFP4 equal torchao's, the others NumPy's."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax.numerics import FLOAT_FORMATS, SCALE_FORMATS, Spec, Stats, scale_codes, scale_values
from qkd_jax.quantizers import QUANTIZERS, check, code_grid, dynamic_params

BLOCKS = np.load(pathlib.Path(__file__).parents[1] / "golden" / "blocks.npz")
MX, NV = {"scale_format": "e8m0"}, {"scale_format": "e4m3fn"}


def cut(x, size):
    return jnp.asarray(x).reshape(*x.shape[:-1], -1, size)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_mx_is_torchaos(name):
    x = cut(BLOCKS[f"mx|{name}|x"], 32)
    options = {"format": name, **MX}
    spec = Spec(FLOAT_FORMATS[name].bits, quantizer="float", options=options, dynamic=True)
    params = dynamic_params(x, spec, (0, 1))
    wanted, zeros = BLOCKS[f"mx|{name}|scale"], np.abs(x).max(-1) == 0
    found = np.asarray(scale_codes(params["scale"], "e8m0"))[..., 0]
    assert found.dtype == np.uint8 and zeros.sum() == 1
    np.testing.assert_array_equal(found[~zeros], wanted[~zeros])
    x_hat = QUANTIZERS["float"].fake_quant(x, params, spec)
    np.testing.assert_array_equal(x_hat.reshape(6, -1), BLOCKS[f"mx|{name}|y"])


def test_nvfp4_is_torchaos():
    x = cut(BLOCKS["nvfp4|x"], 16)
    spec = Spec(4, quantizer="float", options=NV, granularity=16)
    far = jnp.abs(x).max(-1, keepdims=True)
    zero = jnp.zeros_like(far)
    params = QUANTIZERS["float"].init(Stats(-far, far, zero, zero, zero, zero), spec)
    second = BLOCKS["nvfp4|tensor_scale"]
    np.testing.assert_array_equal(params["tensor_scale"], np.full((6, 4, 1), second))
    # torchao ends at the lowest normal number, 2^-6; below it a block has finer scales here.
    coarse = (np.asarray(far) / 6 / second < 2**-6)[..., 0]
    assert coarse.sum() == 5  # one is zero
    np.testing.assert_array_equal(
        params["scale"][..., 0][~coarse], BLOCKS["nvfp4|scale"].reshape(6, 4)[~coarse]
    )
    x_hat = QUANTIZERS["float"].fake_quant(x, params, spec)
    wanted = BLOCKS["nvfp4|y"].reshape(6, 4, 16)
    np.testing.assert_array_equal(x_hat[~coarse], wanted[~coarse])
    error = [np.abs(y - x)[coarse].sum() for y in (x_hat, wanted)]
    assert error[0] < error[1]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "e8m0", "e4m3fn"])
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_block_that_is_not_finite_does_not_become_finite(name, odd):
    """NaN throughout, as the specification allows; the blocks beside it as they were."""
    x = jnp.array([[odd, 1, 2, 3], [1, -2, 3, 6]])
    spec = Spec(4, quantizer="float", options={"scale_format": name}, dynamic=True)
    known = {"tensor_scale": jnp.float32(2**-6)} if name == "e4m3fn" else None
    params = dynamic_params(x, spec, (0,), known=known)
    x_hat = np.asarray(QUANTIZERS["float"].fake_quant(x, params, spec))
    assert np.isnan(x_hat[0]).all()
    np.testing.assert_array_equal(x_hat[1], x[1])


def test_mxint8_is_the_specifications():
    """Elements are codes of -127 to 127 times 2^-6, the shared scale 2^floor(log2 max)."""
    x = np.random.default_rng(1).normal(size=(5, 3, 32)).astype(np.float32)
    x[0, 0, 0], x[1, 1] = 4.0, np.exp2(np.arange(32) - 20.0)
    spec = Spec(8, options=MX, dynamic=True)
    params = dynamic_params(jnp.asarray(x), spec, (0, 1))
    shared = 2.0 ** np.floor(np.log2(np.abs(x.astype(np.float64)).max(-1, keepdims=True)))
    np.testing.assert_array_equal(params["scale"], shared / 64)
    wanted = np.clip(np.round(x / (shared / 64)), -127, 127) * (shared / 64)
    np.testing.assert_array_equal(QUANTIZERS["uniform"].fake_quant(x, params, spec), wanted)


TYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
}


@pytest.mark.parametrize("name", TYPES)
def test_stored_scales_are_the_bits_of_their_type(name):
    bits = np.uint8 if name.startswith("e") else np.uint16
    codes = np.arange(1, np.iinfo(bits).max, dtype=bits)
    with np.errstate(all="ignore"):
        values = codes.view(TYPES[name]).astype(np.float32)
    plain = np.isfinite(values) & (values > 2e-38) & (values < 1e38)
    np.testing.assert_array_equal(scale_values(jnp.asarray(codes), name)[plain], values[plain])
    found = scale_codes(jnp.asarray(values[plain]), name)
    assert found.dtype == bits
    np.testing.assert_array_equal(found, codes[plain])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("fields", [dict(bits=4), dict(bits=4, symmetric=False), dict(bits=3)])
def test_scales_of_half_precision_are_rounded_to_the_nearest(name, fields):
    spec = Spec(**fields, options={"scale_format": name}, granularity="channel")
    lo = -np.exp2(np.linspace(-9, 5, 40)).astype(np.float32)
    hi = np.exp2(np.linspace(-7, 2, 40)).astype(np.float32)
    zero = np.zeros(40, np.float32)
    params = QUANTIZERS["uniform"].init(Stats(lo, hi, zero, zero, zero, zero), spec)
    low, high = spec.format.qmin, spec.format.qmax
    if spec.symmetric:
        exact = np.maximum(lo.astype(np.float64) / low, hi.astype(np.float64) / high)
    else:
        exact = (hi.astype(np.float64) - lo) / (high - low)
    # float32 operations come first: half a unit of float16 or bfloat16 and a few of float32.
    unit = 2.0 ** (np.floor(np.log2(exact)) - (10 if name == "float16" else 7))
    assert np.all(abs(params["scale"] - exact) <= unit * (0.5 + 1e-2))
    scale = np.asarray(params["scale"])
    np.testing.assert_array_equal(scale.astype(TYPES[name]).astype(np.float32), scale)
    zero_point = 0 if spec.symmetric else np.clip(np.round(low - lo / scale), low, high)
    np.testing.assert_array_equal(params["zero_point"], zero_point + 0 * exact)


@pytest.mark.parametrize("name", SCALE_FORMATS)
@pytest.mark.parametrize("quantizer", ["uniform", "float", "codebook"])
@pytest.mark.parametrize("far", [0.0, 1e-30, 1e-12, 3e-8, 1.0, 1e30])
def test_scales_are_above_zero_and_stored_without_loss(name, quantizer, far):
    spec = Spec(4, quantizer=quantizer, options={"scale_format": name}, granularity=4)
    far = jnp.array([[far], [far / 3]], jnp.float32)
    zero = jnp.zeros_like(far)
    module = QUANTIZERS[quantizer]
    params = module.init(Stats(-far, far, zero, zero, zero, zero), spec)
    grid = code_grid(params, spec)
    assert np.all(np.isfinite(grid.scale)) and np.all(grid.scale >= 1e-12)
    kept = scale_values(scale_codes(params["scale"], name), name)
    np.testing.assert_array_equal(kept, params["scale"])
    x = jnp.array([[0.0, 1.0, -1.0, 0.4]]) * far
    x_hat = module.fake_quant(x, params, spec)
    assert np.all(np.isfinite(x_hat)) and np.all(abs(x_hat) <= 2.1 * abs(far) + 1e-11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(options={"scale_format": "e8m1"}), "scale_format.*e8m0"),
        (dict(options=MX, power_of_two=True), "power_of_two=True; each says how"),
        (dict(options=MX, symmetric=False), "block scales have no zero point"),
        (dict(options={**NV, "learned": True}, quantizer="float"), "learned=True"),
        (dict(options=MX, quantizer="lsq"), "option"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check(Spec(4, **fields))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="dense")(x)


def net_of(options, weight=None, bits=4, size=8):
    inputs = Spec(bits, quantizer="float", options=options, granularity=size, dynamic=True)
    return qk.quantize(Dense(), [qk.Rule("dense", weight=weight, input=inputs)])


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.2, 1, shape).astype(np.float32)


@pytest.mark.parametrize("options", [MX, NV, {}], ids=["mx", "nvfp4", "float32"])
def test_blocks_of_a_token_see_no_other(options):
    net, x = net_of(options), data(2, 5, 16)
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    run = jax.jit(net.apply)
    whole = run(variables, x)
    other = x.copy()
    other[1:], other[0, 1:] = 50 * x[1:], 0.01 * x[0, 1:]
    np.testing.assert_array_equal(run(variables, other)[0, 0], whole[0, 0])
    # Nor does a block of the token: a change of one moves the output by its own part.
    kernel = np.asarray(variables["params"]["dense"]["kernel"], np.float64)
    half = x.copy()
    half[..., 8:] = 0
    left = np.asarray(run(variables, half), np.float64)
    x_hat = {}
    watch = lambda path, operand, x, hat, spec, params: x_hat.update({operand: hat})
    net.apply(variables, x, watch=watch)
    np.testing.assert_allclose(left, np.asarray(x_hat["input"])[..., :8] @ kernel[:8], atol=1e-5)
    assert {p.status for p in qk.coverage(net, variables, x).products} == {"input only"}


def test_gradients_pass_straight_through_blocks():
    """dx = g w^T where |x| <= highest * scale; dw = x_hat^T g. MX saturates above 6 of 8."""
    net, x = net_of(MX), data(2, 16, seed=3)
    x[0, 0] = 7.9  # the shared scale is 2^(2 - 2), so that the highest value is 6
    x[0, 1:8] *= 0.1
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    g = data(2, 3, seed=4)
    kernel = variables["params"]["dense"]["kernel"]

    def loss(params, x):
        return jnp.sum(g * net.apply({**variables, "params": params}, x))

    dw, dx = jax.grad(loss, (0, 1))(variables["params"], x)
    far = np.abs(x.reshape(2, 2, 8)).max(-1, keepdims=True)
    scale = 2.0 ** (np.floor(np.log2(far)) - 2)
    inside = (np.abs(x.reshape(2, 2, 8)) <= 6 * scale).reshape(2, 16)
    assert not inside[0, 0] and inside.mean() > 0.8
    np.testing.assert_allclose(dx, (g @ kernel.T) * inside, rtol=1e-5, atol=1e-6)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([-values[:0:-1], values])
    nearest = values[np.abs(x.reshape(2, 2, 8, 1) / scale[..., None] - values).argmin(-1)]
    x_hat = (nearest * scale).reshape(2, 16)
    np.testing.assert_allclose(dw["dense"]["kernel"], x_hat.T @ g, rtol=1e-5, atol=1e-5)


def test_the_second_level_of_inputs_comes_from_calibration():
    net, x = net_of(NV), data(4, 16)
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    kept = variables["quant"]["dense"]["input_quantizer"]
    assert set(kept) == {"dynamic", "tensor_scale"}
    np.testing.assert_allclose(kept["tensor_scale"], np.abs(x).max() / (448 * 6), rtol=1e-6)


def test_blocks_of_inputs_are_dynamic_and_divide():
    with pytest.raises(ValueError, match="'token', 'example' or"):
        qk.Rule("dense", input=Spec(4, quantizer="float", granularity=8))
    with pytest.raises(ValueError, match=r"granularity=5, which does not divide"):
        net_of(MX, size=5).init(jax.random.key(0), data(2, 16))

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, name="attention")(x)

    spec = Spec(4, quantizer="float", granularity=4, dynamic=True, options=MX)
    net = qk.quantize(Attention(), [qk.Rule(".*", input=spec)])
    with pytest.raises(ValueError, match=r"other of layer 'attention/weights_value'.*over tokens"):
        net.init(jax.random.key(0), data(2, 4, 8))


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        x = nn.scan(Step, length=2, **stacked)(name="steps")(x, None)[0]
        members = nn.vmap(nn.Dense, in_axes=None, out_axes=1, axis_size=2, **stacked)
        return members(4, name="members")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="dense")(x), None


@pytest.mark.parametrize("static", [True, False])
def test_layers_that_a_scan_or_a_vmap_stacks_have_two_levels_each(static):
    weight = Spec(4, quantizer="float", options=NV, granularity=8, dynamic=not static)
    inputs = Spec(4, quantizer="float", options=NV, granularity=8, dynamic=True)
    net, x = qk.quantize(Lifted(), [qk.Rule(".*", weight=weight, input=inputs)]), data(3, 16)
    variables = net.init(jax.random.key(0), x)
    kernel = variables["params"]["steps"]["dense"]["kernel"]
    variables["params"]["steps"]["dense"]["kernel"] = kernel * jnp.array([1.0, 3.0])[:, None, None]
    variables = qk.calibrate(net, variables, [x])
    integer = qk.convert(net, variables, x)
    np.testing.assert_array_equal(qk.integer_apply(integer, x), jax.jit(net.apply)(variables, x))
    grads = jax.grad(lambda p: jnp.sum(net.apply({**variables, "params": p}, x) ** 2))(
        variables["params"]
    )
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))
