"""The variables of a net as its traced graph reads them, and where a bias can be added.

A method that rewrites a variable must know that one operation alone reads it, in which layout, and
whether a BatchNorm owns it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkd_jax.graph import IDENTITY, LAYOUT, MARKERS, Graph, Node
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions
from qkd_jax.quantize.variables import Tree, folded_path
from qkd_jax.trees import get, put

BROADCAST = LAYOUT | IDENTITY | {"broadcast_in_dim"}
Readers = Mapping[str, list[Node]]
"""Path of a variable -> the live nodes that read it, directly or through constants."""


def readers(graph: Graph) -> Readers:
    """Returns the nodes that read each variable."""
    found: dict[str, list[Node]] = {path: [] for path in graph.leaves.values()}
    for node in graph.nodes:
        for value in dict.fromkeys(node.inputs):
            origin = graph.producer(value)
            if origin is not None and origin.op in MARKERS:
                continue  # what a marker writes is not the variable any more
            for path in graph.sources.get(value, ()):
                if path in found and node not in found[path]:
                    found[path].append(node)
    return found


def leaf(graph: Graph, value: int, through: frozenset[str]) -> str | None:
    """Follows a constant back to the one variable that it is, through the given operations."""
    while value not in graph.leaves:
        node = graph.producer(value)
        if node is None or node.op not in through:
            return None
        value = node.inputs[0]
    return graph.leaves[value]


def module_of(path: str) -> str:
    """Returns "block/bn" for "params/block/bn/scale"."""
    return path.partition("/")[2].rpartition("/")[0]


def norms_of(traced: TracedNet, node: Node) -> set[str]:
    """Returns the BatchNorms whose variables a node reads as constants."""
    paths = {p for v in node.inputs for p in traced.graph.sources.get(v, ())}
    return {module_of(path) for path in paths} & traced.norms


def is_zero(graph: Graph, value: int) -> bool:
    """Whether a value is a constant of zeros."""
    return value in graph.constants and not np.any(graph.constants[value])


def is_relu(graph: Graph, node: Node) -> bool:
    """Whether a node is max(x, 0)."""
    return node.op == "max" and sum(is_zero(graph, v) for v in node.inputs) == 1


def float64(variables: Mapping[str, Any], path: str) -> np.ndarray:
    """Returns the variable at "params/conv/kernel" in float64."""
    return np.asarray(get(variables, path), np.float64)


@dataclasses.dataclass(frozen=True)
class BiasSite:
    """A variable that is added to a product's output.

    Attributes:
        path: of the variable: a bias, or the mean that a BatchNorm takes off.
        sign: of its part in the output: 1 or -1.
        node: the operation that adds it.
    """

    path: str
    sign: int
    node: Node

    @property
    def value(self) -> int:
        """The output with the bias."""
        return self.node.outputs[0]


def bias_site(traced: TracedNet, product: TracedContraction, readers: Readers) -> BiasSite | None:
    """Returns where to correct a product's output: its bias, its BatchNorm's mean, or a new bias.

    A new one, for a layer without either, lies at `quant/<layer>/folded/bias`. None where a layer
    runs more than once, or is not one that adds such a bias.
    """
    graph, value = traced.graph, product.node.outputs[0]
    while (node := graph.sole_consumer(value)) is not None:
        if node.op in ("add", "sub") and node.inputs[0] == value != node.inputs[1]:
            path = leaf(graph, node.inputs[1], BROADCAST)
        elif node.op == "add" and node.inputs[1] == value != node.inputs[0]:
            path = leaf(graph, node.inputs[0], BROADCAST)
        elif node.op in IDENTITY:
            value = node.outputs[0]
            continue
        else:
            break
        if path is None or readers[path] != [node]:
            break
        return BiasSite(path, 1 if node.op == "add" else -1, node)
    alone = sum(p.path == product.path for p in contractions(graph)) == 1
    features = [out for out in product.operands[1].output_axes if out is not None]
    if not alone or product.path not in traced.layers or features != [product.rank - 1]:
        return None
    return BiasSite(folded_path(product.path, "bias"), 1, product.node)


def add_to_output(variables: Tree, site: BiasSite, delta: np.ndarray) -> Tree:
    """Returns variables with `delta` added to the output at a site."""
    try:
        old = float64(variables, site.path)
    except KeyError:
        old = np.zeros(delta.size)
    return put(variables, site.path, old + site.sign * delta.reshape(old.shape))
