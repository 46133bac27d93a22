"""Weights of a .tflite file: codes with one scale per output channel or per group, or float32.

LiteRT's tensors have scales along one axis. A group is therefore an entry of axis 0 of a tensor
[groups, group size], which is dequantized and then reshaped. Its own block-wise grids have float16
scales, and the kernels that take them round the activations to 8 bits besides.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from qkd_jax.deploy.graph_values import in_operand
from qkd_jax.deploy.litert.flat_file import FileTensor, TensorGrid
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.graph import Node
from qkd_jax.numerics import IntFormat
from qkd_jax.quantize.stored_tensor import StoredTensor, stored_tensor
from qkd_jax.quantize.traced import TracedContraction, grid_of, scale_in_output

Layout = Callable[[np.ndarray], np.ndarray]
CODES = (-128, 127)
SMALL = (-8, 7)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A constant operand in its contraction's layout.

    Attributes:
        array: centred codes, or float32 numbers where there is no scale.
        scale: above 0, of the output's rank or a scalar, or of the array's shape for groups; None
            for a float weight.
        size: of the groups; 0 without them.
        format: of the codes.
        path: of the layer.
    """

    array: np.ndarray
    scale: np.ndarray | None = None
    size: int = 0
    format: IntFormat | None = None
    path: str = ""

    def real(self, product: TracedContraction, side: int) -> np.ndarray:
        """Returns the numbers, float32."""
        if self.scale is None:
            return self.array
        scale = self.scale if self.size else in_operand(product.operands[side], self.scale)
        return self.array.astype(np.float32) * scale.astype(np.float32)

    def stored(
        self, lowering: Lowering, node: Node, layout: Layout, vector: Layout, axis: int
    ) -> FileTensor:
        """Adds the weight as the product reads it.

        Args:
            lowering: the export.
            node: the product.
            layout: from the contraction's layout to the kernel's.
            vector: from the output's rank to one number per output channel.
            axis: of the output channels in the kernel's layout.
        """
        name = f"{node.scope}/weight" if node.scope else "weight"
        array = np.ascontiguousarray(layout(self.array))
        if self.scale is None:
            return lowering.constant(array.astype(np.float32), name)
        if not self.size:
            return self._dequantized(lowering, node, array, vector(self.scale), axis)
        scales = layout(self.scale).reshape(-1, self.size)
        if (scales != scales[:, :1]).any():
            raise ValueError(
                f"the weight of {self.path!r} has groups that are not neighbours in LiteRT's "
                "layout of it. Use granularity='channel'."
            )
        grouped = array.reshape(scales.shape)
        real = self._dequantized(lowering, node, grouped, scales[:, 0], 0)
        return lowering.reshaped(real, array.shape, node)

    def _dequantized(
        self, lowering: Lowering, node: Node, array: np.ndarray, scale: np.ndarray, axis: int
    ) -> FileTensor:
        assert self.format is not None
        ends = int(array.min(initial=0)), int(array.max(initial=0))
        fits = lambda limits: limits[0] <= ends[0] and ends[1] <= limits[1]
        if not fits(CODES):
            raise ValueError(
                f"the weight of {self.path!r} has codes from {ends[0]} to {ends[1]} around its "
                "zero point; LiteRT's are int8. Use a symmetric spec with narrow_range=True, as "
                "targets.fit(rules, 'litert') makes it, or fewer bits."
            )
        dtype = "int4" if lowering.int4 and self.format.bits <= 4 and fits(SMALL) else "int8"
        grid = TensorGrid(scale.astype(np.float32), np.zeros(len(scale), np.int64), axis)
        name = f"{node.scope}/weight_codes" if node.scope else "weight_codes"
        codes = lowering.constant(array.astype(np.int8), name, grid)
        codes.dtype = dtype
        lowering.stored[self.path] = (self.format.name, dtype, codes.name)
        return lowering.add("DEQUANTIZE", [codes], codes.shape, node)


def weight_of(
    lowering: Lowering, product: TracedContraction, side: int, gain: np.ndarray
) -> Weight:
    """Takes a weight as codes or as floats, with a gain per output channel multiplied in.

    Raises:
        ValueError: a grid that LiteRT has no type for.
    """
    operand = product.operands[side]
    if not operand.quantized:
        array = np.asarray(lowering.values.fixed(operand.value), np.float32)
        if np.all(gain == 1):
            return Weight(array)
        return Weight((array * in_operand(operand, gain)).astype(np.float32))
    assert operand.marker is not None
    stored = stored_tensor(lowering.traced, operand.marker)
    _check_format(stored, product.path)
    assert isinstance(stored.format, IntFormat)
    centred = stored.cut(stored.codes) - stored.zero_point
    codes = operand.moved(centred.reshape(stored.codes.shape))
    negative = in_operand(operand, np.sign(gain)) < 0
    size = stored.group[1] if stored.group else 0
    if size:
        scale = np.broadcast_to(stored.scale, centred.shape).reshape(stored.codes.shape)
        multiplier = operand.moved(scale).astype(np.float64) * in_operand(operand, gain)
    else:
        multiplier = _multiplier(lowering, product, side, stored) * gain
        negative = in_operand(operand, np.sign(multiplier)) < 0
    codes = np.where(np.broadcast_to(negative, codes.shape), -codes, codes)
    multiplier = np.abs(multiplier)
    dead = multiplier == 0  # a channel that BatchNorm takes out; a scale is above 0
    if dead.any():
        codes = np.where(dead if size else in_operand(operand, dead), 0, codes)
        rest = multiplier[~dead]
        multiplier = np.where(dead, rest.mean() if rest.size else 1.0, multiplier)
    return Weight(codes.astype(np.int32), multiplier, size, stored.format, product.path)


def _check_format(stored: StoredTensor, path: str) -> None:
    if not stored.uniform:
        raise ValueError(
            f"the weight of {path!r} has codes of {stored.format.name}, which are no multiples of "
            "a scale; LiteRT's weights are integers. Use "
            f"Spec({4 if stored.format.bits <= 4 else 8}), or leave it in float."
        )
    if stored.format.bits > 8:
        raise ValueError(
            f"the weight of {path!r} has {stored.format.bits} bits; LiteRT's weights have at most "
            "8. Use Spec(8), or leave it in float."
        )


def _multiplier(
    lowering: Lowering, product: TracedContraction, side: int, stored: StoredTensor
) -> np.ndarray:
    """Returns the weight's scale in the output's rank, with a folded BatchNorm in it."""
    traced, other = lowering.traced, product.operands[1 - side]
    if product.path in traced.multipliers and other.quantized:
        assert other.marker is not None
        input_scale = grid_of(traced, other.marker).scale.astype(np.float64)
        folded = traced.multipliers[product.path].astype(np.float64)
        folded = folded.reshape((1,) * (product.rank - folded.ndim) + folded.shape)
        return folded / input_scale
    return scale_in_output(product, side, stored.scale).astype(np.float64)
