"""Operations of a traced net that move, repeat or pick numbers, in LiteRT.

`MOVES` maps a primitive's name to a function `(lowering, node) -> FileTensor`, or a tuple of them
for a primitive with several results.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.litert.flat_file import FileTensor
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.deploy.litert.real_elementwise import BINARY
from qkd_jax.graph import Node

LOWEST = float(np.finfo(np.float32).min)  # what a pool of maxima pads with


def _transpose(lowering: Lowering, node: Node) -> FileTensor:
    x = lowering.tensors[node.inputs[0]]
    return lowering.transposed(x, node.params["permutation"], node)


def _reshape(lowering: Lowering, node: Node) -> FileTensor:
    if node.op == "reshape" and node.params.get("dimensions") is not None:
        raise unsupported(node, "it reorders axes while it reshapes")
    x = lowering.tensors[node.inputs[0]]
    return lowering.reshaped(x, lowering.dims(node.outputs[0]), node)


def _broadcast(lowering: Lowering, node: Node) -> FileTensor:
    """Gives a tensor new axes, and repeats it unless its readers do that by themselves."""
    x, out = lowering.tensors[node.inputs[0]], node.outputs[0]
    dims, axes = lowering.dims(out), node.params["broadcast_dimensions"]
    ones = [1] * len(dims)
    for axis, n in zip(axes, x.shape, strict=True):
        ones[axis] = n
    x = lowering.reshaped(x, ones, node)
    if _readers_repeat(lowering, node):
        return x
    return lowering.broadcast(x, dims, node)


def _readers_repeat(lowering: Lowering, node: Node) -> bool:
    """Whether all readers are elementwise, and read beside it what has the whole shape."""
    graph, out = lowering.graph, node.outputs[0]
    if out in graph.outputs:
        return False

    def whole(value: int) -> bool:
        producer = graph.producer(value)
        repeats = producer is not None and producer.op == "broadcast_in_dim"
        dynamic = value in lowering.values.dynamic
        return dynamic and not repeats and graph.shape(value) == graph.shape(out)

    return all(
        reader.op in BINARY and any(whole(v) for v in reader.inputs if v != out)
        for reader in graph.consumers(out)
    )


def _slice(lowering: Lowering, node: Node) -> FileTensor:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    x = lowering.tensors[node.inputs[0]]
    return cut(lowering, node, x, starts, limits, strides, node.outputs[0])


def cut(
    lowering: Lowering,
    node: Node,
    x: FileTensor,
    starts: Sequence[int],
    limits: Sequence[int],
    strides: Sequence[int],
    out: int,
) -> FileTensor:
    """Cuts a window out of a tensor; the batch must stay whole."""
    dims, mask = lowering.dims(out), 0
    sizes = lowering.graph.shape(node.inputs[0])
    ends = list(limits)
    for axis, n in enumerate(sizes):
        if limits[axis] == n:
            mask |= 1 << axis
            ends[axis] = x.sizes[axis]
        if x.shape[axis] < 0 and (starts[axis] or strides[axis] != 1 or limits[axis] != n):
            raise unsupported(node, "it cuts the batch")
    columns = [lowering.integers(c, "slice") for c in (starts, ends, strides)]
    return lowering.add(
        "STRIDED_SLICE", [x, *columns], dims, node, dtype=x.dtype, grid=x.grid, endMask=mask
    )


def _split(lowering: Lowering, node: Node) -> tuple[FileTensor, ...]:
    x, axis = lowering.tensors[node.inputs[0]], node.params["axis"]
    if x.shape[axis] < 0:
        raise unsupported(node, "it cuts the batch")
    shape, parts = lowering.graph.shape(node.inputs[0]), []
    ends = [0, *itertools.accumulate(node.params["sizes"])]
    for value, (start, end) in zip(node.outputs, itertools.pairwise(ends), strict=True):
        starts = [start if a == axis else 0 for a in range(len(shape))]
        limits = [end if a == axis else n for a, n in enumerate(shape)]
        parts.append(cut(lowering, node, x, starts, limits, [1] * len(shape), value))
    return tuple(parts)


def _rev(lowering: Lowering, node: Node) -> FileTensor:
    x = lowering.tensors[node.inputs[0]]
    for axis in node.params["dimensions"]:
        if x.shape[axis] < 0:
            raise unsupported(node, "it reverses the batch")
        at = lowering.integers([axis], "axis")
        x = lowering.add("REVERSE_V2", [x, at], x.shape, node, dtype=x.dtype, grid=x.grid)
    return x


def _pad(lowering: Lowering, node: Node) -> FileTensor:
    config, value = node.params["padding_config"], node.inputs[1]
    if value in lowering.values.dynamic or any(n[2] or min(n[:2]) < 0 for n in config):
        raise unsupported(node, "interior or negative padding, or a padding value that is computed")
    x = lowering.tensors[node.inputs[0]]
    if any(n < 0 and tuple(p[:2]) != (0, 0) for n, p in zip(x.shape, config, strict=True)):
        raise unsupported(node, "it pads the batch")
    number = float(np.asarray(lowering.values.fixed(value)).reshape(()))
    return padded(lowering, node, x, [pair[:2] for pair in config], number)


def padded(
    lowering: Lowering, node: Node, x: FileTensor, pads: Sequence[Sequence[int]], value: float
) -> FileTensor:
    """Pads a tensor with a number, (before, after) for each axis."""
    if not any(sum(pair) for pair in pads):
        return x
    dims = tuple(n if n < 0 else n + sum(pair) for n, pair in zip(x.shape, pads, strict=True))
    stored = lowering.constant(np.asarray(pads, np.int32), "pads")
    if value == 0:
        return lowering.add("PAD", [x, stored], dims, node, dtype=x.dtype)
    number = lowering.constant(np.asarray(value, x.dtype), "pad_value")
    return lowering.add(
        "PADV2",
        [x, stored, number],
        dims,
        node,
        dtype=x.dtype,
        lowest=value <= LOWEST and node.op != "pad",
    )


def _concatenate(lowering: Lowering, node: Node) -> FileTensor:
    axis = node.params["dimension"]
    if lowering.dims(node.outputs[0])[axis] < 0:
        raise unsupported(node, "it joins batches")
    parts = [lowering.whole_operand(v, node) for v in node.inputs]
    return lowering.add_result("CONCATENATION", parts, node, axis=axis)


def _gather(lowering: Lowering, node: Node) -> FileTensor:
    """Takes whole rows of a constant table by number, as an embedding does."""
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    table, index = node.inputs
    shape, rank = lowering.graph.shape(table), len(lowering.graph.shape(index))
    rows = (
        tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(sizes) == (1, *shape[1:])
        and tuple(numbers.offset_dims) == tuple(range(rank - 1, rank - 2 + len(shape)))
    )
    if not rows or index not in lowering.values.dynamic:
        raise unsupported(node, "it takes windows, and no whole rows of a table")
    indices = lowering.tensors[index]
    indices = lowering.reshaped(indices, indices.shape[:-1], node)
    stored = lowering.whole_operand(table, node)
    if str(node.params["mode"]).endswith("CLIP"):
        for op, bound in (("MAXIMUM", 0), ("MINIMUM", shape[0] - 1)):
            end = lowering.constant(np.asarray(bound, indices.dtype), "bound")
            indices = lowering.add(op, [indices, end], indices.shape, node, dtype=indices.dtype)
    return lowering.add_result("GATHER", [stored, indices], node, axis=0)


MOVES: dict[str, Callable[[Lowering, Node], FileTensor | tuple[FileTensor, ...]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "transpose": _transpose,
}
