"""The smallest and largest value seen: nothing is clipped, and one outlier sets the grid."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Spec, Stats

__all__ = ["NEEDS_STATS", "init", "range", "update"]

State = dict[str, jax.Array]

NEEDS_STATS = False


def init(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: `lo` +inf, `hi` -inf."""
    del spec
    hi = jnp.full(shape, -jnp.inf, jnp.float32)
    return {"lo": -hi, "hi": hi}


def update(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Sequence[int] = (),
    stats: Stats | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> State:
    """Widens the range to one batch."""
    del spec, stats
    seen = numerics.measure(x, channel_axes=channel_axes, axis_name=axis_name)
    return {
        "lo": jnp.minimum(state["lo"], seen.lo.astype(state["lo"].dtype)),
        "hi": jnp.maximum(state["hi"], seen.hi.astype(state["hi"].dtype)),
    }


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi).

    Raises:
        ValueError: no data, or NaN or infinite data (outside `jit`, where values are known).
    """
    del spec
    numerics.check_data(state["lo"], state["hi"], empty=state["lo"] > state["hi"])
    return state["lo"], state["hi"]
