import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.quantizers import qil

NAMES = ("int2", "int3", "uint2", "int4", "uint4", "int8", "uint8")


def spec_of(name, **fields):
    return Spec(int(name.strip("uint")), quantizer="qil", signed=name[0] == "i", **fields)


def params_of(center, half_width):
    return {"center": jnp.float32(center), "half_width": jnp.float32(half_width)}


def vjp(x, center, half_width, spec, g, **kw):
    f = lambda x, p: qil.fake_quant(x, p, spec, **kw)
    y, pull = jax.vjp(f, jnp.asarray(x, jnp.float32), params_of(center, half_width))
    dx, dparams = pull(jnp.asarray(g, jnp.float32))
    return tuple(np.asarray(a) for a in (y, dx, dparams["center"], dparams["half_width"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["start", "pruned"])
def test_against_the_papers_formula_in_torch(quantizer_golden, kind, name):
    golden = quantizer_golden(f"qil/{kind}/{name}")
    spec = spec_of(name)
    q = qil.integer_view(params_of(1, 1), spec)[2].qmax
    y, dx, dcenter, dhalf = vjp(
        golden["x"], golden["center"], golden["half_width"], spec, golden["g"], batch_axes=(0,)
    )
    # The center and half width carry LSQ's factor on top; 5 elements of an example.
    factor = 1 / math.sqrt(5 * q)
    np.testing.assert_allclose(y, golden["y"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dx, golden["dx"], rtol=1e-6)
    np.testing.assert_allclose(dcenter, golden["dcenter"] * factor, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(dhalf, golden["dhalf_width"] * factor, rtol=2e-5, atol=1e-6)


def test_two_bit_weights_are_ternary_pruned_and_saturated():
    spec = Spec(2, quantizer="qil")
    # Interval [0.5, 1.5]: the middle, where |code| turns from 0 to 1, is 1.
    x = np.array([-9, -1.5, -1.01, -0.99, -0.5, 0, 0.3, 0.5, 0.99, 1.01, 1.5, 9], np.float32)
    y, dx, _, _ = vjp(x, 1.0, 0.5, spec, np.ones(12))
    np.testing.assert_array_equal(y, 1.5 * np.array([-1, -1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 1]))
    # Strictly inside the interval only; the slope there is (c + d) / (2 d).
    np.testing.assert_array_equal(dx, 1.5 * np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]))
    scale, zero_point, form = qil.integer_view(params_of(1.0, 0.5), spec)
    assert (form.qmin, form.qmax, scale, zero_point) == (-1, 1, 1.5, 0)


def test_unsigned_values_below_the_interval_are_zero():
    spec = Spec(2, quantizer="qil", signed=False)
    x = np.array([-3, 0, 0.5, 0.67, 1.0, 1.4, 1.5, 7], np.float32)
    y, dx, _, _ = vjp(x, 1.0, 0.5, spec, np.ones(8))
    # codes round((x - 0.5) * 3); at x = 1 that is 1.5, a tie, and goes to 2.
    np.testing.assert_allclose(y, 0.5 * np.array([0, 0, 0, 1, 2, 3, 3, 3]))
    np.testing.assert_array_equal(dx, 1.5 * np.array([0, 0, 0, 1, 1, 1, 0, 0]))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.floats(0.1, 2.0),
    st.floats(0.05, 1.0),
    st.integers(0, 2**31),
)
def test_gradients_against_differences_of_a_smooth_surrogate(bits, signed, center, ratio, seed):
    spec = Spec(bits, quantizer="qil", signed=signed)
    q = qil.integer_view(params_of(1, 1), spec)[2].qmax
    c, d = float(np.float32(center)), float(np.float32(center * ratio))
    rng = np.random.default_rng(seed)
    x = rng.normal(0, c, 12).astype(np.float32).astype(np.float64)
    magnitude, sign = (abs(x), np.sign(x)) if signed else (x, 1.0)

    def u(c, d):
        return (magnitude - c) / (2 * d) + 0.5

    start = u(c, d)
    near = (abs(start) < 1e-3) | (abs(start - 1) < 1e-3)
    g = rng.normal(size=12) * ~near
    r = np.round(q * np.clip(start, 0, 1)) / q - np.clip(start, 0, 1)

    def surrogate(c2, d2):
        return np.sum(g * (c + d) * sign * (np.clip(u(c2, d2), 0, 1) + r))

    h = 1e-6 * d
    wanted_c = (surrogate(c + h, d) - surrogate(c - h, d)) / (2 * h)
    wanted_d = (surrogate(c, d + h) - surrogate(c, d - h)) / (2 * h)
    _, _, dcenter, dhalf = vjp(x, c, d, spec, g)
    size = math.sqrt(12 * q)
    tolerance = 1e-3 * (1 + c / d)
    np.testing.assert_allclose(dcenter * size, wanted_c, rtol=1e-3, atol=tolerance)
    np.testing.assert_allclose(dhalf * size, wanted_d, rtol=1e-3, atol=tolerance)


compiled = jax.jit(qil.fake_quant, static_argnames="spec")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 2, 4, 16]),
    st.booleans(),
    st.floats(-1.0, 3.0, width=32),
    st.floats(-0.5, 2.0, width=32),
    st.integers(0, 2**31),
)
def test_any_interval_gives_codes_compiled_or_not(bits, signed, center, half_width, seed):
    if bits == 1 and signed:
        return
    spec = Spec(bits, quantizer="qil", signed=signed)
    params = params_of(center, half_width)
    x = np.random.default_rng(seed).normal(0, 2, 24).astype(np.float32)
    y = qil.fake_quant(x, params, spec)
    scale, zero_point, form = qil.integer_view(params, spec)
    codes = np.round(y * (1 / scale))
    assert np.all((codes >= form.qmin) & (codes <= form.qmax)) and zero_point == 0
    np.testing.assert_array_equal(y, codes * scale)
    np.testing.assert_array_equal(codes.astype(form.storage), codes)
    assert qil.fake_quant(jnp.zeros(1), params, spec) == 0

    np.testing.assert_array_equal(compiled(x, params, spec=spec), y)

    gain, offset = qil.pre_affine(params, spec)
    moved = gain * abs(x) + offset if signed else gain * x + offset
    low, width = max(center - half_width, 0), center + half_width - max(center - half_width, 0)
    if width > 0.05 * (low + 0.1):
        # Where the interval is not tiny beside its place; elsewhere float32 cancels.
        unsigned = np.clip(np.round(moved * (1 / scale)), 0, form.qmax)
        away = abs(codes) if signed else codes
        assert np.all(abs(unsigned - away) <= 1)
        assert np.mean(unsigned != away) <= (0.1 if bits < 12 else 1.0)


def test_the_interval_is_kept_at_zero_and_keeps_its_upper_end():
    # center < half_width would put zero inside the interval; it is cut there.
    spec = Spec(4, quantizer="qil", signed=False)
    x = jnp.linspace(0, 3, 31)
    cut = qil.fake_quant(x, params_of(0.5, 1.5), spec)  # [-1, 2] cut to [0, 2]
    np.testing.assert_array_equal(cut, qil.fake_quant(x, params_of(1.0, 1.0), spec))
    # The gradients are those of the cut interval, and reach both parameters.
    g = np.ones(31)
    a, b = vjp(x, 0.5, 1.5, spec, g), vjp(x, 1.0, 1.0, spec, g)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert a[2] != 0 and a[3] != 0


@pytest.mark.parametrize("interval", [(0.5, 0.0), (0.5, -0.2), (-1.0, 0.2), (0.0, 0.0)])
def test_a_collapsed_interval_stays_finite(interval):
    for signed in (True, False):
        spec = Spec(3, quantizer="qil", signed=signed)
        out = vjp(np.linspace(-1, 1, 41), *interval, spec, np.ones(41))
        assert all(np.isfinite(o).all() for o in out)
        assert qil.integer_view(params_of(*interval), spec)[0] > 0


def test_infinite_input_leaves_the_parameters_gradient_finite():
    y, dx, dcenter, dhalf = vjp(
        [np.inf, -np.inf, 0.5], 1.0, 1.0, Spec(4, quantizer="qil"), np.ones(3)
    )
    np.testing.assert_allclose(y, [2, -2, 4 / 7], rtol=1e-6)
    np.testing.assert_array_equal(dx, [0, 0, 1])
    assert np.isfinite(dcenter) and np.isfinite(dhalf)


def test_the_interval_starts_at_zero_with_the_step_of_lsq():
    x = np.array([-3.0, 0.5, 2.0, 0.5], np.float32)
    stats = numerics.finish(numerics.measure(x))
    # E|x| is 3/2, and 2 sqrt(q) E|x| with q = 1: 3, the largest value; with q = 3 it is beyond.
    for bits, end in ((2, 3.0), (3, 3.0)):
        params = qil.init(stats, Spec(bits, quantizer="qil"))
        assert params == {"center": end / 2, "half_width": end / 2}
    heavy = np.concatenate([np.full(99, 0.5), [20.0]]).astype(np.float32)
    stats = numerics.finish(numerics.measure(heavy))
    mean = heavy.mean(dtype=np.float64)
    for fields, q in ((dict(), 1), (dict(signed=False), 3)):
        params = qil.init(stats, Spec(2, quantizer="qil", **fields))
        np.testing.assert_allclose(params["center"], math.sqrt(q) * mean, rtol=1e-6)
        np.testing.assert_array_equal(params["center"], params["half_width"])
    ranged = qil.init(stats, Spec(2, quantizer="qil", observer="minmax"))
    assert ranged == {"center": 10, "half_width": 10}
    zero = numerics.finish(numerics.measure(0 * x))
    spec = Spec(4, quantizer="qil")
    assert qil.integer_view(qil.init(zero, spec), spec)[0] == 1


def test_a_layer_of_two_bits_does_not_start_pruned():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    spec = Spec(2, quantizer="qil")
    y = qil.fake_quant(x, qil.init(numerics.finish(numerics.measure(x)), spec), spec)
    # The threshold is the mean magnitude, above which are 42 % of a Gaussian.
    assert 0.38 < np.mean(y != 0) < 0.46


def test_at_the_start_it_is_the_uniform_narrow_grid():
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    stats = numerics.finish(numerics.measure(x))
    for bits in (2, 4, 8):
        spec = Spec(bits, quantizer="qil", observer="minmax")
        scale, _, form = qil.integer_view(qil.init(stats, spec), spec)
        assert (form.qmin, form.narrow_range) == (-form.qmax, True)
        np.testing.assert_allclose(scale, abs(x).max() / form.qmax, rtol=1e-6)


def test_refused_specs():
    with pytest.raises(ValueError, match="'qil' came with symmetric=False"):
        qil.check(Spec(4, quantizer="qil", symmetric=False))
    with pytest.raises(ValueError, match="'qil' came with mask='none'"):
        qil.check(Spec(4, quantizer="qil", mask="none"))
    with pytest.raises(ValueError, match="signed=True and narrow_range=False"):
        qil.check(Spec(4, quantizer="qil", narrow_range=False))
    qil.check(Spec(4, quantizer="qil", narrow_range=True))
    qil.check(Spec(4, quantizer="qil", signed=False))
