"""Types of arrays in signatures, with their shapes, which tests check at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray | np.generic  # what is computed before tracing is NumPy's

Values: TypeAlias = Float[Array, "*shape"]
"""A tensor that is quantized, of any shape."""
OnGrid: TypeAlias = Float[Array, "*shape"]
"""Its values on the grid, of the same shape."""
Params: TypeAlias = dict[str, Float[Array, "..."]]
"""Parameters of a quantizer, () or broadcasting against the tensor."""
State: TypeAlias = dict[str, Array]
"""State of an observer."""
Axes: TypeAlias = Sequence[int]
Key: TypeAlias = jax.Array | None
"""Randomness of stochastic rounding; None rounds half to even."""
AxisName: TypeAlias = str | tuple[str, ...] | None
"""Mapped axes (`pmap`, `shard_map`) to reduce over as well."""


def filled(shape: Sequence[int], value: float, dtype: Any = np.float32) -> Array:
    """Returns an array of one value: NumPy's, for JAX would compile a program for its shape."""
    array: Any = np.full(shape, value, dtype)
    return array
