"""Layers inside `nn.cond`, `nn.switch` and `nn.while_loop`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk

X = jnp.abs(jax.random.normal(jax.random.key(0), (4, 6)))
RULES = [qk.Rule(".*", weight=qk.Spec(8, quantizer="lsq"), input=qk.Spec(8, quantizer="lsq"))]


class Branches(nn.Module):
    """One of several layers, by the sign of the input."""

    kind: str = "cond"

    def setup(self):
        self.a, self.b, self.c = nn.Dense(8), nn.Dense(8), nn.Dense(5)

    def __call__(self, x):
        if self.is_initializing():
            self.a(x), self.b(x)
        ways = (lambda m, x: m.a(x)), (lambda m, x: m.b(x))
        if self.kind == "cond":
            h = nn.cond(x.sum() > 0, *ways, self, x)
        else:
            h = nn.switch((x.sum() > 0).astype(int), ways[::-1], self, x)
        return self.c(h)


class Straight(nn.Module):
    """One way of `Branches`, without a branch."""

    way: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="c")(nn.Dense(8, name=self.way)(x))


@pytest.mark.parametrize("observer", [None, "mse", "percentile"])
@pytest.mark.parametrize("kind", ["cond", "switch"])
def test_both_branches_are_calibrated_on_what_runs_through_them(kind, observer):
    model = Branches(kind)
    net = qk.quantize(model, RULES)
    variables = net.init(jax.random.key(1), X)
    statuses = {p.path: p.status for p in qk.coverage(net, variables, X).products}
    assert statuses == dict.fromkeys("abc", "quantized")
    quantized = qk.calibrate(net, variables, [X, -2 * X], observer=observer)
    assert set(quantized["quant"]) == {"a", "b", "c"}
    for way, batch in (("a", X), ("b", -2 * X)):
        # Truth: the same layers without a branch, on the batches that went this way.
        alone = qk.quantize(Straight(way), RULES)
        params = {name: variables["params"][name] for name in (way, "c")}
        other = qk.calibrate(alone, {"params": params}, [batch], observer=observer)
        for name, value in jax.tree_util.tree_leaves_with_path(other["quant"][way]):
            found = quantized["quant"][way]
            for key in name:
                found = found[key.key]
            np.testing.assert_allclose(found, value, rtol=1e-6)
        # And what the net then computes.
        quant = {name: quantized["quant"][name] for name in (way, "c")}
        want = alone.apply({"params": params, "quant": quant}, batch)
        np.testing.assert_allclose(net.apply(quantized, batch), want, rtol=1e-6, atol=1e-6)


def numbers(diagnosed):
    fields = dataclasses.asdict(diagnosed)
    return {name: value for name, value in fields.items() if isinstance(value, int | float)}


@pytest.mark.parametrize("kind", ["cond", "switch"])
def test_layers_of_branches_are_diagnosed_on_what_runs_through_them(kind):
    net = qk.quantize(Branches(kind), RULES)
    quantized = qk.calibrate(net, net.init(jax.random.key(1), X), [X, -2 * X])
    batches = {"a": [X, 3 * X], "b": [-X]}
    found = qk.diagnose(net, quantized, [*batches["b"], *batches["a"]]).operands
    assert sorted(d.path for d in found) == ["a", "a", "b", "b", "c", "c"]
    for way, others in batches.items():
        # Truth: the same layers without a branch, on the batches that went this way.
        alone = qk.quantize(Straight(way), RULES)
        own = {c: {n: quantized[c][n] for n in (way, "c")} for c in ("params", "quant")}
        wanted = qk.diagnose(alone, own, others).operands
        for one, two in zip([d for d in found if d.path == way], wanted, strict=False):
            assert numbers(one) == pytest.approx(numbers(two), rel=1e-5)
    taken = qk.diagnose(net, quantized, batches["a"]).operands
    assert {d.path for d in taken} == {"a", "c"}  # and nothing is said of the other


def test_a_branch_that_no_batch_takes_is_named():
    net = qk.quantize(Branches(), RULES)
    variables = net.init(jax.random.key(1), X)
    with pytest.raises(ValueError, match=r"layer 'b': no calibration data reached"):
        qk.calibrate(net, variables, [X])
    # What the message leaves open: that layer in float.
    net = qk.quantize(Branches(), [qk.Rule("b"), *RULES])
    assert set(qk.calibrate(net, variables, [X])["quant"]) == {"a", "c"}


class Loop(nn.Module):
    def setup(self):
        self.inside, self.head = nn.Dense(6), nn.Dense(5)

    def __call__(self, x):
        if self.is_initializing():
            self.inside(x)
        body = lambda m, carry: (carry[0] + 1, m.inside(carry[1]))
        return self.head(nn.while_loop(lambda m, c: c[0] < 3, body, self, (0, x))[1])


class Closure(nn.Module):
    """Calls a layer in a branch as what it closes over, and not through its argument."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="inside")
        if self.is_initializing():
            layer(x)
        ways = (lambda m, x: layer(x)), (lambda m, x: x)
        return nn.Dense(5, name="head")(nn.cond(x.sum() > 0, *ways, self, x))


class LaxCond(nn.Module):
    """The same under JAX's own `cond`, which knows of no variables."""

    def setup(self):
        self.inside, self.head = nn.Dense(6), nn.Dense(5)

    def __call__(self, x):
        if self.is_initializing():
            self.inside(x)
        ways = (lambda x: self.inside(x)), (lambda x: x)  # flax's modules don't hash here
        return self.head(jax.lax.cond(x.sum() > 0, *ways, x))


class Cell(nn.Module):
    def setup(self):
        self.inside = nn.Dense(6)

    def __call__(self, x, _):
        if self.is_initializing():
            self.inside(x)
        ways = (lambda m, x: m.inside(x)), (lambda m, x: x)
        return nn.cond(x.sum() > 0, *ways, self, x), None


class Steps(nn.Module):
    """A branch in each step of a scan."""

    def setup(self):
        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        self.steps, self.head = nn.scan(Cell, length=3, **lift)(), nn.Dense(5)

    def __call__(self, x):
        return self.head(self.steps(x, None)[0])


class StepsInside(nn.Module):
    """A vmap in a branch."""

    def setup(self):
        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        self.inside, self.head = nn.vmap(nn.Dense, axis_size=3, **lift)(6), nn.Dense(5)

    def __call__(self, x):
        if self.is_initializing():
            self.inside(x)
        ways = (lambda m, x: m.inside(x).sum(0)), (lambda m, x: x)
        return self.head(nn.cond(x.sum() > 0, *ways, self, x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Loop(), "read-only .*nn.while_loop"),
        (Closure(), "through a closure"),
        (LaxCond(), "through a closure.*lax.cond"),
        (Steps(), r"in branches \(nn.cond, nn.switch\) or in nn.scan"),
        (StepsInside(), "in branches .* nn.vmap, not both"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_where_no_statistics_can_be_kept(model, message):
    net = qk.quantize(model, RULES)
    variables = net.init(jax.random.key(1), X)
    with pytest.raises(ValueError, match="(?s)" + message + ".*in float with a rule"):
        qk.calibrate(net, variables, [X])
    net = qk.quantize(model, [qk.Rule(".*inside"), *RULES])
    quantized = qk.calibrate(net, variables, [X])
    assert set(quantized["quant"]) == {"head"}
    assert np.isfinite(net.apply(quantized, X)).all()
