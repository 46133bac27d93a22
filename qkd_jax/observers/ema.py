"""An exponential moving average of each batch's smallest and largest value.

    m <- m + c (batch - m),  c = 0.01

The first batch sets m, so there is no pull towards zero. One batch's outlier moves the range by a
hundredth, and so few batches leave it near the first one's: the option `momentum` is c. Jacob et
al., 2017 (arXiv 1712.05877, section 3.1) smooth activation ranges so; 0.01 is that of PyTorch's
MovingAverageMinMaxObserver.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks, numerics
from qkd_jax.numerics import Axes, AxisName, Spec, State, Stats

__all__ = ["NEEDS_STATS", "OPTIONS", "init", "range", "update"]

NEEDS_STATS = False
OPTIONS = {"momentum": 0.01}


def init(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: `batches` 0.

    Raises:
        ValueError: a momentum outside (0, 1].
    """
    checks.number("option momentum", _momentum(spec), low=0.0, high=1.0, low_allowed=False)
    zero = numerics.filled(shape, 0)
    return {"lo": zero, "hi": zero, "batches": numerics.filled((), 0, np.int32)}


def _momentum(spec: Spec) -> float:
    return spec.option("momentum", OPTIONS["momentum"])


def update(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Axes = (),
    stats: Stats | None = None,
    axis_name: AxisName = None,
) -> State:
    """Moves the range towards one batch's; an empty batch leaves it."""
    del stats
    if x.size == 0:
        return state
    seen = numerics.measure(x, channel_axes=channel_axes, axis_name=axis_name)
    first = state["batches"] == 0

    def moved(old, new):
        new = new.astype(old.dtype)
        return jnp.where(first, new, old + _momentum(spec) * (new - old))

    return {
        "lo": moved(state["lo"], seen.lo),
        "hi": moved(state["hi"], seen.hi),
        "batches": state["batches"] + 1,
    }


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi).

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-1.0, 0.5, 3.0]), qk.Spec(4)
        >>> state = qk.observers.ema.update(qk.observers.ema.init((), spec), x, spec)
        >>> qk.observers.ema.range(state, spec)
        (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    del spec
    numerics.check_data(state["lo"], state["hi"], empty=state["batches"] == 0)
    return state["lo"], state["hi"]
