"""Statistics of a tensor as sums and counts, so that batches and devices add up exactly.

`measure` reduces one batch, `merge` joins two, `finish` turns the sums into `Stats`. Never a mean
of means: a last batch of another size counts by its size. The spread travels as the sum of squared
deviations from the batch's own mean (joined by the parallel-variance formula of Chan, Golub and
LeVeque, 1979), since a difference of large float32 sums would lose it. Sums of very large or small
data are in a power of two of their own, so that no square leaves float32.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics.arrays import Axes, AxisName, filled
from qkd_jax.numerics.rounding import compute_dtype

# Data beyond it are refused: the reciprocal of a scale, 1 / (2 |x|) with one code, and a range of
# both signs must be normal float32 numbers.
LARGEST = 1e37
# Squares of values between 1 / USUAL and USUAL, and their sums, are far inside of float32.
_USUAL = 2.0**40
_SMALLEST_UNIT = 2.0**-126


class Sums(NamedTuple):
    """Sums of a tensor that add up over batches and devices. All arrays have one shape.

    That shape is () for one value per tensor, else it broadcasts against the tensor: full size on
    the channel axes, 1 on the others.
    """

    lo: jax.Array  # smallest value; +inf before any data
    hi: jax.Array  # largest value; -inf before any data
    abs_sum: jax.Array  # sum |x / unit|
    sum: jax.Array  # sum x / unit
    deviations: jax.Array  # sum ((x - mean) / unit)^2
    count: jax.Array  # number of elements, as a float
    unit: jax.Array  # a power of two, `unit_of` the largest magnitude


class Stats(NamedTuple):
    """Statistics of a tensor; each array has shape () or broadcasts against the tensor."""

    lo: jax.Array
    hi: jax.Array
    abs_mean: jax.Array
    mean: jax.Array
    std: jax.Array  # population standard deviation
    count: jax.Array


def reduced_axes(ndim: int, channel_axes: Axes = ()) -> tuple[int, ...]:
    """The axes of an `ndim`-axis tensor that are not channel axes (negative ones count back).

    Raises:
        ValueError: a channel axis that the tensor does not have, or one given twice.
    """
    wrong = [a for a in channel_axes if not -ndim <= a < ndim]
    kept = {a % ndim for a in channel_axes} if not wrong else set()
    if wrong or len(kept) < len(tuple(channel_axes)):
        raise ValueError(
            f"channel_axes is {tuple(channel_axes)} for a tensor of {ndim} axes; give distinct "
            f"axes from {-ndim} to {ndim - 1}."
        )
    return tuple(i for i in range(ndim) if i not in kept)


def empty(shape: Sequence[int] = ()) -> Sums:
    """The sums of no data: the neutral element of `merge`."""
    zero, inf, unit = (filled(shape, value) for value in (0, np.inf, _SMALLEST_UNIT))
    return Sums(lo=inf, hi=-inf, abs_sum=zero, sum=zero, deviations=zero, count=zero, unit=unit)


def unit_of(largest: jax.Array) -> jax.Array:
    """Returns the power of two in which numbers up to `largest` have squares in float32.

    1 for the usual ones, so that these are computed as they are; else `largest` is 1 to 2 units.
    """
    usual = (largest * _USUAL >= 1) & (largest <= _USUAL)
    usual |= ~((largest > 0) & (largest <= LARGEST))
    exponent = jnp.maximum(jnp.frexp(jnp.where(usual, 1, largest))[1] - 1, -126)
    return jnp.where(usual, jnp.ones_like(largest), jnp.ldexp(jnp.ones_like(largest), exponent))


def measure(x: jax.Array, *, channel_axes: Axes = (), axis_name: AxisName = None) -> Sums:
    """Reduces a tensor to sums.

    Args:
        x: any shape, any float dtype (sums are float32, or float64 for float64).
        channel_axes: axes that keep their size; () gives scalars.
        axis_name: mapped axes to reduce over as well (`pmap`, `shard_map`); every device then
            holds the sums over all devices.
    """
    x = jnp.asarray(x)
    axes = reduced_axes(x.ndim, channel_axes)
    keep = bool(channel_axes)
    x = x.astype(compute_dtype(x))

    def reduce(f, value, **kw):
        return f(value, axis=axes, keepdims=keep, **kw)

    lo = reduce(jnp.min, x, initial=jnp.inf)
    hi = reduce(jnp.max, x, initial=-jnp.inf)
    if axis_name is not None:
        lo, hi = jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)
    unit = unit_of(jnp.maximum(jnp.abs(lo), jnp.abs(hi)))
    x = x * (1 / unit)
    abs_sum = reduce(jnp.sum, jnp.abs(x))
    total = reduce(jnp.sum, x)
    per = math.prod(x.shape[i] for i in axes)
    count = jnp.full(total.shape, per, total.dtype)
    if axis_name is None:
        mean = total / max(per, 1)
    else:
        abs_sum, total, count = jax.lax.psum((abs_sum, total, count), axis_name)
        mean = total / jnp.maximum(count, 1)
    deviations = reduce(jnp.sum, jnp.square(x - mean))
    if axis_name is not None:
        deviations = jax.lax.psum(deviations, axis_name)
    return Sums(lo, hi, abs_sum, total, deviations, count, unit)


def merge(a: Sums, b: Sums) -> Sums:
    """Joins the sums of two parts of the data."""
    unit = jnp.maximum(a.unit, b.unit)
    a, b = _in_units(a, unit), _in_units(b, unit)
    count = a.count + b.count
    gap = b.sum / jnp.maximum(b.count, 1) - a.sum / jnp.maximum(a.count, 1)
    between = jnp.square(gap) * (a.count * (b.count / jnp.maximum(count, 1)))
    return Sums(
        lo=jnp.minimum(a.lo, b.lo),
        hi=jnp.maximum(a.hi, b.hi),
        abs_sum=a.abs_sum + b.abs_sum,
        sum=a.sum + b.sum,
        deviations=a.deviations + b.deviations + between,
        count=count,
        unit=unit,
    )


def _in_units(sums: Sums, unit: jax.Array) -> Sums:
    """The same sums in a larger power of two."""
    share = sums.unit * (1 / unit)
    return sums._replace(
        abs_sum=sums.abs_sum * share,
        sum=sums.sum * share,
        deviations=sums.deviations * share * share,
    )


def finish(sums: Sums) -> Stats:
    """Turns sums into statistics.

    Raises:
        ValueError: no data, or data that are NaN, infinite or beyond `LARGEST`. Seen only where the
            values are known (outside `jit`); inside, they pass through.
    """
    check_data(sums.lo, sums.hi, empty=sums.count == 0)
    count = jnp.maximum(sums.count, 1)
    return Stats(
        lo=sums.lo,
        hi=sums.hi,
        abs_mean=sums.abs_sum / count * sums.unit,
        mean=sums.sum / count * sums.unit,
        std=jnp.sqrt(sums.deviations / count) * sums.unit,
        count=sums.count,
    )


def check_data(lo: jax.Array, hi: jax.Array, *, empty: jax.Array) -> None:
    """Raises ValueError for a range that came from no data, from non-finite or too large ones.

    Looks at values, so it does nothing on traced arrays.
    """
    if any(isinstance(a, jax.core.Tracer) for a in (lo, hi, empty)):
        return
    if np.any(empty):
        raise ValueError(
            "no calibration data reached this tensor (0 elements seen); give `calibrate` at least "
            "one non-empty batch that runs through this layer."
        )
    low, high = np.asarray(lo), np.asarray(hi)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        bad = "NaN" if np.isnan(low).any() or np.isnan(high).any() else "infinite values"
        raise ValueError(
            f"the calibration data contain {bad} (range {low.min()} to {high.max()}); a range "
            "needs finite data. Check the normalisation of the inputs and the float net's weights."
        )
    if low.min() < -LARGEST or high.max() > LARGEST:
        raise ValueError(
            f"the calibration data go from {low.min():.4g} to {high.max():.4g}, beyond the "
            f"{LARGEST:g} up to which float32 holds a range and the reciprocal of its scale. Such "
            "numbers are those of a mask or of a net that diverges: quantize what lies before the "
            "mask, or check the normalisation of the inputs and the float net's weights."
        )
