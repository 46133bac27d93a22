"""Softmax, LayerNorm and GELU found in a graph, however the model spelled them.

ONNX has each of them as one operation, and engines have one kernel for each; written out, LayerNorm
alone is a dozen passes over memory. A part of the graph between one value and another is taken for
such an operation when it computes the same numbers on random input, so no spelling needs to be
listed: variance as E[x^2] - E[x]^2 or of the centred values, GELU by erf or erfc.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qkd_jax import graph as graphs
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.graph import Node
from qkd_jax.quantize.traced import PRODUCTS

__all__ = ["GELU_OPSET", "Pattern", "find"]

NEAR = 40  # nodes that are looked at on either side of a seed
TOLERANCE = 1e-5  # of numbers of the order of 1, for a part of some ten float32 operations
# ONNX has them as one operation since.
LAYER_NORM_OPSET, GELU_OPSET = 17, 20


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """A part of a graph that is one operation.

    Attributes:
        op: ONNX's name.
        x: the value that it reads.
        y: the value that it computes.
        nodes: the nodes that it replaces.
        axis: of the model, for Softmax and LayerNormalization.
        attributes: further attributes of the ONNX node.
        scale, bias: of LayerNormalization, [features].
    """

    op: str
    x: int
    y: int
    nodes: frozenset[Node]
    axis: int = -1
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None


def find(export: Export) -> list[Pattern]:
    """Lists the parts of a net's graph that ONNX has one operation for."""
    found: list[Pattern] = []
    taken: set[Node] = set()
    for seed in export.graph.nodes:
        if seed.op in SEEDS and seed not in taken and seed.outputs[0] in export.dynamic:
            pattern = SEEDS[seed.op](export, seed)
            if pattern is not None and taken.isdisjoint(pattern.nodes):
                found.append(pattern)
                taken |= pattern.nodes
    return found


def _gelu(export: Export, seed: Node) -> Pattern | None:
    tanh = seed.op == "tanh"
    for x, y, nodes in _parts(export, seed):
        if len(nodes) < 4:
            continue
        given = _random(export, x)
        wanted = jax.nn.gelu(given, approximate=tanh)
        if _close(_run(export, nodes, x, y, given), wanted):
            return Pattern("Gelu", x, y, nodes, attributes={"tanh": tanh})
    return None


def _softmax(export: Export, seed: Node) -> Pattern | None:
    best = None  # the largest part: a shift of its input changes no softmax
    for x, y, nodes in _parts(export, seed):
        if best is not None and len(nodes) <= len(best.nodes):
            continue
        axes = {n.params["axes"] for n in nodes if n.op == "reduce_sum"}
        if len(axes) != 1 or len(axis := next(iter(axes))) != 1:
            continue
        given = 4 * _random(export, x)
        if _close(_run(export, nodes, x, y, given), jax.nn.softmax(given, axis[0])):
            best = Pattern("Softmax", x, y, nodes, axis[0])
    return best


def _layer_norm(export: Export, seed: Node) -> Pattern | None:
    if export.writer.opset < LAYER_NORM_OPSET:
        return None
    epsilon = _epsilon(export, seed)
    if epsilon is None:
        return None
    best = None
    for x, y, nodes in _parts(export, seed, reduced=True):
        last = len(export.graph.shape(x)) - 1
        axes = {n.params["axes"] for n in nodes if n.op == "reduce_sum"}
        if axes != {(last,)} or (best is not None and len(nodes) <= len(best.nodes)):
            continue
        given = 2 * _random(export, x)
        centred = given - given.mean(-1, keepdims=True, dtype=np.float64)
        normal = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
        result = _run(export, nodes, x, y, given)
        bias = _run(export, nodes, x, y, np.zeros_like(given))
        normal, result, bias = (np.reshape(a, (-1, a.shape[-1])) for a in (normal, result, bias))
        bias = bias[0]
        rows = np.abs(normal).argmax(0)
        columns = np.arange(normal.shape[1])
        scale = (result[rows, columns] - bias) / normal[rows, columns]
        scale = _exact(export, nodes, scale)
        size = max(1.0, float(np.abs(scale).max()), float(np.abs(bias).max()))
        if _close(result / size, (normal * scale + bias) / size):
            best = Pattern(
                "LayerNormalization",
                x,
                y,
                nodes,
                attributes={"epsilon": epsilon},
                scale=scale.astype(np.float32),
                bias=bias.astype(np.float32),
            )
    return best


SEEDS = {
    "erf": _gelu,
    "erfc": _gelu,
    "tanh": _gelu,
    "exp": _softmax,
    "rsqrt": _layer_norm,
}


def _epsilon(export: Export, seed: Node) -> float | None:
    node = export.graph.producer(seed.inputs[0])
    if node is None or node.op != "add":
        return None
    fixed = [v for v in node.inputs if v not in export.dynamic]
    if len(fixed) != 1 or (array := export.fixed(fixed[0])).size != 1:
        return None
    return float(array.reshape(()))


def _exact(export: Export, nodes: frozenset[Node], estimate: np.ndarray) -> np.ndarray:
    """Returns the constant that an estimate with rounding errors means, or the estimate."""
    constants = [np.ones_like(estimate)]
    for node in nodes:
        for value in node.inputs:
            if value not in export.dynamic and export.graph.shape(value)[-1:] == estimate.shape:
                constants.append(np.asarray(export.fixed(value), np.float32).reshape(-1))
    for array in constants:
        if array.shape == estimate.shape and np.allclose(array, estimate, rtol=1e-3, atol=1e-4):
            return array
    return estimate


# -- parts of a graph ---------------------------------------------------------------------------


def _parts(
    export: Export, seed: Node, *, reduced: bool = False
) -> Iterator[tuple[int, int, frozenset[Node]]]:
    """Yields (x, y, nodes): parts around a seed that read x alone and whose y alone is read.

    Nearest ends come first. `reduced`: the seed has one number per row of x.
    """
    graph = export.graph
    before = _around(export, seed, -1)
    after = _around(export, seed, 1)
    shape = None if reduced else graph.shape(seed.outputs[0])
    rows = _size(graph.shape(seed.outputs[0]))
    for x in before:
        wanted = graph.shape(x) if shape is None else shape
        if graph.shape(x) != wanted or (reduced and _size(wanted) <= rows):
            continue
        for y in after:
            if graph.shape(y) == wanted and graph.dtype(y) == graph.dtype(x) == np.float32:
                nodes = _between(export, x, y)
                if nodes is not None and seed in nodes:
                    yield x, y, nodes


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _around(export: Export, seed: Node, direction: int) -> list[int]:
    """Values that the seed depends on (-1), or that depend on it (1), nearest first."""
    graph = export.graph
    start = list(seed.inputs if direction < 0 else seed.outputs)
    found, queue = [], [v for v in start if v in export.dynamic]
    while queue and len(found) < NEAR:
        value = queue.pop(0)
        if value in found:
            continue
        found.append(value)
        if direction < 0:
            node = graph.producer(value)
            if node is not None and _plain(node):
                queue += [v for v in node.inputs if v in export.dynamic]
        else:
            queue += [v for n in graph.consumers(value) if _plain(n) for v in n.outputs]
    return found


def _between(export: Export, x: int, y: int) -> frozenset[Node] | None:
    """Nodes that compute y from x and constants, if nothing else reads what lies between."""
    graph = export.graph
    nodes: dict[Node, None] = {}
    queue = [y]
    while queue:
        value = queue.pop()
        if value == x or value not in export.dynamic:
            continue
        node = graph.producer(value)
        if node is None or not _plain(node) or len(nodes) > NEAR:
            return None
        if node not in nodes:
            nodes[node] = None
            queue += node.inputs
    for node in nodes:
        for value in node.outputs:
            if value != y and (
                value in graph.outputs or any(n not in nodes for n in graph.consumers(value))
            ):
                return None
    return frozenset(nodes)


def _plain(node: Node) -> bool:
    return node.op not in PRODUCTS and node.op not in graphs.MARKERS and len(node.outputs) == 1


def _random(export: Export, value: int) -> np.ndarray:
    batch = export.graph.batch or 1
    shape = [n // batch * 2 if n % batch == 0 else n for n in export.graph.shape(value)]
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _run(export: Export, nodes: frozenset[Node], x: int, y: int, given: np.ndarray) -> np.ndarray:
    """Executes a part of the graph at a batch of 2."""
    env = {x: given}
    for node in export.graph.nodes:
        if node in nodes:
            values = [env[v] if v in env else export.fixed(v, 2) for v in node.inputs]
            results = graphs.execute(node, values, export.graph.batch, 2)
            env.update(zip(node.outputs, map(np.asarray, results), strict=True))
    return env[y]


def _close(found: np.ndarray, wanted: Any) -> bool:
    wanted = np.asarray(wanted)
    return found.shape == wanted.shape and bool(np.all(np.abs(found - wanted) <= TOLERANCE))
