import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.quantizers import lsq

NAMES = ("int2", "int3", "uint2", "int4", "uint4", "int8", "uint8")


def spec_of(name, **fields):
    return Spec(int(name.strip("uint")), quantizer="lsq", signed=name[0] == "i", **fields)


def vjp(x, step, spec, g, **kw):
    f = lambda x, p: lsq.fake_quant(x, p, spec, **kw)
    y, pull = jax.vjp(f, jnp.asarray(x), {"step": jnp.asarray(step, jnp.float32)})
    dx, dparams = pull(jnp.asarray(g))
    return np.asarray(y), np.asarray(dx), np.asarray(dparams["step"])


def slopes(x, step, spec):
    """d x_hat / d x and d x_hat / d step, element by element: each has a step of its own."""
    x = np.asarray(x, np.float32)
    steps = np.full(x.shape, step, np.float32)
    _, dx, dstep = vjp(x, steps, spec, np.ones_like(x))
    return dx, dstep * math.sqrt(spec.format.qmax)  # N = 1


def closed_form(x, step, spec):
    """The paper's slopes in float64: d x_hat / d x and d x_hat / d step."""
    n, p = spec.format.qmin, spec.format.qmax
    u = np.asarray(x, np.float64) / np.float64(step)
    inside = (n < u) & (u < p)
    return inside, np.where(inside, np.round(u) - u, np.where(u <= n, n, p))


@pytest.mark.parametrize("name", NAMES)
def test_against_the_papers_listing_in_torch(quantizer_golden, name):
    golden = quantizer_golden(f"lsq/{name}")
    y, dx, dstep = vjp(golden["x"], golden["step"], spec_of(name), golden["g"], batch_axes=(0,))
    np.testing.assert_allclose(y, golden["y"], rtol=1e-6)
    # PyTorch multiplies the gradient by s and divides it again, and sums in another order.
    np.testing.assert_allclose(dx, golden["dx"], rtol=1e-6)
    np.testing.assert_allclose(dstep, golden["dstep"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_against_torchs_learnable_quantizer(quantizer_golden, name):
    golden = quantizer_golden(f"learnable/{name}")
    x, spec = golden["x"][:, 0], spec_of(name)
    dx, dstep = slopes(x, 0.25, spec)
    n, p = spec.format.qmin, spec.format.qmax
    # PyTorch masks by the rounded code, the paper by u: they differ from an end to half a step
    # outside it, where the paper clips.
    u = x / 0.25
    differs = ((u >= p) & (np.round(u) <= p)) | ((u <= n) & (np.round(u) >= n))
    assert differs.any()
    np.testing.assert_array_equal(dx[~differs], golden["dx"][:, 0][~differs])
    np.testing.assert_allclose(dstep[~differs], golden["dstep"][~differs], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(dx[differs], 0)
    np.testing.assert_allclose(dstep[differs], np.where(u > 0, p, n)[differs], rtol=1e-6)
    y, _, _ = vjp(golden["x"], 0.25, spec, golden["x"])
    np.testing.assert_array_equal(y, golden["y"])


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_gradient_on_and_around_every_edge(bits, signed):
    if bits == 1 and signed:
        return
    spec = Spec(bits, quantizer="lsq", signed=signed)
    n, p = spec.format.qmin, spec.format.qmax
    # The neighbours of 0 are denormal, which XLA takes for 0; 1e-30 stands for them.
    around = [np.nextafter(np.float32(e), np.float32(d)) for e in (n, p) if e for d in (-1e9, 1e9)]
    around += [-1e-30, 1e-30]
    offsets = np.array([-1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5])
    u = np.concatenate([n + offsets, p + offsets, offsets, around]).astype(np.float32)
    u = np.resize(u, 39)  # one shape for all formats, to compile once
    step = 0.125  # a power of two: u is exact in float32
    dx, dstep = slopes(u * np.float32(step), step, spec)
    inside, slope = closed_form(u * np.float64(step), step, spec)
    np.testing.assert_array_equal(dx, inside.astype(np.float32))
    np.testing.assert_allclose(dstep, slope, rtol=1e-6, atol=1e-7)
    # On the ends themselves: no gradient to x, the end to the step.
    at = {float(v): i for i, v in enumerate(u)}
    assert dx[at[n]] == dx[at[p]] == 0
    np.testing.assert_allclose([dstep[at[n]], dstep[at[p]]], [n, p], rtol=1e-6)


def test_exact_halves_round_to_even_in_value_and_gradient():
    dx, dstep = slopes(np.array([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0, Spec(4, quantizer="lsq"))
    np.testing.assert_array_equal(dx, np.ones(5))
    np.testing.assert_allclose(dstep, [-0.5, 0.5, -0.5, 0.5, -0.5], rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 8), st.booleans(), st.floats(0.01, 2.0), st.integers(0, 2**31))
def test_step_gradient_against_differences_of_a_smooth_surrogate(bits, signed, step, seed):
    # With the rounding residual r held fixed, s * (clip(x / s, n, p) + r) is piecewise smooth in s,
    # and its slope is what the straight-through rule claims.
    spec = Spec(bits, quantizer="lsq", signed=signed)
    n, p = spec.format.qmin, spec.format.qmax
    rng = np.random.default_rng(seed)
    x = rng.normal(0, step * p, 16).astype(np.float32).astype(np.float64)
    step = float(np.float32(step))
    u = x / step
    edges = np.minimum(abs(u - n), abs(u - p)) < 1e-3
    halves = abs(u - np.floor(u) - 0.5) < 1e-3
    g = rng.normal(size=16) * ~(edges | halves)
    r = np.round(np.clip(u, n, p)) - np.clip(u, n, p)
    surrogate = lambda s: np.sum(g * s * (np.clip(x / s, n, p) + r))
    h = 1e-6 * step
    difference = (surrogate(step + h) - surrogate(step - h)) / (2 * h)
    _, _, dstep = vjp(x.astype(np.float32), step, spec, g.astype(np.float32))
    np.testing.assert_allclose(dstep * math.sqrt(16 * p), difference, rtol=1e-3, atol=1e-3)


def test_gradient_scale_counts_what_shares_a_step():
    scale = numerics.gradient_scale
    # Weights of a 3x3 convolution, 16 to 32 channels: per tensor, per output channel.
    assert scale((3, 3, 16, 32), 1, 7) == 1 / math.sqrt(3 * 3 * 16 * 32 * 7)
    assert scale((3, 3, 16, 32), 32, 7) == 1 / math.sqrt(3 * 3 * 16 * 7)
    # Activations: features of one example, whatever the batch and wherever its axis.
    for batch in (1, 8, 128):
        for shape, axes in (((batch, 5, 4), (0,)), ((5, 4, batch), (-1,)), ((2, 10, batch), (2,))):
            assert scale(shape, 1, 7, batch_axes=axes) == 1 / math.sqrt(20 * 7)
    assert scale((6, 4, 5), 1, 7, batch_axes=(0, 1)) == 1 / math.sqrt(5 * 7)
    # The unsigned grid's p.
    assert scale((9,), 1, 3) == 1 / math.sqrt(27)


def test_first_step_is_the_papers():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for bits, p in ((2, 1), (3, 3), (4, 7), (8, 127)):
        stats = numerics.finish(numerics.measure(x))
        step = lsq.init(stats, Spec(bits, quantizer="lsq"))["step"]
        np.testing.assert_allclose(step, 2 * abs(x).mean() / math.sqrt(p), rtol=1e-6)
    stats = numerics.finish(numerics.measure(abs(x), channel_axes=(1,)))
    step = lsq.init(stats, Spec(2, quantizer="lsq", signed=False))["step"]
    np.testing.assert_allclose(step, 2 * abs(x).mean(0, keepdims=True) / math.sqrt(3), rtol=1e-6)


def test_first_step_from_an_observer_spans_the_range():
    stats = numerics.finish(numerics.measure(np.array([-1.4, 0.3, 0.7], np.float32)))
    spec = Spec(4, quantizer="lsq", narrow_range=True, observer="minmax")
    np.testing.assert_allclose(lsq.init(stats, spec)["step"], 1.4 / 7, rtol=1e-6)


@pytest.mark.parametrize("observer", [None, "minmax"])
def test_all_zero_data_start_at_step_one(observer):
    stats = numerics.finish(numerics.measure(np.zeros(5, np.float32)))
    assert lsq.init(stats, Spec(4, quantizer="lsq", observer=observer))["step"] == 1


@pytest.mark.parametrize("step", [0.0, -0.3, 1e-20])
def test_a_step_below_the_minimum_works_and_can_come_back(step):
    spec = Spec(3, quantizer="lsq")
    x = np.array([-1.0, 0.0, 2.0], np.float32)
    y, _, dstep = vjp(x, step, spec, np.ones(3, np.float32))
    view, _, _ = lsq.integer_view({"step": jnp.float32(step)}, spec)
    assert view == np.float32(numerics.MIN_SCALE)
    np.testing.assert_array_equal(y, np.float32([-4, 0, 3]) * view)
    # Both ends pull, -4 and 3; the true gradient of max(step, minimum) would be 0.
    np.testing.assert_allclose(dstep, -1 / math.sqrt(3 * 3), rtol=1e-6)
    up = jax.grad(lambda s: lsq.integer_view({"step": s}, spec)[0])(jnp.float32(step))
    assert up == 1


def test_refused_specs():
    with pytest.raises(ValueError, match="'lsq' came with symmetric=False"):
        lsq.check(Spec(4, quantizer="lsq", symmetric=False))
    with pytest.raises(ValueError, match="'lsq' came with mask='rounded'"):
        lsq.check(Spec(4, quantizer="lsq", mask="rounded"))
    with pytest.raises(ValueError, match="symmetric=False"):
        stats = numerics.finish(numerics.measure(np.ones(3, np.float32)))
        lsq.init(stats, Spec(4, quantizer="lsq", symmetric=False))


def test_gradient_descent_on_the_step_finds_the_least_error():
    # The rule need not be the derivative of the error, but it must lead near its minimum.
    x = jnp.asarray(np.random.default_rng(0).normal(size=4000), jnp.float32)
    spec = Spec(3, quantizer="lsq")
    error = lambda s: jnp.mean((lsq.fake_quant(x, {"step": s}, spec) - x) ** 2)
    rate = 0.5 * math.sqrt(4000 * 3)  # takes gs out again
    descend = jax.jit(lambda s: s - rate * jax.grad(error)(s))
    step = jnp.float32(0.2)
    for _ in range(100):
        step = descend(step)
    scan = np.linspace(0.2, 1.2, 101)
    best = min(float(error(jnp.float32(s))) for s in scan)
    assert error(step) < 1.1 * best


def test_the_backward_pass_holds_no_copy_of_the_activations():
    spec = Spec(4, quantizer="lsq", signed=False)
    shapes = [(16, 8, 8, 16), (16, 8, 8, 64)]
    if jax.__version_info__ < (0, 12):  # whose XLA writes down what it sums over a single channel
        shapes.append((16, 28, 28, 1))
    for shape in shapes:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)

        def backward(x, step, g):
            f = lambda x, s: lsq.fake_quant(x, {"step": s}, spec, batch_axes=(0,))
            return jax.vjp(f, x, step)[1](g)

        step = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = jax.jit(backward).lower(x, step, x).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary <= math.prod(shape)  # a byte for each float at most


def test_second_derivatives_exist():
    # Of the closed forms: the step's gradient is linear in the upstream gradient.
    spec = Spec(4, quantizer="lsq")
    x = jnp.linspace(-1, 1, 24).reshape(2, 12)
    loss = lambda s: jnp.sum(lsq.fake_quant(x, {"step": s}, spec) ** 2)
    assert np.isfinite(jax.jit(jax.grad(jax.grad(loss)))(jnp.float32(0.1)))
