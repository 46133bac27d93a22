"""Convolutions and matrix products in LiteRT, with what follows them per channel folded in.

A product is written on real numbers: its weight is DEQUANTIZE of the codes, whose scale per output
channel has the BatchNorm behind the product in it. `integer_kernels` takes the codes themselves
where the input is codes too and the output has a grid.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.litert.coded_weights import Weight, weight_of
from qkd_jax.deploy.litert.flat_file import FileTensor
from qkd_jax.deploy.litert.lowering import Dims, Lowering
from qkd_jax.deploy.litert.real_moves import padded
from qkd_jax.deploy.litert.real_pools import padding_name
from qkd_jax.graph import Node
from qkd_jax.quantize.traced import TracedContraction


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """What follows a product per output channel: y = gain * product + shift.

    Attributes:
        gain: of the output's rank, or a scalar.
        shift: likewise; None where nothing is added.
        nodes: what computes it.
    """

    gain: np.ndarray
    shift: np.ndarray | None
    nodes: tuple[Node, ...]


def write_product(lowering: Lowering, product: TracedContraction) -> FileTensor:
    """Writes a contraction and the constants per channel that follow it."""
    node = product.node
    fixed = [o.value in lowering.graph.constants for o in product.operands]
    if lowering.graph.dtype(node.outputs[0]) != np.float32:
        raise unsupported(node, f"it computes in {lowering.graph.dtype(node.outputs[0]).name}")
    if node.op == "conv_general_dilated":
        if fixed != [False, True]:
            raise unsupported(node, "its kernel is not a constant")
        return _convolution(lowering, product)
    batched = bool(node.params["dimension_numbers"][1][0])
    if not any(fixed) or batched:
        return _matrices(lowering, product)
    return _dense(lowering, product, fixed.index(True))


def _affine(lowering: Lowering, product: TracedContraction, channels: Sequence[int]) -> Affine:
    """Follows sums and products with constants per channel behind a product."""
    gain, shift, nodes = np.ones((), np.float64), None, []
    value = product.node.outputs[0]
    shape = lowering.graph.shape(value)
    for node, left, constant in lowering.values.constant_readers(value):
        whole = constant.reshape((1,) * (product.rank - constant.ndim) + constant.shape)
        for axis in range(whole.ndim):  # a constant that does not vary along an axis
            if axis not in channels and whole.shape[axis] > 1:
                one = whole.take([0], axis)
                whole = one if np.array_equal(np.broadcast_to(one, whole.shape), whole) else whole
        wide = any(n != 1 for axis, n in enumerate(whole.shape) if axis not in channels)
        if wide or lowering.graph.shape(node.outputs[0]) != shape:
            break
        if node.op == "div" and (not left or not whole.all()):
            break
        c = whole.astype(np.float64)
        if node.op == "add":
            shift = c if shift is None else shift + c
        elif node.op == "sub":
            added = -c if left else c
            if not left:
                gain, shift = -gain, None if shift is None else -shift
            shift = added if shift is None else shift + added
        else:
            c = c if node.op == "mul" else 1 / c
            gain, shift = gain * c, None if shift is None else shift * c
        nodes.append(node)
    return Affine(gain, shift, tuple(nodes))


def _absorb(lowering: Lowering, product: TracedContraction, affine: Affine) -> None:
    value = product.node.outputs[0]
    lowering.absorbed.update((node, value) for node in affine.nodes)


def columns(
    product: TracedContraction, side: int, axes: Sequence[int], array: np.ndarray
) -> np.ndarray:
    """Lays out an array of the output's rank along a constant operand's axes, joined into one."""
    operand = product.operands[side]
    if array.size == 1:
        return np.full(math.prod(operand.shape[a] for a in axes), array.reshape(()))
    own = [out for a in axes if (out := operand.output_axes[a]) is not None]
    others = tuple(a for a in range(array.ndim) if a not in own)  # of size 1
    moved = np.squeeze(array, others).transpose([sorted(own).index(out) for out in own])
    return np.broadcast_to(moved, [operand.shape[a] for a in axes]).reshape(-1)


def _bias(lowering: Lowering, node: Node, vector: np.ndarray | None, count: int) -> FileTensor:
    vector = np.zeros(count) if vector is None else vector
    name = f"{node.scope}/bias" if node.scope else "bias"
    return lowering.constant(vector.astype(np.float32), name)


def _convolution(lowering: Lowering, product: TracedContraction) -> FileTensor:
    node, params = product.node, product.node.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    rank = product.rank - 2
    if params["batch_group_count"] != 1 or any(d != 1 for d in params["lhs_dilation"]):
        raise unsupported(node, "it is transposed, or groups the batch")
    if rank not in (1, 2) or any(n < 0 for pair in params["padding"] for n in pair):
        raise unsupported(node, f"{rank} spatial axes, or negative padding")
    affine = _affine(lowering, product, [numbers.out_spec[1]])
    weight = weight_of(lowering, product, 1, affine.gain)
    _absorb(lowering, product, affine)
    vector = lambda a: columns(product, 1, [numbers.rhs_spec[0]], a)
    x = lowering.tensors[node.inputs[0]]
    batch, feature, *spatial = numbers.lhs_spec
    x = lowering.transposed(x, (batch, *spatial, feature), node)
    out_axis, in_axis, *sizes = numbers.rhs_spec
    if rank == 1:
        x = lowering.reshaped(x, (x.shape[0], 1, *x.shape[1:]), node)
    alone = [1] if rank == 1 else []
    strides = [*alone, *params["window_strides"]]
    dilations = [*alone, *params["rhs_dilation"]]
    pads = [*((0, 0) for _ in alone), *params["padding"]]
    windows = [*alone, *(weight.array.shape[a] for a in sizes)]
    reach = [(k - 1) * d + 1 for k, d in zip(windows, dilations, strict=True)]
    padding = padding_name(x.sizes[1:3], reach, strides, pads)
    if not padding:
        x = padded(lowering, node, x, [(0, 0), *pads, (0, 0)], 0.0)
        padding = "VALID"
    channels, inputs = weight.array.shape[out_axis], x.shape[3]
    depthwise = groups == inputs and groups > 1
    options: dict[str, Any] = dict(padding=padding, strideH=strides[0], strideW=strides[1])
    options |= dict(dilationHFactor=dilations[0], dilationWFactor=dilations[1])
    if depthwise:
        options["depthMultiplier"] = channels // inputs

    def layout(kernel: np.ndarray) -> np.ndarray:
        """To [outputs, height, width, inputs of a group], or [1, height, width, outputs]."""
        kernel = kernel.transpose([out_axis, *sizes, in_axis])
        kernel = kernel.reshape(channels, *windows, -1)
        return kernel[..., 0].transpose(1, 2, 0)[None] if depthwise else kernel

    stored = weight.stored(lowering, node, layout, vector, axis=3 if depthwise else 0)
    bias = _bias(lowering, node, None if affine.shift is None else vector(affine.shift), channels)
    dims = lowering.dims(node.outputs[0])
    out = [dims[a] for a in (numbers.out_spec[0], *numbers.out_spec[2:])]
    whole = (out[0], *([1] if rank == 1 else []), *out[1:], channels)
    op = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    y = lowering.add(op, [x, stored, bias], whole, node, **options)
    y = lowering.reshaped(y, (*out, channels), node)
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return lowering.transposed(y, [order.index(a) for a in range(product.rank)], node)


def _free_axes(product: TracedContraction, side: int) -> list[int]:
    """Returns the axes of an operand of a `dot_general` that it alone gives to the output."""
    contracted, batch = product.node.params["dimension_numbers"]
    taken = (*contracted[side], *batch[side])
    return [a for a in range(len(product.operands[side].shape)) if a not in taken]


def _dense(lowering: Lowering, product: TracedContraction, side: int) -> FileTensor:
    """Writes a product with a constant matrix, [outputs, inputs] in the file."""
    node = product.node
    contracted, _ = node.params["dimension_numbers"]
    summed, w_summed = contracted[1 - side], contracted[side]
    x_free, w_free = (_free_axes(product, i) for i in (1 - side, side))
    outputs = [i for i in range(product.rank) if i in product.operands[side].output_axes]
    affine = _affine(lowering, product, outputs)
    weight = weight_of(lowering, product, side, affine.gain)
    _absorb(lowering, product, affine)
    x = lowering.transposed(lowering.tensors[node.inputs[1 - side]], (*x_free, *summed), node)
    lead = [x.shape[a] for a in range(len(x_free))] or [1]
    w_shape = [weight.array.shape[a] for a in w_free]
    count = math.prod(w_shape)
    layout = lambda array: array.transpose([*w_free, *w_summed]).reshape(count, -1)
    x = lowering.reshaped(x, (*lead, weight.array.size // count), node)
    vector = lambda a: columns(product, side, w_free, a)
    stored = weight.stored(lowering, node, layout, vector, axis=0)
    bias = _bias(lowering, node, None if affine.shift is None else vector(affine.shift), count)
    kept = len(lead) > 1
    y = lowering.add("FULLY_CONNECTED", [x, stored, bias], (*lead, count), node, keepNumDims=kept)
    y = lowering.reshaped(y, (*lead[: len(x_free)], *w_shape), node)
    # The columns come last, and first in the model where the constant stands on the left.
    rank, first = len(x_free) + len(w_shape), 0 if side else len(w_shape)
    order = [(first + a) % rank for a in range(rank)]
    return lowering.transposed(y, [order.index(a) for a in range(rank)], node)


def _matrices(lowering: Lowering, product: TracedContraction) -> FileTensor:
    """Writes a product of two values, or of one with a matrix for each member of a batch."""
    node = product.node
    contracted, batch = node.params["dimension_numbers"]
    gain = np.ones(())
    sides: list[FileTensor] = []
    shapes: list[tuple[Dims, Dims]] = []
    for side in (0, 1):
        free, rank = _free_axes(product, side), len(batch[side])
        middle, last = (free, contracted[side]) if side == 0 else (contracted[side], free)
        perm = (*batch[side], *middle, *last)
        if product.operands[side].value in lowering.graph.constants:
            x = _member_weight(lowering, product, side, gain, perm)
        else:
            x = lowering.transposed(lowering.tensors[node.inputs[side]], perm, node)
        lead, rows = x.shape[:rank], x.shape[rank : rank + len(middle)]
        cells = x.shape[rank + len(middle) :]
        shapes.append((lead, rows if side == 0 else cells))
        sides.append(lowering.reshaped(x, (*lead, math.prod(rows), math.prod(cells)), node))
    lead = shapes[0][0]
    dims = (*lead, math.prod(shapes[0][1]), math.prod(shapes[1][1]))
    if len(dims) > 5:
        raise unsupported(node, f"a product of {len(dims)} axes")
    y = lowering.add("BATCH_MATMUL", sides, dims, node)
    return lowering.reshaped(y, (*lead, *shapes[0][1], *shapes[1][1]), node)


def _member_weight(
    lowering: Lowering, product: TracedContraction, side: int, gain: np.ndarray, perm: Sequence[int]
) -> FileTensor:
    """Returns a matrix for each member as floats, for kernels take no scales of members."""
    weight: Weight = weight_of(lowering, product, side, gain)
    array = weight.real(product, side)
    name = f"{product.node.scope}/weight" if product.node.scope else "weight"
    return lowering.constant(array.transpose(perm), name)
