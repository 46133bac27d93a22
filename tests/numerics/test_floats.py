"""Fixed- and floating-point formats, bit for bit against ml_dtypes and against plain search."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qkd_jax.numerics import FLOAT_FORMATS, FixedPointFormat, FloatFormat, IntFormat

TYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "half": np.float16,
}
every = pytest.mark.parametrize("name", FLOAT_FORMATS)


def normal(x):
    """Leaves float32's own subnormals out, which some compilations flush to zero."""
    return (abs(x) >= np.finfo(np.float32).tiny) | (x == 0)


def inputs(format):
    """All float16 numbers, every value, every middle of two, and their float32 neighbours."""
    values = format.values()
    middle = (values[:-1] + values[1:]) / 2
    ends = [s * format.max * f for f in (1.01, 1.06, 1.13, 1.3, 2, 1e6) for s in (1, -1)]
    with np.errstate(all="ignore"):
        half = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
        exact = np.concatenate([half, values, middle, ends]).astype(np.float32)
        exact = exact[np.isfinite(exact)]
        return np.concatenate([exact, *(np.nextafter(exact, np.float32(s)) for s in (1e38, -1e38))])


@every
def test_casting_is_that_of_ml_dtypes(name):
    format = FLOAT_FORMATS[name]
    x = inputs(format)
    x = x[np.isfinite(x)]
    x = x[normal(x)]
    with np.errstate(over="ignore"):
        wanted = x.astype(TYPES[name]).astype(np.float32)
    inside = abs(wanted) <= format.max
    for cast in (format.fake_cast, jax.jit(format.fake_cast)):
        found = np.asarray(cast(jnp.asarray(x)))
        np.testing.assert_array_equal(found[inside], wanted[inside])
        np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
        np.testing.assert_array_equal(abs(found[~inside]), np.float32(format.max))
    free = np.asarray(format.fake_cast(jnp.asarray(x), saturate=False))
    np.testing.assert_array_equal(free, wanted)  # infinity or NaN, as the type has it


@every
def test_codes_are_the_bit_patterns_of_ml_dtypes(name):
    format, kind = FLOAT_FORMATS[name], TYPES[name]
    store = np.uint8 if format.bits <= 8 else np.uint16
    codes = np.arange(2**format.bits, dtype=store)
    wanted = codes.view(kind).astype(np.float32)
    found = np.asarray(format.decode(jnp.asarray(codes)))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))
    finite = np.isfinite(wanted)
    if name == "bf16":
        finite &= normal(wanted)
    back = np.asarray(format.encode(jnp.asarray(wanted[finite])))
    np.testing.assert_array_equal(back, codes[finite])
    np.testing.assert_array_equal(
        format.values(), np.unique(wanted[np.isfinite(wanted)].astype(np.float64))
    )


@every
def test_ends_and_what_is_no_number(name):
    format = FLOAT_FORMATS[name]
    info = ml_dtypes.finfo(TYPES[name])
    assert format.bits == info.bits and format.max == float(info.max) == -format.min
    assert format.smallest == float(info.smallest_subnormal)
    special = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(
        format.fake_cast(special), np.float32([format.max, -format.max, np.nan])
    )
    if format.specials == "ieee":
        codes = format.encode(special, saturate=False)
        np.testing.assert_array_equal(format.decode(codes), special)
    elif format.specials == "nan":
        codes = format.encode(special, saturate=False)
        assert np.isnan(format.decode(codes)).all()


def test_the_known_ends():
    ends = {n: FLOAT_FORMATS[n].max for n in ("e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1")}
    assert ends == {"e4m3fn": 448, "e5m2": 57344, "e3m2": 28, "e2m3": 7.5, "e2m1": 6}
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(FLOAT_FORMATS["e2m1"].values()[7:], e2m1)


@pytest.mark.parametrize(
    "format", [FixedPointFormat(3, 4), FixedPointFormat(0, 7), FixedPointFormat(4, 4, False)]
)
def test_fixed_point_takes_the_nearest_value_and_saturates(format):
    x = np.random.default_rng(0).normal(0, 6, 4000).astype(np.float32)
    values = format.values()
    assert len(values) == 2**format.bits and values[1] - values[0] == format.smallest
    assert (values[0], values[-1]) == (format.min, format.max)
    found = np.asarray(format.fake_cast(jnp.asarray(x)))
    gap = abs(np.float64(x)[:, None] - values)
    np.testing.assert_allclose(abs(np.float64(x) - found), gap.min(1), rtol=0, atol=0)
    codes = format.encode(jnp.asarray(x))
    np.testing.assert_array_equal(format.decode(codes), found)
    np.testing.assert_array_equal(
        np.unique(values), np.unique(format.decode(format.encode(values)))
    )
    middle = jnp.asarray((values[:-1] + values[1:]) / 2)  # ties go to the even code
    assert np.all(np.asarray(format.encode(middle)) % 2 == 0)
    ends = format.fake_cast(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(ends, np.float32([format.max, format.min, np.nan]))


def test_integers_are_fixed_point_without_a_fraction():
    x = jnp.asarray(np.random.default_rng(1).normal(0, 9, 2000), jnp.float32)
    whole, fixed = IntFormat(5), FixedPointFormat(4, 0)
    np.testing.assert_array_equal(whole.values(), fixed.values())
    np.testing.assert_array_equal(whole.fake_cast(x), fixed.fake_cast(x))
    np.testing.assert_array_equal(whole.decode(whole.encode(x)), fixed.decode(fixed.encode(x)))
    assert (whole.min, whole.max, whole.smallest) == (fixed.min, fixed.max, fixed.smallest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FloatFormat(1, 3), "exponent_bits is 1"),
        (lambda: FloatFormat(4, 0), "mantissa_bits is 0"),
        (lambda: FloatFormat(8, 10), "bits .* is 19"),
        (lambda: FloatFormat(4, 3, "fn"), "specials is 'fn'.*nan"),
        (lambda: FixedPointFormat(-1, 3), "integer_bits is -1"),
        (lambda: FixedPointFormat(10, 10), r"integer_bits \+ fraction_bits.* is 21"),
        (lambda: FixedPointFormat(0, 0), r"integer_bits \+ fraction_bits.* is 1"),
    ],
)
def test_formats_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()
