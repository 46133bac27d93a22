"""Number formats, statistics, and the arithmetic between real numbers and codes.

`formats` says which codes exist, `spec` how a tensor is quantized, `stats` what is known of its
values, `mapping` turns ranges into scales and numbers into codes, `rounding` holds the gradient
building blocks. Pure functions of arrays; nothing here knows of models.
"""

from qkd_jax.numerics.arrays import Array, Axes, AxisName, Key, OnGrid, Params, State, Values
from qkd_jax.numerics.backward import cotangents, mean_of, partial_sums
from qkd_jax.numerics.fixed import FixedPointFormat
from qkd_jax.numerics.floats import FLOAT_FORMATS, FloatFormat
from qkd_jax.numerics.formats import MAX_BITS, IntFormat
from qkd_jax.numerics.histogram import BINS, add_to_histogram, empty_histogram, magnitudes
from qkd_jax.numerics.mapping import (
    MIN_SCALE,
    Grid,
    affine_parameters,
    check_operand,
    check_scale,
    check_sign,
    codes_of,
    decode,
    encode,
    guarded,
    nearest_level,
    power_of_two_above,
    range_parameters,
    shared_axes,
    symmetric_scale,
)
from qkd_jax.numerics.rounding import (
    at_least,
    compute_dtype,
    gradient_scale,
    match_cotangent,
    round_codes,
    round_ste,
    sum_to,
    through_rounding,
    within,
)
from qkd_jax.numerics.spec import (
    MASKS,
    Spec,
    check_option,
    refuse_fields,
    refuse_learned_power_of_two,
    refuse_odd_codes_of_16_bits,
    refuse_one_bit,
)
from qkd_jax.numerics.staircase import snapped_zero_point, staircase, step_grid
from qkd_jax.numerics.stats import (
    Stats,
    Sums,
    check_data,
    empty,
    finish,
    measure,
    merge,
    reduced_axes,
    unit_of,
)

__all__ = [
    "BINS",
    "FLOAT_FORMATS",
    "MASKS",
    "MAX_BITS",
    "MIN_SCALE",
    "Array",
    "Axes",
    "AxisName",
    "FixedPointFormat",
    "FloatFormat",
    "Grid",
    "IntFormat",
    "Key",
    "OnGrid",
    "Params",
    "Spec",
    "State",
    "Stats",
    "Sums",
    "Values",
    "add_to_histogram",
    "affine_parameters",
    "at_least",
    "check_data",
    "check_operand",
    "check_option",
    "check_scale",
    "check_sign",
    "codes_of",
    "compute_dtype",
    "cotangents",
    "decode",
    "empty",
    "empty_histogram",
    "encode",
    "finish",
    "gradient_scale",
    "guarded",
    "magnitudes",
    "match_cotangent",
    "mean_of",
    "measure",
    "merge",
    "nearest_level",
    "partial_sums",
    "power_of_two_above",
    "range_parameters",
    "reduced_axes",
    "refuse_fields",
    "refuse_learned_power_of_two",
    "refuse_odd_codes_of_16_bits",
    "refuse_one_bit",
    "round_codes",
    "round_ste",
    "shared_axes",
    "snapped_zero_point",
    "staircase",
    "step_grid",
    "sum_to",
    "symmetric_scale",
    "through_rounding",
    "unit_of",
    "within",
]
