"""The kinds of quantization that a spec asks for: dynamic, grouped, weight only, in steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax import ptq
from qkd_jax.numerics import Spec


class Net(nn.Module):
    """A convolution, BatchNorm and a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x)
        return nn.Dense(5, name="dense")(x.mean((1, 2)))


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.2, 1, shape).astype(np.float32)


def made(*rules, images=None):
    images = data(4, 5, 5, 8) if images is None else images
    net = qk.quantize(Net(), rules)
    variables = net.init(jax.random.key(0), images)
    noise = data(6, seed=3)
    variables["batch_stats"]["norm"]["mean"] = jnp.asarray(noise)
    variables["params"]["norm"]["scale"] = jnp.asarray(noise + 0.1)  # gains of both signs
    return net, variables, images


class Dense(nn.Module):
    """One dense layer, so that its operands are known."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="dense")(x)


def numpy_affine(x, axes, bits=8):
    """Affine fake quantization in float64, a scale for each entry of what is not in `axes`."""
    x = np.asarray(x, np.float64)
    lo = np.minimum(x.min(axes, keepdims=True), 0)
    hi = np.maximum(x.max(axes, keepdims=True), 0)
    scale = (hi - lo) / (2**bits - 1)
    zero = np.round(-lo / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def numpy_symmetric(w, axes, bits):
    w = np.asarray(w, np.float64)
    n, p = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if bits >= 8:
        n = -p
    scale = np.maximum(w.min(axes, keepdims=True) / n, w.max(axes, keepdims=True) / p)
    return np.clip(np.round(w / scale), n, p) * scale


AFFINE = dict(bits=8, signed=False, symmetric=False, dynamic=True)


@pytest.mark.parametrize(
    ("granularity", "axes"), [("token", (2,)), ("example", (1, 2)), ("tensor", (0, 1, 2))]
)
def test_dynamic_ranges_are_those_of_the_call(granularity, axes):
    spec = Spec(**AFFINE, granularity=granularity)
    net = qk.quantize(
        Dense(), [qk.Rule("dense", weight=Spec(8, granularity="channel"), input=spec)]
    )
    x = data(4, 6, 7)
    variables = net.init(jax.random.key(0), x)
    variables = qk.calibrate(net, variables, [x])
    other = 100 * data(3, 6, 7, seed=5) * np.exp(data(3, 6, 1, seed=6))
    kernel = variables["params"]["dense"]["kernel"]
    wanted = numpy_affine(other, axes) @ numpy_symmetric(kernel, (0,), 8)
    # atol: one code of the largest row, for the ties that float32 moves.
    np.testing.assert_allclose(net.apply(variables, other), wanted, rtol=1e-4, atol=1e-3)


def test_a_dynamic_example_does_not_see_its_neighbours():
    rule = qk.Rule("conv|dense", weight=Spec(8), input=Spec(**AFFINE, granularity="token"))
    net, variables, images = made(rule)
    variables = qk.calibrate(net, variables, [images])
    whole = jax.jit(net.apply)(variables, images)
    mixed = images.copy()
    mixed[1:] *= 50
    np.testing.assert_array_equal(jax.jit(net.apply)(variables, mixed)[0], whole[0])


def test_gradients_of_a_dynamic_product_are_those_of_its_operands():
    spec = Spec(**AFFINE, granularity="token", mask="none")
    net = qk.quantize(
        Dense(), [qk.Rule("dense", weight=Spec(8, granularity="channel"), input=spec)]
    )
    x = data(4, 7) * np.exp(2 * data(4, 1, seed=9))
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    g = data(4, 3, seed=2)

    def loss(params, x):
        return jnp.sum(g * net.apply({**variables, "params": params}, x))

    grads, dx = jax.grad(loss, (0, 1))(variables["params"], x)
    kernel = variables["params"]["dense"]["kernel"]
    wanted = numpy_affine(x, (1,)).T @ g
    np.testing.assert_allclose(grads["dense"]["kernel"], wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dx, g @ numpy_symmetric(kernel, (0,), 8).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_groups_cut_the_contraction_axis(size):
    net = qk.quantize(Dense(), [qk.Rule("dense", weight=Spec(4, granularity=size))])
    x = data(4, 8)
    floats = net.init(jax.random.key(0), x)
    variables = qk.calibrate(net, floats, [x])
    params = variables["quant"]["dense"]["weight_quantizer"]
    assert params["scale"].shape == (8 // size, 1, 3)
    kernel = np.asarray(floats["params"]["dense"]["kernel"])
    cut = kernel.reshape(8 // size, size, 3)
    # A group's weights of one sign leave the other half of the grid unused: any sign may lead.
    wanted = numpy_symmetric(np.concatenate([cut, 0 * cut], 1), (1,), 4)[:, :size].reshape(8, 3)
    np.testing.assert_allclose(net.apply(variables, x), x @ wanted, rtol=1e-5, atol=1e-6)
    assert qk.size(net, variables, x).bytes == (24 * 4 + 32 * 24 // size) // 8


def test_groups_of_a_convolution_cut_its_input_channels():
    net, variables, images = made(qk.Rule("conv", weight=Spec(4, granularity=4)))
    variables = qk.calibrate(net, variables, [images])
    shape = variables["quant"]["conv"]["weight_quantizer"]["scale"].shape
    assert shape == (1, 1, 2, 1, 6)  # the window shares


def test_a_group_size_that_does_not_divide_names_the_layer_and_those_that_do():
    with pytest.raises(ValueError, match=r"layer 'conv' has granularity=3.*axis of 8.*1, 2, 4, 8"):
        made(qk.Rule("conv", weight=Spec(4, granularity=3)))  # at init, before anything is trained


def test_groups_and_dynamic_ranges_keep_their_batch_norm():
    for rule in (
        qk.Rule("conv", weight=Spec(4, granularity=4), input=Spec(8)),
        qk.Rule("conv", weight=Spec(4), input=Spec(**AFFINE, granularity="token")),
    ):
        net, variables, images = made(rule)
        variables = qk.calibrate(net, variables, [images])
        folded = ptq.fold_bn(net, variables, images)
        assert "identity" not in str(jax.tree.structure(folded))
        np.testing.assert_array_equal(net.apply(folded, images), net.apply(variables, images))
        found = qk.integer_apply(qk.convert(net, variables, images), images)
        np.testing.assert_array_equal(found, jax.jit(net.apply)(variables, images))


def test_operands_can_be_calibrated_one_after_the_other():
    rule = qk.Rule("conv|dense", weight=Spec(2), input=Spec(4, symmetric=False))
    net, floats, images = made(rule)
    weights = qk.calibrate(net, floats, [images], operands=("weight",))
    assert set(weights["quant"]["dense"]) == {"weight_quantizer"}
    both = qk.calibrate(net, weights, [images], operands=("input",))
    assert set(both["quant"]["dense"]) == {"weight_quantizer", "input_quantizer"}
    for a, b in zip(
        jax.tree.leaves(weights["quant"]["dense"]["weight_quantizer"]),
        jax.tree.leaves(both["quant"]["dense"]["weight_quantizer"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    # The input of the dense layer was observed behind the quantized convolution.
    _, hidden = net.apply(weights, images, capture_intermediates=True, mutable=["intermediates"])
    seen = nn.relu(hidden["intermediates"]["norm"]["__call__"][0]).mean((1, 2))
    scale = both["quant"]["dense"]["input_quantizer"]["scale"]
    np.testing.assert_allclose(scale, seen.max() / 15, rtol=1e-5)
    at_once = qk.calibrate(net, floats, [images])["quant"]["dense"]["input_quantizer"]["scale"]
    assert abs(at_once - scale) > 1e-3


@pytest.mark.parametrize("operands", ["weight", (), ("weights",)])
def test_wrong_operands_are_refused(operands):
    net, floats, images = made(qk.Rule("conv", weight=Spec(2)))
    with pytest.raises(ValueError, match="operand"):
        qk.calibrate(net, floats, [images], operands=operands)


def test_a_folded_float_net_can_be_calibrated():
    rule = qk.Rule("conv|dense", weight=Spec(8, granularity="channel"), input=Spec(8))
    net, floats, images = made(rule)
    folded = ptq.fold_bn(net, floats, images)
    np.testing.assert_allclose(net.apply(folded, images), net.apply(floats, images), atol=1e-5)
    variables = qk.calibrate(net, folded, [images])
    assert "identity" in variables["quant"]["norm"]["folded"]
    kernel = folded["params"]["conv"]["kernel"]
    scale = variables["quant"]["conv"]["weight_quantizer"]["scale"]
    np.testing.assert_allclose(scale[0, 0, 0], abs(kernel).max((0, 1, 2)) / 127, rtol=1e-6)
    np.testing.assert_allclose(net.apply(variables, images), net.apply(floats, images), atol=0.1)
    integer = qk.convert(net, variables, images)
    np.testing.assert_allclose(
        qk.integer_apply(integer, images), net.apply(variables, images), rtol=1e-4, atol=1e-5
    )


def test_a_folded_quantized_net_is_not_calibrated_again():
    net, floats, images = made(qk.Rule("conv|dense", weight=Spec(8), input=Spec(8)))
    folded = ptq.fold_bn(net, qk.calibrate(net, floats, [images]), images)
    with pytest.raises(ValueError, match=r"layer 'conv' has a BatchNorm folded.*fold the float"):
        qk.calibrate(net, folded, [images])


def test_watch_sees_every_quantized_operand():
    rule = qk.Rule("conv|dense", weight=Spec(3), input=Spec(4, symmetric=False))
    net, floats, images = made(rule)
    variables = qk.calibrate(net, floats, [images])
    seen = {}

    def watch(path, operand, x, x_hat, spec, params):
        seen[path, operand] = (x.shape, float(jnp.max(abs(x - x_hat))), spec.bits, sorted(params))

    net.apply(variables, images, watch=watch)
    assert set(seen) == {(p, o) for p in ("conv", "dense") for o in ("weight", "input")}
    for (path, operand), (_, error, _, _) in seen.items():
        scale = variables["quant"][path][f"{operand}_quantizer"]["scale"]
        assert error <= scale / 2 * 1.001
    assert seen["conv", "input"][0] == images.shape


def test_stochastic_rounding_needs_the_stream_and_is_right_in_the_mean():
    spec = Spec(3, rounding="stochastic")
    net = qk.quantize(Dense(), [qk.Rule("dense", weight=spec)])
    x = data(4, 8)
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    still = net.apply(variables, x)
    even = qk.quantize(Dense(), [qk.Rule("dense", weight=Spec(3))]).apply(variables, x)
    np.testing.assert_array_equal(still, even)

    draw = jax.jit(lambda key: net.apply(variables, x, rngs={"rounding": key}))
    first = draw(jax.random.key(1))
    np.testing.assert_array_equal(first, draw(jax.random.key(1)))
    assert np.any(first != draw(jax.random.key(2)))
    many = jax.vmap(draw)(jax.random.split(jax.random.key(3), 4000))
    wanted = x @ variables["params"]["dense"]["kernel"]
    scale = float(variables["quant"]["dense"]["weight_quantizer"]["scale"])
    # Standard error of the mean of 4,000 draws of a sum of 8 roundings; six of them.
    margin = 6 * scale * 0.5 * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(4000)
    assert np.all(abs(many.mean(0) - wanted) < margin)


@pytest.mark.parametrize("granularity", ["token", "example", "tensor"])
def test_dynamic_ranges_on_four_devices_are_those_on_one(granularity):
    spec = Spec(**AFFINE, granularity=granularity)
    net = qk.quantize(Dense(), [qk.Rule("dense", weight=Spec(8), input=spec)])
    x = data(8, 6, 7) * np.exp(data(8, 1, 1, seed=4))
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    one = jax.jit(net.apply)(variables, x)
    mapped = jax.pmap(lambda x: net.apply(variables, x, axis_name="batch"), axis_name="batch")(
        x.reshape(4, 2, 6, 7)
    )
    np.testing.assert_array_equal(mapped.reshape(one.shape), one)


class Lifted(nn.Module):
    """Attention and scanned, rematerialised dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        layer = nn.scan(
            nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layer(name="steps")(x, None)[0]


class Step(nn.Module):
    """One step of the scan."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="dense")(x), None


@pytest.mark.parametrize("granularity", ["token", "example"])
def test_dynamic_attention_and_lifted_layers(granularity):
    spec = Spec(**AFFINE, granularity=granularity)
    weight = Spec(8, granularity="channel")
    net = qk.quantize(
        Lifted(),
        [
            qk.Rule("steps/dense", weight=Spec(8, granularity=4), input=spec),
            qk.Rule(".*", weight=weight, input=spec),
        ],
    )
    x = data(4, 5, 8)
    floats = net.init(jax.random.key(0), x)
    variables = qk.calibrate(net, floats, [x])
    groups = variables["quant"]["steps"]["dense"]["weight_quantizer"]["scale"]
    assert groups.shape == (3, 2, 1, 8)
    out = jax.jit(net.apply)(variables, x)
    # 8 bits everywhere: an error of a few codes in a hundred.
    assert np.linalg.norm(out - net.apply(floats, x)) <= 0.03 * np.linalg.norm(out)
    assert np.any(out != net.apply(floats, x))
    grads = jax.grad(lambda p: jnp.sum(net.apply({**variables, "params": p}, x) ** 2))(
        variables["params"]
    )
    float_grads = jax.grad(lambda p: jnp.sum(net.apply({**floats, "params": p}, x) ** 2))(
        variables["params"]
    )
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(float_grads), strict=True):
        assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(b) + 1e-3
    assert "8 MISSED" not in str(qk.coverage(net, variables, x))
    assert not qk.coverage(net, variables, x).missed


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_bad_scale_is_refused_before_anything_is_shipped(bad):
    rule = qk.Rule("conv|dense", weight=Spec(4), input=Spec(4))
    net, floats, images = made(rule)
    variables = qk.calibrate(net, floats, [images])
    variables["quant"]["dense"]["weight_quantizer"]["scale"] = jnp.float32(bad)
    with pytest.raises(ValueError, match=r"scale.* holds .*greater than 0. Calibrate again"):
        net.apply(variables, images)
    named = r"weight of layer 'dense'.*holds .*greater than 0"
    with pytest.raises(ValueError, match=named):
        qk.convert(net, variables, images)
    with pytest.raises(ValueError, match=named):
        qk.deploy.to_onnx(net, variables, images, "nothing.onnx")
