"""States that several observers share: extremes, and extremes beside a histogram."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics.arrays import Axes, AxisName, State, filled
from qkd_jax.numerics.histogram import add_to_histogram, empty_histogram
from qkd_jax.numerics.spec import Spec
from qkd_jax.numerics.stats import Stats, measure


def init_extremes(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: `lo` +inf, `hi` -inf."""
    del spec
    return {"lo": filled(shape, np.inf), "hi": filled(shape, -np.inf)}


def update_extremes(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Axes = (),
    stats: Stats | None = None,
    axis_name: AxisName = None,
) -> State:
    """Widens the range to one batch."""
    del spec, stats
    seen = measure(x, channel_axes=channel_axes, axis_name=axis_name)
    return {
        "lo": jnp.minimum(state["lo"], seen.lo.astype(state["lo"].dtype)),
        "hi": jnp.maximum(state["hi"], seen.hi.astype(state["hi"].dtype)),
    }


def init_histogram(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: an empty histogram, `lo` +inf and `hi` -inf."""
    return {**init_extremes(shape, spec), **empty_histogram(shape)}


def update_histogram(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Axes = (),
    stats: Stats | None = None,
    axis_name: AxisName = None,
) -> State:
    """Counts one batch."""
    ends = update_extremes(state, x, spec, channel_axes=channel_axes, axis_name=axis_name)
    histogram = {k: state[k] for k in ("counts", "exponent")}
    del stats
    return {
        **ends,
        **add_to_histogram(histogram, x, channel_axes=channel_axes, axis_name=axis_name),
    }
