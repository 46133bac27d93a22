"""Operations of a traced net that move, repeat or pick numbers, in ONNX.

`MOVES` maps a primitive's name to a function `(export, node, *tensors or arrays) -> Tensor`, or a
tuple of them for a primitive with several results.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node


def _transpose(export: Export, node: Node, x: Tensor) -> Tensor:
    # The model's axes change their numbers; the tensor stays where it is.
    moves = node.params["permutation"]
    numbers = [moves.index(a) for a in range(len(moves))]
    return x.renumbered(x.name, export.shape(node), numbers)


def _squeeze(export: Export, node: Node, x: Tensor) -> Tensor:
    return _dropped(export, node, x, [a % len(x.shape) for a in node.params["dimensions"]])


def _dropped(export: Export, node: Node, x: Tensor, axes: list[int]) -> Tensor:
    """Removes axes of size 1."""
    if not axes:
        return x
    at = sorted(x.perm.index(a) for a in axes)
    name = export.add("Squeeze", [x.name, export.writer.shape_constant(at, "axes")], node)
    return x.without(name, axes)


def _reshape(export: Export, node: Node, x: Tensor) -> Tensor:
    if node.params["dimensions"] is not None:
        raise unsupported(node, "it reorders axes while it reshapes")
    shape = export.shape(node)
    if x.shape == shape:
        return x
    ones = [a for a, n in enumerate(x.shape) if n == 1]
    if tuple(n for n in x.shape if n != 1) == shape:
        return _dropped(export, node, x, ones)
    # Both first axes may print as -1 and yet be (batch * T) and batch: the graph's sizes decide.
    sizes = [export.graph.shape(v)[:1] for v in (node.inputs[0], node.outputs[0])]
    first = x.perm and x.perm[0] == 0 and x.shape[0] == shape[0] == -1 and sizes[0] == sizes[1]
    if first and len(shape) == 2 and x.order is None:
        index = np.arange(math.prod(x.shape[1:])).reshape(x.shape[1:])
        index = index.transpose([a - 1 for a in x.perm[1:]]).reshape(-1)
        order = None if np.array_equal(index, np.arange(index.size)) else (1, index)
        return Tensor(export.add("Flatten", [x.name], node, axis=1), shape, (0, 1), order)
    x = export.writer.plain(x, node.scope)
    if sum(n == -1 for n in shape) > 1:
        raise unsupported(node, f"the batch is in several axes of {shape}")
    name = export.add("Reshape", [x.name, export.writer.shape_constant(shape)], node)
    return Tensor(name, shape, tuple(range(len(shape))))


def _broadcast(export: Export, node: Node, x: Tensor) -> Tensor:
    shape, axes = export.shape(node), node.params["broadcast_dimensions"]
    new = [a for a in range(len(shape)) if a not in axes]
    perm = [axes[a] for a in x.perm]
    order = None if x.order is None else (axes[x.order[0]], x.order[1])
    name, old = x.name, dict(zip(axes, x.shape, strict=True))
    if new:
        # A new axis goes behind its left neighbour, wherever that one stands.
        for axis in new:
            perm.insert(perm.index(axis - 1) + 1 if axis else 0, axis)
        at = sorted(perm.index(a) for a in new)
        name = export.add("Unsqueeze", [name, export.writer.shape_constant(at, "axes")], node)
    repeats = [shape[a] if old.get(a, 1) != shape[a] else 1 for a in perm]
    if any(n != 1 for n in repeats):
        sizes = export.graph.shape(node.outputs[0])
        repeats = [sizes[a] if n != 1 else 1 for a, n in zip(perm, repeats, strict=True)]
        repeated = export.run_time_shape(repeats, node.scope)
        name = export.add("Expand", [name, repeated], node)
    return Tensor(name, shape, tuple(perm), order)


def _slice(export: Export, node: Node, x: Tensor) -> Tensor:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    x = export.writer.ordered(x, node.scope)
    rows = []
    for at, axis in enumerate(x.perm):
        whole = limits[axis] == export.graph.shape(node.inputs[0])[axis]
        if starts[axis] or strides[axis] != 1 or not whole:
            end = np.iinfo(np.int64).max if whole else limits[axis]
            rows.append((starts[axis], end, at, strides[axis]))
    return dataclasses.replace(_sliced(export, node, x, rows), shape=export.shape(node))


def _sliced(export: Export, node: Node, x: Tensor, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Cuts a tensor by rows of (start, end, ONNX axis) or (start, end, ONNX axis, stride)."""
    if not rows:
        return x
    columns = [export.writer.shape_constant(c, "slice") for c in zip(*rows, strict=True)]
    return export.add_like(x, "Slice", [x.name, *columns], node)


def _split(export: Export, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    x, axis = export.writer.ordered(x, node.scope), node.params["axis"]
    if x.shape[axis] == -1:
        raise unsupported(node, "it cuts the batch")
    ends = [0, *itertools.accumulate(node.params["sizes"])]
    parts = []
    for value, (start, end) in zip(node.outputs, itertools.pairwise(ends), strict=True):
        part = _sliced(export, node, x, [(start, end, x.perm.index(axis))])
        parts.append(dataclasses.replace(part, shape=export.values.shape(value)))
    return tuple(parts)


def _rev(export: Export, node: Node, x: Tensor) -> Tensor:
    x, axes = export.writer.ordered(x, node.scope), node.params["dimensions"]
    if any(x.shape[a] == -1 for a in axes):
        raise unsupported(node, "it reverses the batch")
    # From the last entry down; the end lies beyond the first.
    rows = [(-1, np.iinfo(np.int64).min, x.perm.index(a), -1) for a in axes]
    return _sliced(export, node, x, rows)


def _pad(export: Export, node: Node, x: Tensor, value: Any) -> Tensor:
    config = node.params["padding_config"]
    if isinstance(value, Tensor) or any(inner for _, _, inner in config):
        raise unsupported(node, "interior padding, or a padding value that is computed")
    x = export.writer.ordered(x, node.scope)
    pads = [config[a][end] for end in (0, 1) for a in x.perm]
    inputs = [x.name, export.writer.shape_constant(pads, "pads")]
    inputs.append(export.writer.constant(value, "pad_value"))
    return export.add_result(x, "Pad", inputs, node)


def _concatenate(export: Export, node: Node, *parts: Any) -> Tensor:
    first = next(p for p in parts if isinstance(p, Tensor))
    names = []
    for value, part in zip(node.inputs, parts, strict=True):
        if not isinstance(part, Tensor):
            part = export.tensor(value)
        part = export.writer.ordered(part, node.scope)
        names.append(export.writer.arranged(part, first.perm, node.scope).name)
    axis = first.perm.index(node.params["dimension"])
    name = export.add("Concat", names, node, axis=axis)
    return Tensor(name, export.shape(node), first.perm)


MOVES: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
