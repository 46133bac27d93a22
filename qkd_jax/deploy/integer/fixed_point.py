"""Fixed-point rescaling of int32 sums, without an integer wider than 32 bits.

A factor f is m0 * 2^(exponent - 31) with m0 in [2^30, 2^31): x * f is a left shift, the rounded
high half of a product, and a rounding right shift. What is rounded here is rounded as gemmlowp does
(Jacob et al., 2017, arXiv 1712.05877, section 2.2 and appendix B): the high half with halves up,
the shift with halves away from zero. Negative factors have a negative m0 and negate the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_SHIFT = 30


def decompose(factor: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (m0, exponent), int32, with factor = m0 * 2^(exponent - 31) to 31 bits.

    |m0| lies in [2^30, 2^31), or is 0 where the factor is 0 or the shift leaves no bit of it.
    """
    mantissa, exponent = np.frexp(np.asarray(factor, np.float64))
    m0 = np.rint(mantissa * 2.0**31).astype(np.int64)
    over = np.abs(m0) == 2**31
    m0, exponent = np.where(over, m0 // 2, m0), exponent + over
    gone = exponent < -MAX_SHIFT
    m0, exponent = np.where(gone, 0, m0), np.where(gone, 0, exponent)
    return m0.astype(np.int32), exponent.astype(np.int32)


def high_multiply(x: jax.Array, m0: jax.Array) -> jax.Array:
    """Returns floor((x * |m0| + 2^30) / 2^31), negated where m0 is negative; int32 from int32.

    The 64-bit product is put together from four of 16-bit halves.
    """
    size = jnp.abs(m0)
    xh, xl = x >> 16, (x & 0xFFFF).astype(jnp.uint32)
    mh, ml = size >> 16, size & 0xFFFF
    low = xl * ml.astype(jnp.uint32)
    one = xh * ml
    two = (xl * mh.astype(jnp.uint32)).astype(jnp.int32)  # below 2^31
    middle = (one & 0xFFFF) + (two & 0xFFFF) + (low >> 16).astype(jnp.int32)
    high = xh * mh + (one >> 16) + (two >> 16) + (middle >> 16)
    low = ((middle & 0xFFFF).astype(jnp.uint32) << 16) | (low & 0xFFFF)
    nudged = low + jnp.uint32(2**30)
    high = high + (nudged < low).astype(jnp.int32)
    result = (high << 1) | (nudged >> 31).astype(jnp.int32)
    return jnp.where(m0 < 0, -result, result)


def rounding_shift(x: jax.Array, shift: jax.Array | int) -> jax.Array:
    """Returns x / 2^shift, rounded half away from zero; int32, shifts of 0 to 30."""
    shift = jnp.asarray(shift, jnp.int32)
    mask = (jnp.int32(1) << shift) - 1
    threshold = (mask >> 1) + (x < 0).astype(jnp.int32)
    return (x >> shift) + ((x & mask) > threshold).astype(jnp.int32)


def rescale(x: jax.Array, m0: jax.Array, exponent: jax.Array) -> jax.Array:
    """Fixed-point x * m0 * 2^(exponent - 31), rounded; the caller bounds the result below 2^30."""
    x = x << jnp.maximum(exponent, 0)
    return rounding_shift(high_multiply(x, m0), jnp.maximum(-exponent, 0))


def table(x: jax.Array, thresholds: jax.Array, sign: jax.Array | None) -> jax.Array:
    """Counts the thresholds that x has reached, int32.

    Args:
        x: int32.
        thresholds: int32 [levels - 1, ...], rising along axis 0; the rest broadcasts against x.
        sign: 1 or -1 by channel, or None: where it is -1, -x is compared.
    """
    x = x if sign is None else x * sign
    return jnp.asarray(sum((x >= t).astype(jnp.int32) for t in thresholds))
