"""Softmax, LayerNorm and GELU recognised in a graph, however the model spelled them.

Files have each of them as one operation or a few, and engines have one kernel for each; as a model
spells it, LayerNorm alone is a dozen passes over memory. A part of the graph between one value and
another counts as such an operation when it computes the same numbers on random input, so no
spelling needs to be listed: variance as E[x^2] - E[x]^2 or of the centred values, GELU by erf or
erfc.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qkd_jax.deploy.graph_values import Values
from qkd_jax.graph import CONTRACTIONS, MARKERS, Node, execute

NEAR = 40  # nodes that are looked at on either side of a seed
TOLERANCE = 1e-5  # of numbers of the order of 1, for a part of some ten float32 operations


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """A part of a graph that is one operation.

    Attributes:
        op: ONNX's name.
        x: the value that it reads.
        y: the value that it computes.
        nodes: the nodes that it replaces.
        axis: of the model, for Softmax and LayerNormalization.
        attributes: "tanh" of Gelu, whether it is that approximation; "epsilon" of
            LayerNormalization.
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


def find_patterns(values: Values, *, layer_norm: bool = True) -> list[Pattern]:
    """Lists the parts of a net's graph that are such operations.

    Args:
        values: of the graph.
        layer_norm: False where the file has no LayerNormalization.
    """
    seeds = {op: fit for op, fit in SEEDS.items() if layer_norm or op != "rsqrt"}
    patterns: list[Pattern] = []
    inside: set[Node] = set()
    for seed in values.graph.nodes:
        if seed.op in seeds and seed not in inside and seed.outputs[0] in values.dynamic:
            pattern = seeds[seed.op](values, seed)
            if pattern is not None and inside.isdisjoint(pattern.nodes):
                patterns.append(pattern)
                inside |= pattern.nodes
    return patterns


def _gelu(values: Values, seed: Node) -> Pattern | None:
    tanh = seed.op == "tanh"
    for x, y, nodes in _parts(values, seed):
        if len(nodes) < 4:
            continue
        probe = _random(values, x)
        if _close(_run(values, nodes, x, y, probe), jax.nn.gelu(probe, approximate=tanh)):
            return Pattern("Gelu", x, y, nodes, attributes={"tanh": tanh})
    return None


def _softmax(values: Values, seed: Node) -> Pattern | None:
    best = None  # the largest part: a shift of its input changes no softmax
    for x, y, nodes in _parts(values, seed):
        if best is not None and len(nodes) <= len(best.nodes):
            continue
        axes = {n.params["axes"] for n in nodes if n.op == "reduce_sum"}
        if len(axes) != 1 or len(axis := next(iter(axes))) != 1:
            continue
        probe = 4 * _random(values, x)
        if _close(_run(values, nodes, x, y, probe), jax.nn.softmax(probe, axis[0])):
            best = Pattern("Softmax", x, y, nodes, axis[0])
    return best


def _layer_norm(values: Values, seed: Node) -> Pattern | None:
    epsilon = _epsilon(values, seed)
    if epsilon is None:
        return None
    best = None
    for x, y, nodes in _parts(values, seed, reduced=True):
        last = len(values.graph.shape(x)) - 1
        axes = {n.params["axes"] for n in nodes if n.op == "reduce_sum"}
        if axes != {(last,)} or (best is not None and len(nodes) <= len(best.nodes)):
            continue
        probe = 2 * _random(values, x)
        centred = probe - probe.mean(-1, keepdims=True, dtype=np.float64)
        normal = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
        result = _run(values, nodes, x, y, probe)
        bias = _run(values, nodes, x, y, np.zeros_like(probe))
        normal, result, bias = (np.reshape(a, (-1, a.shape[-1])) for a in (normal, result, bias))
        bias = bias[0]
        rows = np.abs(normal).argmax(0)
        columns = np.arange(normal.shape[1])
        scale = (result[rows, columns] - bias) / normal[rows, columns]
        scale = _exact(values, nodes, scale)
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


def _epsilon(values: Values, seed: Node) -> float | None:
    node = values.graph.producer(seed.inputs[0])
    if node is None or node.op != "add":
        return None
    fixed = [v for v in node.inputs if v not in values.dynamic]
    if len(fixed) != 1 or (array := values.fixed(fixed[0])).size != 1:
        return None
    return float(array.reshape(()))


def _exact(values: Values, nodes: frozenset[Node], estimate: np.ndarray) -> np.ndarray:
    """Returns the constant that an estimate with rounding errors means, or the estimate."""
    constants = [np.ones_like(estimate)]
    for node in nodes:
        for value in node.inputs:
            if value not in values.dynamic and values.graph.shape(value)[-1:] == estimate.shape:
                constants.append(np.asarray(values.fixed(value), np.float32).reshape(-1))
    for array in constants:
        if array.shape == estimate.shape and np.allclose(array, estimate, rtol=1e-3, atol=1e-4):
            return array
    return estimate


def _parts(
    values: Values, seed: Node, *, reduced: bool = False
) -> Iterator[tuple[int, int, frozenset[Node]]]:
    """Yields (x, y, nodes): parts around a seed that read x alone and whose y alone is read.

    Nearest ends come first. `reduced`: the seed has one number per row of x.
    """
    graph = values.graph
    before = _around(values, seed, -1)
    after = _around(values, seed, 1)
    rows = math.prod(graph.shape(seed.outputs[0]))
    for x in before:
        shape = graph.shape(x) if reduced else graph.shape(seed.outputs[0])
        if graph.shape(x) != shape or (reduced and math.prod(shape) <= rows):
            continue
        for y in after:
            if graph.shape(y) == shape and graph.dtype(y) == graph.dtype(x) == np.float32:
                nodes = _between(values, x, y)
                if nodes is not None and seed in nodes:
                    yield x, y, nodes


def _around(values: Values, seed: Node, direction: int) -> list[int]:
    """Lists values that the seed depends on (-1), or that depend on it (1), nearest first."""
    graph = values.graph
    start = list(seed.inputs if direction < 0 else seed.outputs)
    near, queue = [], [v for v in start if v in values.dynamic]
    while queue and len(near) < NEAR:
        value = queue.pop(0)
        if value in near:
            continue
        near.append(value)
        if direction < 0:
            node = graph.producer(value)
            if node is not None and _plain(node):
                queue += [v for v in node.inputs if v in values.dynamic]
        else:
            queue += [v for n in graph.consumers(value) if _plain(n) for v in n.outputs]
    return near


def _between(values: Values, x: int, y: int) -> frozenset[Node] | None:
    """Returns the nodes that compute y from x, if nothing else reads what lies between."""
    graph = values.graph
    nodes: dict[Node, None] = {}
    queue = [y]
    while queue:
        value = queue.pop()
        if value == x or value not in values.dynamic:
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
    return node.op not in CONTRACTIONS and node.op not in MARKERS and len(node.outputs) == 1


def _random(values: Values, value: int) -> np.ndarray:
    batch = values.graph.batch
    shape = [n // batch * 2 if batch and n % batch == 0 else n for n in values.graph.shape(value)]
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _run(values: Values, nodes: frozenset[Node], x: int, y: int, probe: np.ndarray) -> np.ndarray:
    """Executes a part of the graph at a batch of 2."""
    env = {x: probe}
    for node in values.graph.nodes:
        if node in nodes:
            inputs = [env[v] if v in env else values.fixed(v, 2) for v in node.inputs]
            results = execute(node, inputs, values.graph.batch, 2)
            env.update(zip(node.outputs, map(np.asarray, results), strict=True))
    return env[y]


def _close(result: np.ndarray, expected: Any) -> bool:
    expected = np.asarray(expected)
    return result.shape == expected.shape and bool(np.all(np.abs(result - expected) <= TOLERANCE))
