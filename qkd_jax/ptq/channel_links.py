"""Tensors between which a factor per channel can be moved without a change of the function.

A value y that is written by one product (or by the affine of a normalisation) may be divided by
s > 0, one number per channel, if everything that reads it can take the factor: a ReLU, a pool or a
sum over positions passes it on (positively homogeneous operations), a bias on the way is divided
too, and a product multiplies its weight along the input channels. A `Link` is one such value; where
anything else reads it (a residual add, a sigmoid, the net's own output) there is none.

Equalization, SmoothQuant and bias absorption all start from this list. To let another operation
pass a factor on, add it to `_is_homogeneous`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qkd_jax.graph import IDENTITY, MARKERS, Graph, Node
from qkd_jax.ptq.kernels import Kernel, kernel
from qkd_jax.ptq.leaves import BROADCAST, Readers, float64, is_zero, leaf, norms_of, readers
from qkd_jax.ptq.moments import rescale_folded
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions
from qkd_jax.trees import put

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """A value whose channels can be rescaled, and all that takes part.

    Attributes:
        source: the weight whose output channels are divided, or None.
        gain: without a source, path of the normalisation's gain, which is divided.
        value: the value.
        channels: how many there are.
        shifts: paths of what is added on the way (biases, running means), divided too.
        targets: the weights that multiply the value, in order; their inputs are multiplied.
        norms: BatchNorms on the way that are not folded.
        nodes: the operations on the way, in order, products left out.
    """

    source: Kernel | None
    gain: str | None
    value: int
    channels: int
    shifts: tuple[str, ...]
    targets: tuple[Kernel, ...]
    norms: frozenset[str]
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The layer or the normalisation whose channels these are."""
        return self.source.layer if self.source else (self.gain or "").partition("/")[2]


def links(traced: TracedNet) -> list[Link]:
    """Lists the values whose channels can be rescaled, in the order of the graph."""
    graph, variable_readers = traced.graph, readers(traced.graph)
    by_node = {p.node: p for p in contractions(graph)}
    found = []
    for node in graph.nodes:
        value, source, gain = node.outputs[0], None, None
        channels = graph.shape(value)[-1] if graph.shape(value) else 0
        if node in by_node:
            source = kernel(traced, by_node[node], variable_readers)
            if source is None or source.out_axis is None:
                continue
        elif node.op == "mul" and not any(v in graph.constants for v in node.outputs):
            gain = _gain(graph, node, channels, variable_readers)
            if gain is None:
                continue
        else:
            continue
        link = _follow(traced, by_node, variable_readers, value, channels, source, gain)
        if link is not None:
            found.append(link)
    return found


def divided(
    variables: Mapping[str, Any], link: Link, scale: np.ndarray, norms: Mapping[str, str]
) -> dict[str, Any]:
    """Returns variables whose value at a link is divided by `scale`, and its readers' weights not.

    Args:
        variables: of the net, float.
        link: the value.
        scale: [channels], above 0.
        norms: the folded BatchNorm behind each layer, whose stated moments are divided too.
    """
    result = dict(variables)
    for target in link.targets:
        result = put(result, target.path, target.scale_in(float64(result, target.path), scale))
    if link.source is not None:
        weight = float64(result, link.source.path)
        result = put(result, link.source.path, link.source.scale_out(weight, 1 / scale))
    for path in (*link.shifts, *([link.gain] if link.gain else [])):
        old = float64(result, path)
        result = put(result, path, old / scale.reshape(old.shape))
    if link.source is not None and link.name in norms:  # folded, or its mean were a shift
        result = rescale_folded(result, norms[link.name], scale)
    return result


def nearest_links(traced: TracedNet, wanted: Callable[[Kernel], bool]) -> list[Link]:
    """Returns one link for each layer that has one and is wanted: the nearest place before it.

    Places whose factor a BatchNorm's own statistics would have to follow are left out.
    """
    chosen: list[Link] = []
    covered: set[str] = set()
    for link in reversed(links(traced)):  # the nearest place before a layer comes last
        paths = {t.path for t in link.targets}
        statistics = any(path.startswith("batch_stats/") for path in link.shifts)
        if any(map(wanted, link.targets)) and not statistics and not paths & covered:
            chosen.insert(0, link)
            covered |= paths
    return chosen


def _follow(
    traced: TracedNet,
    by_node: Mapping[Node, TracedContraction],
    readers: Readers,
    root: int,
    channels: int,
    source: Kernel | None,
    gain: str | None,
) -> Link | None:
    """Follows a factor on `root` to the products that take it up; None at any other reader."""
    graph = traced.graph
    scaled = {root}
    shifts: list[str] = []
    targets: list[Kernel] = []
    norms: set[str] = set()
    nodes: list[Node] = []
    for node in graph.nodes:
        hits = [i for i, v in enumerate(node.inputs) if v in scaled]
        if not hits:
            continue
        if node in by_node:
            target = kernel(traced, by_node[node], readers) if hits == [0] else None
            if target is None or target.in_axis is None or target.in_channels % channels:
                return None
            targets.append(target)
            continue
        if node.op in ("add", "sub") and len(hits) == 1:
            shift = _shift(graph, node.inputs[1 - hits[0]], channels, readers, node)
            if shift is None:
                return None
            shifts.append(shift)
        elif not _is_homogeneous(graph, node, hits, channels):
            return None
        norms |= norms_of(traced, node)
        nodes.append(node)
        scaled.update(node.outputs)
    if not targets or scaled.intersection(graph.outputs):
        return None
    return Link(
        source,
        gain,
        root,
        channels,
        tuple(shifts),
        tuple(targets),
        frozenset(norms),
        tuple(nodes),
    )


def _is_homogeneous(graph: Graph, node: Node, hits: list[int], channels: int) -> bool:
    """Whether f(s * y) = s * f(y) for s > 0 per entry of the last axis."""
    before, after = graph.shape(node.inputs[hits[0]]), graph.shape(node.outputs[0])
    params = node.params
    if not after or len(node.outputs) > 1:
        return False
    if node.op in MARKERS:
        return hits == [0] and len(node.inputs) == 1
    if node.op in IDENTITY or node.op in ("abs", "neg"):
        return True
    if node.op in ("max", "min"):
        return len(hits) == 1 and is_zero(graph, node.inputs[1 - hits[0]])
    if node.op == "mul":
        return len(hits) == 1
    if node.op == "div":
        return hits == [0]
    if node.op in _REDUCTIONS:
        return len(before) - 1 not in params["axes"]
    if node.op in _WINDOWS:
        return params["window_dimensions"][-1] == 1
    if node.op in ("reshape", "squeeze", "expand_dims"):
        # In the row-major order of both, an element's index in the last axis, modulo the number of
        # channels, stays as it is.
        return after[-1] % channels == 0 and not (node.op == "reshape" and params["dimensions"])
    if node.op == "slice":
        return before[-1] == after[-1] and (params["strides"] or (1,))[-1] == 1
    if node.op == "pad":
        untouched = tuple(params["padding_config"][-1]) == (0, 0, 0)
        return hits == [0] and untouched and is_zero(graph, node.inputs[1])
    if node.op == "rev":
        return len(before) - 1 not in params["dimensions"]
    if node.op == "transpose":
        return params["permutation"][-1] == len(before) - 1
    if node.op == "broadcast_in_dim":
        last = params["broadcast_dimensions"][-1:] == (len(after) - 1,)
        return last and before[-1] == after[-1]
    return False


def _shift(graph: Graph, value: int, channels: int, readers: Readers, node: Node) -> str | None:
    """Returns the variable [channels] that a constant broadcasts along the last axis, or None."""
    path = leaf(graph, value, BROADCAST)
    if path is None or readers[path] != [node]:
        return None
    whole = np.asarray(graph.constants[value])
    variable = next(v for v, p in graph.leaves.items() if p == path)
    vector = np.asarray(graph.constants[variable]).reshape(-1)
    if vector.size != channels or not whole.ndim or whole.shape[-1] != channels:
        return None
    return path if np.array_equal(whole, np.broadcast_to(vector, whole.shape)) else None


def _gain(graph: Graph, node: Node, channels: int, readers: Readers) -> str | None:
    """Returns the variable [channels] that multiplies a value that is no constant, or None."""
    pending = [v for v in node.inputs if v in graph.constants]
    if len(pending) != 1:
        return None
    while pending:
        value = pending.pop()
        path, producer = graph.leaves.get(value), graph.producer(value)
        if path is not None:
            alone = path.startswith("params/") and readers[path] == [node]
            if alone and np.size(graph.constants[value]) == channels > 1:
                return path
        elif producer is not None and producer.op == "mul":
            pending.extend(producer.inputs)  # an evaluated BatchNorm's gain, times constants
        elif producer is not None and producer.op in BROADCAST:
            pending.append(producer.inputs[0])
    return None
