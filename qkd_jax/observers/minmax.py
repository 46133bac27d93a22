"""The smallest and largest value seen: nothing is clipped, and one outlier sets the grid.

Reference: Jacob et al., 2018, arXiv 1712.05877, section 3.1, for weights.
"""

from __future__ import annotations

import jax

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.numerics.states import init_extremes as init
from qkd_jax.numerics.states import update_extremes as update

__all__ = ["NEEDS_STATS", "init", "range", "update"]

State = dict[str, jax.Array]

NEEDS_STATS = False


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi).

    Raises:
        ValueError: no data, or NaN or infinite data (outside `jit`, where values are known).
    """
    del spec
    numerics.check_data(state["lo"], state["hi"], empty=state["lo"] > state["hi"])
    return state["lo"], state["hi"]
