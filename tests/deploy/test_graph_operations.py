"""What a net's own code may compute, in every file: JAX, StableHLO, ONNX Runtime and OpenVINO."""

import importlib.util
import typing

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import (
    convert,
    integer_apply,
    load,
    load_stablehlo,
    onnx_session,
    save,
    save_stablehlo,
    to_onnx,
)
from qkd_jax.deploy.onnx.engines import openvino_model
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule
from qkd_jax.quantize.calibration import calibrate

WEIGHT = Spec(small_nets.PRODUCT_BITS, granularity="channel")
RULES = [Rule(".*", weight=WEIGHT, input=Spec(8, symmetric=False))]
FUSED = 2e-6  # XLA contracts a product and a sum where it fuses them: the last bit of a float32
X = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)


def first_mean(y):
    return y.mean((1, 2)).sum() > 0  # of the whole batch


def moves(y):
    start = jnp.int32(jnp.abs(y[0, 0, 0]) * 3)
    return {
        "tile": jnp.tile(y, (1, 2, 3)),
        "tile a constant": jnp.tile(jnp.arange(6.0).reshape(1, 1, 6), (y.shape[0], 4, 1)) * y,
        "stack": jnp.stack([y, 2 * y], 2),
        "unstack": y[:, 0] + sum(jnp.unstack(y, axis=1)),
        "roll": jnp.roll(y, 1, 1),
        "repeat": jnp.repeat(y, 2, 1),
        "edge": jnp.pad(y, ((0, 0), (1, 2), (0, 0)), mode="edge"),
        "linear_ramp": jnp.pad(y, ((0, 0), (1, 2), (1, 0)), mode="linear_ramp"),
        "symmetric": jnp.pad(y, ((0, 0), (1, 2), (0, 0)), mode="symmetric"),
        "wrap": jnp.pad(y, ((0, 0), (1, 2), (0, 0)), mode="wrap"),
        "dynamic_slice": jax.lax.dynamic_slice_in_dim(y, start, 3, 1),
        "dynamic_slice of a constant": y[:, :2, :2]
        + jax.lax.dynamic_slice(jnp.arange(30.0).reshape(1, 5, 6), (0, start, 9), (1, 2, 2)),
        "dynamic_update_slice": jax.lax.dynamic_update_slice(y, -y[:, :2, :3], (0, start, start)),
    }


def indices(y):
    places = y.argmax(1)
    return {
        "of each example": y[jnp.arange(y.shape[0]), places[:, 0]],
        "of each example, the last axis": y[jnp.arange(y.shape[0]), :, places[:, 0]],
        "take_along_axis": jnp.take_along_axis(y, places[:, None], 1),
        "take": jnp.take(y, jnp.array([2, 0]), 1, mode="clip"),
        "clipped": y[jnp.arange(y.shape[0]), (places[:, 0] + 2).clip(0, 3)],
        "one_hot": jax.nn.one_hot(places, 4),
        "a window of each example": jax.vmap(
            lambda row, start: jax.lax.dynamic_slice(row, (start, 0), (2, 6))
        )(y, places[:, 0]),
        "a window of each example, the last axis": jax.vmap(
            lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, 3, 1)
        )(y, places[:, 1]),
        "numbers of examples": jnp.arange(y.shape[0])[:, None] + places,
    }


def order(y):
    return {
        "argmax": y.argmax(-1),
        "argmin": y.argmin(1),
        "argmax of equal numbers": (y > 0).astype(jnp.float32).argmax(-1),
        "top_k": jax.lax.top_k(y, 2),
        "sort": jnp.sort(y, 1),
        "argsort": jnp.argsort(y, -1),
        "median": jnp.median(y, -1),
        "cumsum": jnp.cumsum(y, 1),
        "cumsum from the end": jax.lax.cumsum(y, 2, reverse=True),
        "cumprod": jnp.cumprod(y, -1),
        "cummax": jax.lax.cummax(y, 2),
        "cummin from the end": jax.lax.cummin(y, 1, reverse=True),
    }


def arithmetic(y):
    whole = jnp.int32(y * 10)
    return {
        "rem": jax.lax.rem(y, jnp.full_like(y, 0.3)),
        "mod": jnp.mod(y, 0.3),
        "mod of integers": whole % 4,
        "rem of integers": jax.lax.rem(whole, jnp.full_like(whole, 4)),
        "floor_divide": y // 0.3,
        "round": jax.lax.round(jnp.round(y * 4) / 2),
        "isfinite": jnp.isfinite(y / y.astype(jnp.int32)),
        "where isnan": jnp.where(jnp.isnan(y), 0.0, y),
        "clip to arrays": jnp.clip(y, jnp.zeros((1, 1, 6)), jnp.linspace(0, 1, 6)[None, None]),
        "cond": jax.lax.cond(first_mean(y), lambda y: 2 * y, lambda y: -y, y),
        "cond of constants": jax.lax.cond(
            first_mean(y), lambda: jnp.ones((y.shape[0], 2)), lambda: jnp.zeros((y.shape[0], 2))
        ),
        "switch": jax.lax.switch(
            jnp.int32(jnp.abs(y[0, 0, 0]) * 3), [jnp.sin, jnp.cos, jnp.tanh], y
        ),
        "outer": jnp.einsum("bij,kl->blik", y, jnp.arange(6.0).reshape(2, 3)),
        "resize": jax.image.resize(y, (y.shape[0], 7, 9), "bilinear"),
        "products with several rows": jnp.einsum("btd,bsd->bts", y, y)[..., None],
    }


def truths(y):
    yes, also = y > 0, y > 0.5
    return {
        "argmax": yes.argmax(-1),
        "argmin": yes.argmin(1),
        "max": jax.lax.max(yes, also),
        "min of a constant": jax.lax.min(yes, jnp.tile(jnp.arange(6) > 2, (1, 4, 1))),
        "reduce_max": jnp.max(yes, 1),
        "reduce_min": jnp.min(yes, (1, 2)),
        "less": yes < also,
        "at least a constant": yes >= jnp.array([[[True, False] * 3]]),
        "equal": (yes == also) & (yes != also[:, :1]),
        "sort": jnp.sort(yes, -1),
        "top_k": jax.lax.top_k(yes, 2)[0],
        "sum and mean": (yes.sum(1), yes.mean(-1)),
        "products and sums": yes * also + ~yes,
        "cumsum": jnp.cumsum(yes, -1),
        "where": jnp.where(yes, also, yes[:, :1]),
        "all and any": (yes.all(1), also.any()),
    }


def constants(y):
    batch = y.shape[0]
    causal = nn.make_causal_mask(jnp.zeros((batch, 4)))
    return {
        "ones": jnp.concatenate([y, jnp.ones((batch, 4, 1))], -1),
        "mask": jnp.where(causal[:, 0], jnp.einsum("btd,bsd->bts", y, y), -1e9),
        "not of the input": jnp.arange(3.0),
        "a number for each example": jnp.full((batch, 2), 0.5),
        "two for each": jnp.concatenate([y[:, 0], jnp.ones((batch, 6))], 0),
    }


GROUPS = {f.__name__: f for f in (moves, indices, order, arithmetic, truths, constants)}


class Net(nn.Module):
    group: str

    @nn.compact
    def __call__(self, x):
        return GROUPS[self.group](nn.Dense(6, name="first")(x))


def assert_equal(found, expected, tolerance=0.0):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, path
        if a.dtype.kind == "f":
            np.testing.assert_allclose(b, a, tolerance, tolerance, err_msg=str(path))
        else:
            np.testing.assert_array_equal(b, a, err_msg=str(path))


def on_openvino(path, expected):
    """Returns OpenVINO's results; those expected where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return expected
    results = openvino_model(path)([X])
    return [results[i] for i in range(len(jax.tree.leaves(expected)))]


@pytest.mark.parametrize("group", GROUPS)
def test_in_jax_and_stablehlo_at_another_batch_size(tmp_path, group):
    net, variables = small_nets.calibrated(Net(group), RULES, X)
    expected = jax.jit(net.apply)(variables, X)
    integer = convert(net, variables, X[:2])
    assert_equal(integer_apply(integer, X), expected, FUSED)
    save(integer, tmp_path)
    assert_equal(integer_apply(load(tmp_path), X), expected, FUSED)
    save_stablehlo(integer, tmp_path / "hlo", platforms=["cpu"])
    assert_equal(load_stablehlo(tmp_path / "hlo")(X), expected, FUSED)


@pytest.mark.parametrize("group", GROUPS)
def test_on_onnx_engines_at_another_batch_size(tmp_path, group):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net, variables = small_nets.float_net(Net(group), X)
    expected = jax.jit(net.apply)(variables, X)
    written = to_onnx(net, variables, X[:2], tmp_path / "net.onnx")
    assert_equal(onnx_session(written.path).run(None, {"images": X}), expected, 2e-5)
    assert_equal(on_openvino(written.path, expected), expected, 2e-5)


class Ties(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.argsort(jnp.round(nn.Dense(6, name="first")(x)), -1)


def test_equal_numbers_keep_their_order_on_onnx_runtime(tmp_path):
    """ONNX says so of TopK; OpenVINO 2026.4.1 gives equal numbers in an order of its own."""
    pytest.importorskip("onnxruntime")
    net, variables = small_nets.float_net(Ties(), X)
    written = to_onnx(net, variables, X[:2], tmp_path / "net.onnx")
    expected = np.argsort(
        np.round(nn.Dense(6).apply({"params": variables["params"]["first"]}, X)), kind="stable"
    )
    np.testing.assert_array_equal(onnx_session(written.path).run(None, {"images": X})[0], expected)


@flax.struct.dataclass
class Out:
    logits: jax.Array
    features: jax.Array
    unused: jax.Array | None = None


class Pair(typing.NamedTuple):
    second: jax.Array
    first: jax.Array


class Structured(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(6, name="first")(x)
        return Out(y.sum(1), y), Pair(2 * y, -y), [y + 1]


def test_dataclasses_and_named_tuples_are_dicts_in_files(tmp_path):
    net, variables = small_nets.calibrated(Structured(), RULES, X)
    out, pair, (more,) = jax.jit(net.apply)(variables, X)
    integer = convert(net, variables, X)
    assert type(integer_apply(integer, X)[0]) is Out
    save(integer, tmp_path)
    save_stablehlo(integer, tmp_path / "hlo", platforms=["cpu"])
    for found in (integer_apply(load(tmp_path), X), load_stablehlo(tmp_path / "hlo")(X)):
        fields, named, others = found
        assert set(fields) - {"unused"} == {"logits", "features"} and set(named) == set(
            Pair._fields
        )
        np.testing.assert_array_equal(fields["logits"], out.logits)
        np.testing.assert_array_equal(fields["features"], out.features)
        np.testing.assert_array_equal(named["first"], pair.first)
        np.testing.assert_array_equal(others[0], more)


class Probe(nn.Module):
    """Attention pooling: one learned query for every example."""

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, 6))
        probe = jnp.tile(probe, (x.shape[0], 1, 1))
        return nn.Dense(3, name="head")(nn.MultiHeadDotProductAttention(2, name="pool")(probe, x))


@pytest.mark.parametrize("rules", [[], RULES], ids=["float", "w8a8"])
def test_attention_whose_query_is_tiled(tmp_path, rules):
    net, variables = small_nets.float_net(Probe(), X, rules)
    if rules:
        net, variables = small_nets.calibrated(Probe(), rules, X)
        integer = convert(net, variables, X[:2])
        assert_equal(integer_apply(integer, X), net.apply(variables, X), 1e-6)
    pytest.importorskip("onnxruntime")
    expected = jax.jit(net.apply)(variables, X)
    written = to_onnx(net, variables, X[:2], tmp_path / "net.onnx")
    # A code of the probabilities is 1 / 255; the two engines may put one on its other side.
    tolerance = 0.02 if rules else 1e-5
    assert_equal(onnx_session(written.path).run(None, {"images": X}), [expected], tolerance)
    assert_equal(on_openvino(written.path, [expected]), [expected], tolerance)


class Messages(nn.Module):
    """A graph network: features of nodes, and the edges' ends, which are no batch together."""

    @nn.compact
    def __call__(self, graph):
        nodes, edges = graph
        sent = nn.Dense(6, name="message")(nodes)[edges[:, 0]]
        received = (edges[:, 1][None] == jnp.arange(nodes.shape[0])[:, None]) @ sent
        return nn.Dense(3, name="head")(received)


def test_a_net_without_a_batch_keeps_the_shapes_of_its_example(tmp_path):
    nodes = X[:, 0]
    edges = jnp.array([[0, 1], [1, 2], [3, 2], [4, 0], [2, 1], [0, 3]])
    net, variables = small_nets.float_net(Messages(), (nodes, edges), RULES)
    variables = calibrate(net, variables, [((nodes, edges),)], observer="minmax")
    with pytest.raises(ValueError, match=r"one batch axis of one size.*any_batch=False"):
        convert(net, variables, (nodes, edges))
    integer = convert(net, variables, (nodes, edges), any_batch=False)
    expected = jax.jit(net.apply)(variables, (nodes, edges))
    assert_equal(integer_apply(integer, (nodes, edges)), expected)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 6\), \(6, 2\)\].*any_batch=False"):
        integer_apply(integer, (nodes[:4], edges))
    save(integer, tmp_path)
    assert_equal(integer_apply(load(tmp_path), (nodes, edges)), expected)
    save_stablehlo(integer, tmp_path / "hlo", platforms=["cpu"])
    assert_equal(load_stablehlo(tmp_path / "hlo")(nodes, edges), expected)


class Rolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.concatenate([nn.Dense(6, name="first")(x), jnp.ones((1, 4, 6))])
        return (y - jnp.roll(y, 1, 0))[1:], nn.LayerNorm()(y), nn.softmax(y)


def test_examples_that_see_each_other_keep_their_batch_size(tmp_path):
    net, variables = small_nets.calibrated(Rolled(), RULES, X)
    expected = jax.jit(net.apply)(variables, X)
    for write in (convert, lambda *args: to_onnx(*args, tmp_path / "net.onnx")):
        with pytest.raises(ValueError, match=r"'concatenate' in .*batch size \+1.*any_batch=False"):
            write(net, variables, X)
    assert_equal(integer_apply(convert(net, variables, X, any_batch=False), X), expected, FUSED)
    pytest.importorskip("onnxruntime")
    written = to_onnx(net, variables, X, tmp_path / "net.onnx", any_batch=False)
    assert {"Softmax", "LayerNormalization"} <= set(written.operations)
    assert_equal(onnx_session(written.path).run(None, {"images": X}), expected, 1e-5)
