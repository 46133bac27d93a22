"""GPTQ: codes equal to qwix's, weights on the grid, and less error than rounding to nearest."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax import data
from qkd_jax.numerics import Spec
from qkd_jax.ptq import gptq
from qkd_jax.ptq.gptq_core import quantize_columns
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ptq.npz")
CASES = {  # name: (bits, granularity)
    "tensor_int4": (4, "tensor"),
    "channel_int4": (4, "channel"),
    "channel_int8": (8, "channel"),
    "channel_int2": (2, "channel"),
    "group_int4": (4, 32),
    "group_int8": (8, 64),
}


# Each case compiles a loop of its own.
FAST = ("tensor_int4", "channel_int4", "group_int4")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_codes_are_those_of_qwix(name):
    bits, granularity = CASES[name]
    weight, inputs, codes, scale = (
        GOLDEN[f"gptq/{name}/{key}"] for key in ("weight", "inputs", "codes", "scale")
    )
    spec = Spec(bits, scaling="qmax_half", narrow_range=False, granularity=granularity)
    group = granularity if isinstance(granularity, int) else None
    # [groups, rows or 1, 1]; groups find their own, so what comes in must not matter.
    given = scale.T[..., None] if group is None else np.full((*scale.T.shape, 1), 7.0)
    params = {"scale": given, "zero_point": np.zeros_like(given)}
    x = inputs.astype(np.float64)
    found, made = quantize_columns(weight, x @ x.T, params, spec, group=group)
    np.testing.assert_allclose(made["scale"][..., 0].T, scale, rtol=1e-6)
    whole = np.repeat(scale, weight.shape[1] // scale.shape[1], axis=1)
    np.testing.assert_array_equal(np.rint(found / whole), codes)


@pytest.mark.slow
def test_the_block_is_a_matter_of_speed_alone():
    weight, inputs = (GOLDEN[f"gptq/channel_int4/{key}"] for key in ("weight", "inputs"))
    scale = np.abs(weight).max(axis=1)[None, :, None] / 7
    params = {"scale": scale, "zero_point": np.zeros_like(scale)}
    x = inputs.astype(np.float64)
    codes = [
        np.rint(quantize_columns(weight, x @ x.T, params, Spec(4), block=block)[0] / scale[0])
        for block in (1, 50, 4096)
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])


def restated(weight, hessian, scale, bits):
    """The algorithm without blocks, in float64: one row of weights, column by column."""
    weight, hessian = weight.astype(np.float64).copy(), hessian.copy()
    columns = len(hessian)
    dead = np.diag(hessian) == 0
    hessian += np.diag(dead + 0.01 * np.mean(np.diag(hessian)))
    weight[dead] = 0
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for j in range(columns):
        code = np.clip(np.rint(weight[j] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (weight[j] - code * scale) / upper[j, j]
        weight[j + 1 :] -= error * upper[j, j + 1 :]
        weight[j] = code * scale
    return weight


class Layers(nn.Module):
    """A strided, dilated, padded convolution, a grouped one, a depthwise one, two dense layers."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(6, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), name="conv")(x)
        y = nn.relu(y)
        y = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, padding="VALID", name="grouped")(y))
        y = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(y))
        y = nn.relu(nn.DenseGeneral((3, 4), axis=-1, name="heads")(y))
        y = nn.DenseGeneral(5, axis=(-2, -1), name="join")(y)
        return nn.Dense(4, name="head")(y.mean(axis=(1, 2)))


def columns_of(layer, x, kernel):
    """Inputs [samples, columns] of a layer and each output's own columns, from NumPy alone."""
    if layer in ("heads", "join", "head"):
        summed = 2 if layer == "join" else 1
        flat = x.reshape(-1, int(np.prod(x.shape[-summed:])))
        return [flat], [kernel.reshape(flat.shape[1], -1)]
    strides, dilation, groups, padding = {
        "conv": ((2, 1), (1, 2), 1, ((1, 1), (1, 1))),
        "grouped": ((1, 1), (1, 1), 2, ((0, 0), (0, 0))),
        "depthwise": ((1, 1), (1, 1), 8, ((1, 1), (1, 1))),
    }[layer]
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    high, wide = kernel.shape[:2]
    rows = (x.shape[1] - (high - 1) * dilation[0] - 1) // strides[0] + 1
    cols = (x.shape[2] - (wide - 1) * dilation[1] - 1) // strides[1] + 1
    patches = np.stack(
        [
            x[:, r * strides[0] :, c * strides[1] :][
                :, : high * dilation[0] : dilation[0], : wide * dilation[1] : dilation[1]
            ][:, :high, :wide]
            for r in range(rows)
            for c in range(cols)
        ],
        axis=1,
    )
    split = np.split(patches, groups, axis=-1)
    weights = np.split(kernel, groups, axis=-1)
    width = kernel.shape[2] * high * wide
    return (
        [p.reshape(-1, width) for p in split],
        [w.reshape(width, -1) for w in weights],
    )


SPECS = {
    "channel": Spec(3, granularity="channel"),
    "tensor": Spec(4),
    "lsq": Spec(3, quantizer="lsq", granularity="channel"),
}
# Each layer compiles a loop of its own: one runs with the fast tests.
LAYERS = [
    ("channel", "grouped"),
    pytest.param("channel", ".*", marks=pytest.mark.slow),
    pytest.param("tensor", "conv|depthwise", marks=pytest.mark.slow),
    pytest.param("lsq", "heads", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def setup():
    # The padding of SAME under stride 2 is (1, 1) on 9 rows.
    x = np.asarray(small_nets.images(8))
    net, variables = small_nets.float_net(Layers(), x)
    return net, variables, x


def captured(net, variables, x):
    """What each layer reads, by layer."""
    inputs = {}

    def note(next_fun, args, kwargs, context):
        if context.module.path:
            inputs["/".join(context.module.path)] = np.asarray(args[0], np.float64)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        net.model.apply(variables, x)
    return inputs


@pytest.mark.parametrize(("name", "pattern"), LAYERS)
def test_every_kind_of_layer_by_its_own_definition(setup, name, pattern):
    _, variables, x = setup
    net = quantize(Layers(), [Rule(pattern, weight=SPECS[name])])
    quantized = calibrate(net, variables, [x])
    found = gptq(net, quantized, [x[:5], x[5:]], sequential=False)
    assert jax.tree.structure(found) == jax.tree.structure(quantized)
    for layer, inputs in captured(net, variables, x).items():
        if not re.fullmatch(pattern, layer):
            continue
        kernel = np.asarray(variables["params"][layer]["kernel"])
        params = quantized["quant"][layer]["weight_quantizer"]
        scale = np.broadcast_to(
            np.asarray(params["step" if name == "lsq" else "scale"]),
            [1] * (kernel.ndim - (2 if layer == "heads" else 1))
            + list(kernel.shape[-2:] if layer == "heads" else kernel.shape[-1:]),
        ).reshape(-1)
        xs, ws = columns_of(layer, inputs, kernel)
        want, of = [], 0
        for part, w in zip(xs, ws, strict=True):
            hessian = part.T @ part
            for column in w.T:
                want.append(restated(column, hessian, float(scale[of]), SPECS[name].bits))
                of += 1
        new = np.asarray(found["params"][layer]["kernel"])
        got = new.reshape(-1, new.shape[-1] if layer != "heads" else 12).T
        np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_weights_lie_on_the_grid_and_groups_get_scales_from_the_weights_at_their_turn(setup):
    _, variables, x = setup
    net = quantize(Layers(), [Rule("grouped", weight=Spec(4, granularity=1))])
    quantized = calibrate(net, variables, [x])
    found = gptq(net, quantized, [x], sequential=False)
    scales = [t["quant"]["grouped"]["weight_quantizer"]["scale"] for t in (quantized, found)]
    # Three input channels a group of the convolution: three groups of nine taps.
    assert scales[0].shape == scales[1].shape == (1, 1, 3, 1, 8)
    # The first group of columns is untouched when its scale is taken, later ones have moved.
    np.testing.assert_allclose(scales[1][:, :, 0], scales[0][:, :, 0], rtol=1e-6)
    assert not np.isclose(scales[1][:, :, 1:], scales[0][:, :, 1:], rtol=1e-3).any()
    kernel = np.asarray(found["params"]["grouped"]["kernel"]).reshape(3, 3, 3, 1, 8)
    codes = kernel / np.asarray(scales[1])
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-5)
    assert codes.min() >= -8.01 and codes.max() <= 7.01


def output_error(net, found, variables, x):
    want = net.apply(variables, x)
    return float(jnp.mean((net.apply(found, x) - want) ** 2))


def test_a_trained_layer_loses_less_than_by_nearest_rounding():
    # A ridge readout of the digits, tried on images that it was not rounded for.
    digits = data.load("digits")
    x = digits.normalize(digits.train_images).reshape(-1, 64)[:600]
    targets = np.eye(10)[digits.train_labels[: len(x)]]
    weight = np.linalg.solve(x.T @ x + np.eye(64), x.T @ targets).astype(np.float32)
    net = quantize(nn.Dense(10), [Rule("", weight=Spec(3, granularity="channel"))])
    variables = {"params": {"kernel": jnp.asarray(weight), "bias": jnp.zeros(10)}}
    nearest = calibrate(net, variables, [x[:200]])
    found = gptq(net, nearest, [x[:200]])
    errors = [output_error(net, v, variables, x[200:]) for v in (nearest, found)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.slow
def test_sequential_sees_the_quantized_layers_before(setup):
    _, variables, x = setup
    rules = [
        Rule("conv|grouped", weight=Spec(2, granularity="channel"), input=Spec(4, symmetric=False))
    ]
    net = quantize(Layers(), rules)
    quantized = calibrate(net, variables, [x])
    found = gptq(net, quantized, [x], sequential=True)
    apart = gptq(net, quantized, [x], sequential=False)
    # What the second layer reads in the finished net gives its Hessian.
    inputs = {}

    def note(path, operand, x, x_hat, spec, params):
        if operand == "input":
            inputs[path] = np.asarray(x_hat, np.float64)

    net.apply(found, x, watch=note)
    kernel = np.asarray(variables["params"]["grouped"]["kernel"])
    scale = np.asarray(quantized["quant"]["grouped"]["weight_quantizer"]["scale"]).reshape(-1)
    (first, _), (w, _) = columns_of("grouped", inputs["grouped"], kernel)
    want = restated(w[:, 0], first.T @ first, float(scale[0]), 2)
    got = np.asarray(found["params"]["grouped"]["kernel"])[..., 0].reshape(-1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    other = np.asarray(apart["params"]["grouped"]["kernel"])
    assert (other != np.asarray(found["params"]["grouped"]["kernel"])).any()


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3, name="twice")
        return layer(layer(x))


def test_shared_weights_are_left_and_said_so():
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 3)))
    net, variables = small_nets.calibrated(Twice(), [Rule("twice", weight=Spec(4))], x)
    lines = []
    found = gptq(net, variables, [x], report=lines.append)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert len(lines) == 2 and all("left twice" in line for line in lines)


def test_what_is_refused():
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 6)))
    net, variables = small_nets.float_net(nn.Dense(4), x, [Rule("", weight=Spec(4))])
    with pytest.raises(ValueError, match="no weight quantizers"):
        gptq(net, variables, [x])
    scale = {"scale": jnp.ones(()), "zero_point": jnp.zeros(())}
    quantized = {**variables, "quant": {"weight_quantizer": scale}}
    with pytest.raises(ValueError, match="percdamp"):
        gptq(net, quantized, [x], percdamp=0)
    with pytest.raises(ValueError, match="block"):
        gptq(net, quantized, [x], block=0)
    with pytest.raises(ValueError, match="batches is empty"):
        gptq(net, quantized, [])
    with pytest.raises(ValueError, match="give a list of batches"):
        gptq(net, quantized, x)
    with pytest.raises(ValueError, match="holds NaN in"):
        gptq(net, quantized, [np.full_like(x, np.nan)])
    dynamic = quantize(nn.Dense(4), [Rule("", weight=Spec(4, dynamic=True))])
    marked = {**variables, "quant": {"weight_quantizer": {"dynamic": jnp.ones(())}}}
    with pytest.raises(ValueError, match="dynamic=True"):
        gptq(dynamic, marked, [x])
    folded = {"weight_quantizer": scale, "folded": {"multiplier": jnp.ones(4)}}
    with pytest.raises(ValueError, match="before `fold_bn`"):
        gptq(net, {**variables, "quant": folded}, [x])


@pytest.mark.slow
def test_a_quantizer_that_moves_its_own_values_is_refused():
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 6)))
    net, variables = small_nets.calibrated(
        nn.Dense(4), [Rule("", weight=Spec(3, quantizer="qil"))], x
    )
    params = variables["quant"]["weight_quantizer"]
    params["half_width"] = params["half_width"] * 0.6  # pruning: what lies on the grid shrinks
    with pytest.raises(ValueError, match="moves values that lie on its own grid"):
        gptq(net, variables, [x])
