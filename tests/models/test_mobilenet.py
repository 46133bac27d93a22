"""MobileNets by hand: sizes, blocks in float64, and what quantization does to each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import models
from qkd_jax.models.mobilenet import InvertedResidual, SeparableBlock
from qkd_jax.numerics import Spec
from qkd_jax.ptq import fold_bn
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.inspection import coverage, layers
from qkd_jax.quantize.presets import rules

# Without optimisations XLA compiles several times faster, which is most of the time here.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NAMES = ("mobilenet", "mobilenet_v2")


def batch(seed=0, shape=(8, 8, 8, 1)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shapes_of(model, shape=(2, 28, 28, 1)):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def trained_like(model, images, seed=0):
    """Variables with BatchNorm statistics, gains (of both signs) and offsets away from 1 and 0."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            signs = rng.choice([-1, 1], leaf.shape) if name == "scale" else 1
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) * signs, jnp.float32)
        if name in ("bias", "mean"):
            return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(value, shapes_of(model, images.shape))


# --- architecture ---------------------------------------------------------------------------------


def separable(inner, outer):
    return 9 * inner + 2 * inner + inner * outer + 2 * outer


def inverted(inner, outer, expansion):
    hidden = inner * expansion
    up = inner * hidden + 2 * hidden if expansion > 1 else 0
    return up + 9 * hidden + 2 * hidden + hidden * outer + 2 * outer


def test_parameter_counts_by_hand():
    count = lambda model: sum(x.size for x in jax.tree.leaves(shapes_of(model)["params"]))
    stem = lambda width: 9 * width + 2 * width
    head = lambda width: 10 * width + 10
    v1 = separable(8, 16) + separable(16, 32) + separable(32, 32)
    v1 += separable(32, 64) + separable(64, 64)
    assert count(models.create("mobilenet", 10)) == stem(8) + v1 + head(64)
    v2 = inverted(8, 8, 1) + inverted(8, 16, 6) + inverted(16, 16, 6)
    v2 += inverted(16, 32, 6) + inverted(32, 32, 6)
    v2 += 32 * 128 + 2 * 128
    assert count(models.create("mobilenet_v2", 10)) == stem(8) + v2 + head(128)
    short = models.create("mobilenet_v2", 10, width=4, blocks=[1, 1, 1], expansion=1)
    v2 = inverted(4, 4, 1) + inverted(4, 8, 1) + inverted(8, 16, 1) + 16 * 64 + 2 * 64
    assert count(short) == stem(4) + v2 + head(64)


@pytest.mark.parametrize(
    ("name", "channels"), [("mobilenet", (16, 32, 64)), ("mobilenet_v2", (8, 16, 32))]
)
def test_sizes_of_the_maps(name, channels):
    def features(stem_stride):
        model = models.create(name, 10, stem_stride=stem_stride)
        _, found = jax.eval_shape(
            lambda v, x: model.apply(v, x, mutable="features"),
            shapes_of(model),
            jnp.zeros((2, 28, 28, 1)),
        )
        return [found["features"][f"stage{s}"][0].shape for s in (1, 2, 3)]

    for stride, sizes in ((2, (14, 7, 4)), (1, (28, 14, 7))):
        wanted = [(2, s, s, c) for s, c in zip(sizes, channels, strict=True)]
        assert features(stride) == wanted


def normalised(x, variables, name):
    params, stats = variables["params"][name], variables["batch_stats"][name]
    gain = np.float64(params["scale"]) / np.sqrt(np.float64(stats["var"]) + 1e-5)
    return (x - np.float64(stats["mean"])) * gain + np.float64(params["bias"])


def depthwise(x, kernel, stride):
    """Each channel with its own 3x3 filter, one pixel of padding on each side; plain loops."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = range(0, x.shape[1], stride)
    columns = range(0, x.shape[2], stride)
    out = np.zeros((x.shape[0], len(rows), len(columns), x.shape[3]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, row : row + 3, column : column + 3, :]
            out[:, i, j] = np.einsum("bhwc,hwc->bc", window, np.float64(kernel)[:, :, 0])
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_a_separable_block_in_float64(stride):
    x, block = batch(shape=(2, 5, 6, 3)), SeparableBlock(width=4, stride=stride)
    variables = trained_like(block, x)
    kernels = {k: v["kernel"] for k, v in variables["params"].items() if "kernel" in v}
    y = normalised(depthwise(x, kernels["depthwise"], stride), variables, "depthwise_bn")
    y = np.maximum(y, 0) @ np.float64(kernels["pointwise"])[0, 0]
    y = np.maximum(normalised(y, variables, "pointwise_bn"), 0)
    np.testing.assert_allclose(block.apply(variables, x), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("width", "stride", "expansion"), [(3, 1, 4), (3, 2, 4), (5, 1, 1)])
def test_an_inverted_residual_in_float64(width, stride, expansion):
    x = 4 * batch(shape=(2, 5, 6, 3))
    block = InvertedResidual(width=width, stride=stride, expansion=expansion)
    variables = trained_like(block, x)
    kernels = {k: v["kernel"] for k, v in variables["params"].items() if "kernel" in v}
    y = np.float64(x)
    if expansion > 1:
        y = normalised(y @ np.float64(kernels["expand"])[0, 0], variables, "expand_bn")
        assert y.max() > 6  # else the cap would not be seen
        y = np.clip(y, 0, 6)
    y = normalised(depthwise(y, kernels["depthwise"], stride), variables, "depthwise_bn")
    y = np.clip(y, 0, 6) @ np.float64(kernels["project"])[0, 0]
    y = normalised(y, variables, "project_bn")
    if width == 3 and stride == 1:
        y = y + x
    assert y.min() < 0  # the bottleneck is linear
    np.testing.assert_allclose(block.apply(variables, x), y, rtol=2e-5, atol=2e-5)


def test_activation_is_a_choice():
    x = 9 * batch(shape=(2, 5, 5, 3))
    pair = [SeparableBlock(width=4, activation=a) for a in ("relu", "relu6")]
    variables = trained_like(pair[0], x)
    plain, capped = (np.asarray(block.apply(variables, x)) for block in pair)
    assert plain.max() > 6 >= capped.max()


def test_depthwise_layers_start_from_fan_in():
    # 9 inputs a filter, whatever the number of channels: variance 2/9.
    variables = fast(SeparableBlock(width=4).init)(jax.random.key(0), jnp.zeros((1, 4, 4, 2048)))
    kernel = np.asarray(variables["params"]["depthwise"]["kernel"])
    assert kernel.shape == (3, 3, 1, 2048)
    # The standard error of this variance over 18,432 draws is 1 %.
    np.testing.assert_allclose(kernel.var(), 2 / 9, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mobilenet", {"width": 0}, "width is 0"),
        ("mobilenet", {"stem_stride": 0}, "stem_stride is 0"),
        ("mobilenet", {"blocks": (1, 2)}, r"blocks is \(1, 2\); it must be three numbers"),
        ("mobilenet", {"blocks": 2}, "blocks is 2; it must be three numbers"),
        ("mobilenet", {"blocks": (1, 0, 1)}, r"blocks\[1\] is 0"),
        ("mobilenet", {"activation": "relu7"}, "activation is 'relu7'.*relu6"),
        ("mobilenet_v2", {"expansion": 0}, "expansion is 0"),
        ("mobilenet_v2", {"width": 0.5}, "width is 0.5"),
    ],
)
def test_fields_out_of_range(name, fields, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(models.create(name, 10, **fields))


# --- quantization ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_coverage_finds_every_product(name):
    net = quantize(models.create(name, 10), rules("w4a4:static"))
    x = jax.ShapeDtypeStruct((3, 28, 28, 1), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    found = coverage(net, variables, x)
    assert {p.status for p in found.products} == {"quantized"} and not found.missed
    assert [p.path for p in found.products] == [info.path for info in layers(net, variables, x)]
    macs = {p.path: p.macs for p in found.products}
    assert macs["stem"] == 14 * 14 * 9 * 8 and found.products[0].path == "stem"
    hidden, maps = (16, 7 * 7) if name == "mobilenet" else (48, 7 * 7)
    assert macs["stage2_block0/depthwise"] == maps * 9 * hidden
    bits = {p.path: p.bits for p in found.products}
    assert {path for path, b in bits.items() if b == (8, 8)} == {"stem", "head"}
    assert set(bits.values()) == {(8, 8), (4, 4)}


def norms(params, path=""):
    for key, value in params.items():
        here = f"{path}/{key}"
        if key.endswith("_bn"):
            yield here
        elif isinstance(value, dict):
            yield from norms(value, here)


def identities(quant, path=""):
    for key, value in quant.items():
        if key == "folded" and "identity" in value:
            yield path
        elif isinstance(value, dict):
            yield from identities(value, f"{path}/{key}")


@pytest.mark.parametrize("name", NAMES)
def test_batch_norms_fold_exactly(name):
    x = batch()
    net = quantize(models.create(name, 3, width=4))
    variables = trained_like(net.model, x)
    folded = fold_bn(net, variables, x)
    wanted = set(norms(variables["params"]))
    assert set(identities(folded["quant"])) == wanted
    assert len(wanted) == (11 if name == "mobilenet" else 16)
    wanted = np.asarray(net.apply(variables, x))
    np.testing.assert_allclose(net.apply(folded, x), wanted, atol=1e-5 * np.abs(wanted).max())


W4 = {g: Spec(4, quantizer="lsq", granularity=g) for g in ("tensor", "channel")}
A4 = {s: Spec(4, quantizer="lsq", signed=s) for s in (True, False)}


def low_bit(granularity, signed):
    """W4A4 with LSQ; `signed`: a pattern of the layers whose input has both signs."""
    end = Spec(8, quantizer="lsq")
    return (
        Rule("stem", weight=end, input=Spec(8, symmetric=False, signed=False)),
        Rule("head", weight=end, input=Spec(8, quantizer="lsq", signed=False)),
        *([Rule(signed, weight=W4[granularity], input=A4[True])] if signed else []),
        Rule(".*", weight=W4[granularity], input=A4[False]),
    )


def trained(net, variables, x, labels, *, steps, rate):
    """Returns (variables, losses, last gradients) after plain gradient descent on one batch."""

    @fast
    def step(state):
        def loss(learned):
            logits, updates = net.apply(state | learned, x, train=True, mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(x)), labels]), updates

        learned = {k: state[k] for k in ("params", "quant") if k in state}
        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(learned)
        learned = jax.tree.map(lambda p, g: p - rate * g, learned, grads)
        return state | updates | learned, value, grads

    values, grads = [], None
    for _ in range(steps):
        variables, value, grads = step(variables)
        values.append(float(value))
    return variables, values, grads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "granularity", "signed"),
    [
        ("mobilenet", "tensor", ""),
        ("mobilenet", "channel", ""),
        ("mobilenet_v2", "channel", ".*/expand|last"),
    ],
)
def test_trains_with_four_bits(name, granularity, signed):
    fields = dict(width=4, expansion=2) if signed else dict(width=4)
    net = quantize(models.create(name, 3, **fields), low_bit(granularity, signed))
    labels = np.arange(32) % 3
    ramp = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]  # brighter below, above or nowhere
    x = (
        0.7 * batch(shape=(32, 8, 8, 1))
        + np.float32(labels - 1)[:, None, None, None] * ramp[:, None]
    )
    # Ranges are taken in evaluation mode, so BatchNorm's statistics must have seen the data first.
    floats = fast(net.init)(jax.random.key(0), x)
    floats, _, _ = trained(net, floats, x, labels, steps=30, rate=0.02)
    variables = calibrate(net, floats, [x])
    variables, values, grads = trained(net, variables, x, labels, steps=40, rate=0.02)
    assert values[-1] < 0.7 * values[0], values
    kernel = variables["params"]["stage2_block0"]["depthwise"]["kernel"].shape
    gradients = grads["quant"]["stage2_block0"]["depthwise"]
    gradient = gradients["weight_quantizer"]["step"]
    assert gradient.shape == ((1, 1, 1, kernel[-1]) if granularity == "channel" else ())
    assert kernel[:3] == (3, 3, 1)
    assert np.isfinite(gradient).all() and np.all(gradients["input_quantizer"]["step"])
    assert np.count_nonzero(gradient) > 0.8 * gradient.size


def test_inputs_with_both_signs_are_refused_by_unsigned_rules():
    net = quantize(models.create("mobilenet_v2", 3, width=4, expansion=2), rules("w4a4"))
    x = batch()
    with pytest.raises(ValueError, match=r"input of layer '([a-z0-9_]*/expand|last)' goes down to"):
        calibrate(net, trained_like(net.model, x), [x])
