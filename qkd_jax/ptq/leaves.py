"""The variables of a net as its traced graph reads them, and where a bias can be added.

A method that rewrites a variable must know that one operation alone reads it, in which layout, and
whether a BatchNorm owns it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkd_jax.graph import IDENTITY, LAYOUT, MARKERS, Graph, Node, execute
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
            if _is_marked(graph, value):
                continue
            for path in graph.sources.get(value, ()):
                if path in found and node not in found[path]:
                    found[path].append(node)
    return found


def _is_marked(graph: Graph, value: int) -> bool:
    """Whether a value is what a marker writes, moved or cast: not its variable any more."""
    origin = graph.producer(value)
    while origin is not None and origin.op in BROADCAST:
        origin = graph.producer(origin.inputs[0])
    return origin is not None and origin.op in MARKERS


def leaf(graph: Graph, value: int, through: frozenset[str]) -> str | None:
    """Follows a constant back to the one variable that it is, through the given operations."""
    while value not in graph.leaves:
        node = graph.producer(value)
        if node is None or node.op not in through:
            return None
        value = node.inputs[0]
    return graph.leaves[value]


def entries(graph: Graph, value: int) -> tuple[str, np.ndarray] | None:
    """Returns (path of a variable, which of its entries a constant holds), or None.

    The entries are flat indices in the constant's shape. A step of a scan is a slice of its
    variable, a member of a vmapped layer may be transposed: both are followed.
    """
    moves = []
    while value not in graph.leaves:
        node = graph.producer(value)
        if node is None or node.op not in BROADCAST | {"slice"}:
            return None
        if node.op not in IDENTITY:
            moves.append(node)
        value = node.inputs[0]
    shape = graph.shape(value)
    index = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    for node in reversed(moves):
        index = np.asarray(execute(node, [index])[0])
    return graph.leaves[value], index


def put_entries(variables: Tree, path: str, index: np.ndarray, values: Any) -> Tree:
    """Returns variables with other values of the entries that `entries` found."""
    array = np.array(get(variables, path))
    array.reshape(-1)[index.reshape(-1)] = np.asarray(values, array.dtype).reshape(-1)
    return put(variables, path, array)


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
        features: axes of what it adds to that come from the weight, ascending.
        entries: which of the variable's entries each feature of the output adds, as flat indices;
            None for a new variable.
    """

    path: str
    sign: int
    node: Node
    features: tuple[int, ...]
    entries: np.ndarray | None = None

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
    features = sorted(out for out in product.operands[1].output_axes if out is not None)
    while (node := graph.sole_consumer(value)) is not None:
        if node.op in ("add", "sub") and node.inputs[0] == value != node.inputs[1]:
            added = node.inputs[1]
        elif node.op == "add" and node.inputs[1] == value != node.inputs[0]:
            added = node.inputs[0]
        elif node.op in IDENTITY:
            value = node.outputs[0]
            continue
        elif node.op == "transpose":  # of the members of a vmapped layer
            features = sorted(node.params["permutation"].index(axis) for axis in features)
            value = node.outputs[0]
            continue
        else:
            break
        path = leaf(graph, added, BROADCAST)
        found = entries(graph, added) if path is not None and readers[path] == [node] else None
        if path is None or found is None or found[1].ndim not in (0, product.rank):
            break
        kept = tuple(slice(None) if i in features else 0 for i in range(found[1].ndim))
        sign = 1 if node.op == "add" else -1
        return BiasSite(path, sign, node, tuple(features), found[1][kept])
    alone = sum(p.path == product.path for p in contractions(graph)) == 1
    last = [out for out in product.operands[1].output_axes if out is not None]
    if not alone or product.path not in traced.layers or last != [product.rank - 1]:
        return None
    return BiasSite(folded_path(product.path, "bias"), 1, product.node, tuple(last))


def add_to_output(variables: Tree, site: BiasSite, delta: np.ndarray) -> Tree:
    """Returns variables with `delta` added to the output at a site.

    Args:
        variables: of the net.
        site: where.
        delta: a number for each feature, along the output's axes that come from the weight; what
            several features share is given their mean.
    """
    try:
        old = float64(variables, site.path)
    except KeyError:
        old = np.zeros(delta.size)
    if site.entries is None:
        return put(variables, site.path, old + site.sign * delta.reshape(old.shape))
    index = np.broadcast_to(site.entries, delta.shape).reshape(-1)
    count = np.maximum(np.bincount(index, minlength=old.size), 1)
    mean = np.bincount(index, weights=delta.reshape(-1), minlength=old.size) / count
    return put(variables, site.path, old + site.sign * mean.reshape(old.shape))
