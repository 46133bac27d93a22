"""Coverage finds every product, sizes are counted by hand."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.inspection import coverage, layers, size
from qkd_jax.quantizers import uniform

KEY = jax.random.key(0)
W, A = Spec(2, granularity="channel"), Spec(4)


class Net(nn.Module):
    """One layer of each fate, and two products that no rule can reach."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.Conv(6, (1, 1), name="weight_only")(x)
        x = jnp.mean(x, (1, 2))
        x = nn.Dense(5, name="left")(x)
        x = x @ self.param("w", nn.initializers.normal(), (5, 7))
        x = jnp.einsum("bc,cd->bd", x, self.param("v", nn.initializers.normal(), (7, 3)))
        return nn.Dense(2, name="no_rule")(x)


RULES = [
    Rule("conv", weight=W, input=A),
    Rule("weight_only", weight=W),
    Rule("left"),
]


@pytest.fixture
def net():
    net = quantize(Net(), RULES)
    x = jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    return net, net.init(KEY, x), x


def test_every_product_and_its_fate(net):
    net, variables, x = net
    found = coverage(net, variables, x)
    assert [(p.path, p.status, p.bits) for p in found.products] == [
        ("conv", "quantized", (2, 4)),
        ("weight_only", "weight only", (2, 32)),
        ("left", "skipped", (32, 32)),
        ("", "MISSED", (32, 32)),
        ("bc,cd->bd", "MISSED", (32, 32)),
        ("no_rule", "skipped", (32, 32)),
    ]
    assert [p.macs for p in found.products] == [4 * 4 * 27 * 4, 4 * 4 * 4 * 6, 30, 35, 21, 6]
    assert len(found.missed) == 2
    assert "planned" in str(found) and "2 MISSED" in str(found)
    calibrated = calibrate(net, variables, [x])
    assert coverage(net, calibrated, x).products == found.products
    # Bit operations: by hand, from the MACs and bits above; all in float before calibration.
    assert found.bit_operations == (1728 + 384 + 30 + 35 + 21 + 6) * 32 * 32
    by_hand = 1728 * 2 * 4 + 384 * 2 * 32 + (30 + 35 + 21 + 6) * 32 * 32
    assert coverage(net, calibrated, x).bit_operations == by_hand
    assert "planned" not in str(coverage(net, calibrated, x))


def test_weights_alone_have_a_share_of_their_own():
    x = jnp.ones((2, 8))
    net = quantize(nn.Dense(4), [Rule(".*", weight=W)])
    found = coverage(net, calibrate(net, net.init(KEY, x), [x]), x)
    assert found.share("weight only") == 1 and found.share("quantized") == 0
    last = str(found).splitlines()[-1]
    assert last == (
        "1 products, 0.0% of multiply-accumulates quantized, 100.0% weight only, 0 MISSED"
    )


def test_operands_that_wait_for_their_calibration_are_named(net):
    net, variables, x = net
    weights = calibrate(net, variables, [x], operands=("weight",))
    found = coverage(net, weights, x)
    assert [(p.status, p.bits) for p in found.products[:2]] == [
        ("NOT CALIBRATED", (2, 32)),
        ("weight only", (2, 32)),
    ]
    assert size(net, weights, x).bytes == size(net, calibrate(net, variables, [x]), x).bytes


class Positions(nn.Module):
    """Adds a table that its code computes by a product, as sines of positions are."""

    @nn.compact
    def __call__(self, x):
        angles = jnp.einsum("m,d->md", jnp.arange(4.0), jnp.linspace(0.1, 1, 6))
        table = self.param("table", nn.initializers.normal(), (4, 3))
        added = jnp.sin(angles) + table @ jnp.ones((3, 6))
        return nn.Dense(2, name="head")(x + added[None])


def test_products_of_the_codes_own_numbers_are_no_products_of_the_net():
    net = quantize(Positions(), [Rule(".*", weight=W, input=A)])
    x = jnp.ones((2, 4, 6))
    found = coverage(net, net.init(KEY, x), x)
    # One with a parameter is.
    assert [(p.op, p.status) for p in found.products] == [
        ("dot_general", "MISSED"),
        ("dot_general", "quantized"),
    ]


def test_coverage_needs_shapes_only(net):
    net, variables, x = net
    shapes = jax.eval_shape(lambda: (variables, x))
    assert coverage(net, *shapes) == coverage(net, variables, x)


@pytest.mark.parametrize("spec", [A, Spec(4, dynamic=True)])
def test_coverage_traces_no_quantizer(spec, monkeypatch):
    x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    net = quantize(nn.Dense(4), [Rule(".*", weight=W, input=spec)])
    variables = calibrate(net, net.init(KEY, x), [x])
    monkeypatch.setattr(uniform, "fake_quant", None)
    assert [p.bits for p in coverage(net, variables, x).products] == [(2, 4)]


def test_attention_products_are_missed_only_without_a_rule():
    x = jnp.ones((2, 5, 8)) * jnp.arange(8.0)[None, None]
    for rules, statuses in (
        ([Rule(".*", weight=W, input=A)], ["quantized"] * 6),
        (
            [Rule("query|key|value|out", weight=W, input=A)],
            ["quantized"] * 3 + ["skipped"] * 2 + ["quantized"],
        ),
    ):
        net = quantize(nn.MultiHeadDotProductAttention(2), rules)
        found = coverage(net, net.init(KEY, x), x)
        assert [p.status for p in found.products] == statuses


def test_sizes_counted_by_hand(net):
    net, variables, x = net
    floats = size(net, variables, x)
    conv, weight_only = 27 * 4, 4 * 6
    others = 4 + 6 + (6 * 5 + 5) + 35 + 21 + (3 * 2 + 2)
    assert floats.params == conv + weight_only + others
    assert floats.bytes == floats.float_bytes == 4 * floats.params
    # 2-bit kernels, float32 for the rest, and a float32 scale for each of 4 and 6 channels.
    quantized = size(net, calibrate(net, variables, [x]), x)
    bits = 2 * (conv + weight_only) + 32 * (others + 4 + 6)
    assert quantized.bytes == bits // 8


def test_learned_bits_are_listed_and_counted_as_those_in_use():
    learned = Spec(8, quantizer="lsq", options={"learn_bits": True})
    rules = [Rule(".*", weight=learned, input=learned)]
    net, x = quantize(nn.Dense(4, use_bias=False), rules), jnp.ones((2, 16))
    variables = net.init(jax.random.key(0), x)
    planned = layers(net, variables, x)[0]
    assert (planned.weight.bits, planned.input.bits) == (8, 8)
    bits = {"weight_quantizer": 3.4, "input_quantizer": 4.6}
    variables["quant"] = {
        k: {"step": jnp.ones(()), "bits": jnp.float32(b)} for k, b in bits.items()
    }
    (found,) = layers(net, variables, x)
    assert (found.weight.bits, found.input.bits) == (3, 5)
    assert found.weight.label.startswith("int3") and found.bits == 64 * 3 + 32
    assert size(net, variables, x).bytes == (64 * 3 + 32) // 8
    assert [p.bits for p in coverage(net, variables, x).products] == [(3, 5)]
    # One width stores a tensor: the most that a channel uses.
    variables["quant"]["weight_quantizer"] |= {"bits": jnp.array([[2.0, 3.0, 5.2, 9.0]])}
    assert layers(net, variables, x)[0].weight.bits == 8


def test_layers_in_order_of_running(net):
    net, variables, x = net
    found = layers(net, variables, x)
    assert [(f.path, f.kind) for f in found] == [
        ("conv", "conv"), ("weight_only", "conv"), ("left", "dense"), ("no_rule", "dense"),
    ]  # fmt: skip
    assert found[0].weight == W and found[0].input == A and found[1].input is None
    assert found[0].params == 27 * 4 + 4 and not found[0].calibrated
    assert found[0].bits == 2 * 27 * 4 + 32 * (4 + 4)  # planned: a scale for each channel


def test_einsums_over_a_batch_axis_and_over_a_summed_one():
    x = jnp.ones((1, 3, 4)) * jnp.arange(4.0)[None, None]
    for equation, shape, macs in (("bhd,hde->bhe", (3, 4, 5), 60), ("abc,cd->ad", (4, 5), 20)):
        net = quantize(nn.Einsum(shape, equation, use_bias=False), [Rule(".*", weight=W, input=A)])
        (found,) = coverage(net, net.init(KEY, x), x).products
        assert (found.status, found.macs) == ("quantized", macs)


def product(kind):
    """A product of x [2, 8] and w [8, 8] in a model's own code."""
    numbers = (((1,), (0,)), ((), ()))
    dot = lambda x, w: jax.lax.dot_general(x, w, numbers)
    step = lambda x, w: (x @ w, None)
    return {
        "@": lambda x, w: x @ w,
        "jnp.dot": jnp.dot,
        "jnp.matmul": jnp.matmul,
        "jnp.tensordot": lambda x, w: jnp.tensordot(x, w, 1),
        "jnp.einsum": lambda x, w: jnp.einsum("bc,cd->bd", x, w),
        "lax.dot_general": dot,
        "lax.conv": lambda x, w: jax.lax.conv(x[:, :, None], w.T[:, :, None], (1,), "SAME")[..., 0],
        "jit": jax.jit(dot),
        "remat": jax.checkpoint(dot),
        "vmap": lambda x, w: jax.vmap(lambda row: row @ w)(x),
        "scan": lambda x, w: jax.lax.scan(step, x, w[None])[0],
        "cond": lambda x, w: jax.lax.cond(x.sum() > 0, dot, lambda x, w: x, x, w),
        "while": lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, x),
        "custom_vjp": custom(dot),
    }[kind]


def custom(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda x, w: (function(x, w), (x, w)), lambda kept, g: kept)
    return wrapped


PRODUCTS = (
    "@ jnp.dot jnp.matmul jnp.tensordot jnp.einsum lax.dot_general lax.conv jit remat vmap scan "
    "cond while custom_vjp"
).split()


@pytest.mark.parametrize("kind", PRODUCTS)
def test_no_spelling_of_a_product_is_passed_over(kind):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (8, 8))
            return nn.Dense(3, name="head")(product(kind)(x, w))

    net, x = quantize(Own(), [Rule("head", weight=W, input=A)]), jnp.ones((2, 8))
    variables = net.init(KEY, x)
    for stage in (variables, calibrate(net, variables, [x])):
        found = coverage(net, stage, x).products
        assert [(p.status, p.macs) for p in found] == [("MISSED", 64), ("quantized", 24)]


class Block(nn.Module):
    """A layer and attention's two products in the shape of a residual block."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(8, name="dense")(x + y), None


@pytest.mark.parametrize("kind", ["plain", "remat", "scan", "cond", "jit"])
def test_layers_and_attention_are_quantized_inside_every_transform(kind):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            if kind == "scan":
                lifted = nn.scan(
                    Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
                )
                return lifted(name="block")(x, None)[0]
            if kind == "cond":
                block = Block(name="block")
                run = lambda block, x: block(x)[0]
                if self.is_initializing():
                    return run(block, x)
                return nn.cond(x.sum() > 0, run, lambda block, x: x, block, x)
            lift = {"plain": lambda b: b, "remat": nn.remat, "jit": nn.jit}[kind]
            return lift(Block)(name="block")(x)[0]

    net = quantize(Outer(), [Rule(".*", weight=W, input=A)])
    x = jnp.ones((2, 5, 8)) * jnp.arange(8.0)[None, None]
    found = coverage(net, net.init(KEY, x), x).products
    names = ("query", "key", "value", "query_key", "weights_value", "out")
    paths = [*(f"block/attention/{name}" for name in names), "block/dense"]
    assert sorted(p.path for p in found) == sorted(paths * (2 if kind == "scan" else 1))
    assert {p.status for p in found} == {"quantized"}
