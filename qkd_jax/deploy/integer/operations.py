"""The operations that a saved integer program may consist of: a closed set, with their attributes.

A saved operation is the name of a JAX primitive and the attributes that are listed here; what is
computed is what StableHLO's specification says of the operation of that name. An attribute with a
default is written only where it differs. `UNSET` stands for attributes of JAX alone (placement and
typing), which a file never holds; a version of JAX that knows more or fewer of them needs its lines
changed here, and old files stay good.

To let files hold another operation, add its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import primitives

from qkd_jax import checks

__all__ = ["OPERATIONS", "attributes", "parameters", "primitive"]

REQUIRED = object()
UNSET = object()

_WINDOW = {
    "window_dimensions": REQUIRED,
    "window_strides": REQUIRED,
    "padding": REQUIRED,
    "base_dilation": REQUIRED,
    "window_dilation": REQUIRED,
}
_PRODUCT = {"precision": None, "preferred_element_type": None, "out_sharding": UNSET}
_CUMULATIVE = {"axis": REQUIRED, "reverse": False}
_PLAIN = (
    "abs add and atan2 ceil clamp copy div eq erf erf_inv erfc floor ge gt is_finite le lt max min "
    "ne neg nextafter not or pow rem select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign square stop_gradient sub xor"
).split()
_ACCURATE = "cbrt cos exp exp2 expm1 log log1p logistic rsqrt sin sqrt tan tanh".split()

# Operation -> attribute -> its default, REQUIRED, or UNSET.
OPERATIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN},
    **{name: {"accuracy": UNSET} for name in _ACCURATE},
    "argmax": {"axes": REQUIRED, "index_dtype": REQUIRED},
    "argmin": {"axes": REQUIRED, "index_dtype": REQUIRED},
    "broadcast_in_dim": {
        "shape": REQUIRED,
        "broadcast_dimensions": REQUIRED,
        "sharding": UNSET,
    },
    "concatenate": {"dimension": REQUIRED},
    "conv_general_dilated": {
        "window_strides": REQUIRED,
        "padding": REQUIRED,
        "lhs_dilation": REQUIRED,
        "rhs_dilation": REQUIRED,
        "dimension_numbers": REQUIRED,
        "feature_group_count": 1,
        "batch_group_count": 1,
        **_PRODUCT,
    },
    "convert_element_type": {"new_dtype": REQUIRED, "weak_type": False, "sharding": UNSET},
    "cumlogsumexp": _CUMULATIVE,
    "cummax": _CUMULATIVE,
    "cummin": _CUMULATIVE,
    "cumprod": _CUMULATIVE,
    "cumsum": _CUMULATIVE,
    "dot_general": {"dimension_numbers": REQUIRED, **_PRODUCT},
    "dynamic_slice": {"slice_sizes": REQUIRED},
    "gather": {
        "dimension_numbers": REQUIRED,
        "slice_sizes": REQUIRED,
        "unique_indices": False,
        "indices_are_sorted": False,
        "mode": REQUIRED,
        "fill_value": None,
    },
    "integer_pow": {"y": REQUIRED},
    "iota": {"dtype": REQUIRED, "shape": REQUIRED, "dimension": REQUIRED, "sharding": UNSET},
    "mul": {"out_dtype": UNSET},
    "pad": {"padding_config": REQUIRED},
    "reduce_and": {"axes": REQUIRED},
    "reduce_max": {"axes": REQUIRED},
    "reduce_min": {"axes": REQUIRED},
    "reduce_or": {"axes": REQUIRED},
    "reduce_precision": {"exponent_bits": REQUIRED, "mantissa_bits": REQUIRED},
    "reduce_prod": {"axes": REQUIRED},
    "reduce_sum": {"axes": REQUIRED, "out_sharding": UNSET},
    "reduce_window_max": _WINDOW,
    "reduce_window_min": _WINDOW,
    "reduce_window_sum": _WINDOW,
    "reshape": {"new_sizes": REQUIRED, "dimensions": None, "sharding": UNSET},
    "rev": {"dimensions": REQUIRED},
    "round": {"rounding_method": REQUIRED},
    "slice": {"start_indices": REQUIRED, "limit_indices": REQUIRED, "strides": None},
    "split": {"sizes": REQUIRED, "axis": REQUIRED},
    "squeeze": {"dimensions": REQUIRED},
    "transpose": {"permutation": REQUIRED},
}
_HERE = {"split": jax.lax.split_p}  # not among `jax.extend`'s names


def primitive(op: str) -> Any:
    """Returns the JAX primitive of an operation.

    Raises:
        ValueError: an operation that is not in `OPERATIONS`.
    """
    if op not in OPERATIONS:
        raise checks.unknown("operation", op, OPERATIONS)
    return _HERE[op] if op in _HERE else getattr(primitives, f"{op}_p")


def attributes(op: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns what a file keeps of a primitive's parameters.

    Raises:
        ValueError: an operation, a parameter or a placement that files cannot hold.
    """
    if op not in OPERATIONS:
        raise ValueError(
            f"operation {op!r} in {where or 'the root module'!r} cannot be saved; a model file "
            f"holds these: {', '.join(OPERATIONS)}. Write the layer with them, or add the "
            "operation's line to qkd_jax/deploy/integer/operations.py."
        )
    known, kept = OPERATIONS[op], {}
    for name, value in params.items():
        default = known.get(name, UNSET)
        if default is UNSET:
            if value is not None:
                raise ValueError(
                    f"operation {op!r} in {where or 'the root module'!r} has {name}={value!r}, "
                    "which a model file cannot hold; leave it out of the model."
                )
        elif default is REQUIRED or value != default:
            kept[name] = value
    return kept


def parameters(op: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a primitive's parameters from what a file keeps of them: inverts `attributes`.

    Raises:
        ValueError: an unknown operation, or attributes that are not its own.
    """
    primitive(op)
    known = OPERATIONS[op]
    for name in kept:
        if known.get(name, UNSET) is UNSET:
            allowed = [n for n, default in known.items() if default is not UNSET]
            raise checks.unknown(f"attribute of operation {op!r}:", name, allowed)
    missing = [n for n, default in known.items() if default is REQUIRED and n not in kept]
    if missing:
        raise ValueError(f"operation {op!r} lacks its attribute {missing[0]!r}.")
    values = {n: None if default is UNSET else default for n, default in known.items()}
    return {**values, **kept}
