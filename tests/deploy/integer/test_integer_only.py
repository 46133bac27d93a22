"""Integer-only nets: no float inside, the trained net's codes, and a NumPy twin bit for bit."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax import graph
from qkd_jax.deploy import convert, integer_apply
from qkd_jax.deploy.integer import reference
from qkd_jax.models import create
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets

IMAGES = np.random.default_rng(0).normal(0, 1, (16, 12, 12, 1)).astype(np.float32)


def inside(model, images):
    """Dtypes of everything that an integer-only program computes between input and output codes."""
    traced = graph.trace(lambda a, x: integer_apply(type(model)(a, model.program), x),
                         model.arrays, images, evaluate=False)  # fmt: skip
    depends, floats = {traced.inputs[0]}, []
    for node in traced.nodes:
        if depends.intersection(node.inputs):
            depends.update(node.outputs)
            floats += [node.op for v in node.outputs if traced.dtype(v).kind == "f"]
    return floats


def compare(net, variables, images, allowed=0.0):
    """Integer-only against the program with floats and against NumPy; returns the model."""
    model = convert(net, variables, images, integer_only=True)
    found, codes = integer_apply(model, images, capture=True)
    twin, twin_codes = reference.run(model.program, model.arrays, images)
    np.testing.assert_array_equal(twin, found)
    assert set(twin_codes) == set(codes)
    for name, array in codes.items():
        np.testing.assert_array_equal(twin_codes[name], array, err_msg=name)

    _, wanted = integer_apply(convert(net, variables, images), images, capture=True)
    assert set(codes) == set(wanted)
    gaps = {n: np.abs(np.asarray(codes[n]) - np.asarray(a)) for n, a in wanted.items()}
    assert max(int(g.max()) for g in gaps.values()) <= (1 if allowed else 0), gaps.keys()
    assert sum(int((g > 0).sum()) for g in gaps.values()) <= allowed * sum(
        g.size for g in gaps.values()
    )
    # Floats: the input to its codes (scaled, rounded, clipped) and the logits' codes scaled.
    assert set(inside(model, images)) <= {"mul", "round", "max", "min", "clamp", "reshape",
                                          "convert_element_type"}  # fmt: skip
    assert inside(model, images)[-2:] == ["convert_element_type", "mul"]
    assert all(
        a.dtype != jnp.float32 or a.size == 1 for a in model.arrays.values()
    )  # two scales at the borders
    return model


def fitted(model, images, preset):
    rules = presets.rules(preset, model=model, images=images)
    return small_nets.calibrated(model, rules, images)


def test_a_mixed_net():
    images = np.asarray(small_nets.images(8))
    net, variables = fitted(small_nets.Mixed(), images, "w8a8:integer")
    model = compare(net, variables, images, allowed=1e-3)
    other = small_nets.images(3, seed=4)
    np.testing.assert_array_equal(
        integer_apply(model, other), reference.run(model.program, model.arrays, other)[0]
    )
    kinds = [type(step).__name__ for step in model.program.steps]
    # Seven quantizers behind the first, and the sum that is pooled without a module of its own.
    assert kinds.count("Rescale") == 9 and kinds.count("Encode") == kinds.count("Decode") == 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w8a8:integer", "w4a4:integer", "w2a2:integer"])
@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
def test_nets_of_the_models_package(name, preset):
    fields = dict(width=4) | (dict(expansion=2) if name != "resnet8" else {})
    net, variables = fitted(create(name, 10, **fields), IMAGES, preset)
    model = compare(net, variables, IMAGES, allowed=1e-3)
    kinds = {type(step).__name__ for step in model.program.steps}
    assert ("Table" in kinds) == (preset != "w8a8:integer")


class Pair(nn.Module):
    """Two dense layers: a clipped sum of one term, and thresholds for any quantizer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(6, name="a")(x)))
        return nn.Dense(3, name="b")(x)


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        ("qil", 3),
        *(
            pytest.param(q, b, marks=pytest.mark.slow)
            for q, b in (("ewgs", 4), ("pact", 6), ("dorefa", 4), ("tqt", 3), ("qil", 6))
        ),
    ],
)
def test_thresholds_are_where_the_codes_rise(quantizer, bits):
    x = np.random.default_rng(1).normal(0, 1, (64, 8)).astype(np.float32)
    weight = Spec(4, granularity="channel")
    rules = [
        Rule("a", weight=weight, input=Spec(8)),
        Rule("b", weight=weight, input=Spec(bits, quantizer=quantizer, signed=False),
             output=Spec(8)),
    ]  # fmt: skip
    net, variables = small_nets.calibrated(Pair(), rules, x)
    model = compare(net, variables, x, allowed=1e-2 if quantizer == "pact" else 0.0)
    tables = [s for s in model.program.steps if type(s).__name__ == "Table"]
    assert len(tables) == int(quantizer != "pact")
    if tables:
        (table,) = tables
        thresholds = np.asarray(model.arrays[table.thresholds])
        assert thresholds.shape == (2**bits - 1, 1, 6)
        assert np.all(np.diff(thresholds, axis=0) >= 0)
        # One more or less at a threshold: the code changes there and only there.
        scale = variables["params"]["norm"]["scale"]
        assert np.any(np.asarray(scale) < 0) and model.arrays[table.sign].min() == -1


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(4, name="left")(x), nn.Dense(4, name="right")(x)
        return nn.Dense(2, name="head")(nn.tanh(a) + nn.relu(b))


class Touched(nn.Module):
    """Its input, or what is between its layers, is changed in float."""

    change: Callable
    first: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="a")(self.change(x) if self.first else x)
        return nn.Dense(2, name="b")(x if self.first else self.change(x))


def clamped(x):
    high = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3]), x.shape)
    return jax.lax.clamp(-jnp.ones_like(x), x, high)


GRIDS = [Rule("a|b", weight=Spec(8), input=Spec(8), output=Spec(8))]


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (Touched(lambda x: 1 - x, first=True), GRIDS, "'sub' in 'the root module' stays in float"),
        (Touched(clamped, first=False), GRIDS, "'clamp' in 'the root module' stays in float"),
        (Touched(lambda x: x.astype(jnp.int32).astype(jnp.float32), first=False), GRIDS,
         "'convert_element_type' in 'the root module' stays in float: it rounds to int32"),
        (Touched(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), first=False), GRIDS,
         "'convert_element_type' in 'the root module' stays in float: it rounds to bfloat16"),
        (Touched(jnp.bfloat16, first=True), GRIDS, "it rounds to bfloat16"),
        (
            Branches(),
            [Rule("left|right", weight=Spec(8), input=Spec(8)),
             Rule("head", weight=Spec(8), input=Spec(8), output=Spec(8))],
            "'tanh' in 'the root module' stays in float.*`output` spec.*w8a8:integer",
        ),
        (
            Pair(),
            [Rule("a|b", weight=Spec(8), input=Spec(8))],
            "the net's output is not on a grid.*output=Spec",
        ),
        (
            Pair(),
            [Rule("a", weight=Spec(8), input=Spec(8), output=Spec(8)),
             Rule("b", weight=Spec(8), output=Spec(8))],
            "'dot_general' in 'b' stays in float: its weight has codes and its input has none",
        ),
    ],
)  # fmt: skip
def test_what_stays_in_float_is_named(model, rules, message):
    x = np.random.default_rng(1).normal(0, 1, (8, 8)).astype(np.float32)
    net, variables = small_nets.calibrated(model, rules, x)
    with pytest.raises(ValueError, match=message):
        convert(net, variables, x, integer_only=True)


@pytest.mark.slow
def test_a_transformer_is_refused_by_its_layer_norm():
    model = create("vit", 3, depth=1, width=8, heads=2)
    net, variables = fitted(model, IMAGES, "w8a8:integer")
    with pytest.raises(ValueError, match="'square' in 'block0/norm1' stays in float"):
        convert(net, variables, IMAGES, integer_only=True)


def test_zero_padding_pads_with_the_zero_point():
    """An affine input whose zero point is not 0: a border of zeros must change nothing."""

    class Conv(nn.Module):
        padding: str

        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (3, 3), padding=self.padding, name="conv")(x)

    x = np.random.default_rng(2).uniform(1, 3, (2, 5, 5, 2)).astype(np.float32)
    rule = Rule("conv", weight=Spec(8, granularity="channel"),
                input=Spec(8, signed=False, symmetric=False), output=Spec(8))  # fmt: skip
    x[0, 0, 0, 0] = -1
    net, variables = small_nets.calibrated(Conv("SAME"), [rule], x)
    assert variables["quant"]["conv"]["input_quantizer"]["zero_point"] == 64
    outer = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    valid = type(net)(Conv("VALID"), net.rules)
    for integer_only in (False, True):
        same = convert(net, variables, x, integer_only=integer_only)
        padded = convert(valid, variables, outer, integer_only=integer_only)
        np.testing.assert_array_equal(integer_apply(same, x), integer_apply(padded, outer))
    np.testing.assert_array_equal(
        reference.run(same.program, same.arrays, x)[0], integer_apply(same, x)
    )


class Tied(nn.Module):
    def setup(self):
        self.embed, self.first = nn.Embed(7, 6, name="embed"), nn.Dense(6, name="first")

    def __call__(self, x):
        return self.embed.attend(nn.relu(self.first(x)))


class Upward(nn.Module):
    transposed: bool

    @nn.compact
    def __call__(self, x):
        up = nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=self.transposed, name="up")
        return nn.Dense(5, name="head")(nn.relu(up(x)).mean((1, 2)))


@pytest.mark.parametrize(
    ("model", "shape", "last"),
    [(Tied(), (3, 8, 4), "embed"), (Upward(True), (3, 5, 5, 4), "head")],
    ids=["attend", "transposed kernel"],
)
def test_a_weight_that_is_moved_between_its_codes_and_its_product(model, shape, last):
    x = np.random.default_rng(0).normal(0.3, 1, shape).astype(np.float32)
    weight, signal = Spec(8, granularity="channel"), Spec(8, symmetric=False)
    rules = [Rule(last, weight=weight, input=signal, output=Spec(8))]
    net, variables = small_nets.calibrated(
        model, [*rules, Rule(".*", weight=weight, input=signal)], x
    )
    compare(net, variables, x, allowed=0.01)
