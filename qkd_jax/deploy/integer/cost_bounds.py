"""Bounds on what a saved program may cost an example, in memory and in work.

A number in a small file (a padding, a window, a dilation, a shape) must not decide how much memory
or time running it takes. So values are bounded by the images and weights that the program has, far
above what nets need.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A value may have so many elements an example, and so many times those of the images and weights;
# all values together so many times that.
USUAL, TIMES, TOGETHER = 2**22, 256, 16
# Multiplications and comparisons an example; beyond, every weight may meet every number of the
# images, with eight weights in a byte.
WORK, IN_A_BYTE = 2**30, 8


def check(
    equations: Sequence[Any], inputs: Sequence[Any], arrays: Mapping[str, np.ndarray], examples: int
) -> None:
    """Refuses a program whose values or whose work are absurdly large.

    Args:
        equations: of its jaxpr.
        inputs: the shapes of its images.
        arrays: its weights and parameters.
        examples: the size of the batch in those shapes.

    Raises:
        ValueError: a value, all values together, or the work would be too large.
    """
    images = sum(math.prod(a.shape) for a in inputs) // examples
    weights = sum(array.size for array in arrays.values())
    has = f"its images and weights have {images + weights:,}"
    most = max(USUAL, TIMES * (images + weights))
    sizes = [_size(eqn) // examples for eqn in equations]
    if (largest := max(sizes, default=0)) > most:
        raise ValueError(
            f"a value of its program would have {largest:,} elements an example, and {has}"
        )
    if sum(sizes) > TOGETHER * most:
        raise ValueError(
            f"the values of its program would have {sum(sizes):,} elements an example, and {has}"
        )
    work = sum(map(_work, equations)) // examples
    if work > max(WORK, IN_A_BYTE * images * weights):
        raise ValueError(f"its program would take {work:,} operations an example, and {has}")


def _size(eqn: Any) -> int:
    """Elements of the largest result, or of an operand with its padding and dilation."""
    sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
    params, name = eqn.params, eqn.primitive.name
    if name == "pad":
        config = params["padding_config"]
        sizes.append(_spread(eqn.invars[0].aval.shape, [(lo, hi, i + 1) for lo, hi, i in config]))
    elif name.startswith("reduce_window"):
        ends = zip(params["padding"], params["base_dilation"], strict=True)
        sizes.append(_spread(eqn.invars[0].aval.shape, [(*pads, d) for pads, d in ends]))
        window = [(0, 0, d) for d in params["window_dilation"]]
        sizes.append(_spread(params["window_dimensions"], window))
    elif name == "conv_general_dilated":
        (lhs, rhs), numbers = (v.aval.shape for v in eqn.invars), params["dimension_numbers"]
        ends = zip(params["padding"], params["lhs_dilation"], strict=True)
        sizes.append(
            math.prod(lhs[axis] for axis in numbers.lhs_spec[:2])
            * _spread([lhs[a] for a in numbers.lhs_spec[2:]], [(*pads, d) for pads, d in ends])
        )
        window = [(0, 0, d) for d in params["rhs_dilation"]]
        sizes.append(_spread([rhs[axis] for axis in numbers.rhs_spec[2:]], window))
    return max(sizes, default=0)


def _spread(shape: Sequence[int], ends: Sequence[tuple[int, int, int]]) -> int:
    """Elements of a shape with (low, high) padding and a dilation for each axis."""
    sizes = zip(shape, ends, strict=True)
    return math.prod(max(n - 1, 0) * d + 1 + max(lo, 0) + max(hi, 0) for n, (lo, hi, d) in sizes)


def _work(eqn: Any) -> int:
    """Multiplications or comparisons; 1 for each result of an elementwise operation."""
    results = sum(math.prod(v.aval.shape) for v in eqn.outvars)
    params, name = eqn.params, eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return results * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, outputs = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return results * math.prod(n for axis, n in enumerate(kernel) if axis != outputs)
    if name.startswith("reduce_window"):
        return results * math.prod(params["window_dimensions"])
    return results
