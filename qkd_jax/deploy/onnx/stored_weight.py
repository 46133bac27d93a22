"""Weights whose scale varies along the sum, or that lie on no uniform grid, in ONNX.

Groups, codebooks and small floats: their scale cannot leave the product, so the file dequantizes
the array in front of it, in the form that `WeightForms.form` names:

- "float": Cast of the codes (or Gather from a table), Mul by the scale, and a Max that changes
  nothing. Engines unpack such weights when they load the file, and compute in float whatever their
  options are: without the Max, OpenVINO rounds the product's inputs to 8 bits.
- "blocks": DequantizeLinear with a block size, which leaves to the engine's options what becomes
  of the inputs.
- "nbits", "nbits_int8": `com.microsoft` MatMulNBits, whose kernels read codes of 2, 4 or 8 bits;
  its accuracy level is 1 (float inputs) or 4 (inputs rounded to 8 bits, block by block).

What MatMulNBits cannot hold is written as "float", and float4 (for engines that read it) as
"blocks"; what DequantizeLinear cannot hold is written as "float".
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qkd_jax.deploy.onnx.context import Export, WeightForms
from qkd_jax.graph import Graph, Node
from qkd_jax.numerics import FLOAT_FORMATS, FloatFormat, IntFormat, TableFormat
from qkd_jax.quantize.stored_tensor import StoredTensor, stored_tensor
from qkd_jax.quantize.traced import TracedNet, contractions, has_codes, is_quantizer

MICROSOFT = "com.microsoft"
NBITS = ("nbits", "nbits_int8")
PACKED = (2, 4, 8)
LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
# The opsets that brought the types in which codes and scales are kept.
TYPE_OPSETS = {"float8": 19, "int4": 21, "float4": 23, "e8m0": 24, "int2": 25}
FLOAT_TYPES = {
    FLOAT_FORMATS["e4m3fn"]: np.dtype(ml_dtypes.float8_e4m3fn),
    FLOAT_FORMATS["e5m2"]: np.dtype(ml_dtypes.float8_e5m2),
    FLOAT_FORMATS["e2m1"]: np.dtype(ml_dtypes.float4_e2m1fn),
    FLOAT_FORMATS["bf16"]: np.dtype(ml_dtypes.bfloat16),
    FLOAT_FORMATS["half"]: np.dtype(np.float16),
}
SCALE_TYPES = {
    "e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """A stored tensor in the layout of its contraction.

    Attributes:
        tensor: the codes and their grid, as the net has them.
        codes: in the contraction's layout.
        blocks: for each axis, how many neighbours share a scale.
        scale: one entry a block: shape[i] / blocks[i] along axis i.
        block_scale: as scale, which is `block_scale * tensor.tensor_scale` where there is one.
        zero_point: as scale, or None for 0.
    """

    tensor: StoredTensor
    codes: np.ndarray
    blocks: tuple[int, ...]
    scale: np.ndarray
    block_scale: np.ndarray
    zero_point: np.ndarray | None


def laid_out(tensor: StoredTensor, places: np.ndarray) -> StoredArray:
    """Brings codes and grid to a layout.

    Args:
        tensor: the codes and their grid.
        places: for each entry of the layout, its place among the codes, counted in C order.
    """
    codes = np.asarray(tensor.codes)
    cut = list(codes.shape)
    if tensor.group is not None:
        axis, size = tensor.group
        cut[axis : axis + 1] = [codes.shape[axis] // size, size]
    arrays = (tensor.scale, tensor.block_scale, tensor.zero_point)
    grid = np.broadcast_shapes(*(array.shape for array in arrays))
    numbers = np.arange(math.prod(grid)).reshape(grid)
    blocks = np.broadcast_to(numbers, cut).reshape(-1)[places]
    sizes = tuple(_block_size(blocks, axis) for axis in range(blocks.ndim))
    chosen = blocks[tuple(slice(None, None, size) for size in sizes)]
    scale, block_scale, shift = (np.broadcast_to(a, grid).reshape(-1)[chosen] for a in arrays)
    laid = codes.reshape(-1)[places]
    return StoredArray(tensor, laid, sizes, scale, block_scale, shift if shift.any() else None)


def _block_size(blocks: np.ndarray, axis: int) -> int:
    """Returns how many neighbours along an axis lie in one block everywhere."""
    lines = np.moveaxis(blocks, axis, 0).reshape(blocks.shape[axis], -1)
    borders = np.flatnonzero((lines[1:] != lines[:-1]).any(1)) + 1
    return math.gcd(len(lines), *map(int, borders))


def stored_weights(traced: TracedNet, forms: WeightForms) -> dict[Node, StoredTensor]:
    """Returns codes and grid of the weights that these forms are for, by their markers."""
    found = {}
    for product in contractions(traced.graph):
        for operand, other in (product.operands, product.operands[::-1]):
            marker, constants = operand.marker, traced.graph.constants
            if marker is None or not operand.quantized or operand.value not in constants:
                continue
            packs = forms.chosen and forms.form in NBITS and not other.quantized
            if packs or not has_codes(traced, operand):
                found[marker] = stored_tensor(traced, marker)
    for node in traced.graph.nodes:
        marker = table_marker(traced.graph, node)
        if marker is not None and is_quantizer(marker):
            found[marker] = stored_tensor(traced, marker)
    return found


def table_marker(graph: Graph, node: Node) -> Node | None:
    """Returns the quantizer of a table that a node looks up by indices, or None."""
    marker = graph.producer(node.inputs[0]) if node.op == "gather" else None
    if marker is None or marker.op != "quantizer":
        return None
    return marker if marker.outputs[0] in graph.constants else None


def opset_for(tensor: StoredTensor, forms: WeightForms) -> int:
    """Returns the lowest opset that keeps codes and scales in as many bits as they have."""
    format, needs = tensor.format, [13]
    if isinstance(format, FloatFormat):
        needs += [TYPE_OPSETS["float8"]] if 5 <= format.bits <= 8 else []
        needs += [TYPE_OPSETS["float4"]] if format.bits <= 4 and forms.float4 else []
    if format.bits <= 4 and forms.pack:
        needs.append(TYPE_OPSETS["int2" if format.bits <= 2 and forms.int2 else "int4"])
    return max(*needs, _scale_opset(tensor))


def write_stored(export: Export, node: Node, stored: StoredArray, path: str) -> str:
    """Writes the real values of a stored array; returns their name."""
    name = f"{node.scope}/weight" if node.scope else "weight"
    if export.forms.form == "blocks" or _reads_float4(export, stored):
        written = _dequantize_linear(export, node, stored, path, name)
        if written:
            return written
    codes, table = _element(export, stored, in_blocks=False)
    export.stored[path] = (stored.tensor.format.name, codes.dtype.name)
    cut, scale_shape = _cut(stored)
    values = export.writer.constant(codes.reshape(cut), name)
    if table is None:
        values = export.cast(values, np.float32, node)
    else:
        entries = export.writer.constant(table, f"{name}_table")
        values = export.add("Gather", [entries, export.cast(values, np.int32, node)], node)
    if stored.zero_point is not None:
        shift = stored.zero_point.astype(np.float32).reshape(scale_shape)
        shift = export.writer.constant(shift, f"{name}_zero_point")
        values = export.add("Sub", [values, shift], node)
    scale = _scale(export, node, stored, lambda array: array.reshape(scale_shape), name)
    values = export.add("Mul", [values, scale], node)
    if len(cut) != stored.codes.ndim:
        shape = export.writer.shape_constant(stored.codes.shape)
        values = export.add("Reshape", [values, shape], node)
    return export.fenced(values, node) if export.forms.fenced else values


def packed_width(export: Export, stored: StoredArray) -> int:
    """Returns the bits in which MatMulNBits is to read a matrix [inputs, outputs]; 0 for none."""
    format = stored.tensor.format
    if export.forms.form not in NBITS or not isinstance(format, IntFormat) or format.bits > 8:
        return 0
    if stored.codes.ndim != 2 or _packed_block(stored) < SMALLEST_BLOCK:
        return 0
    widths = [w for w in PACKED if w >= format.bits]
    if export.forms.form == "nbits_int8":
        return widths[0]
    fast = [w for w in widths if w in export.forms.packed_bits]
    return fast[0] if fast and (fast[0] == widths[0] or export.forms.chosen) else 0


def write_packed(
    export: Export,
    node: Node,
    x: str,
    stored: StoredArray,
    width: int,
    bias: np.ndarray | None,
    path: str,
) -> str:
    """Writes x [..., inputs] times a matrix [inputs, outputs] as MatMulNBits.

    Codes are unsigned there, and lie along the inputs of each output, the first in the low bits.
    """
    writer, (inputs, outputs) = export.writer, stored.codes.shape
    block, format = _packed_block(stored), stored.tensor.format
    assert isinstance(format, IntFormat)
    name = f"{node.scope}/weight" if node.scope else "weight"
    offset = 2 ** (width - 1) if format.signed else 0
    groups = inputs // block

    def by_output(array: np.ndarray) -> np.ndarray:  # [outputs, groups]
        whole = array
        for axis, size in enumerate((stored.blocks[0] // block, stored.blocks[1])):
            whole = np.repeat(whole, size, axis)
        return np.ascontiguousarray(whole.T)

    codes = (stored.codes.T.astype(np.int32) + offset).reshape(outputs, groups, block)
    codes = writer.constant(_packed(codes, width), name)
    export.stored[path] = (format.name, f"uint{width}")
    scale = _scale(export, node, stored, by_output, name)
    operands = [x, codes, scale]
    shift = 0 if stored.zero_point is None else by_output(stored.zero_point).astype(np.int32)
    if np.any(shift + offset != 2 ** (width - 1)):  # what it takes where it is given none
        shift = np.broadcast_to(shift + offset, (outputs, groups))
        operands.append(writer.constant(_packed(shift, width), f"{name}_zero_point"))
    if bias is not None:
        operands += [""] * (5 - len(operands))
        operands.append(writer.constant(bias.astype(np.float32), f"{node.scope}/bias"))
    if export.forms.form == "nbits_int8":
        export.rounded_inputs.append(path)
    return export.add(
        "MatMulNBits",
        operands,
        node,
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=width,
        block_size=block,
        accuracy_level=4 if export.forms.form == "nbits_int8" else 1,
    )


def _packed_block(stored: StoredArray) -> int:
    """Returns the largest power of two that MatMulNBits takes and that divides the blocks."""
    return math.gcd(stored.blocks[0], LARGEST_BLOCK)


def _packed(codes: np.ndarray, width: int) -> np.ndarray:
    """Packs codes of 2, 4 or 8 bits along the last axis, the first in the low bits."""
    each = 8 // width
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    parts = [padded[..., i::each] << (width * i) for i in range(each)]
    return np.bitwise_or.reduce(parts).astype(np.uint8)


def _dequantize_linear(
    export: Export, node: Node, stored: StoredArray, path: str, name: str
) -> str:
    """Writes a DequantizeLinear with one scale a tensor, a channel or a block; "" if it cannot."""
    shape, blocks = stored.codes.shape, stored.blocks
    cut = [i for i, (n, b) in enumerate(zip(shape, blocks, strict=True)) if 1 < b < n]
    own = [i for i, (n, b) in enumerate(zip(shape, blocks, strict=True)) if b == 1 < n]
    codes, table = _element(export, stored, in_blocks=True)
    if table is not None or codes.dtype.itemsize > 1:
        return ""
    if "int2" in codes.dtype.name and shape[-1] % 4:
        return ""  # findings/onnxruntime_int2_columns.sh
    attributes = {}
    if cut:
        if len(cut) > 1 or len(own) != len(shape) - 1 or export.writer.opset < TYPE_OPSETS["int4"]:
            return ""
        attributes = {"axis": cut[0], "block_size": blocks[cut[0]]}
    elif own:
        if len(own) > 1:
            return ""
        attributes = {"axis": own[0]}
    layout = stored.scale.shape if cut else (-1,) if own else ()
    export.stored[path] = (stored.tensor.format.name, codes.dtype.name)
    scale = _scale(export, node, stored, lambda array: array.reshape(layout), name)
    inputs = [export.writer.constant(codes, name), scale]
    if stored.zero_point is not None:
        shift = stored.zero_point.astype(codes.dtype).reshape(layout)
        inputs.append(export.writer.constant(shift, f"{name}_zero_point", owner=inputs[0]))
    return export.add("DequantizeLinear", inputs, node, **attributes)


def _reads_float4(export: Export, stored: StoredArray) -> bool:
    codes = stored.tensor.format == FLOAT_FORMATS["e2m1"]
    return codes and export.forms.float4 and export.forms.form in NBITS


def _cut(stored: StoredArray) -> tuple[list[int], list[int]]:
    """Returns the shapes of codes whose blocks have axes of their own, and of their scales."""
    codes, scale = [], []
    for size, block in zip(stored.codes.shape, stored.blocks, strict=True):
        inner = 1 < block < size
        codes += [size // block, block] if inner else [size]
        scale += [size // block, 1] if inner else [size // block]
    return codes, scale


def _element(
    export: Export, stored: StoredArray, *, in_blocks: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns codes in the type that the file keeps, and the table that they index, or None."""
    format, codes, opset = stored.tensor.format, stored.codes, export.writer.opset
    if isinstance(format, IntFormat):
        kind = "" if format.signed else "u"
        return codes.astype(_integers(export, format.bits, kind, format.storage)), None
    if isinstance(format, FloatFormat):
        values = np.asarray(format.decode(jnp.asarray(codes)), np.float32)
        wide = [FLOAT_TYPES[format]] if format in FLOAT_TYPES else []
        if format.bits > 4:
            wide += [FLOAT_TYPES[FLOAT_FORMATS[name]] for name in ("e4m3fn", "e5m2")]
        for dtype in wide:
            kind = dtype.name.partition("_")[0]
            taken = kind != "float4" or (in_blocks and export.forms.float4)
            if opset >= TYPE_OPSETS.get(kind, 13) and taken:
                kept = values.astype(dtype)
                if np.array_equal(kept.astype(np.float32), values):
                    return kept, None
        if format.bits > 8:
            return values, None
    levels = format.levels if isinstance(format, TableFormat) else 2**format.bits
    table = np.asarray(format.decode(jnp.arange(levels)), np.float32)
    return codes.astype(_integers(export, format.bits, "u", np.dtype(np.uint8))), table


def _integers(export: Export, bits: int, kind: str, storage: np.dtype) -> np.dtype:
    """Returns the type of integer codes: the smallest that opset and engine have."""
    if bits <= 2 and export.forms.int2 and export.writer.opset >= TYPE_OPSETS["int2"]:
        return np.dtype(f"{kind}int2")
    if bits <= 4 and export.forms.pack and export.writer.opset >= TYPE_OPSETS["int4"]:
        return np.dtype(f"{kind}int4")
    return storage


def _scale(
    export: Export,
    node: Node,
    stored: StoredArray,
    arrange: Callable[[np.ndarray], np.ndarray],
    name: str,
) -> str:
    """Writes the scales in the format that holds them, where the opset has it, else in float32.

    Args:
        export: the export.
        node: the product.
        stored: the array whose scales they are.
        arrange: from their layout to that of the file.
        name: of the weight.
    """
    writer, tensor, hint = export.writer, stored.tensor, f"{name}_scale"
    dtype = SCALE_TYPES.get(tensor.scale_format)
    members = tensor.tensor_scale is not None and np.size(tensor.tensor_scale) > 1
    if dtype is None or members or writer.opset < _scale_opset(tensor):
        return writer.constant(arrange(stored.scale), hint)
    kept = writer.constant(arrange(stored.block_scale).astype(dtype), hint)
    written = export.cast(kept, np.float32, node)
    if tensor.tensor_scale is None:
        return written
    second = np.asarray(tensor.tensor_scale, np.float32).reshape(())
    second = writer.constant(second, f"{hint}_of_tensor")
    return export.add("Mul", [written, second], node)


def _scale_opset(tensor: StoredTensor) -> int:
    kinds = {"e8m0": "e8m0", "e4m3fn": "float8"}
    return TYPE_OPSETS.get(kinds.get(tensor.scale_format, ""), 13)
