"""Number formats, statistics, and the arithmetic between real numbers and codes.

`formats` says which codes exist, `spec` how a tensor is quantized, `stats` what is known of its
values, `mapping` turns ranges into scales and numbers into codes, `rounding` holds the gradient
building blocks. Pure functions of arrays; nothing here knows of models.
"""

from qkd_jax.numerics.formats import MAX_BITS, IntFormat
from qkd_jax.numerics.mapping import (
    MIN_SCALE,
    affine_parameters,
    check_operand,
    check_sign,
    decode,
    encode,
    range_parameters,
    symmetric_scale,
)
from qkd_jax.numerics.rounding import at_least, compute_dtype, match_cotangent, round_ste
from qkd_jax.numerics.spec import GRANULARITIES, MASKS, Spec
from qkd_jax.numerics.stats import (
    Stats,
    Sums,
    check_data,
    empty,
    finish,
    measure,
    merge,
    reduced_axes,
)

__all__ = [
    "GRANULARITIES",
    "MASKS",
    "MAX_BITS",
    "MIN_SCALE",
    "IntFormat",
    "Spec",
    "Stats",
    "Sums",
    "affine_parameters",
    "at_least",
    "check_data",
    "check_operand",
    "check_sign",
    "compute_dtype",
    "decode",
    "empty",
    "encode",
    "finish",
    "match_cotangent",
    "measure",
    "merge",
    "range_parameters",
    "reduced_axes",
    "round_ste",
    "symmetric_scale",
]
