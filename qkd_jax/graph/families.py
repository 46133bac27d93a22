"""Families of primitives, the axes of contractions, and the names of markers.

A marker is a jitted call whose name says what it stands for:

    quantizer:<layer path>:<operand>           a quantizer
    quantizer:<layer path>:<operand>@<axes>    one with a dynamic range; axes such as "0100", with a
                                               "1" for each axis that has ranges of its own
    quantizer:<path>:<operand>@#<axis>x<size>  one whose groups of that size cut an axis; the axes
                                               of a dynamic one are then those of the cut tensor
    skipped:<layer path>:<operand>             an operand, or an output, that stays in float
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MARKERS = ("quantizer", "skipped")
CONTRACTIONS = frozenset({"conv_general_dilated", "dot_general"})
# Each number of the result is one of the operand, and each of the operand occurs once.
LAYOUT = frozenset({"reshape", "transpose", "rev", "squeeze", "expand_dims", "copy"})
# The result has the operand's shape and, up to rounding to its dtype, the operand's numbers.
IDENTITY = frozenset({"copy", "convert_element_type", "stop_gradient", "optimization_barrier"})

Axes = tuple[int | None, ...]
"""Per axis of an operand, the output axis that it becomes; None where it is summed over."""


class Marker(NamedTuple):
    """The parts of a marker's name."""

    kind: str
    path: str
    operand: str
    dynamic_axes: str  # "" unless the range is dynamic
    group: tuple[int, int] | None  # (axis, size) of the groups that cut the tensor


def marker_name(
    kind: str,
    path: str,
    operand: str,
    dynamic_axes: str = "",
    group: tuple[int, int] | None = None,
) -> str:
    """Returns the name of a marker, such as "quantizer:stem/conv:input"."""
    detail = dynamic_axes if group is None else f"{dynamic_axes}#{group[0]}x{group[1]}"
    return f"{kind}:{path}:{operand}" + (f"@{detail}" if detail else "")


def parse_marker(name: Any) -> Marker | None:
    """Returns what a call's name says, or None for a call that is no marker."""
    kind, _, rest = str(name).partition(":")
    if kind not in MARKERS or not rest:
        return None
    path, _, operand = rest.rpartition(":")
    operand, _, text = operand.partition("@")
    dynamic_axes, _, groups = text.partition("#")
    axis, _, size = groups.partition("x")
    return Marker(kind, path, operand, dynamic_axes, (int(axis), int(size)) if groups else None)


def modules(eqn: Any) -> list[str]:
    """Returns the module names that an equation's name stack adds ("layer.method" -> "layer")."""
    stack = str(eqn.source_info.name_stack)
    return [part.partition(".")[0] for part in stack.split("/") if part and "(" not in part]


def output_axes(op: str, dimension_numbers: Any, ranks: Sequence[int]) -> tuple[Axes, Axes]:
    """Returns the output axes of both operands of a contraction.

    Args:
        op: a member of `CONTRACTIONS`.
        dimension_numbers: the primitive's parameter: `lax.ConvDimensionNumbers`, or
            ((contracted, contracted), (batch, batch)).
        ranks: of the two operands.
    """
    axes: list[list[int | None]] = [[None] * rank for rank in ranks]
    if op == "conv_general_dilated":
        axes[0][dimension_numbers.lhs_spec[0]] = dimension_numbers.out_spec[0]
        axes[1][dimension_numbers.rhs_spec[0]] = dimension_numbers.out_spec[1]
    else:
        contracted, batch = dimension_numbers
        position = len(batch[0])
        for side in (0, 1):
            for out, axis in enumerate(batch[side]):
                axes[side][axis] = out
            for axis in range(ranks[side]):
                if axis not in contracted[side] and axis not in batch[side]:
                    axes[side][axis] = position
                    position += 1
    return tuple(axes[0]), tuple(axes[1])


def scale_in_output(scale: Any, axes: Axes, rank: int) -> Any:
    """Reshapes the scale of a contraction's operand to the rank of the output.

    Args:
        scale: a scalar, or an array (of NumPy or JAX) with one axis for each of the operand's and
            size 1 on those that are summed over.
        axes: the operand's output axes.
        rank: of the output.

    Returns:
        The scale, which broadcasts against the output; a scalar as it is.

    Raises:
        ValueError: the scale varies along an axis that is summed over.
    """
    if np.ndim(scale) == 0:
        return scale
    kept = sorted((out, axis) for axis, out in enumerate(axes) if out is not None)
    summed = [axis for axis, out in enumerate(axes) if out is None]
    if any(scale.shape[axis] != 1 for axis in summed):
        raise ValueError(
            f"a scale of shape {tuple(scale.shape)} varies along a summed axis; it must be 1 on "
            "every axis that the contraction sums over. Use granularity='tensor', or 'channel' on "
            "output channels."
        )
    shape = [1] * rank
    for out, axis in kept:
        shape[out] = scale.shape[axis]
    return scale.transpose([axis for _, axis in kept] + summed).reshape(shape)
