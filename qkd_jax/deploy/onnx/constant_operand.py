"""The constant operand of a contraction in ONNX: a weight, as codes or as floats.

DequantizeLinear stands on an int8 weight whose other operand is codes too: engines make an integer
kernel of the two. In front of float inputs they make something else of it: ONNX Runtime and
OpenVINO quantize those inputs to 8 bits by themselves (findings/openvino_own_activations.sh), and
OpenVINO misreads int4 of an odd number of inputs (findings/openvino_odd_int4.sh). Such a weight is
cast to float, and its scale multiplies the sums.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from qkd_jax.deploy.graph_values import in_operand
from qkd_jax.deploy.onnx.context import DynamicRange, Export
from qkd_jax.deploy.onnx.stored_weight import (
    laid_out,
    packed_width,
    write_packed,
    write_stored,
)
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.numerics import codes_of
from qkd_jax.quantize.dynamic_grids import takes_out_dynamic_scales
from qkd_jax.quantize.stored_tensor import StoredTensor
from qkd_jax.quantize.traced import (
    Operand,
    TracedContraction,
    grid_of,
    is_dynamic,
    scale_in_output,
)

BYTES = (np.dtype(np.int8), np.dtype(np.uint8))
INT16_LIMIT, INT32_LIMIT = 32767, 2.0**31
FINE_BITS = 7


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantOperand:
    """A constant operand in its contraction's layout.

    Attributes:
        array: codes, or floats where there is no scale.
        scale: per output channel, or a scalar; None for a float weight.
        zero_point: as scale; None for 0.
        late: whether the scale multiplies the sums, and not the array.
        flip: output channels whose result is to be negated, or None.
        bias_outside: whether the bias must stay outside the product: between codes of few bits,
            whose unit is coarse, and behind a dynamic range.
        fenced: whether no grid may follow the product at once. ONNX Runtime takes a product that
            stands between two grids for one of integers, and rounds a float weight to 8 bits
            (findings/onnxruntime_quantizes_float_weights.sh).
        unit: of the product's sums, s_x * s_w, in the output's rank, where the engine rounds a bias
            inside the product to it; else None.
        dynamic: the other operand's range, where it is dynamic and both sides are codes of at most
            8 bits: the product is then one of codes, scaled once.
        stored: codes and grid of a weight that has groups, or is on no uniform grid; `array` then
            holds the place of each entry among its codes.
        path: of the layer.
        on_codes: whether that product is one of integers. ONNX's convolutions have one zero point
            for all examples, so those with one for each multiply codes that are held in float.
    """

    array: np.ndarray
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    late: bool = False
    flip: np.ndarray | None = None
    bias_outside: bool = False
    fenced: bool = False
    unit: np.ndarray | None = None
    dynamic: DynamicRange | None = None
    on_codes: bool = False
    stored: StoredTensor | None = None
    path: str = ""

    def takes(self, bias: np.ndarray) -> bool:
        """Whether a bias can stand inside the product, and stay what it is.

        Inside a quantized product ONNX Runtime (its WeightBiasQuantization) makes an int32 of it,
        in the unit of the sums (findings/onnxruntime_rounds_float_bias.sh): right for biases that
        are such multiples already, as those of `ptq.integer_bias` are, to float32's precision.
        """
        if self.flip is not None or self.bias_outside:
            return False
        if self.unit is None:
            return True
        multiples = np.asarray(bias, np.float64) / self.unit
        whole = np.round(multiples)
        near = np.abs(multiples - whole) <= np.abs(whole) * 2.0**-22
        return bool(np.all(near & (np.abs(whole) < INT32_LIMIT)))

    def other_input(self, export: Export, value: int) -> Tensor:
        """Returns what the contraction reads for the other operand: its codes if it is dynamic."""
        x = export.tensors[value]
        if self.dynamic is None:
            return x
        name = self.dynamic.codes if self.on_codes else self.dynamic.centred
        return dataclasses.replace(x, name=name)

    def add_input(self, export: Export, node: Node, array: np.ndarray, axis: int) -> str:
        """Adds the array as the product reads it; `axis` is the output channels' ONNX axis."""
        if self.stored is not None:
            return write_stored(export, node, laid_out(self.stored, array), self.path)
        name = f"{node.scope}/weight" if node.scope else "weight"
        stored = export.writer.constant(array, name)
        if self.scale is None or self.on_codes:
            return stored
        if self.late:
            codes = export.cast(stored, np.float32, node)
            if self.zero_point is None:
                return codes
            shape = [1] * array.ndim
            shape[axis] = self.zero_point.size
            shift = self.zero_point.astype(np.float32).reshape(shape)
            shift = export.writer.constant(shift, f"{name}_zero_point")
            return export.add("Sub", [codes, shift], node)
        scale = self.scale.reshape(-1) if self.scale.size > 1 else self.scale.reshape(())
        grid = [export.writer.constant(scale, f"{name}_scale")]
        zero_point = np.zeros(scale.shape, array.dtype)
        if self.zero_point is not None:
            zero_point = np.broadcast_to(self.zero_point.reshape(-1), scale.shape).copy()
            if not scale.ndim:
                zero_point = zero_point.reshape(())
        # Not shared: with session.x64quantprecision ONNX Runtime makes uint8 of int8 weights, and
        # fails to load a file in which two of them have one zero point.
        grid.append(export.writer.constant(zero_point, f"{name}_zero_point", owner=stored))
        attributes = {"axis": axis} if scale.ndim else {}
        return export.add("DequantizeLinear", [stored, *grid], node, **attributes)

    def packed_product(
        self, export: Export, node: Node, x: str, matrix: np.ndarray, bias: np.ndarray | None
    ) -> str:
        """Writes x times a matrix of codes as a kernel that reads them packed; "" if it cannot."""
        if self.stored is None:
            return ""
        laid = laid_out(self.stored, matrix)
        width = packed_width(export, laid)
        return write_packed(export, node, x, laid, width, bias, self.path) if width else ""

    def scaled(
        self, export: Export, node: Node, sums: str, rows: str, channel_scales: np.ndarray
    ) -> str:
        """Multiplies sums of codes by the scales; `rows` are those of a dynamic range, or ""."""
        if self.on_codes:
            sums = export.cast(sums, np.float32, node)
        scale = export.writer.constant(channel_scales, f"{node.scope}/weight_scale")
        if rows:
            scale = export.add("Mul", [rows, scale], node)
        return export.add("Mul", [sums, scale], node)


def constant_operand(export: Export, product: TracedContraction, side: int) -> ConstantOperand:
    """Takes a weight as codes with the output multiplier in their scale, or as floats."""
    operand, other = product.operands[side], product.operands[1 - side]
    if not operand.quantized:
        # Some grid is in front, perhaps moved or pooled, and one may follow.
        fenced = bool(export.dequantized) and export.onnxruntime
        return ConstantOperand(export.values.fixed(operand.value), fenced=fenced)
    assert operand.marker is not None
    if operand.marker in export.stored_tensors:
        stored = export.stored_tensors[operand.marker]
        shape = operand.marker_shape
        places = operand.moved(np.arange(math.prod(shape)).reshape(shape))
        fenced = bool(export.dequantized) and export.onnxruntime
        return ConstantOperand(places, fenced=fenced, stored=stored, path=product.path)
    scale, zero_point, format = grid_of(export.traced, operand.marker)
    hat = np.asarray(export.graph.constants[operand.marker.outputs[0]], np.float32)
    codes = (codes_of(hat, scale) + zero_point).astype(np.int32)
    codes = operand.moved(codes)
    multiplier = scale_in_output(product, side, scale).astype(np.float64)
    if product.path in export.traced.multipliers and other.quantized:
        assert other.marker is not None
        input_scale = grid_of(export.traced, other.marker).scale.astype(np.float64)
        folded = export.traced.multipliers[product.path].astype(np.float64)
        multiplier = folded.reshape((1,) * (product.rank - folded.ndim) + folded.shape)
        multiplier = multiplier / input_scale
    storage = export.storage(product.path, format)
    dynamic = _dynamic_range(export, other, storage, zero_point)
    late = dynamic is not None or _scales_late(export, other, storage, zero_point)
    flip = None
    negative = np.sign(multiplier) < 0
    if negative.any() and not late:
        # A negative multiplier goes into the codes, as long as -code is a code.
        flipped = np.broadcast_to(in_operand(operand, negative), codes.shape)
        lowest = jnp.iinfo(storage).min
        if zero_point.any() or not format.signed or (codes[flipped] == lowest).any():
            flip = np.where(negative, -1.0, 1.0).astype(np.float32)
        else:
            codes = np.where(flipped, -codes, codes)
        multiplier = np.abs(multiplier)
    stored_zero_point = None
    if zero_point.any():
        stored_zero_point = scale_in_output(product, side, zero_point).astype(storage)
    on_codes = dynamic is not None
    if dynamic is not None and product.node.op == "conv_general_dilated":
        stretched = any(d != 1 for d in product.node.params["lhs_dilation"])
        on_codes = not stretched and not (dynamic.zero_point and dynamic.axes)
    bias_outside, unit = late or is_dynamic(export.traced, other.marker), None
    if other.quantized and not bias_outside:
        assert other.marker is not None
        other_scale, _, other_format = grid_of(export.traced, other.marker)
        bias_outside = min(format.bits, other_format.bits) < FINE_BITS
        if export.onnxruntime:
            unit = multiplier * np.float64(other_scale)
    in_float = late and dynamic is None
    name = export.tensors[other.value].name
    activation = export.dequantized[name] if on_codes else export.static_codes(name)
    if (on_codes or not late) and activation is not None:
        largest = int(np.abs(codes).max(initial=0))
        if 2 * activation.largest * largest > INT16_LIMIT:
            export.saturating.append(product.path)
    return ConstantOperand(
        array=codes.astype(storage),
        scale=multiplier.astype(np.float32),
        zero_point=stored_zero_point,
        late=late,
        flip=flip,
        bias_outside=bias_outside,
        fenced=in_float and bool(export.dequantized) and export.onnxruntime,
        unit=unit,
        dynamic=dynamic,
        on_codes=on_codes,
    )


def _dynamic_range(
    export: Export, other: Operand, storage: np.dtype, zero_point: np.ndarray
) -> DynamicRange | None:
    """Returns the other operand's range, if it is dynamic and leaves a product of 8-bit codes."""
    if not is_dynamic(export.traced, other.marker) or storage not in BYTES or zero_point.any():
        return None
    dequantized = export.dequantized.get(export.tensors[other.value].name)
    dynamic = None if dequantized is None else dequantized.range
    if dynamic is None or not dynamic.codes:
        return None
    return dynamic if takes_out_dynamic_scales(export.traced, other) else None


def _scales_late(export: Export, other: Operand, storage: np.dtype, zero_point: np.ndarray) -> bool:
    """Whether an engine makes something else of this weight than DequantizeLinear says."""
    if not export.quantizes_inputs:
        return storage.itemsize > 1
    if storage != np.int8 or zero_point.any():
        return True
    return export.static_codes(export.tensors[other.value].name) is None
