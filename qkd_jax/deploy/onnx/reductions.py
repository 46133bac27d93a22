"""Reductions and pools of a traced net in ONNX; a sum that is divided by its terms is a mean.

`REDUCTIONS` maps a primitive's name to a function `(export, node, *tensors or arrays) -> Tensor`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.ordering import of_truths
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node, execute


def _reduce(op: str) -> Callable[..., Tensor]:
    def write(export: Export, node: Node, x: Tensor) -> Tensor:
        if export.graph.dtype(node.inputs[0]) == np.bool_:
            return of_truths(f"Reduce{op}")(export, node, x)
        axes = tuple(node.params["axes"])
        if x.order is not None and x.order[0] not in axes:
            x = export.writer.ordered(x, node.scope)
        kind = "Mean" if op == "Sum" and _absorbs_mean(export, node, x, axes) else op
        return x.without(_reduced(export, node, x, axes, kind), axes)

    return write


def _reduced(export: Export, node: Node, x: Tensor, axes: tuple[int, ...], kind: str) -> str:
    at = sorted(x.perm.index(a) for a in axes)
    # Of a map: the mean over the features of tokens has its own kernel.
    if kind == "Mean" and len(x.shape) > 3 and at == list(range(2, len(x.shape))):
        name = export.add("GlobalAveragePool", [x.name], node)
    else:
        name = export.add_reduced(f"Reduce{kind}", x.name, at, node)
    # Engines let grids pass a Squeeze, so that a pool too runs on codes; not a Flatten.
    return export.add("Squeeze", [name, export.writer.shape_constant(at, "axes")], node)


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
            return export.add_result(x, "MaxPool", [x.name], node, **attributes)
        attributes["count_include_pad"] = _absorbs_average(export, node, window)
        out = export.add_result(x, "AveragePool", [x.name], node, **attributes)
        if node.outputs[0] in export.absorbed.values():
            return out
        size = export.writer.constant(np.float32(math.prod(window)), "window")
        return export.add_like(out, "Mul", [out.name, size], node)  # the model wants a sum

    return write


def _absorbs_mean(export: Export, node: Node, x: Tensor, axes: tuple[int, ...]) -> bool:
    """Absorbs the division of a sum by its number of terms; returns whether there is one."""
    terms = int(np.prod([x.shape[a] for a in axes]))
    return terms > 0 and _absorbs_division(export, node, lambda a: a.ndim == 0 and a == terms)


def _absorbs_average(export: Export, node: Node, window: tuple[int, ...]) -> int:
    """Absorbs the division behind a sum over windows; returns count_include_pad."""
    if _absorbs_division(export, node, lambda a: a.ndim == 0 and a == np.prod(window)):
        return 1
    shape = export.values.shape(node.inputs[0])
    ones = jnp.asarray(np.ones([1 if n == -1 else n for n in shape], np.float32))
    counts = np.asarray(execute(node, [ones], export.graph.batch, 1)[0])
    same = _absorbs_division(
        export, node, lambda a: a.ndim == counts.ndim and bool(np.all(a - counts == 0))
    )
    return 0 if same else 1


def _absorbs_division(export: Export, node: Node, accepts: Callable[[np.ndarray], bool]) -> bool:
    (out,), values = node.outputs, export.values
    reader = export.graph.sole_consumer(out)
    if reader is None or reader.op != "div" or reader.inputs[0] != out:
        return False
    if reader.inputs[1] in values.dynamic or not accepts(values.fixed(reader.inputs[1])):
        return False
    export.absorbed[reader] = out
    return True


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "reduce_max": _reduce("Max"),
    "reduce_min": _reduce("Min"),
    "reduce_sum": _reduce("Sum"),
    "reduce_window_max": _pool("Max"),
    "reduce_window_sum": _pool("Average"),
}
