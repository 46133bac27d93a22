"""Operations of a traced net that take or replace entries by their indices, in ONNX.

`INDEXING` maps a primitive's name to a function `(export, node, *tensors or arrays) -> Tensor`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.stored_weight import laid_out, table_marker, write_stored
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node


def _gather(export: Export, node: Node, x: Any, index: Any) -> Tensor:
    """Gathers entries along one axis: rows of a table (nn.Embed), or pixels of a nearest resize.

    Rows beyond a table are NaN in the net; what engines make of them is not defined.
    """
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    shape = export.graph.shape(node.inputs[0])
    index_shape = export.graph.shape(node.inputs[1])[:-1]
    axis = numbers.collapsed_slice_dims[0] if len(numbers.collapsed_slice_dims) == 1 else -1
    rank = len(shape) - 1 + len(index_shape)
    behind = tuple(a for a in range(rank) if not axis <= a < axis + len(index_shape))
    if (
        axis < 0
        or numbers.start_index_map != (axis,)
        or numbers.offset_dims != behind
        or numbers.operand_batching_dims
        or any(n != m for a, (n, m) in enumerate(zip(sizes, shape, strict=True)) if a != axis)
    ):
        return _gather_nd(export, node)
    writer = export.writer
    if isinstance(index, Tensor):
        index = writer.plain(index, node.scope)
        last = writer.shape_constant([len(index_shape)], "axes")
        indices = _within(export, node, index.name, [shape[axis]])
        indices = export.add("Squeeze", [indices, last], node)
    else:
        index = np.asarray(index)[..., 0]
        if index.min(initial=0) < 0 or index.max(initial=0) >= shape[axis]:
            raise unsupported(node, "it takes entries beyond the axis")
        indices = writer.constant(index.astype(np.int64), "places")
    if isinstance(x, Tensor):
        x = writer.plain(x, node.scope)
        if x.shape[axis] == -1:
            raise unsupported(node, "it takes entries of the batch")
        name = x.name
    else:
        name = _table(export, node, np.asarray(x))
    name, out = export.add("Gather", [name, indices], node, axis=axis), export.shape(node)
    return Tensor(name, out, tuple(range(len(out))))


def _table(export: Export, node: Node, table: np.ndarray) -> str:
    """Writes a table that is looked up: as codes where it is on a grid."""
    marker = table_marker(export.graph, node)
    if marker in export.stored_tensors:
        stored = laid_out(export.stored_tensors[marker], np.arange(table.size).reshape(table.shape))
        return write_stored(export, node, stored, marker.params["path"])
    return export.writer.constant(table, f"{node.scope}/table" if node.scope else "table")


def _within(export: Export, node: Node, indices: str, sizes: Sequence[int]) -> str:
    """Clips indices [..., axes] to the sizes of their axes, if the net does."""
    if node.params["mode"] != GatherScatterMode.CLIP:
        return indices
    writer, dtype = export.writer, export.graph.dtype(node.inputs[1])
    last = export.run_time_shape(sizes, node.scope)
    last = export.add("Sub", [last, writer.shape_constant([1], "one")], node)
    indices = export.add("Min", [indices, export.cast(last, dtype, node)], node)
    return export.add("Max", [indices, writer.constant(np.zeros((), dtype), "zero")], node)


def _gather_nd(export: Export, node: Node) -> Tensor:
    """Gathers by indices of several axes, or of one for each entry of others.

    GatherND reads [shared axes, indexed axes, other axes] by [shared axes, ..., indexed axes] and
    writes [shared axes, ..., other axes]. A window along an axis (a slice that starts elsewhere in
    each example) is the indices of its entries.
    """
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    shape, starts = export.graph.shape(node.inputs[0]), tuple(numbers.start_index_map)
    whole = [sizes[a] == shape[a] and a not in numbers.collapsed_slice_dims for a in starts]
    clips = node.params["mode"] == GatherScatterMode.CLIP  # so that a whole axis starts at 0
    used = [i for i, all_of_it in enumerate(whole) if not (all_of_it and clips)]
    indexed, shared = tuple(starts[i] for i in used), tuple(numbers.operand_batching_dims)
    others = tuple(a for a in range(len(shape)) if a not in (*shared, *indexed))
    windows = [a for a in indexed if a not in numbers.collapsed_slice_dims]
    if (
        not indexed
        or not set(numbers.collapsed_slice_dims) <= set(indexed)
        or (windows and len(indexed) > 1)
        or any(sizes[a] != shape[a] for a in others)
    ):
        raise unsupported(node, "it takes windows, and no whole entries of axes")
    writer = export.writer
    x, index = (writer.plain(export.tensor(v), node.scope) for v in node.inputs)
    x = writer.arranged(x, (*shared, *indexed, *others), node.scope)
    rank = len(index.shape) - 1
    first = tuple(numbers.start_indices_batching_dims)
    rest = [a for a in range(rank) if a not in first]
    index = writer.arranged(index, (*first, *rest, rank), node.scope)
    name = index.name
    if len(used) < len(starts):
        chosen = writer.constant(np.asarray(used, np.int64), "places")
        name = export.add("Gather", [name, chosen], node, axis=rank)
    reach = [shape[a] - sizes[a] + 1 for a in indexed]
    indices = export.cast(_within(export, node, name, reach), np.int64, node)
    if windows:  # [..., 1] to [..., entries, 1]
        at = writer.shape_constant([rank], "axes")
        steps = writer.constant(np.arange(sizes[windows[0]], dtype=np.int64)[:, None], "window")
        indices = export.add("Add", [export.add("Unsqueeze", [indices, at], node), steps], node)
    attributes = {"batch_dims": len(shared)} if shared else {}
    name = export.add("GatherND", [x.name, indices], node, **attributes)
    out = export.shape(node)
    # The axes of the indices stand, in their order, where those of the operand do not.
    places = [a for a in range(len(out)) if a not in numbers.offset_dims]
    kept = [a for a in range(len(shape)) if a not in (*shared, *numbers.collapsed_slice_dims)]
    offsets = dict(zip(kept, numbers.offset_dims, strict=True))
    perm = [places[a] for a in (*first, *rest)] + [offsets[a] for a in (*windows, *others)]
    return Tensor(name, out, tuple(map(int, perm)))


def _starts(export: Export, node: Node, values: Sequence[int], at: Sequence[int]) -> str:
    """Returns the starts of windows along some axes, int64, moved so that the windows fit."""
    operand, window = (export.graph.shape(v) for v in _window_values(node))
    pieces = []
    for value, axis in zip(values, at, strict=True):
        name = export.cast(export.tensor(value).name, np.int64, node)
        bounds = [
            export.writer.constant(np.int64(n), "start") for n in (0, operand[axis] - window[axis])
        ]
        name = export.add("Clip", [name, *bounds], node)
        pieces.append(
            export.add("Unsqueeze", [name, export.writer.shape_constant([0], "axes")], node)
        )
    return pieces[0] if len(pieces) == 1 else export.add("Concat", pieces, node, axis=0)


def _window_values(node: Node) -> tuple[int, int]:
    """Returns the values that have the shapes of the operand and of the window."""
    return node.inputs[0], node.inputs[1] if node.op == "dynamic_update_slice" else node.outputs[0]


def _cut_axes(export: Export, node: Node) -> list[int]:
    operand, window = (export.values.shape(v) for v in _window_values(node))
    axes = [a for a, (n, m) in enumerate(zip(operand, window, strict=True)) if n != m]
    if any(operand[a] == -1 or window[a] == -1 for a in axes):
        raise unsupported(node, "it cuts the batch")
    return axes


def _dynamic_slice(export: Export, node: Node, *operands: Any) -> Tensor:
    x, axes = (
        export.writer.ordered(export.tensor(node.inputs[0]), node.scope),
        _cut_axes(export, node),
    )
    if not axes:
        return x
    writer, window = export.writer, export.graph.shape(node.outputs[0])
    starts = _starts(export, node, [node.inputs[1 + a] for a in axes], axes)
    ends = export.add("Add", [starts, writer.shape_constant([window[a] for a in axes])], node)
    at = writer.shape_constant([x.perm.index(a) for a in axes], "axes")
    return export.add_result(x, "Slice", [x.name, starts, ends, at], node)


def _dynamic_update_slice(export: Export, node: Node, *operands: Any) -> Tensor:
    x, axes = (
        export.writer.ordered(export.tensor(node.inputs[0]), node.scope),
        _cut_axes(export, node),
    )
    update = export.writer.ordered(export.tensor(node.inputs[1]), node.scope)
    update = export.writer.arranged(update, x.perm, node.scope)
    size = export.graph.shape(node.inputs[1])
    starts = [_starts(export, node, [node.inputs[2 + a]], [a]) for a in axes]
    name = _updated(
        export, node, x, x.name, update.name, list(zip(axes, starts, strict=True)), size
    )
    return Tensor(name, export.shape(node), x.perm)


def _updated(
    export: Export,
    node: Node,
    x: Tensor,
    name: str,
    update: str,
    starts: list[tuple[int, str]],
    size: Sequence[int],
) -> str:
    """Joins what lies before, in and behind a window along its first axis, axis by axis."""
    if not starts:
        return update
    (axis, start), *rest = starts
    writer = export.writer
    at = writer.shape_constant([x.perm.index(axis)], "axes")
    end = export.add("Add", [start, writer.shape_constant([size[axis]])], node)
    first, last = writer.shape_constant([0]), writer.shape_constant([np.iinfo(np.int64).max])
    before, inside, behind = (
        export.add("Slice", [name, *ends, at], node)
        for ends in ((first, start), (start, end), (end, last))
    )
    inside = _updated(export, node, x, inside, update, rest, size)
    return export.add("Concat", [before, inside, behind], node, axis=x.perm.index(axis))


def _iota(export: Export, node: Node) -> Tensor:
    """Numbers the examples; other axes are constants."""
    params, sizes = node.params, export.graph.shape(node.outputs[0])
    axis, writer = params["dimension"], export.writer
    count = export.run_time_shape([sizes[axis]], node.scope)
    ends = writer.constant(np.int64(0), "zero"), writer.constant(np.int64(1), "one")
    limit = export.add("Squeeze", [count, writer.shape_constant([0], "axes")], node)
    name = export.add("Range", [ends[0], limit, ends[1]], node)
    name = export.cast(name, params["dtype"], node)
    new = [a for a in range(len(sizes)) if a != axis]
    if new:
        name = export.add("Unsqueeze", [name, writer.shape_constant(new, "axes")], node)
        name = export.add("Expand", [name, export.run_time_shape(sizes, node.scope)], node)
    return Tensor(name, export.shape(node), tuple(range(len(sizes))))


INDEXING: dict[str, Callable[..., Tensor]] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
}
