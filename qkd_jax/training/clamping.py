"""Learned sizes of a quantizer's grid, kept within a factor of their initial values.

A quantizer names them in its `SIZE`. They are kept between start / ratio and start ratio, those
whose name begins with `log2_` within log2(ratio) of their start, and `lower` to `upper` by their
width, about their middle.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qkd_jax.numerics import Spec
from qkd_jax.quantizers import facts

_LOG2 = "log2_"
_ENDS = ("lower", "upper")


def clamps(spec: Spec, name: str) -> bool:
    """Whether a parameter of this quantizer is the learned size of its grid."""
    stated = facts(spec.quantizer)
    if stated.size_option and not spec.option(stated.size_option, False):
        return False
    return not spec.dynamic and name in stated.size


def clamped(
    leaves: Mapping[str, jax.Array], starts: Mapping[str, jax.Array], ratio: jax.Array
) -> dict[str, jax.Array]:
    """Returns {path: value within its limits} of the parameters in `starts`.

    Args:
        leaves: {path: parameter of a quantizer}.
        starts: those of them that are clamped, when the stage began.
        ratio: the factor, a scalar.
    """
    values: dict[str, jax.Array] = {}
    for path, start in starts.items():
        name = path.rpartition("/")[2]
        if name not in _ENDS:
            values[path] = _within(name, start, ratio, leaves[path])
    for path in starts:
        if path.rpartition("/")[2] == "lower":
            upper = path.removesuffix("lower") + "upper"
            width, middle = leaves[upper] - leaves[path], (leaves[upper] + leaves[path]) / 2
            first = starts[upper] - starts[path]
            half = jnp.clip(width, first / ratio, first * ratio) / 2
            outside = ~((width >= first / ratio) & (width <= first * ratio))
            values[path] = jnp.where(outside, middle - half, leaves[path])
            values[upper] = jnp.where(outside, middle + half, leaves[upper])
    return values


def _within(name: str, start: jax.Array, ratio: jax.Array, value: jax.Array) -> jax.Array:
    if name.startswith(_LOG2):
        return jnp.clip(value, start - jnp.log2(ratio), start + jnp.log2(ratio))
    # A gain may be negative: its absolute value is clamped.
    low, high = jnp.abs(start) / ratio, jnp.abs(start) * ratio
    return jnp.where(start < 0, jnp.clip(value, -high, -low), jnp.clip(value, low, high))
