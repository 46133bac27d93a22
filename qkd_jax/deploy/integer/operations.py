"""The operations that a saved integer program may consist of: a closed set, with their attributes.

A saved operation is the name of a JAX primitive and the attributes that are listed here; it
computes what StableHLO's specification says of the operation of that name. An attribute with a
default is written only where it differs. `UNSET` stands for attributes of JAX alone (placement and
typing), which a file never holds; a version of JAX with more or fewer of them needs its lines
changed here, and old files stay valid.

To let files hold another operation, add its line.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import primitives

from qkd_jax import checks

REQUIRED = object()
UNSET = object()


def _attributes(required: str = "", *, unset: str = "", **defaults: Any) -> dict[str, Any]:
    """Returns attribute -> its default, REQUIRED, or UNSET."""
    values = dict.fromkeys(required.split(), REQUIRED)
    return {**values, **defaults, **dict.fromkeys(unset.split(), UNSET)}


_REDUCE = _attributes("axes")
_CUMULATIVE = _attributes("axis", reverse=False)
_WINDOW = _attributes("window_dimensions window_strides padding base_dilation window_dilation")
_CONTRACTION = _attributes(unset="out_sharding", precision=None, preferred_element_type=None)
_PLAIN = (
    "abs acos acosh add and asin asinh atan atan2 atanh ceil clamp copy cosh div "
    "dynamic_update_slice eq erf erf_inv erfc floor ge gt is_finite le lt max min ne neg nextafter "
    "not or pow rem select_n shift_left shift_right_arithmetic shift_right_logical sign sinh "
    "square stop_gradient sub xor"
).split()
_ACCURATE = "cbrt cos exp exp2 expm1 log log1p logistic rsqrt sin sqrt tan tanh".split()

OPERATIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN},
    **{name: _attributes(unset="accuracy") for name in _ACCURATE},
    "argmax": _attributes("axes index_dtype"),
    "argmin": _attributes("axes index_dtype"),
    "broadcast_in_dim": _attributes("shape broadcast_dimensions", unset="sharding"),
    "concatenate": _attributes("dimension"),
    "conv_general_dilated": _attributes(
        "window_strides padding lhs_dilation rhs_dilation dimension_numbers",
        feature_group_count=1,
        batch_group_count=1,
    )
    | _CONTRACTION,
    "convert_element_type": _attributes("new_dtype", unset="sharding", weak_type=False),
    "cumlogsumexp": _CUMULATIVE,
    "cummax": _CUMULATIVE,
    "cummin": _CUMULATIVE,
    "cumprod": _CUMULATIVE,
    "cumsum": _CUMULATIVE,
    "dot_general": _attributes("dimension_numbers") | _CONTRACTION,
    "dynamic_slice": _attributes("slice_sizes"),
    "gather": _attributes(
        "dimension_numbers slice_sizes mode",
        unique_indices=False,
        indices_are_sorted=False,
        fill_value=None,
    ),
    "integer_pow": _attributes("y"),
    "iota": _attributes("dtype shape dimension", unset="sharding"),
    "mul": _attributes(unset="out_dtype"),
    "pad": _attributes("padding_config"),
    "reduce_and": _REDUCE,
    "reduce_max": _REDUCE,
    "reduce_min": _REDUCE,
    "reduce_or": _REDUCE,
    "reduce_precision": _attributes("exponent_bits mantissa_bits"),
    "reduce_prod": _REDUCE,
    "reduce_sum": _attributes("axes", unset="out_sharding"),
    "reduce_window_max": _WINDOW,
    "reduce_window_min": _WINDOW,
    "reduce_window_sum": _WINDOW,
    "reshape": _attributes("new_sizes", unset="sharding", dimensions=None),
    "rev": _attributes("dimensions"),
    "round": _attributes("rounding_method"),
    "sort": _attributes("dimension num_keys", is_stable=True),
    "slice": _attributes("start_indices limit_indices", strides=None),
    "split": _attributes("sizes axis"),
    "squeeze": _attributes("dimensions"),
    "top_k": _attributes("k axis"),
    "transpose": _attributes("permutation"),
}
_PRIVATE = {"split": jax.lax.split_p}  # not among `jax.extend`'s names


def primitive(op: str) -> Any:
    """Returns the JAX primitive of an operation.

    Raises:
        ValueError: an operation that is not in `OPERATIONS`.
    """
    if op not in OPERATIONS:
        raise checks.unknown("operation", op, OPERATIONS)
    return _PRIVATE[op] if op in _PRIVATE else getattr(primitives, f"{op}_p")


def attributes(op: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the attributes that a file holds of a primitive's parameters.

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
            if value is not None and value != _newer(op).get(name):
                raise ValueError(
                    f"operation {op!r} in {where or 'the root module'!r} has {name}={value!r}, "
                    "which a model file cannot hold; leave it out of the model."
                )
        elif default is REQUIRED or value != default:
            kept[name] = value
    return kept


def parameters(op: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a primitive's parameters from the attributes in a file: inverts `attributes`.

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
    return {**_newer(op), **values, **kept}


@functools.cache
def _newer(op: str) -> dict[str, Any]:
    """What JAX 0.12 binds and 0.10 does not, with its default; read from the installed one."""
    functions = {
        "erfc": jax.lax.erfc,
        "reduce_max": lambda x: jax.lax.reduce_max(x, (0,)),
        "reduce_min": lambda x: jax.lax.reduce_min(x, (0,)),
        "top_k": lambda x: jax.lax.top_k(x, 1),
    }
    if op not in functions:
        return {}
    (eqn,) = jax.make_jaxpr(functions[op])(jax.numpy.ones(1)).eqns
    return {name: value for name, value in eqn.params.items() if name not in OPERATIONS[op]}
