"""Convolutions and matrix products in ONNX, with the bias and BatchNorm's constants drawn in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax import graph as graphs
from qkd_jax.deploy.onnx.context import Export, Found, unsupported
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.quantize.traced import Operand, Product, grid_of, is_found, scale_in_output

__all__ = ["write_product"]

FLOAT32, INT32 = np.dtype(np.float32), np.dtype(np.int32)
BYTES = (np.dtype(np.int8), np.dtype(np.uint8))
INT16_LIMIT = 32767
FINE_BITS = 7


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A constant operand in its product's layout.

    Attributes:
        array: codes, or floats where there is no scale.
        scale: per output channel, or a scalar; None for a float weight.
        zero_point: as scale; None for 0.
        flip: output channels whose result is to be negated, or None.
        coarse: whether the bias must stay outside the product. ONNX Runtime rounds the bias of a
            quantized product to the unit of its sums, s_x * s_w: harmless at 8 bits, but enough to
            change most logits at 2.
        found: the other operand's range, where it is found at run time and both sides are codes of
            at most 8 bits: the product is then one of codes, scaled once.
        on_codes: whether that product is one of integers. ONNX's convolutions have one zero point
            for all examples, so those with one for each multiply codes that are held in float.
    """

    array: np.ndarray
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    flip: np.ndarray | None = None
    coarse: bool = False
    found: Found | None = None
    on_codes: bool = False


def write_product(export: Export, product: Product) -> Tensor:
    """Writes a product, its bias, and constants per channel that follow it."""
    node = product.node
    fixed = [o.value not in export.dynamic for o in product.operands]
    if all(fixed) or (node.op == "conv_general_dilated" and fixed != [False, True]):
        raise unsupported(node, "its kernel is not a constant")
    if not any(fixed):
        return _dynamic_product(export, product)
    side = fixed.index(True)
    channels = [i for i in range(product.rank) if i in product.operands[side].output_axes]
    weight = _weight(export, product, side)
    bias = _bias(export, product, channels)
    if node.op == "conv_general_dilated":
        out = _conv(export, product, weight, bias)
    else:
        out = _matmul(export, product, side, weight, bias)
    return _affine(export, node, out)


def _weight(export: Export, product: Product, side: int) -> Weight:
    """Takes the weight as codes with the output multiplier in their scale, or as floats."""
    operand, other = product.operands[side], product.operands[1 - side]
    if not operand.quantized:
        return Weight(export.fixed(operand.value))
    assert operand.marker is not None
    scale, zero_point, format = grid_of(export.traced, operand.marker)
    hat = np.asarray(export.graph.constants[operand.marker.outputs[0]], np.float32)
    codes = np.round(hat * (np.float32(1) / scale)) + zero_point
    codes = _moved(codes.astype(np.int32), operand)
    in_output = scale_in_output(product, side, scale).astype(np.float64)
    if product.path in export.traced.multipliers and other.quantized:
        assert other.marker is not None
        input_scale = grid_of(export.traced, other.marker).scale.astype(np.float64)
        multiplier = export.traced.multipliers[product.path].astype(np.float64)
        in_output = multiplier.reshape((1,) * (product.rank - multiplier.ndim) + multiplier.shape)
        in_output = in_output / input_scale
    storage = export.storage(product.path, format)
    flip = None
    negative = np.sign(in_output) < 0
    if negative.any():
        # A negative multiplier goes into the codes, as long as -code is a code.
        in_operand = np.broadcast_to(_to_operand(negative, operand), codes.shape)
        lowest = jnp.iinfo(storage).min
        if zero_point.any() or not format.signed or (codes[in_operand] == lowest).any():
            flip = np.where(negative, -1.0, 1.0).astype(np.float32)
        else:
            codes = np.where(in_operand, -codes, codes)
        in_output = np.abs(in_output)
    shifted = zero_point_in_output = None
    if zero_point.any():
        shifted = scale_in_output(product, side, zero_point)
        zero_point_in_output = shifted.astype(storage)
    in_output = in_output.astype(np.float32)
    coarse, found = False, None
    if is_found(export.traced, other.marker):
        coarse, found = True, export.found.get(export.tensors[other.value].name)
        plain = storage in BYTES and zero_point_in_output is None
        if found is not None and not (plain and np.dtype(found.format.storage) in BYTES):
            found = None
        if found is not None and any(other.output_axes[axis] is None for axis in found.axes):
            raise unsupported(product.node, "its input's ranges vary along the sum")
    elif other.quantized:
        assert other.marker is not None
        coarse = min(format.bits, grid_of(export.traced, other.marker).format.bits) < FINE_BITS
    on_codes = found is not None
    if found is not None and product.node.op == "conv_general_dilated":
        stretched = any(d != 1 for d in product.node.params["lhs_dilation"])
        on_codes = not stretched and not (found.zero_point and found.axes)
    if found is None or on_codes:
        _note_saturation(export, product, other, codes)
    return Weight(
        codes.astype(storage), in_output, zero_point_in_output, flip, coarse, found, on_codes
    )


def _note_saturation(export: Export, product: Product, other: Operand, codes: np.ndarray) -> None:
    if other.value in export.tensors:
        activation = export.largest.get(export.tensors[other.value].name, 0)
        if 2 * activation * int(np.abs(codes).max(initial=0)) > INT16_LIMIT:
            export.saturating.append(product.path)


def _moved(codes: np.ndarray, operand: Operand) -> np.ndarray:
    for node in operand.moves:
        codes = np.asarray(graphs.execute(node, [codes])[0])
    return codes


def _to_operand(array: np.ndarray, operand: Operand) -> np.ndarray:
    """Brings an array of the output's rank (or a scalar) to an operand's axes."""
    if array.ndim == 0:
        return array
    index = [array.shape[out] if out is not None else 1 for out in operand.output_axes]
    kept = [out for out in operand.output_axes if out is not None]
    moved = array.transpose([*kept, *(i for i in range(array.ndim) if i not in kept)])
    return moved.reshape(index)


def _bias(export: Export, product: Product, channels: list[int]) -> np.ndarray | None:
    """Sums the constants per channel that are added to the product, and absorbs the additions."""
    total, value = None, product.node.outputs[0]
    shape = export.graph.shape(value)
    for node, _, constant in export.constant_readers(value):
        if node.op != "add" or export.graph.shape(node.outputs[0]) != shape:
            break
        whole = constant.reshape((1,) * (product.rank - constant.ndim) + constant.shape)
        if any(n != 1 for axis, n in enumerate(whole.shape) if axis not in channels):
            break
        total = whole if total is None else total + whole
        export.absorbed[node] = product.node.outputs[0]
    return total


def _affine(export: Export, node: Node, out: Tensor) -> Tensor:
    """Draws a run of sums and products with constants into one Mul and one Add."""
    gain, shift = np.float64(1), np.float64(0)
    last = _last_absorbed(export, node.outputs[0])
    run = []
    for reader, left, c in export.constant_readers(last):
        c = c.astype(np.float64)
        if reader.op == "div" and not left:
            break
        if reader.op == "add":
            shift = shift + c
        elif reader.op == "sub":
            gain, shift = (gain, shift - c) if left else (-gain, c - shift)
        elif reader.op == "mul":
            gain, shift = gain * c, shift * c
        else:
            gain, shift = gain / c, shift / c
        run.append(reader)
    if len(run) < 2 or any(export.shape(r) != out.shape for r in run):
        return out
    export.absorbed.update((reader, node.outputs[0]) for reader in run)
    for op, constant in (("Mul", gain), ("Add", shift)):
        array = export.writer.like(np.asarray(constant, np.float32), out)
        name = export.writer.constant(array, f"{run[0].scope}/{op.lower()}_constant")
        out = export.same(out, export.add(op, [out.name, name], run[0]))
    return out


def _last_absorbed(export: Export, value: int) -> int:
    while (reader := export.graph.sole_consumer(value)) in export.absorbed:
        assert reader is not None
        value = reader.outputs[0]
    return value


def _as_input(export: Export, node: Node, array: np.ndarray, weight: Weight, axis: int) -> str:
    """Adds a weight, dequantized if it is codes; `axis` is the output channels' ONNX axis."""
    name = f"{node.scope}/weight" if node.scope else "weight"
    stored = export.writer.constant(array, name)
    if weight.found is not None:
        if weight.on_codes:
            return stored
        return export.add("Cast", [stored], node, to=export.element_type(FLOAT32))
    if weight.scale is None:
        return stored
    scale = weight.scale.reshape(-1) if weight.scale.size > 1 else weight.scale.reshape(())
    grid = [export.writer.constant(scale, f"{name}_scale")]
    zero_point = np.zeros(scale.shape, array.dtype)
    if weight.zero_point is not None:
        zero_point = np.broadcast_to(weight.zero_point.reshape(-1), scale.shape).copy()
        if not scale.ndim:
            zero_point = zero_point.reshape(())
    grid.append(export.writer.constant(zero_point, f"{name}_zero_point"))
    attributes = {"axis": axis} if scale.ndim else {}
    return export.add("DequantizeLinear", [stored, *grid], node, **attributes)


def _flipped(export: Export, node: Node, name: str, flip: np.ndarray | None, out: Tensor) -> str:
    if flip is None:
        return name
    signs = export.writer.constant(export.writer.like(flip, out), "signs")
    return export.add("Mul", [name, signs], node)


def _conv(export: Export, product: Product, weight: Weight, bias: np.ndarray | None) -> Tensor:
    node, params = product.node, product.node.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise unsupported(node, "it groups the batch")
    x = export.writer.ordered(_source(export, node.inputs[0], weight), node.scope)
    x = export.writer.arranged(x, numbers.lhs_spec, node.scope)
    kernel = weight.array.transpose(numbers.rhs_spec)
    sizes, padding = kernel.shape[2:], params["padding"]
    dilations = params["rhs_dilation"]
    out = Tensor("", export.shape(node), numbers.out_spec)
    stretched = any(d != 1 for d in params["lhs_dilation"])
    attributes: dict[str, Any] = {
        "kernel_shape": list(sizes),
        "group": groups,
        "dilations": list(dilations),
    }
    if stretched:
        kernel = _transposed(node, kernel, groups)
        reach = [(k - 1) * d for k, d in zip(sizes, dilations, strict=True)]
        starts = [r - lo for r, (lo, _) in zip(reach, padding, strict=True)]
        ends = [r - hi for r, (_, hi) in zip(reach, padding, strict=True)]
        if min(starts) < 0 or any(s != 1 for s in params["window_strides"]):
            raise unsupported(node, f"padding {padding} of a transposed convolution")
        attributes["strides"] = list(params["lhs_dilation"])
        attributes["pads"] = [*starts, *(max(e, 0) for e in ends)]
        attributes["output_padding"] = [max(-e, 0) for e in ends]
        if any(
            p >= s for p, s in zip(attributes["output_padding"], attributes["strides"], strict=True)
        ):
            raise unsupported(node, f"padding {padding} of a transposed convolution")
        if groups > 1 and weight.scale is not None and weight.scale.size > 1:
            raise unsupported(node, "groups with a scale per channel, transposed")
    else:
        if any(n < 0 for pair in padding for n in pair):
            raise unsupported(node, f"negative padding {padding}")
        attributes["strides"] = list(params["window_strides"])
        attributes["pads"] = [pair[i] for i in (0, 1) for pair in padding]
    inputs = [x.name, _as_input(export, node, kernel, weight, 1 if stretched else 0)]
    op = "ConvTranspose" if stretched else "ConvInteger" if weight.on_codes else "Conv"
    drawn_in = bias is not None and weight.flip is None and not weight.coarse
    if drawn_in:
        inputs.append(
            _bias_input(export, node, bias, kernel.shape[1] if stretched else len(kernel))
        )
    if weight.found is not None and weight.on_codes and weight.found.zero_point:  # one for all
        storage = export.element_type(weight.found.format.storage)
        inputs.append(export.add("Cast", [weight.found.zero_point], node, to=storage))
    name = export.add(op, inputs, node, **attributes)
    if weight.found is not None:
        rows = _rows(export, node.inputs[0], weight.found, numbers.lhs_spec, node)
        name = _scaled(export, node, name, rows, weight, out)
    name = _flipped(export, node, name, weight.flip, out)
    if bias is not None and not drawn_in:
        added = export.writer.constant(export.writer.like(bias, out), f"{node.scope}/bias")
        name = export.add("Add", [name, added], node)
    return dataclasses.replace(out, name=name)


def _source(export: Export, value: int, weight: Weight) -> Tensor:
    """What a product reads in place of a value: its codes, where their range is found."""
    x = export.tensors[value]
    if weight.found is None:
        return x
    return export.same(x, weight.found.codes if weight.on_codes else weight.found.centred)


def _rows(
    export: Export,
    value: int,
    found: Found,
    perm: Sequence[int],
    node: Node,
    summed: int = 1,
    *,
    zero_point: bool = False,
) -> str:
    """Scales (or zero points) of a value in an order of its axes, the last `summed` ones as one."""
    name = found.zero_point if zero_point else found.scale
    if not found.axes:
        return name
    tensor = export.same(export.tensors[value], name)
    name = export.writer.arranged(tensor, perm, node.scope).name
    if summed == 1:
        return name
    last = list(range(len(perm) - summed + 1, len(perm)))
    return export.add("Squeeze", [name, export.writer.shape_constant(last, "axes")], node)


def _scaled(
    export: Export, node: Node, sums: str, rows: str, weight: Weight, out: Tensor | None = None
) -> str:
    """Multiplies sums of codes by the product of the two scales, as the net does."""
    assert weight.scale is not None
    if weight.on_codes:
        sums = export.add("Cast", [sums], node, to=export.element_type(FLOAT32))
    channels = weight.scale if out is None else export.writer.like(weight.scale, out)
    stored = export.writer.constant(channels, f"{node.scope}/weight_scale")
    return export.add("Mul", [sums, export.add("Mul", [rows, stored], node)], node)


def _bias_input(export: Export, node: Node, bias: Any, channels: int) -> str:
    vector = np.broadcast_to(bias.reshape(-1), (channels,)).astype(np.float32)
    return export.writer.constant(vector, f"{node.scope}/bias")


def _transposed(node: Node, kernel: np.ndarray, groups: int) -> np.ndarray:
    """[out, in/groups, ...] of a stretched convolution to [in, out/groups, ...], flipped."""
    outputs, inputs, *sizes = kernel.shape
    split = kernel.reshape(groups, outputs // groups, inputs, *sizes)
    joined = split.swapaxes(1, 2).reshape(groups * inputs, outputs // groups, *sizes)
    return np.flip(joined, tuple(range(2, joined.ndim)))


def _matmul(
    export: Export, product: Product, side: int, weight: Weight, bias: np.ndarray | None
) -> Tensor:
    """Writes a product with a constant matrix: Gemm for [batch, features], else MatMul."""
    node = product.node
    contracted, batch = node.params["dimension_numbers"]
    x = _source(export, node.inputs[1 - side], weight)
    summed, w_summed = contracted[1 - side], contracted[side]
    x_free = [a for a in range(len(x.shape)) if a not in summed]
    if batch[0] or (side == 0 and x_free):
        raise unsupported(node, "the constant has batch axes, or stands on the left")
    w_free = [a for a in range(weight.array.ndim) if a not in w_summed]
    w_shape = tuple(weight.array.shape[a] for a in w_free)
    channels = math.prod(w_shape)
    matrix = weight.array.transpose([*w_summed, *w_free]).reshape(-1, channels)
    if x.order is not None and (x.order[0],) == tuple(summed):
        matrix, x = matrix[x.order[1]], dataclasses.replace(x, order=None)
    x = export.writer.ordered(x, node.scope)
    x = export.writer.arranged(x, (*x_free, *summed), node.scope)
    lead = [x.shape[a] for a in x_free]
    name = x.name
    if len(summed) != 1:
        shape = export.writer.shape_constant([*lead, len(matrix)])
        name = export.add("Reshape", [name, shape], node)

    def flat(array: Any) -> Any:
        """One number per column of the matrix, from an array of the output's rank."""
        if array is None or array.size == 1:
            return array
        return np.broadcast_to(array.reshape(array.shape[len(lead) :]), w_shape).reshape(-1)

    weight = dataclasses.replace(
        weight, scale=flat(weight.scale), zero_point=flat(weight.zero_point)
    )
    matrix = np.ascontiguousarray(matrix)
    inputs = [name, _as_input(export, node, matrix, weight, 1)]
    vector = None if bias is None else np.broadcast_to(np.ravel(flat(bias)), (channels,))
    if len(lead) == 1 and vector is not None and weight.flip is None and not weight.coarse:
        stored = export.writer.constant(vector.astype(np.float32), f"{node.scope}/bias")
        name = export.add("Gemm", [*inputs, stored], node)
    else:
        name = export.add("MatMulInteger" if weight.on_codes else "MatMul", inputs, node)
        if weight.found is not None:
            perm, given = (*x_free, *summed), node.inputs[1 - side]
            if weight.found.zero_point:
                zero_points = _rows(
                    export, given, weight.found, perm, node, len(summed), zero_point=True
                )
                zero_points = export.add("Cast", [zero_points], node, to=export.element_type(INT32))
                columns = matrix.astype(np.int32).sum(0, dtype=np.int32)
                columns = export.writer.constant(columns, f"{node.scope}/column_sums")
                shift = export.add("Mul", [zero_points, columns], node)
                name = export.add("Sub", [name, shift], node)
            rows = _rows(export, given, weight.found, perm, node, len(summed))
            name = _scaled(export, node, name, rows, weight)
        if weight.flip is not None:
            signs = export.writer.constant(flat(weight.flip), "signs")
            name = export.add("Mul", [name, signs], node)
        if vector is not None:
            # ONNX Runtime draws an Add back into a Gemm, and then rounds it; not a Sub.
            op, sign = ("Sub", -1) if weight.coarse else ("Add", 1)
            stored = export.writer.constant(sign * vector.astype(np.float32), f"{node.scope}/bias")
            name = export.add(op, [name, stored], node)
    shape = export.shape(node)
    if shape != (*lead, channels):
        name = export.add("Reshape", [name, export.writer.shape_constant(shape)], node)
    return Tensor(name, shape, tuple(range(len(shape))))


def _dynamic_product(export: Export, product: Product) -> Tensor:
    """Writes a product of two activations as MatMul over [batch axes, rows, columns]."""
    node = product.node
    if node.op != "dot_general":
        raise unsupported(node, "its kernel is computed from the input")
    contracted, batch = node.params["dimension_numbers"]
    operands, free = [], []
    for side in (0, 1):
        x = export.writer.ordered(export.tensors[node.inputs[side]], node.scope)
        rows = [a for a in range(len(x.shape)) if a not in (*contracted[side], *batch[side])]
        if len(rows) != 1 or len(contracted[side]) != 1:
            raise unsupported(node, "a product of two activations with several rows of axes")
        operands.append(x)
        free.append(rows)

    def arrangement(side: int, left: bool) -> tuple[int, ...]:
        inner = (*free[side], *contracted[side]) if left else (*contracted[side], *free[side])
        return (*batch[side], *inner)

    # y = a b or, with its last two axes swapped, b' a': whichever moves fewer operands.
    orders = ((0, 1), (1, 0))
    moved = [
        sum(operands[side].perm != arrangement(side, side == left) for side in (0, 1))
        for left, _ in orders
    ]
    left, right = orders[moved[1] < moved[0]]
    names = [
        export.writer.arranged(operands[side], arrangement(side, side == left), node.scope).name
        for side in (left, right)
    ]
    shape = export.shape(node)
    perm = list(range(len(shape)))
    if left == 1:
        perm[-2:] = perm[:-3:-1]
    return Tensor(export.add("MatMul", names, node), shape, tuple(perm))
