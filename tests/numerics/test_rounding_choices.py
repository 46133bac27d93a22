"""Roundings, surrogate gradients, scale conventions and powers of two, against closed forms."""

import decimal
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import IntFormat, Spec
from qkd_jax.quantizers import uniform

HALVES = [0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, -0.49999997, 0.3, -0.7, 8388607.5, 0.0, 3.0]


@pytest.mark.parametrize(
    ("rounding", "mode"),
    [
        ("even", decimal.ROUND_HALF_EVEN),
        ("away", decimal.ROUND_HALF_UP),
        ("floor", decimal.ROUND_FLOOR),
        ("stochastic", decimal.ROUND_HALF_EVEN),  # without a key: evaluation
    ],
)
def test_deterministic_roundings_are_those_of_decimal_arithmetic(rounding, mode):
    u = jnp.asarray(HALVES, jnp.float32)
    wanted = [float(decimal.Decimal(float(v)).quantize(decimal.Decimal(1), mode)) for v in u]
    for found in (
        numerics.round_codes(u, rounding),
        jax.jit(lambda u: numerics.round_codes(u, rounding))(u),
    ):
        np.testing.assert_array_equal(found, wanted)


def test_stochastic_rounding_goes_up_as_often_as_the_fraction_says():
    u = jnp.repeat(jnp.asarray([0.25, -0.25, 3.9, 7.0, 8388607.5]), 20_000).reshape(5, -1)
    found = numerics.round_codes(u, "stochastic", jax.random.key(0))
    low = np.floor(u)
    assert np.all((found == low) | (found == low + 1))
    share = np.mean(found - low, axis=1)
    fraction = np.asarray([0.25, 0.75, 0.9, 0.0, 0.5])
    assert np.all(abs(share - fraction) <= 6 * np.sqrt(fraction * (1 - fraction) / 20_000) + 1e-6)


@pytest.mark.parametrize("backward", ["dsq", "sigmoid"])
@pytest.mark.parametrize("strength", [0.05, 0.2, 0.9])
def test_a_smooth_staircase_rises_by_one_in_every_cell(backward, strength):
    strength = strength if backward == "dsq" else 10 * strength
    spec = Spec(3, backward=backward, strength=strength)
    u = jnp.asarray((np.arange(40_000) + 0.5) / 10_000 - 2, jnp.float32)  # four cells
    slope = np.asarray(numerics.through_rounding(jnp.ones_like(u), u, spec), np.float64)
    np.testing.assert_allclose(slope.reshape(4, -1).mean(1), 1, rtol=1e-4)
    # The steepest place of a cell is the threshold between its two codes.
    assert np.all(abs(slope.reshape(4, -1).argmax(1) - 4999.5) <= 60)


def test_dsq_is_the_derivative_of_its_staircase():
    alpha, u = 0.2, np.linspace(-1.9, 1.9, 39)
    k, s = math.log(2 / alpha - 1), 1 / (1 - alpha)

    def staircase(v):  # the paper's phi between two codes, in code units
        cell = np.floor(v)
        return cell + 0.5 * (1 + s * np.tanh(k * (v - cell - 0.5)))

    h = 1e-6
    wanted = (staircase(u + h) - staircase(u - h)) / (2 * h)
    spec = Spec(4, backward="dsq", strength=alpha)
    found = numerics.through_rounding(jnp.ones(39), jnp.asarray(u, jnp.float32), spec)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_ewgs_scales_by_the_distance_to_the_code():
    spec = Spec(2, signed=False, backward="ewgs", strength=0.3)
    u = jnp.asarray([0.2, 0.9, 2.4, 3.0])
    g = jnp.asarray([1.0, -2.0, 3.0, 4.0])
    wanted = [1 * (1 + 0.3 * 0.2 / 3), -2 * (1 + 0.3 * 0.1 / 3), 3 * (1 + 0.3 * 0.4 / 3), 4]
    np.testing.assert_allclose(numerics.through_rounding(g, u, spec), wanted, rtol=1e-6)


def test_uniform_takes_its_backward_inside_the_grid_alone():
    spec = Spec(3, backward="sigmoid", strength=8.0)
    params = {"scale": jnp.float32(0.5), "zero_point": jnp.float32(0)}
    x = jnp.asarray([0.1, 0.26, -0.74, 5.0, -5.0])
    found = jax.grad(lambda x: uniform.fake_quant(x, params, spec).sum())(x)

    def slope(u):  # in float64, from the sigmoid itself
        f = u - math.floor(u) - 0.5
        sigma = lambda v: 1 / (1 + math.exp(-v))
        return 8 * sigma(8 * f) * (1 - sigma(8 * f)) / (2 * sigma(4) - 1)

    np.testing.assert_allclose(found[:3], [slope(v / 0.5) for v in (0.1, 0.26, -0.74)], rtol=1e-5)
    np.testing.assert_array_equal(found[3:], 0)


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [("cover", max(3 / 7, 2 / 8)), ("qmax", 3 / 7), ("qmax_half", 3 / 7.5)],
)
def test_conventions_of_the_scale(scaling, wanted):
    scale, zero_point = numerics.range_parameters(
        jnp.float32(-2), jnp.float32(3), Spec(4, scaling=scaling)
    )
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)
    assert zero_point == 0
    # Leaning to the negative side only "cover" uses the lowest code.
    scale, _ = numerics.range_parameters(jnp.float32(-4), jnp.float32(1), Spec(4, scaling=scaling))
    leaning = {"cover": 4 / 8, "qmax": 4 / 7, "qmax_half": 4 / 7.5}[scaling]
    np.testing.assert_allclose(scale, leaning, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_powers_of_two_cover_the_range(symmetric):
    spec = Spec(8, symmetric=symmetric, power_of_two=True)
    rng = np.random.default_rng(0)
    lo, hi = -np.exp(rng.normal(0, 4, 500)), np.exp(rng.normal(0, 4, 500))
    scale, zero_point = numerics.range_parameters(jnp.float32(lo), jnp.float32(hi), spec)
    plain, _ = numerics.range_parameters(
        jnp.float32(lo), jnp.float32(hi), Spec(8, symmetric=symmetric)
    )
    mantissa, _ = np.frexp(np.asarray(scale))
    np.testing.assert_array_equal(mantissa, 0.5)
    assert np.all(scale >= plain) and np.all(scale < 2 * plain)
    assert np.all(zero_point == np.round(zero_point))


def test_a_power_of_two_is_its_own_power_of_two():
    exact = 2.0 ** np.arange(-30, 30)
    for scale in (exact, exact * (1 - 2.0**-24)):  # and what rounds up to it
        found = numerics.power_of_two_above(jnp.asarray(scale, jnp.float32))
        np.testing.assert_array_equal(found, exact)
    up = numerics.power_of_two_above(jnp.asarray(exact * (1 + 2.0**-22), jnp.float32))
    np.testing.assert_array_equal(up, 2 * exact)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(scaling="half"), "scaling is 'half'.*qmax_half"),
        (dict(rounding="up"), "rounding is 'up'.*stochastic"),
        (dict(backward="dqs"), "backward is 'dqs'.*dsq"),
        (dict(strength=0.1), "backward='ste', which has none"),
        (dict(backward="dsq", strength=1.0), "strength of backward='dsq' is 1.0"),
        (dict(backward="sigmoid", strength=0.0), "strength of backward='sigmoid' is 0.0"),
        (dict(backward="ewgs", strength=-1.0), "strength of backward='ewgs' is -1.0"),
        (dict(backward="dsq", rounding="floor"), "rounding='floor' came with backward='dsq'"),
        (dict(granularity="token"), "granularity='token' came with dynamic=False"),
        (dict(dynamic=True, observer="mse"), "dynamic=True came with observer='mse'"),
        (dict(options=3), "options is 3; it must be a dict"),
        (dict(options={"a": object()}), "options.'a'. is"),
    ],
)
def test_refused_choices(fields, message):
    with pytest.raises(ValueError, match=message):
        Spec(4, **fields)


def test_options_are_hashable_and_read_by_name():
    spec = Spec(4, options={"b": [1, 2], "a": 0.5})
    assert spec.options == (("a", 0.5), ("b", (1, 2)))
    assert spec == Spec(4, options={"a": 0.5, "b": (1, 2)}) and hash(spec)
    assert spec.option("a", 1.0) == 0.5 and spec.option("c", 7) == 7


def test_encode_honours_its_rounding():
    codes = numerics.encode(
        jnp.asarray([0.25, 0.75, -0.25]), jnp.float32(0.5), 0, IntFormat(4), rounding="away"
    )
    np.testing.assert_array_equal(codes, [1, 2, -1])
