"""Fixed-point pieces against Python's own integers, which have no width."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax.deploy.integer import fixed_point, reference

EDGES = [0, 1, -1, 2, 2**15, -(2**15), 2**16 - 1, 2**16, -(2**16), 2**30 - 1, 2**30, -(2**30)]
EDGES += [2**31 - 1, -(2**31), -(2**31) + 1, 0x7FFF8000, -0x7FFF8000, 0x12345678, -0x12345678]
FACTORS = [2**30, 2**30 + 1, 2**31 - 1, 2**31 - 2**15, 0x5A827999, 0x40008000, 0x7FFF0001]
high = jax.jit(fixed_point.high_multiply)
shift = jax.jit(fixed_point.rounding_shift)


def exact_high(x, m):
    return (x * m + 2**30) // 2**31


def exact_shift(x, by):
    half = (2**by) // 2 if by else 0
    return (abs(x) + half) // 2**by * (1 if x >= 0 else -1)


def test_high_half_on_every_pair_of_edges():
    pairs = [(x, m) for x in EDGES for m in FACTORS]
    # And products whose low half sits on either side of the rounding boundary.
    pairs += [(x + d, m) for m in FACTORS for x in (2**31 // m, 3 * 2**30 // m) for d in (-1, 0, 1)]
    x, m = (np.array(column, np.int64).astype(np.int32) for column in zip(*pairs, strict=True))
    wanted = [exact_high(a, b) for a, b in pairs]
    np.testing.assert_array_equal(high(x, m), wanted)
    np.testing.assert_array_equal(high(x, -m), [-w for w in wanted])
    np.testing.assert_array_equal(reference.high_multiply(x, m), wanted)
    np.testing.assert_array_equal(reference.high_multiply(x, -m), [-w for w in wanted])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_numbers(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-(2**31), 2**31, 64)
    m = rng.integers(2**30, 2**31, 64)
    by = rng.integers(0, 31, 64)
    x32, m32, by32 = (a.astype(np.int32) for a in (x, m, by))
    np.testing.assert_array_equal(
        high(x32, m32), [exact_high(int(a), int(b)) for a, b in zip(x, m, strict=True)]
    )
    wanted = [exact_shift(int(a), int(b)) for a, b in zip(x, by, strict=True)]
    np.testing.assert_array_equal(shift(x32, by32), wanted)
    np.testing.assert_array_equal(reference.rounding_shift(x32, by32), wanted)


def test_a_factor_and_its_parts():
    rng = np.random.default_rng(0)
    factors = np.exp(rng.uniform(-18, 12, 200)) * rng.choice([-1, 1], 200)
    factors = np.concatenate([factors, [0.0, 1.0, -1.0, 0.5, 1 - 2**-40, 2.0**-40]])
    m0, exponent = fixed_point.decompose(factors)
    size = np.abs(m0.astype(np.int64))
    assert np.all((size == 0) | ((size >= 2**30) & (size < 2**31)))
    found = m0.astype(np.float64) * 2.0 ** (exponent - 31.0)
    assert np.all(np.abs(found - factors) <= np.maximum(2.0**-31 * np.abs(factors), 2.0**-31))
    # A sum times its factor is within half of a unit and the factor's own 31 bits.
    x = np.rint(rng.uniform(-1, 1, factors.shape) * 2**29 / np.maximum(np.abs(factors), 1))
    result = np.asarray(jax.jit(fixed_point.rescale)(x.astype(np.int32), m0, exponent))
    assert np.all(np.abs(result - x * factors) <= 1.0)
