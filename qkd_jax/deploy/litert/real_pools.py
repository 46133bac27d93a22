"""Reductions and pools of a traced net in LiteRT; a sum divided by its terms is a mean.

`REDUCTIONS` maps a primitive's name to a function `(lowering, node) -> FileTensor`.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.litert.flat_file import FileTensor
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.deploy.litert.real_moves import LOWEST, padded
from qkd_jax.graph import LAYOUT, Node, execute


def _reduce(op: str) -> Callable[[Lowering, Node], FileTensor]:
    def write(lowering: Lowering, node: Node) -> FileTensor:
        x, axes = lowering.tensors[node.inputs[0]], tuple(node.params["axes"])
        if lowering.graph.dtype(node.inputs[0]) != np.float32:
            raise unsupported(node, f"of type {lowering.graph.dtype(node.inputs[0]).name}")
        if any(x.shape[a] < 0 for a in axes):
            raise unsupported(node, "it reduces the batch")
        terms = math.prod(x.shape[a] for a in axes)
        mean = op == "SUM" and absorbs_division(
            lowering, node, lambda a: a.size == 1 and float(a.reshape(())) == terms
        )
        at = lowering.integers(axes, "axes")
        return lowering.add_result("MEAN" if mean else op, [x, at], node, keepDims=False)

    return write


def absorbs_division(lowering: Lowering, node: Node, accepts: Callable[[np.ndarray], bool]) -> bool:
    """Absorbs the division behind a sum if it accepts the divisor; returns whether it did."""
    (out,), values = node.outputs, lowering.values
    reader = lowering.graph.sole_consumer(out)
    if reader is not None and reader.op in LAYOUT | {"broadcast_in_dim"}:
        (kept,) = reader.outputs  # with the axes that the sum took away
        if math.prod(lowering.graph.shape(kept)) == math.prod(lowering.graph.shape(out)):
            out, reader = kept, lowering.graph.sole_consumer(kept)
    if reader is None or reader.op != "div" or reader.inputs[0] != out:
        return False
    if reader.inputs[1] in values.dynamic or not accepts(values.fixed(reader.inputs[1])):
        return False
    lowering.absorbed[reader] = out
    return True


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """Returns what LiteRT pads an axis with under SAME: the odd one behind."""
    total = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def padding_name(
    sizes: Sequence[int],
    windows: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[Sequence[int]],
) -> str:
    """Returns LiteRT's word for a padding, or "" where it has none."""
    if not any(sum(pair) for pair in pads):
        return "VALID"
    rows = zip(sizes, windows, strides, pads, strict=True)
    return "SAME" if all(same_padding(n, w, s) == tuple(p) for n, w, s, p in rows) else ""


def _pool(lowering: Lowering, node: Node) -> FileTensor:
    params, rank = node.params, len(lowering.graph.shape(node.inputs[0]))
    largest = node.op == "reduce_window_max"
    window, strides = params["window_dimensions"], params["window_strides"]
    pads = [tuple(pair) for pair in params["padding"]]
    if any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
        raise unsupported(node, "it is dilated")
    spatial = range(1, rank - 1)
    outer = (0, rank - 1)
    moved = any(window[a] != 1 or strides[a] != 1 or sum(pads[a]) for a in outer)
    if moved or not 3 <= rank <= 4 or any(n < 0 for pair in pads for n in pair):
        raise unsupported(node, "a pool of other axes than [batch, height, width, channels] has")
    x = lowering.tensors[node.inputs[0]]
    axes = [*spatial]
    if rank == 3:  # [batch, 1, width, channels]
        x = lowering.reshaped(x, (x.shape[0], 1, *x.shape[1:]), node)
    at = lambda seq, one: [one, *(seq[a] for a in axes)][-2:]
    windows, steps, both = at(window, 1), at(strides, 1), at(pads, (0, 0))
    name = padding_name(x.sizes[1:3], windows, steps, both)
    size, divided = math.prod(window), False
    counted = not largest and not _counts(lowering, node)
    if counted:
        divided = absorbs_division(lowering, node, lambda a: a.size == 1 and a.reshape(()) == size)
        name = "" if name == "SAME" else name  # that kernel leaves the padding out of its count
    if not name and not largest and not counted:
        raise unsupported(node, f"padding {both} left out of the count is not LiteRT's SAME")
    if not name:
        x = padded(lowering, node, x, [(0, 0), *both, (0, 0)], LOWEST if largest else 0.0)
        name = "VALID"
    out = lowering.dims(node.outputs[0])
    out = (out[0], 1, *out[1:]) if rank == 3 else out
    op = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
    options = dict(strideH=steps[0], strideW=steps[1])
    options |= dict(filterHeight=windows[0], filterWidth=windows[1])
    y = lowering.add(op, [x], out, node, padding=name, **options)
    if counted and not divided:  # the model wants a sum
        y = lowering.add("MUL", [y, lowering.number(size, "window")], out, node)
    return lowering.reshaped(y, lowering.dims(node.outputs[0]), node)


def _counts(lowering: Lowering, node: Node) -> bool:
    """Absorbs a division by the number of terms that are no padding; returns whether it is one."""
    shape = [n if n > 0 else -n for n in lowering.dims(node.inputs[0])]
    ones = jnp.ones(shape, jnp.float32)
    counts = np.asarray(execute(node, [ones], lowering.graph.batch, 1)[0])
    if (counts == counts.flat[0]).all():
        return False
    return absorbs_division(
        lowering, node, lambda a: a.ndim == counts.ndim and bool(np.all(a - counts == 0))
    )


def _argument(op: str) -> Callable[[Lowering, Node], FileTensor]:
    def write(lowering: Lowering, node: Node) -> FileTensor:
        x, (axis,) = lowering.tensors[node.inputs[0]], node.params["axes"]
        at = lowering.constant(np.int32(axis), "axis")
        kind = lowering.dtype(node.outputs[0], node)
        return lowering.add_result(op, [x, at], node, outputType=kind)

    return write


REDUCTIONS: dict[str, Callable[[Lowering, Node], FileTensor]] = {
    "argmax": _argument("ARG_MAX"),
    "argmin": _argument("ARG_MIN"),
    "reduce_max": _reduce("REDUCE_MAX"),
    "reduce_min": _reduce("REDUCE_MIN"),
    "reduce_sum": _reduce("SUM"),
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
}
