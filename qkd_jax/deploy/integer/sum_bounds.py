"""Bounds of the integer sums of a contraction, and the pieces that make float32 exact.

Sums are integers of at most `bound`, the largest sum of |codes_w| over the inputs of an output
times the largest |codes_x|. Below 2^24 float32 holds them exactly in any order, below 2^31 int32
does. Larger ones are cut along what is summed into as few pieces as keep each below 2^24, and added
in int32.
"""

import math

import numpy as np

from qkd_jax.deploy.integer.program import FLOAT32_EXACT, cut_axes, cut_ends
from qkd_jax.graph import Node
from qkd_jax.numerics import codes_of
from qkd_jax.quantize.dynamic_grids import dynamic_grid, takes_out_dynamic_scales
from qkd_jax.quantize.traced import (
    TracedContraction,
    TracedNet,
    grid_of,
    has_integer_codes,
    is_dynamic,
)

MOST_PIECES = 16  # beyond, int32


def code_range(traced: TracedNet, marker: Node) -> tuple[int, int]:
    """Returns the lowest and the highest centred code of a quantizer."""
    if is_dynamic(traced, marker):
        format, _ = dynamic_grid(traced, marker)
        if traced.spec(marker).symmetric:
            return format.qmin, format.qmax
        widest = format.qmax - format.qmin  # the zero point is one of the codes
        return -widest, widest
    _, zero_point, format = grid_of(traced, marker)
    return int(format.qmin - zero_point.max()), int(format.qmax - zero_point.min())


def sum_bound(
    traced: TracedNet, product: TracedContraction, ranges: list[tuple[int, int]]
) -> tuple[int, int]:
    """Returns the largest magnitude that a sum can reach, and the pieces that it is cut into.

    The pieces are the fewest whose own sums stay within `FLOAT32_EXACT`; 1 where none do.

    Args:
        traced: the net.
        product: of codes.
        ranges: `code_range` of its operands.
    """
    cut = cut_axes(product.node)
    largest = [max(-lo, hi) for lo, hi in ranges]
    for side, operand in enumerate(product.operands):
        if operand.value in traced.graph.constants:
            assert operand.marker is not None
            hat = np.asarray(traced.graph.constants[operand.marker.outputs[0]], np.float32)
            codes = np.abs(codes_of(hat, grid_of(traced, operand.marker).scale)).astype(np.int32)
            codes = operand.moved(codes).astype(np.int64) * largest[1 - side]
            summed = tuple(i for i, out in enumerate(operand.output_axes) if out is None)
            bound = int(codes.sum(axis=summed).max(initial=0))
            if bound <= FLOAT32_EXACT or cut is None:
                return bound, 1
            # The axis that is cut comes last: sums of each of its entries, by output.
            rest = tuple(i for i in summed if i != cut[side])
            by_entry = np.moveaxis(codes.sum(axis=rest, keepdims=True), cut[side], -1)
            return bound, _pieces(by_entry.reshape(-1, codes.shape[cut[side]]))
    operand = product.operands[0]
    sizes = zip(operand.shape, operand.output_axes, strict=True)
    bound = math.prod(n for n, out in sizes if out is None) * largest[0] * largest[1]
    if bound <= FLOAT32_EXACT or cut is None:
        return bound, 1
    size = operand.shape[cut[0]]
    return bound, _pieces(np.full((1, size), bound // size, np.int64))


def sums_codes(traced: TracedNet, product: TracedContraction) -> bool:
    """Whether a product is one of integer codes whose scales are constant along each sum."""
    return product.quantized and all(
        operand.marker is not None
        and has_integer_codes(traced, operand.marker)
        and (not is_dynamic(traced, operand.marker) or takes_out_dynamic_scales(traced, operand))
        for operand in product.operands
    )


def _pieces(sums: np.ndarray) -> int:
    """Returns the fewest pieces whose sums stay within `FLOAT32_EXACT`; 1 where none do.

    Args:
        sums: largest magnitudes, [outputs, entries of the axis that is cut].
    """
    size = sums.shape[1]
    for pieces in range(2, min(size, MOST_PIECES) + 1):
        starts = cut_ends(size, pieces)[:-1]
        if np.add.reduceat(sums, starts, axis=1).max(initial=0) <= FLOAT32_EXACT:
            return pieces
    return 1
