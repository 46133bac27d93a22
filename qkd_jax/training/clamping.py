"""Learned sizes of a quantizer's grid: kept within a factor of their initial values, or collapsed.

A quantizer names them in its `SIZE`. They are kept between start / ratio and start ratio, those
whose name begins with `log2_` within log2(ratio) of their start, and `lower` to `upper` by their
width, about their middle.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics import Spec
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.variables import quantizer_key, quantizers
from qkd_jax.quantizers import facts, grid_sizes
from qkd_jax.trees import join

_LOG2 = "log2_"
_ENDS = ("lower", "upper")


def collapsed(net: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, float]:
    """Returns {"<layer>/<operand>_quantizer/<size>": the lowest value} of grids that are a point.

    A size at 0 or below is computed with as the smallest scale: what passes the grid is 0 for
    every purpose, the net may train on without it, and `convert` and `to_onnx` refuse it.
    """
    found = {}
    for path, operand, params in quantizers(variables):
        spec = net.spec_of(path, operand)
        if spec is None or spec.dynamic:
            continue
        for name, size in grid_sizes(params, spec).items():
            lowest = float(np.min(np.asarray(size)))
            if not lowest > 0:
                found[join(path, quantizer_key(operand), name)] = lowest
    return found


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
