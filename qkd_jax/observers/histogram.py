"""Extremes and a histogram: the state of observers that read their range from one."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from qkd_jax import numerics
from qkd_jax.numerics import Spec, Stats
from qkd_jax.observers import minmax

__all__ = ["init", "update"]

State = dict[str, jax.Array]


def init(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: an empty histogram, `lo` +inf and `hi` -inf."""
    return {**minmax.init(shape, spec), **numerics.empty_histogram(shape)}


def update(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Sequence[int] = (),
    stats: Stats | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> State:
    """Counts one batch."""
    ends = minmax.update(state, x, spec, channel_axes=channel_axes, axis_name=axis_name)
    histogram = {k: state[k] for k in ("counts", "exponent")}
    del stats
    return {
        **ends,
        **numerics.add_to_histogram(histogram, x, channel_axes=channel_axes, axis_name=axis_name),
    }
