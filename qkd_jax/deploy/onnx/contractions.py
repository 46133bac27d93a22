"""Convolutions and matrix products in ONNX, with the biases and BatchNorm constants fused in."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.onnx.constant_operand import ConstantOperand, constant_operand
from qkd_jax.deploy.onnx.context import DynamicRange, Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.quantize.traced import TracedContraction


def write_product(export: Export, product: TracedContraction) -> Tensor:
    """Writes a contraction, its bias, and constants per channel that follow it."""
    node = product.node
    # What is repeated along the batch is no matrix, though no input reaches it.
    fixed = [o.value in export.graph.constants for o in product.operands]
    if node.op == "conv_general_dilated" and fixed != [False, True]:
        raise unsupported(node, "its kernel is not a constant")
    if not any(fixed):
        return _dynamic_operands(export, product)
    side = fixed.index(True)
    if node.op == "dot_general" and not product.operands[side].quantized:
        (summed, _), (batch, _) = node.params["dimension_numbers"]
        kept = [len(_free_axes(product, i)) for i in (0, 1)]
        if batch and [len(summed), *kept] != [1, 1, 1]:
            return _dynamic_operands(export, product)
    channels = [i for i in range(product.rank) if i in product.operands[side].output_axes]
    weight = constant_operand(export, product, side)
    bias = _bias(export, product, channels)
    if bias is not None and not weight.takes(bias):
        weight = dataclasses.replace(weight, bias_outside=True)
    if node.op == "conv_general_dilated":
        out = _conv(export, product, weight, bias)
    elif node.params["dimension_numbers"][1][0]:
        out = _members(export, product, side, weight, bias)
    else:
        out = _matmul(export, product, side, weight, bias)
    return _affine(export, node, out)


def _bias(export: Export, product: TracedContraction, channels: list[int]) -> np.ndarray | None:
    """Sums the constants per channel that are added to the product, and absorbs the additions."""
    total, value = None, product.node.outputs[0]
    shape = export.graph.shape(value)
    for node, _, constant in export.values.constant_readers(value):
        if node.op != "add" or export.graph.shape(node.outputs[0]) != shape:
            break
        whole = constant.reshape((1,) * (product.rank - constant.ndim) + constant.shape)
        if any(n != 1 for axis, n in enumerate(whole.shape) if axis not in channels):
            break
        total = whole if total is None else total + whole
        export.absorbed[node] = product.node.outputs[0]
    return total


def _affine(export: Export, node: Node, out: Tensor) -> Tensor:
    """Folds a run of sums and products with constants into one Mul and one Add."""
    gain, shift = np.float64(1), np.float64(0)
    last, run = node.outputs[0], []
    while (reader := export.graph.sole_consumer(last)) in export.absorbed:
        assert reader is not None
        last = reader.outputs[0]
    for reader, left, c in export.values.constant_readers(last):
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
        out = export.add_like(out, op, [out.name, name], run[0])
    return out


def _conv(
    export: Export, product: TracedContraction, weight: ConstantOperand, bias: np.ndarray | None
) -> Tensor:
    node, params = product.node, product.node.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise unsupported(node, "it groups the batch")
    x = export.writer.ordered(weight.other_input(export, node.inputs[0]), node.scope)
    x = export.writer.arranged(x, numbers.lhs_spec, node.scope)
    kernel = weight.array.transpose(numbers.rhs_spec)
    out = Tensor("", export.shape(node), numbers.out_spec)
    stretched = any(d != 1 for d in params["lhs_dilation"])
    attributes: dict[str, Any] = {
        "kernel_shape": list(kernel.shape[2:]),
        "group": groups,
        "dilations": list(params["rhs_dilation"]),
    }
    if stretched:
        attributes |= _transposed_attributes(node, kernel.shape[2:])
        in_array = (weight.zero_point,) if weight.late else (weight.scale, weight.zero_point)
        if groups > 1 and any(a is not None and a.size > 1 for a in in_array):
            raise unsupported(node, "groups with a grid per channel, transposed")
        kernel = _transposed(kernel, groups)
    else:
        if any(n < 0 for pair in params["padding"] for n in pair):
            raise unsupported(node, f"negative padding {params['padding']}")
        attributes["strides"] = list(params["window_strides"])
        attributes["pads"] = [pair[i] for i in (0, 1) for pair in params["padding"]]
    inputs = [x.name, weight.add_input(export, node, kernel, 1 if stretched else 0)]
    op = "ConvTranspose" if stretched else "ConvInteger" if weight.on_codes else "Conv"
    fused = bias is not None and not weight.bias_outside
    if fused:
        channels = kernel.shape[1] if stretched else len(kernel)
        vector = np.broadcast_to(bias.reshape(-1), (channels,)).astype(np.float32)
        inputs.append(export.writer.constant(vector, f"{node.scope}/bias"))
    dynamic = weight.dynamic
    if dynamic is not None and weight.on_codes:
        inputs.append(_zero_point(export, dynamic, dynamic.zero_point, node))
    name = export.add(op, inputs, node, **attributes)
    if weight.late:
        assert weight.scale is not None
        rows = ""
        if dynamic is not None:
            rows = _rows(export, dynamic.scale, dynamic, node.inputs[0], numbers.lhs_spec, node)
        name = weight.scaled(export, node, name, rows, export.writer.like(weight.scale, out))
    if weight.flip is not None:
        signs = export.writer.constant(export.writer.like(weight.flip, out), "signs")
        name = export.add("Mul", [name, signs], node)
    if bias is not None and not fused:
        added = export.writer.constant(export.writer.like(bias, out), f"{node.scope}/bias")
        name = export.add("Add", [name, added], node)
    if weight.fenced:
        name = export.fenced(name, node)
    return dataclasses.replace(out, name=name)


def _zero_point(export: Export, range: DynamicRange, own: str, node: Node) -> str:
    """Writes the zero point of codes as they are held: the shift of signed ones, plus their own."""
    if not own:
        return export.writer.constant(np.uint8(range.offset), "offset")
    if range.offset:
        offset = export.writer.constant(np.float32(range.offset), "offset")
        own = export.add("Add", [own, offset], node)
    return export.cast(own, np.uint8, node)


def _transposed_attributes(node: Node, sizes: Sequence[int]) -> dict[str, list[int]]:
    """Strides and padding of a stretched convolution, as those of a ConvTranspose."""
    params, strides = node.params, list(node.params["lhs_dilation"])
    reach = [(k - 1) * d for k, d in zip(sizes, params["rhs_dilation"], strict=True)]
    starts, ends = (
        [r - pair[i] for r, pair in zip(reach, params["padding"], strict=True)] for i in (0, 1)
    )
    output_padding = [max(-e, 0) for e in ends]
    fits = all(p < s for p, s in zip(output_padding, strides, strict=True))
    if min(starts) < 0 or any(s != 1 for s in params["window_strides"]) or not fits:
        raise unsupported(node, f"padding {params['padding']} of a transposed convolution")
    pads = [*starts, *(max(e, 0) for e in ends)]
    return {"strides": strides, "pads": pads, "output_padding": output_padding}


def _transposed(kernel: np.ndarray, groups: int) -> np.ndarray:
    """[out, in/groups, ...] of a stretched convolution to [in, out/groups, ...], flipped."""
    outputs, inputs, *sizes = kernel.shape
    split = kernel.reshape(groups, outputs // groups, inputs, *sizes)
    joined = split.swapaxes(1, 2).reshape(groups * inputs, outputs // groups, *sizes)
    return np.flip(joined, tuple(range(2, joined.ndim)))


def _rows(
    export: Export,
    name: str,
    dynamic: DynamicRange,
    value: int,
    perm: Sequence[int],
    node: Node,
    summed: int = 1,
) -> str:
    """Scales or zero points of a value in an order of its axes, the last `summed` ones as one."""
    if not dynamic.axes:
        return name
    tensor = dataclasses.replace(export.tensors[value], name=name)
    name = export.writer.arranged(tensor, perm, node.scope).name
    if summed == 1:
        return name
    last = list(range(len(perm) - summed + 1, len(perm)))
    return export.add("Squeeze", [name, export.writer.shape_constant(last, "axes")], node)


def _free_axes(product: TracedContraction, side: int) -> list[int]:
    """Returns the axes of an operand of a `dot_general` that it alone gives to the output."""
    contracted, batch = product.node.params["dimension_numbers"]
    taken = (*contracted[side], *batch[side])
    return [a for a in range(len(product.operands[side].shape)) if a not in taken]


def _per_column(
    product: TracedContraction, side: int, axes: Sequence[int], array: np.ndarray | None
) -> Any:
    """Lays out an array of the output's rank as a constant operand's axes, joined into one."""
    if array is None or array.size == 1:
        return array
    operand = product.operands[side]
    own = [out for a in axes if (out := operand.output_axes[a]) is not None]
    others = tuple(a for a in range(array.ndim) if a not in own)  # of size 1
    moved = np.squeeze(array, others).transpose([sorted(own).index(out) for out in own])
    return np.broadcast_to(moved, [operand.shape[a] for a in axes]).reshape(-1)


def _matmul(
    export: Export,
    product: TracedContraction,
    side: int,
    weight: ConstantOperand,
    bias: np.ndarray | None,
) -> Tensor:
    """Writes a product with a constant matrix: Gemm for [batch, features], else MatMul."""
    node = product.node
    contracted, _ = node.params["dimension_numbers"]
    x = weight.other_input(export, node.inputs[1 - side])
    summed, w_summed = contracted[1 - side], contracted[side]
    x_free, w_free = (_free_axes(product, i) for i in (1 - side, side))
    w_shape = tuple(weight.array.shape[a] for a in w_free)
    channels = math.prod(w_shape)
    matrix = weight.array.transpose([*w_summed, *w_free]).reshape(-1, channels)
    in_groups = weight.stored is not None and weight.stored.group is not None
    if x.order is not None and (x.order[0],) == tuple(summed) and not in_groups:
        matrix, x = matrix[x.order[1]], dataclasses.replace(x, order=None)
    x = export.writer.ordered(x, node.scope)
    x = export.writer.arranged(x, (*x_free, *summed), node.scope)
    lead = [x.shape[a] for a in x_free]
    name = x.name
    if len(summed) != 1:
        shape = export.writer.shape_constant([*lead, len(matrix)])
        name = export.add("Reshape", [name, shape], node)

    flat = functools.partial(_per_column, product, side, w_free)
    weight = dataclasses.replace(
        weight, scale=flat(weight.scale), zero_point=flat(weight.zero_point)
    )
    matrix = np.ascontiguousarray(matrix)
    vector = None if bias is None else np.broadcast_to(np.ravel(flat(bias)), (channels,))
    packed = weight.packed_product(export, node, name, matrix, vector)
    inputs = [] if packed else [name, weight.add_input(export, node, matrix, 1)]
    if packed:
        name = packed
    elif len(lead) == 1 and vector is not None and not weight.bias_outside:
        stored = export.writer.constant(vector.astype(np.float32), f"{node.scope}/bias")
        name = export.add("Gemm", [*inputs, stored], node)
    else:
        if weight.on_codes:
            assert weight.dynamic is not None
            inputs.append(_zero_point(export, weight.dynamic, "", node))  # those of rows later
        name = export.add("MatMulInteger" if weight.on_codes else "MatMul", inputs, node)
        if weight.late:
            assert weight.scale is not None
            row_scales = ""
            if weight.dynamic is not None:
                dynamic, value, perm = weight.dynamic, node.inputs[1 - side], (*x_free, *summed)
                rows = lambda name: _rows(export, name, dynamic, value, perm, node, len(summed))
                row_scales = rows(dynamic.scale)
                if dynamic.zero_point:
                    zero_points = export.cast(rows(dynamic.zero_point), np.int32, node)
                    columns = matrix.astype(np.int32).sum(0, dtype=np.int32)
                    columns = export.writer.constant(columns, f"{node.scope}/column_sums")
                    shift = export.add("Mul", [zero_points, columns], node)
                    name = export.add("Sub", [name, shift], node)
            name = weight.scaled(export, node, name, row_scales, weight.scale)
        if weight.flip is not None:
            signs = export.writer.constant(flat(weight.flip), "signs")
            name = export.add("Mul", [name, signs], node)
        if vector is not None:
            # ONNX Runtime fuses an Add back into a Gemm, and then rounds it; not a Sub.
            op, sign = ("Sub", -1) if weight.bias_outside else ("Add", 1)
            stored = export.writer.constant(sign * vector.astype(np.float32), f"{node.scope}/bias")
            name = export.add(op, [name, stored], node)
    if weight.fenced:
        name = export.fenced(name, node)
    if len(w_shape) != 1:
        shape = export.writer.shape_constant([*lead, *w_shape])
        name = export.add("Reshape", [name, shape], node)
    # The columns come last, and first in the model where the constant stands on the left.
    rank = len(lead) + len(w_shape)
    first = 0 if side else len(w_shape)
    perm = tuple((first + a) % rank for a in range(rank))
    return Tensor(name, export.shape(node), perm)


def _members(
    export: Export,
    product: TracedContraction,
    side: int,
    weight: ConstantOperand,
    bias: np.ndarray | None,
) -> Tensor:
    """Writes a product with a matrix for each member (of nn.vmap, of experts) as one MatMul.

    DequantizeLinear has scales along one axis: the members' columns lie side by side until then.
    """
    node, writer = product.node, export.writer
    contracted, batch = node.params["dimension_numbers"]
    x = writer.ordered(weight.other_input(export, node.inputs[1 - side]), node.scope)
    free = [_free_axes(product, i) for i in (1 - side, side)]
    if weight.dynamic is not None or [len(contracted[side]), *map(len, free)] != [1, 1, 1]:
        raise unsupported(
            node,
            "its constant has a matrix for each member, and its input dynamic ranges or rows "
            "of several axes",
        )
    shape = export.shape(node)
    own = [*batch[side], *free[1]]
    columns = weight.array.transpose(*contracted[side], *own)
    rank = len(batch[0])
    flat = functools.partial(_per_column, product, side, own)
    laid = dataclasses.replace(weight, scale=flat(weight.scale), zero_point=flat(weight.zero_point))
    stored = laid.add_input(export, node, columns.reshape(len(columns), -1), 1)
    stored = export.add("Reshape", [stored, writer.shape_constant(columns.shape)], node)
    perm = [*range(1, rank + 1), 0, rank + 1]
    stored = export.add("Transpose", [stored], node, perm=perm)
    x = writer.arranged(x, (*batch[1 - side], *free[0], *contracted[1 - side]), node.scope)
    name = export.add("MatMul", [x.name, stored], node)
    order = [*range(rank), *((rank, rank + 1) if side else (rank + 1, rank))]
    out = Tensor(name, shape, tuple(order))
    if weight.late:
        assert weight.scale is not None
        scale = writer.like(weight.scale, out)
        out = dataclasses.replace(out, name=weight.scaled(export, node, name, "", scale))
    for op, array in (("Mul", weight.flip), ("Add", bias)):
        if array is not None:
            constant = writer.constant(writer.like(array, out), f"{node.scope}/{op.lower()}")
            out = export.add_like(out, op, [out.name, constant], node)
    return dataclasses.replace(out, name=export.fenced(out.name, node)) if weight.fenced else out


def _dynamic_operands(export: Export, product: TracedContraction) -> Tensor:
    """Writes a product of two activations as MatMul over [batch axes, rows, columns]."""
    node = product.node
    if node.op != "dot_general":
        raise unsupported(node, "its kernel is computed from the input")
    contracted, batch = node.params["dimension_numbers"]
    free = [_free_axes(product, side) for side in (0, 1)]
    operands = [
        export.writer.ordered(export.tensor(value), node.scope) for value in node.inputs[:2]
    ]
    if any(len(axes) != 1 for axes in (*free, contracted[0])):
        return _flattened(export, node, operands, free)

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


def _flattened(
    export: Export, node: Node, operands: Sequence[Tensor], free: Sequence[Sequence[int]]
) -> Tensor:
    """Writes a product whose rows, columns or sums are several axes, or none, as a MatMul."""
    contracted, batch = node.params["dimension_numbers"]

    def size(axes: Sequence[int], shape: Sequence[int]) -> int:
        sizes = [shape[a] for a in axes]
        if sizes.count(-1) > 1:
            raise unsupported(node, "the batch is in several of its axes")
        return -1 if -1 in sizes else math.prod(sizes)

    names = []
    for side, x in enumerate(operands):
        inner = (free[0], contracted[0]) if side == 0 else (contracted[1], free[1])
        arranged = export.writer.arranged(x, (*batch[side], *inner[0], *inner[1]), node.scope)
        sizes = [size(axes, x.shape) for axes in inner]
        # A size of 0 copies the operand's own.
        shape = export.writer.shape_constant([0] * len(batch[side]) + sizes)
        names.append(export.add("Reshape", [arranged.name, shape], node))
    out, kept = export.shape(node), len(batch[0])
    if out[kept:].count(-1) > 1 or size(contracted[0], operands[0].shape) == -1:
        raise unsupported(node, "the batch is in several of its axes, or in its sum")
    shape = export.writer.shape_constant([0] * kept + list(out[kept:]))
    name = export.add("Reshape", [export.add("MatMul", names, node), shape], node)
    return Tensor(name, out, tuple(range(len(out))))
