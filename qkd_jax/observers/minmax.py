"""The smallest and largest value seen: nothing is clipped, and one outlier sets the grid.

Reference: Jacob et al., 2018, arXiv 1712.05877, section 3.1, for weights.
"""

import jax

from qkd_jax import numerics
from qkd_jax.numerics import Spec, State
from qkd_jax.numerics.states import init_extremes as init
from qkd_jax.numerics.states import update_extremes as update

__all__ = ["ANY_SPEC", "NEEDS_STATS", "init", "range", "update"]

NEEDS_STATS = False
ANY_SPEC = True


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi).

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-1.0, 0.5, 3.0]), qk.Spec(4)
        >>> state = qk.observers.minmax.update(qk.observers.minmax.init((), spec), x, spec)
        >>> qk.observers.minmax.range(state, spec)
        (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    del spec
    numerics.check_data(state["lo"], state["hi"], empty=state["lo"] > state["hi"])
    return state["lo"], state["hi"]
