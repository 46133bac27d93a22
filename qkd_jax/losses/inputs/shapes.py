"""Types of a loss's arguments and values, with their shapes, which tests check at run time.

What a loss checks itself is an `Array` of any shape here, so that its own message comes first: it
says which argument is wrong and how to repair it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Bool, Float, Shaped

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import ArrayLike as Scalar  # a number, or a scalar array, which may be traced
else:
    import numpy as np

    Array, Scalar = jax.Array | np.ndarray, Any


# Arguments. The net that learns says how many values come out.
Arrays = Sequence[Array] | Array
Logits = Feature = Shaped[Array, "batch ..."]
Mask = Array | None

# What has been checked, and results.
Matrix = Float[Array, "batch classes"]
Kept = Bool[Array, "batch"] | None
Values = Float[Array, "batch"]
