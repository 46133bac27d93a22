"""A histogram that grows with its data and loses nothing.

`BINS` bins of one width lie around zero; the width is a power of two, the smallest at which the
data seen so far fit. When larger values come, it is doubled as often as needed and neighbouring
bins are joined, so every count keeps an exact place. The width depends on the largest magnitude of
all data alone: the order of batches, how they are cut, and the number of devices change no bit.
Counts are int32, exact up to 2^31 - 1 elements a bin.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics.arrays import Axes, AxisName, State, filled
from qkd_jax.numerics.rounding import compute_dtype
from qkd_jax.numerics.stats import reduced_axes

BINS = 4096  # half of them on each side of zero
# Exponent of the width before any data: below it every float32 is 0 or denormal.
SMALLEST = -126


def empty_histogram(shape: Sequence[int]) -> State:
    """No data: `counts` [*shape, BINS] int32 and `exponent` [*shape] int32, log2 of the width."""
    return {
        "counts": filled((*shape, BINS), 0, np.int32),
        "exponent": filled(shape, SMALLEST, np.int32),
    }


def add_to_histogram(
    state: State,
    x: jax.Array,
    *,
    channel_axes: Axes = (),
    axis_name: AxisName = None,
) -> State:
    """Adds the elements of a tensor.

    Args:
        state: of `empty_histogram` or the last call.
        x: any shape; float. Non-finite elements are not counted.
        channel_axes: axes of `x` with histograms of their own.
        axis_name: mapped axes to sum over.
    """
    shape = state["exponent"].shape
    axes = reduced_axes(x.ndim, channel_axes)
    kept = [i for i in range(x.ndim) if i not in axes]
    rows = jnp.transpose(x.astype(compute_dtype(x)), (*kept, *axes))
    rows = jnp.reshape(rows, (math.prod(shape), -1))
    finite = jnp.isfinite(rows)
    rows = jnp.where(finite, rows, 0)

    top = jnp.max(jnp.abs(rows), axis=1, initial=0)
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
    old = jnp.reshape(state["exponent"], -1)
    # frexp: top = m 2^e with m in [1/2, 1), so top < 2^e = (BINS / 2) * width.
    fitting = jnp.frexp(top)[1].astype(jnp.int32) - (BINS.bit_length() - 2)
    new = jnp.maximum(old, jnp.where(top > 0, fitting, SMALLEST))

    half = BINS // 2
    cells = jnp.floor(jnp.ldexp(rows, -new[:, None])).astype(jnp.int32)
    cells = jnp.clip(cells, -half, half - 1) + half
    offsets = BINS * jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    added = jnp.zeros(rows.shape[0] * BINS, jnp.int32)
    added = added.at[(cells + offsets).reshape(-1)].add(finite.reshape(-1).astype(jnp.int32))
    if axis_name is not None:
        added = jax.lax.psum(added, axis_name)

    # Joining 2^k neighbours: the index of an old bin, counted from zero, is shifted right by k.
    shift = jnp.minimum(new - old, 31)[:, None]
    index = jnp.right_shift(jnp.arange(BINS, dtype=jnp.int32)[None, :] - half, shift) + half
    moved = jnp.zeros_like(added)
    before = jnp.reshape(state["counts"], (-1, BINS))
    moved = moved.at[(index + offsets).reshape(-1)].add(before.reshape(-1))
    return {
        "counts": jnp.reshape(moved + added, (*shape, BINS)),
        "exponent": jnp.reshape(new, shape),
    }


def magnitudes(counts: Any) -> Any:
    """The histogram of |x|, [..., BINS / 2], from that of x; NumPy or JAX arrays.

    Bin j holds |x| in [j, j + 1) widths; negative numbers on an edge count one bin lower.
    """
    half = BINS // 2
    return counts[..., half:] + counts[..., :half][..., ::-1]
