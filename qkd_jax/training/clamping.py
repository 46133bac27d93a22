"""Learned sizes of a quantizer's grid, kept within a factor of what they were.

A quantizer names them in its `SIZE`. They are kept between start / ratio and start ratio, those
whose name begins with `log2_` within log2(ratio) of their start, and `lower` to `upper` by their
width, about their middle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qkd_jax.numerics import Spec
from qkd_jax.quantizers import facts

__all__ = ["bounded_ends", "bounds", "clamps"]

_LOG2 = "log2_"
_ENDS = ("lower", "upper")


def clamps(spec: Spec, name: str) -> bool:
    """Whether a parameter of this quantizer is the learned size of its grid."""
    stated = facts(spec.quantizer)
    if stated.size_option and not spec.option(stated.size_option, False):
        return False
    return not spec.dynamic and name in stated.size


def bounds(
    starts: Mapping[str, jax.Array], ratio: jax.Array
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Returns {name in "quant": function} that holds each parameter but the ends of intervals.

    Args:
        starts: {path of a parameter: its array when the stage began} of those that are clamped.
        ratio: The factor, a scalar.
    """
    last = {name: name.rpartition("/")[2] for name in starts}
    return {
        name: functools.partial(_within, last[name], start, ratio)
        for name, start in starts.items()
        if last[name] not in _ENDS
    }


def _within(name: str, start: jax.Array, ratio: jax.Array, value: jax.Array) -> jax.Array:
    if name.startswith(_LOG2):
        return jnp.clip(value, start - jnp.log2(ratio), start + jnp.log2(ratio))
    # A gain may be negative: its size is what is held.
    low, high = jnp.abs(start) / ratio, jnp.abs(start) * ratio
    return jnp.where(start < 0, jnp.clip(value, -high, -low), jnp.clip(value, low, high))


def bounded_ends(
    leaves: Mapping[str, jax.Array], start: Mapping[str, jax.Array], ratio: jax.Array
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Returns {name in "quant": function} that holds the width of intervals, about their middle.

    Args:
        leaves: Parameters now, by their paths.
        start: Those of them that are clamped, when the stage began.
        ratio: The factor, a scalar.
    """
    found: dict[str, Callable[[jax.Array], jax.Array]] = {}
    for name in start:
        if name.rpartition("/")[2] != "lower":
            continue
        above = f"{name.removesuffix('lower')}upper"
        width, middle = leaves[above] - leaves[name], (leaves[above] + leaves[name]) / 2
        first = start[above] - start[name]
        half = jnp.clip(width, first / ratio, first * ratio) / 2
        inside = (width >= first / ratio) & (width <= first * ratio)
        for end, place in ((name, middle - half), (above, middle + half)):
            found[end] = functools.partial(jnp.where, ~inside, place)
    return found
