"""Operations of a traced net that compare or accumulate numbers along an axis, in ONNX.

`ORDERING` maps a primitive's name to a function `(export, node, *tensors or arrays) -> Tensor`, or
a tuple of them for a primitive with several results.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node


def _arg(op: str) -> Callable[..., Tensor]:
    def write(export: Export, node: Node, x: Tensor) -> Tensor:
        (axis,) = node.params["axes"]
        x = export.number(export.writer.ordered(x, node.scope), node.inputs[0], node)
        # Of equal numbers both take the first.
        name = export.add(op, [x.name], node, axis=x.perm.index(axis), keepdims=1)
        at = export.writer.shape_constant([x.perm.index(axis)], "axes")
        name = export.cast(name, node.params["index_dtype"], node)
        return x.without(export.add("Squeeze", [name, at], node), [axis])

    return write


def of_truths(op: str) -> Callable[..., Tensor]:
    """Writes a reduction of truths by the operation that does the same to 0 and 1."""

    def write(export: Export, node: Node, x: Tensor) -> Tensor:
        x, axes = export.writer.ordered(x, node.scope), list(node.params["axes"])
        at = sorted(x.perm.index(a) for a in axes)
        name = export.cast(x.name, np.float32, node)
        name = export.add_reduced(op, name, at, node)
        name = export.add("Squeeze", [name, export.writer.shape_constant(at, "axes")], node)
        return x.without(export.cast(name, np.bool_, node), axes)

    return write


def _sort(export: Export, node: Node, *operands: Any) -> tuple[Tensor, ...]:
    """Sorts by the first operand; the others move along.

    Equal keys keep their order, as ONNX says of TopK; OpenVINO 2026.4.1 does not keep it
    (findings/openvino_topk_ties.sh).
    """
    axis, writer = node.params["dimension"], export.writer
    if node.params["num_keys"] != 1:
        raise unsupported(node, "it sorts by several keys")
    keys, *others = (writer.plain(export.tensor(v), node.scope) for v in node.inputs)
    count = export.run_time_shape([export.graph.shape(node.inputs[0])[axis]], node.scope)
    values, places = _top(export, node, keys, count, axis, largest=0)
    moved = (
        dataclasses.replace(
            o, name=export.add("GatherElements", [o.name, places], node, axis=o.perm.index(axis))
        )
        for o in others
    )
    return (dataclasses.replace(keys, name=values), *moved)


def _top_k(export: Export, node: Node, x: Tensor) -> tuple[Tensor, Tensor]:
    axis = node.params.get("axis", len(x.shape) - 1) % len(x.shape)
    x = export.writer.ordered(x, node.scope)
    count = export.writer.shape_constant([node.params["k"]], "count")
    values, places = _top(export, node, x, count, axis, largest=1)
    shapes = [export.values.shape(v) for v in node.outputs]
    places = export.cast(places, export.graph.dtype(node.outputs[1]), node)
    return (
        dataclasses.replace(x, name=values, shape=shapes[0]),
        dataclasses.replace(x, name=places, shape=shapes[1]),
    )


def _top(
    export: Export, node: Node, x: Tensor, count: str, axis: int, largest: int
) -> tuple[str, str]:
    keys = export.number(x, node.inputs[0], node)
    values, places = export.writer.add_several(
        "TopK",
        [keys.name, count],
        node.scope,
        2,
        axis=x.perm.index(axis),
        largest=largest,
        sorted=1,
    )
    if keys is not x:
        # OpenVINO 2026.4.1 does not compile a Cast to truths behind one of several results.
        zero = export.writer.constant(np.float32(0), "zero")
        values = export.add("Greater", [values, zero], node)
    return values, places


def _cumsum(export: Export, node: Node, x: Tensor) -> Tensor:
    x = export.writer.ordered(x, node.scope)
    axis = export.writer.constant(np.int64(x.perm.index(node.params["axis"])), "axis")
    return export.add_like(x, "CumSum", [x.name, axis], node, reverse=int(node.params["reverse"]))


def _cumulative(op: str, start: Callable[[np.dtype], Any]) -> Callable[..., Tensor]:
    """Combines each entry with those before it, at distances of 1, 2, 4 and so on."""

    def write(export: Export, node: Node, x: Tensor) -> Tensor:
        axis, writer = node.params["axis"], export.writer
        x = writer.ordered(x, node.scope)
        size, at = x.shape[axis], x.perm.index(axis)
        if size == -1:
            raise unsupported(node, "it accumulates along the batch")
        dtype = np.dtype(export.graph.dtype(node.inputs[0]))
        neutral = writer.constant(np.asarray(start(dtype), dtype), "neutral")
        name, distance = x.name, 1
        while distance < size:
            pads = np.zeros((2, len(x.shape)), np.int64)
            cut = (0, size - distance)
            if node.params["reverse"]:
                cut = (distance, size)
            pads[int(node.params["reverse"]), at] = distance
            rows = [writer.shape_constant([c], "slice") for c in (*cut, at)]
            moved = export.add("Slice", [name, *rows], node)
            padding = writer.constant(pads.reshape(-1), "pads")
            moved = export.add("Pad", [moved, padding, neutral], node)
            name, distance = export.add(op, [name, moved], node), 2 * distance
        return dataclasses.replace(x, name=name)

    return write


def _lowest(dtype: np.dtype) -> Any:
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype) -> Any:
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


ORDERING: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cummax": _cumulative("Max", _lowest),
    "cummin": _cumulative("Min", _highest),
    "cumprod": _cumulative("Mul", lambda dtype: 1),
    "cumsum": _cumsum,
    "reduce_and": of_truths("ReduceMin"),
    "reduce_or": of_truths("ReduceMax"),
    "sort": _sort,
    "top_k": _top_k,
}
