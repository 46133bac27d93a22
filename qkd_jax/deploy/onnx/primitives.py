"""How each operation of a traced net is written in ONNX.

`OPERATIONS` maps a primitive's name to a function `(export, node, *tensors or arrays) -> Tensor`,
or a tuple of them for a primitive with several results; add an operation as one entry.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from qkd_jax.deploy.onnx.context import Export, unsupported
from qkd_jax.deploy.onnx.patterns import GELU_OPSET, Pattern
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node

__all__ = ["OPERATIONS", "write_pattern"]

UNARY = {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "not": "Not",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
BINARY = {
    "add": "Add",
    "and": "And",
    "div": "Div",
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "or": "Or",
    "pow": "Pow",
    "sub": "Sub",
}


def _unary(op: str) -> Callable[..., Tensor]:
    return lambda export, node, x: export.same(x, export.add(op, [x.name], node))


def _binary(op: str) -> Callable[..., Tensor]:
    def write(export: Export, node: Node, x: Any, y: Any) -> Tensor:
        if op == "Max" and isinstance(x, Tensor) and not isinstance(y, Tensor) and _is(y, 0):
            return export.same(x, export.add("Relu", [x.name], node))
        if op == "Max" and isinstance(y, Tensor) and not isinstance(x, Tensor) and _is(x, 0):
            return export.same(y, export.add("Relu", [y.name], node))
        (x, y), tensor = export.aligned(node, x, y)
        return export.result(node, export.add(op, [x, y], node), tensor)

    return write


def _is(array: np.ndarray, number: float) -> bool:
    return array.ndim == 0 and array == number


def _same(export: Export, node: Node, x: Tensor) -> Tensor:
    return x


def _rsqrt(export: Export, node: Node, x: Tensor) -> Tensor:
    root = export.add("Sqrt", [x.name], node)
    return export.same(x, export.add("Reciprocal", [root], node))


def _not_equal(export: Export, node: Node, x: Any, y: Any) -> Tensor:
    equal = _binary("Equal")(export, node, x, y)
    return export.same(equal, export.add("Not", [equal.name], node))


def _square(export: Export, node: Node, x: Tensor) -> Tensor:
    return export.same(x, export.add("Mul", [x.name, x.name], node))


def _integer_pow(export: Export, node: Node, x: Tensor) -> Tensor:
    power = export.writer.constant(np.float32(node.params["y"]), "power")
    return export.same(x, export.add("Pow", [x.name, power], node))


def _erfc(export: Export, node: Node, x: Tensor) -> Tensor:
    one = export.writer.constant(np.float32(1), "one")
    return export.same(x, export.add("Sub", [one, export.add("Erf", [x.name], node)], node))


def _log1p(export: Export, node: Node, x: Tensor) -> Tensor:
    one = export.writer.constant(np.float32(1), "one")
    return export.same(x, export.add("Log", [export.add("Add", [x.name, one], node)], node))


def _expm1(export: Export, node: Node, x: Tensor) -> Tensor:
    one = export.writer.constant(np.float32(1), "one")
    return export.same(x, export.add("Sub", [export.add("Exp", [x.name], node), one], node))


def _convert(export: Export, node: Node, x: Tensor) -> Tensor:
    before, after = export.graph.dtype(node.inputs[0]), np.dtype(node.params["new_dtype"])
    if before == after:
        return x
    return export.same(x, export.add("Cast", [x.name], node, to=export.element_type(after)))


def _clamp(export: Export, node: Node, low: Any, x: Tensor, high: Any) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low.ndim or high.ndim:
        raise unsupported(node, "its bounds are not two numbers")
    bounds = [export.writer.constant(b, "bound") for b in (low, high)]
    return export.same(x, export.add("Clip", [x.name, *bounds], node))


def _select(export: Export, node: Node, which: Any, *cases: Any) -> Tensor:
    if len(cases) != 2:
        raise unsupported(node, f"it chooses among {len(cases)} cases")
    (which, no, yes), tensor = export.aligned(node, which, *cases)
    return export.result(node, export.add("Where", [which, yes, no], node), tensor)


def _transpose(export: Export, node: Node, x: Tensor) -> Tensor:
    # The model's axes change their numbers; the tensor stays where it is.
    moves = node.params["permutation"]
    perm = tuple(moves.index(axis) for axis in x.perm)
    order = None if x.order is None else (moves.index(x.order[0]), x.order[1])
    return Tensor(x.name, export.shape(node), perm, order)


def _squeeze(export: Export, node: Node, x: Tensor) -> Tensor:
    axes = [a % len(x.shape) for a in node.params["dimensions"]]
    return _dropped(export, node, x, axes)


def _dropped(export: Export, node: Node, x: Tensor, axes: list[int]) -> Tensor:
    """Removes axes of size 1."""
    if not axes:
        return x
    where = sorted(x.perm.index(a) for a in axes)
    name = export.add("Squeeze", [x.name, export.writer.shape_constant(where, "axes")], node)
    kept = [a for a in range(len(x.shape)) if a not in axes]
    perm = tuple(kept.index(a) for a in x.perm if a in kept)
    order = None if x.order is None else (kept.index(x.order[0]), x.order[1])
    return Tensor(name, tuple(x.shape[a] for a in kept), perm, order)


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
        where = sorted(perm.index(a) for a in new)
        name = export.add("Unsqueeze", [name, export.writer.shape_constant(where, "axes")], node)
    wanted = [shape[a] if old.get(a, 1) != shape[a] else 1 for a in perm]
    if any(n != 1 for n in wanted):
        if -1 in wanted:
            raise unsupported(node, "it repeats a tensor along the batch")
        name = export.add("Expand", [name, export.writer.shape_constant(wanted)], node)
    return Tensor(name, shape, tuple(perm), order)


def _slice(export: Export, node: Node, x: Tensor) -> Tensor:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    x = export.writer.ordered(x, node.scope)
    rows = []
    for place, axis in enumerate(x.perm):
        whole = limits[axis] == export.graph.shape(node.inputs[0])[axis]
        if starts[axis] or strides[axis] != 1 or not whole:
            if x.shape[axis] == -1 and not whole:
                raise unsupported(node, "it cuts the batch")
            end = np.iinfo(np.int64).max if whole else limits[axis]
            rows.append((starts[axis], end, place, strides[axis]))
    if not rows:
        return x
    columns = [export.writer.shape_constant(c, "slice") for c in zip(*rows, strict=True)]
    return export.result(node, export.add("Slice", [x.name, *columns], node), x)


def _split(export: Export, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    x, axis = export.writer.ordered(x, node.scope), node.params["axis"]
    if x.shape[axis] == -1:
        raise unsupported(node, "it cuts the batch")
    ends = [0, *itertools.accumulate(node.params["sizes"])]
    parts = []
    for value, row in zip(node.outputs, itertools.pairwise(ends), strict=True):
        columns = (*row, x.perm.index(axis))
        inputs = [x.name, *(export.writer.shape_constant([n], "slice") for n in columns)]
        name = export.add("Slice", inputs, node)
        parts.append(dataclasses.replace(x, name=name, shape=export.sizes(value)))
    return tuple(parts)


def _rev(export: Export, node: Node, x: Tensor) -> Tensor:
    x, axes = export.writer.ordered(x, node.scope), node.params["dimensions"]
    if any(x.shape[a] == -1 for a in axes):
        raise unsupported(node, "it turns the batch round")
    if not axes:
        return x
    # From the last entry down; the end lies beyond the first.
    rows = [(-1, np.iinfo(np.int64).min, x.perm.index(a), -1) for a in axes]
    columns = [export.writer.shape_constant(c, "slice") for c in zip(*rows, strict=True)]
    return export.same(x, export.add("Slice", [x.name, *columns], node))


def _gather(export: Export, node: Node, x: Any, index: Any) -> Tensor:
    """Entries along one axis: rows of a table (nn.Embed), or the places of a nearest resize.

    Rows beyond a table are NaN in the net; what engines make of them is their own affair.
    """
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    shape = export.graph.shape(node.inputs[0])
    where = export.graph.shape(node.inputs[1])[:-1]
    axis = numbers.collapsed_slice_dims[0] if len(numbers.collapsed_slice_dims) == 1 else -1
    rank = len(shape) - 1 + len(where)
    behind = tuple(a for a in range(rank) if not axis <= a < axis + len(where))
    if (
        axis < 0
        or numbers.start_index_map != (axis,)
        or numbers.offset_dims != behind
        or numbers.operand_batching_dims
        or any(n != m for a, (n, m) in enumerate(zip(sizes, shape, strict=True)) if a != axis)
    ):
        raise unsupported(node, "it takes more than entries of one axis")
    writer = export.writer
    if isinstance(index, Tensor):
        if node.params["mode"] == GatherScatterMode.CLIP:
            raise unsupported(node, "it clips places that are known at run time only")
        index = writer.plain(index, node.scope)
        last = writer.shape_constant([len(where)], "axes")
        places = export.add("Squeeze", [index.name, last], node)
    else:
        index = np.asarray(index)[..., 0]
        if index.min(initial=0) < 0 or index.max(initial=0) >= shape[axis]:
            raise unsupported(node, "it takes entries beyond the axis")
        places = writer.constant(index.astype(np.int64), "places")
    if isinstance(x, Tensor):
        x = writer.plain(x, node.scope)
        if x.shape[axis] == -1:
            raise unsupported(node, "it takes entries of the batch")
        name = x.name
    else:
        name = writer.constant(x, f"{node.scope}/table" if node.scope else "table")
    out = export.shape(node)
    return Tensor(
        export.add("Gather", [name, places], node, axis=axis), out, tuple(range(len(out)))
    )


def _pad(export: Export, node: Node, x: Tensor, value: Any) -> Tensor:
    config = node.params["padding_config"]
    if isinstance(value, Tensor) or any(inner for _, _, inner in config):
        raise unsupported(node, "interior padding, or a padding value that is computed")
    x = export.writer.ordered(x, node.scope)
    pads = [config[a][0] for a in x.perm] + [config[a][1] for a in x.perm]
    inputs = [x.name, export.writer.shape_constant(pads, "pads")]
    inputs.append(export.writer.constant(value, "pad_value"))
    return export.result(node, export.add("Pad", inputs, node), x)


def _concatenate(export: Export, node: Node, *parts: Any) -> Tensor:
    first = next(p for p in parts if isinstance(p, Tensor))
    names = []
    for part in parts:
        if isinstance(part, Tensor):
            part = export.writer.ordered(part, node.scope)
            names.append(export.writer.arranged(part, first.perm, node.scope).name)
        else:
            names.append(_repeated(export, node, np.asarray(part), first))
    axis = first.perm.index(node.params["dimension"])
    name = export.add("Concat", names, node, axis=axis)
    return Tensor(name, export.shape(node), first.perm)


def _repeated(export: Export, node: Node, part: np.ndarray, beside: Tensor) -> str:
    """A constant in the order of another tensor, repeated along the batch of that tensor."""
    name = export.writer.constant(part.transpose(beside.perm), "part")
    batch = [a for a, n in enumerate(beside.shape) if n == -1]
    if batch != [0]:
        if batch:
            raise unsupported(node, "a constant part of it, beside a batch that is not in front")
        return name
    # Its shape at run time: the other tensor's batch, then the constant's own sizes.
    writer, place = export.writer, beside.perm.index(0)
    # Shape has had bounds of its own since opset 15 only.
    sizes = export.add("Shape", [beside.name], node)
    sizes = export.add("Gather", [sizes, writer.shape_constant([place])], node)
    own = [part.shape[a] for a in beside.perm]
    pieces = [own[:place], sizes, own[place + 1 :]]
    shape = [p if isinstance(p, str) else writer.shape_constant(p) for p in pieces if len(p)]
    return export.add("Expand", [name, export.add("Concat", shape, node, axis=0)], node)


def write_pattern(export: Export, pattern: Pattern) -> Tensor:
    """Writes a part of the graph that ONNX has one operation for."""
    node = export.graph.producer(pattern.y)
    assert node is not None
    x = export.tensors[pattern.x]
    if pattern.op == "Gelu":
        return dataclasses.replace(x, name=_gelu(export, node, x.name, **pattern.attributes))
    x = export.writer.ordered(x, node.scope)
    if pattern.op == "Softmax":
        axis = x.perm.index(pattern.axis)
        return export.same(x, export.add("Softmax", [x.name], node, axis=axis))
    if x.perm[-1] != len(x.perm) - 1:
        x = export.writer.plain(x, node.scope)
    grid = (pattern.scale, pattern.bias)
    names = [export.writer.constant(a, f"{node.scope}/norm") for a in grid]
    attributes = {"axis": -1, **pattern.attributes}
    return export.same(x, export.add(pattern.op, [x.name, *names], node, **attributes))


def _gelu(export: Export, node: Node, x: str, *, tanh: bool) -> str:
    """One node since opset 20; before that, for erf, the five that engines fuse into one."""
    if export.writer.opset >= GELU_OPSET:
        return export.add("Gelu", [x], node, approximate="tanh" if tanh else "none")

    def number(value: float) -> str:
        return export.writer.constant(np.float32(value), "number")

    if tanh:
        cube = export.add("Mul", [export.add("Mul", [x, x], node), x], node)
        inner = export.add("Add", [x, export.add("Mul", [cube, number(0.044715)], node)], node)
        inner = export.add("Mul", [inner, number(math.sqrt(2 / math.pi))], node)
        curve = export.add("Tanh", [inner], node)
    else:
        curve = export.add("Erf", [export.add("Div", [x, number(math.sqrt(2))], node)], node)
    twice = export.add("Mul", [x, export.add("Add", [curve, number(1)], node)], node)
    return export.add("Mul", [twice, number(0.5)], node)


def _reduce(op: str) -> Callable[..., Tensor]:
    def write(export: Export, node: Node, x: Tensor) -> Tensor:
        axes = tuple(node.params["axes"])
        if x.order is not None and x.order[0] not in axes:
            x = export.writer.ordered(x, node.scope)
        kind = "Mean" if op == "Sum" and export.takes_mean(node, x, axes) else op
        name = _reduced(export, node, x, axes, kind)
        kept = [a for a in range(len(x.shape)) if a not in axes]
        perm = tuple(kept.index(a) for a in x.perm if a in kept)
        return Tensor(name, tuple(x.shape[a] for a in kept), perm)

    return write


def _reduced(export: Export, node: Node, x: Tensor, axes: tuple[int, ...], kind: str) -> str:
    where = sorted(x.perm.index(a) for a in axes)
    # Of a map: the mean over the features of tokens has its own kernel.
    if kind == "Mean" and len(x.shape) > 3 and where == list(range(2, len(x.shape))):
        # Engines let grids pass a Squeeze, so that the pool too runs on codes; not a Flatten.
        pooled = export.add("GlobalAveragePool", [x.name], node)
        return export.add("Squeeze", [pooled, export.writer.shape_constant(where, "axes")], node)
    # The axes are an input of ReduceSum since opset 13 and of its siblings since 18.
    if export.writer.opset >= 18 or kind == "Sum":
        inputs = [x.name, export.writer.shape_constant(where, "axes")]
        return export.add(f"Reduce{kind}", inputs, node, keepdims=0)
    return export.add(f"Reduce{kind}", [x.name], node, axes=where, keepdims=0)


def _pool(op: str) -> Callable[..., Tensor]:
    def write(export: Export, node: Node, x: Tensor, *start: Any) -> Tensor:
        params, rank = node.params, len(x.shape)
        window, strides = params["window_dimensions"], params["window_strides"]
        if any(d != 1 for d in params["base_dilation"]):
            raise unsupported(node, "its input is dilated")
        pooled = [a for a in range(rank) if window[a] != 1 or strides[a] != 1]
        outer = [a for a in range(rank) if a not in pooled]
        if x.shape[0] != -1 or 0 in pooled or any(params["padding"][a] != (0, 0) for a in outer):
            raise unsupported(node, "it pools over the batch")
        x = export.writer.ordered(x, node.scope)
        if set(x.perm[2:]) != set(pooled):
            # Any axis that is not pooled may be the channel axis, if there is just one.
            spatial = [a for a in range(1, rank) if a != x.perm[1]]
            if x.perm[0] != 0 or not set(pooled) <= set(spatial):
                spatial = [a for a in range(1, rank - 1)]
                x = export.writer.arranged(x, (0, rank - 1, *spatial), node.scope)
        if x.perm[0] != 0 or not set(pooled) <= set(x.perm[2:]):
            raise unsupported(node, f"it pools over axes {pooled} of {rank}")
        axes = x.perm[2:]
        attributes: dict[str, Any] = {
            "kernel_shape": [window[a] for a in axes],
            "strides": [strides[a] for a in axes],
            "pads": [params["padding"][a][i] for i in (0, 1) for a in axes],
        }
        if any(d != 1 for d in params["window_dilation"]):
            if op == "Average" and export.writer.opset < 19:
                raise unsupported(node, "a dilated average pool needs opset=19 or above")
            attributes["dilations"] = [params["window_dilation"][a] for a in axes]
        if op == "Max":
            return export.result(node, export.add("MaxPool", [x.name], node, **attributes), x)
        attributes["count_include_pad"] = export.takes_average(node, window)
        name = export.add("AveragePool", [x.name], node, **attributes)
        if not export.averaged(node):  # a sum is what the model wants
            size = export.writer.constant(np.float32(math.prod(window)), "window")
            name = export.add("Mul", [name, size], node)
        return export.result(node, name, x)

    return write


OPERATIONS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    **{name: _unary(op) for name, op in UNARY.items()},
    **{name: _binary(op) for name, op in BINARY.items()},
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "copy": _same,
    "erfc": _erfc,
    "expm1": _expm1,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "log1p": _log1p,
    "ne": _not_equal,
    "optimization_barrier": _same,
    "pad": _pad,
    "reduce_max": _reduce("Max"),
    "reduce_min": _reduce("Min"),
    "reduce_sum": _reduce("Sum"),
    "reduce_window_max": _pool("Max"),
    "reduce_window_sum": _pool("Average"),
    "reshape": _reshape,
    "rev": _rev,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _squeeze,
    "stop_gradient": _same,
    "transpose": _transpose,
}
