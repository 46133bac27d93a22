"""Units of reconstruction: layers, and the blocks between articulation points.

A unit has one value it starts from (its entry) and one it ends with (its exit). Both kinds are read
from the graph: a layer is a product and the element-wise operations behind it, up to its
activation; a block lies between two values through which everything must pass, so a residual block
is one unit, whatever its author called it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.graph import MARKERS, Graph, Node, execute
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions, is_quantizer

ELEMENTWISE = frozenset(
    "abs add clamp convert_element_type copy div erf exp integer_pow log logistic max min mul neg "
    "pow rsqrt sign sqrt square stop_gradient sub tanh".split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """A part of a graph with one entry and one exit.

    Attributes:
        name: the paths of its layers.
        entry: the value it reads, before any quantizer of it.
        exit: the value it ends with.
        nodes: its operations that depend on the entry, in order.
        weights: the quantizers of its weights.
    """

    name: str
    entry: int
    exit: int
    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The quantizers of its activations."""
        return tuple(node for node in self.nodes if is_quantizer(node))


def layer_units(traced: TracedNet) -> list[Unit]:
    """Returns one unit for each product with a quantized weight, in order."""
    graph, units = traced.graph, []
    for product in contractions(graph):
        if not _has_quantized_weight(product):
            continue
        side = next(o for o in product.operands if o is not product.weight)
        entry = side.value if side.marker is None else side.marker.inputs[0]
        exit = product.node.outputs[0]
        while (node := graph.sole_consumer(exit)) is not None:
            others = [v for v in node.inputs if v != exit]
            if node.op not in ELEMENTWISE or any(v not in graph.constants for v in others):
                break
            exit = node.outputs[0]
        units.append(_unit(graph, [product], entry, exit))
    return units


def block_units(traced: TracedNet) -> list[Unit]:
    """Returns the blocks between articulation points that hold a quantized weight, in order.

    An articulation point is a value with which everything that was computed before it can be
    forgotten. Points within one chain of element-wise operations count once, at its end.
    """
    graph = traced.graph
    waiting = [p for p in contractions(graph) if _has_quantized_weight(p)]
    order = {node: i for i, node in enumerate(graph.nodes)}
    points = _articulations(graph)
    units, entry = [], graph.inputs[0]
    for i, (index, value) in enumerate(points):
        inside = [p for p in waiting if order[p.node] <= index]
        following = points[i + 1][0] if i + 1 < len(points) else None
        if inside and not _chain_continues(graph, index, following):
            units.append(_unit(graph, inside, entry, value))
            entry = value
            waiting = waiting[len(inside) :]
    return units


def _chain_continues(graph: Graph, index: int, following: int | None) -> bool:
    """Whether nothing but element-wise operations lies before the next articulation point."""
    if following is None:
        return False
    between = [
        node
        for node in graph.nodes[index + 1 : following + 1]
        if not all(v in graph.constants for v in node.outputs)
    ]
    return bool(between) and all(node.op in ELEMENTWISE for node in between)


def _articulations(graph: Graph) -> list[tuple[int, int]]:
    """Returns (index of the writing node, value) for each value that is alone live behind it."""
    last = {v: len(graph.nodes) for v in graph.outputs}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            last[value] = max(last.get(value, -1), index)
    live, found = set(graph.inputs), []
    for index, node in enumerate(graph.nodes):
        live.update(v for v in node.outputs if v not in graph.constants)
        live = {v for v in live if last.get(v, -1) > index}
        if len(live) == 1 and not live.isdisjoint(node.outputs) and node.op not in MARKERS:
            found.append((index, next(iter(live))))
    return found


def _has_quantized_weight(product: TracedContraction) -> bool:
    weight = product.weight
    return weight is not None and weight.quantized


def _unit(graph: Graph, inside: Sequence[TracedContraction], entry: int, exit: int) -> Unit:
    nodes, seen, stack = [], {entry}, [exit]
    while stack:
        value = stack.pop()
        if value in seen or value in graph.constants:
            continue
        seen.add(value)
        node = graph.producer(value)
        assert node is not None, "a unit's exit depends on its entry alone"
        nodes.append(node)
        stack.extend(node.inputs)
    order = {node: i for i, node in enumerate(graph.nodes)}
    weights = [p.weight.marker for p in inside if p.weight is not None and p.weight.marker]
    return Unit(
        name=", ".join(dict.fromkeys(p.path for p in inside)),
        entry=entry,
        exit=exit,
        nodes=tuple(sorted(dict.fromkeys(nodes), key=order.__getitem__)),
        weights=tuple(weights),
    )


def run_unit(
    traced: TracedNet,
    unit: Unit,
    x: jax.Array,
    weights: Mapping[int, jax.Array],
    *,
    quantize: Callable[[Node, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Runs a unit on its entry's value, at any batch size.

    Args:
        traced: the net.
        unit: one of its units.
        x: the entry's value.
        weights: output of a weight's quantizer -> what to use in its place.
        quantize: what an activation's quantizer does: (node, its input) -> output; None runs it as
            it is.
    """
    graph = traced.graph
    batch = x.shape[graph.batch_axis(unit.entry)]
    env: dict[int, Any] = {unit.entry: x, **weights}
    for node in unit.nodes:
        values = [env[v] if v in env else graph.constants[v] for v in node.inputs]
        if quantize is not None and is_quantizer(node):
            env[node.outputs[0]] = quantize(node, jnp.asarray(values[0]))
        else:
            results = execute(node, values, graph.batch, batch)
            env.update(zip(node.outputs, results, strict=True))
    return env[unit.exit]
