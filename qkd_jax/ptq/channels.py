"""Which tensors a factor per channel can be moved between without a change of the function.

A value y that is written by one product (or by the affine of a normalisation) may be divided by
s > 0, one number per channel, if everything that reads it can take the factor: a ReLU, a pool or a
sum over positions passes it on (positively homogeneous operations), a bias on the way is divided
too, and a product multiplies its weight along the input channels. A `Link` is one such place; where
anything else reads the value (a residual add, a sigmoid, the net's own output) there is none.

Equalization, SmoothQuant and bias absorption all start from this list. To let another operation
pass a factor on, add it to `_passes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from qkd_jax.graph import MARKERS, Graph, Node
from qkd_jax.quantize.traced import LAYOUT, Product, TracedNet, products
from qkd_jax.quantize.variables import Tree, folded_path
from qkd_jax.trees import get, put

__all__ = [
    "Kernel",
    "Link",
    "Place",
    "Target",
    "add_to",
    "bias_place",
    "is_relu",
    "kernel",
    "links",
    "norms_of",
    "readers",
]

IDENTITY = frozenset({"copy", "convert_element_type", "stop_gradient", "optimization_barrier"})
_SPREAD = LAYOUT | IDENTITY | {"broadcast_in_dim"}
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A layer's weight as a bilinear map between input and output channels.

    Attributes:
        path: of the variable.
        out_axis: the axis that becomes the last axis of the output, or None.
        in_axis: the axis summed with the last axis of the input, or None.
        groups: of a grouped convolution; input channel g * n + i is entry i of group g.
    """

    path: str
    out_axis: int | None
    in_axis: int | None
    groups: int

    def _split(self, array: np.ndarray) -> np.ndarray:
        """Returns [rest, in / groups, groups, out / groups]."""
        assert self.in_axis is not None
        if self.out_axis is None:
            moved = np.moveaxis(array, self.in_axis, -1)[..., None]
        else:
            moved = np.moveaxis(array, (self.in_axis, self.out_axis), (-2, -1))
        *rest, inputs, outputs = moved.shape
        return moved.reshape(int(np.prod(rest)), inputs, self.groups, outputs // self.groups)

    def out_ranges(self, array: np.ndarray) -> np.ndarray:
        """The largest |w| of each output channel."""
        assert self.out_axis is not None
        axes = tuple(i for i in range(array.ndim) if i != self.out_axis)
        return np.abs(array).max(axis=axes)

    def in_ranges(self, array: np.ndarray, channels: int) -> np.ndarray:
        """The largest |w| of each input channel; positions of a flattened map share theirs."""
        found = np.abs(self._split(array)).max(axis=(0, 3)).T.reshape(-1)
        return found.reshape(-1, channels).max(axis=0)

    def scale_out(self, array: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Multiplies the output channels."""
        assert self.out_axis is not None
        shape = [1] * array.ndim
        shape[self.out_axis] = -1
        return array * factor.reshape(shape)

    def scale_in(self, array: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Multiplies the input channels."""
        assert self.in_axis is not None
        per_group = array.shape[self.in_axis]
        whole = np.tile(factor, per_group * self.groups // factor.size)
        grouped = whole.reshape(self.groups, per_group).T  # [in / groups, groups]
        if self.out_axis is None:
            shape = [1] * array.ndim
            shape[self.in_axis] = -1
            return array * grouped.reshape(shape)
        wide = np.repeat(grouped, array.shape[self.out_axis] // self.groups, axis=1)
        shape = [1] * array.ndim
        shape[self.in_axis], shape[self.out_axis] = wide.shape
        return array * (wide if self.in_axis < self.out_axis else wide.T).reshape(shape)

    def through(self, array: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The output for an input that is `x` per channel, everywhere: [out]."""
        whole = np.tile(x, array.shape[self.in_axis or 0] * self.groups // x.size)
        grouped = whole.reshape(self.groups, -1)
        return np.einsum("rigo,gi->go", self._split(array), grouped).reshape(-1)

    def depthwise(self, array: np.ndarray) -> bool:
        """Whether each input channel has one output channel of its own."""
        if self.in_axis is None or self.out_axis is None or self.groups == 1:
            return False
        return array.shape[self.in_axis] == 1 and array.shape[self.out_axis] == self.groups


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A product that takes a factor up in its weight."""

    product: Product
    kernel: Kernel


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """A value whose channels can be rescaled, and all that takes part.

    Attributes:
        source: the product whose output channels are divided, or None.
        kernel: its weight, or None.
        gain: without a source, path of the normalisation's gain, which is divided.
        channels: how many there are.
        shifts: paths of what is added on the way (biases, running means), divided too.
        targets: the products that read the value, in order; their inputs are multiplied.
        norms: BatchNorms on the way that are not folded.
        root: the value.
        path: the operations on the way, in order, products left out.
    """

    source: Product | None
    kernel: Kernel | None
    gain: str | None
    channels: int
    shifts: tuple[str, ...]
    targets: tuple[Target, ...]
    norms: frozenset[str]
    root: int
    path: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The layer or the normalisation whose channels these are."""
        return self.source.path if self.source else (self.gain or "").partition("/")[2]


def links(traced: TracedNet) -> list[Link]:
    """Lists the places where a factor per channel can be moved, in the order of the graph."""
    graph, read = traced.graph, readers(traced.graph)
    by_node = {p.node: p for p in products(graph)}
    found = []
    for node in graph.nodes:
        value = node.outputs[0]
        channels = graph.shape(value)[-1] if graph.shape(value) else 0
        source, taken, gain = by_node.get(node), None, None
        if source is not None:
            taken = kernel(graph, source, read)
            if taken is None or taken.out_axis is None:
                continue
        elif node.op == "mul" and not any(v in graph.constants for v in node.outputs):
            gain = _gain(graph, node, channels, read)
            if gain is None:
                continue
        else:
            continue
        link = _follow(traced, by_node, read, value, channels, (source, taken, gain))
        if link is not None:
            found.append(link)
    return found


def kernel(graph: Graph, product: Product, read: Mapping[str, list[Node]]) -> Kernel | None:
    """Returns the weight of a product that reads one variable, as it is and alone; else None."""
    weight = product.operands[1]
    if weight.name != "weight" or weight.marker is None or weight.moves:
        return None
    path = _leaf(graph, weight.marker.inputs[0], IDENTITY)
    if path is None or read[path] != [weight.marker]:
        return None
    numbers, groups = product.node.params["dimension_numbers"], 1
    last_in, last_out = len(product.operands[0].shape) - 1, product.rank - 1
    if product.node.op == "conv_general_dilated":
        if product.node.params["batch_group_count"] != 1:
            return None
        groups = product.node.params["feature_group_count"]
        pairs = {numbers.lhs_spec[1]: numbers.rhs_spec[1]}
    else:
        pairs = dict(zip(*numbers[0], strict=True))
    axes = weight.output_axes
    out_axis = axes.index(last_out) if last_out in axes else None
    return Kernel(path, out_axis, pairs.get(last_in), groups)


def readers(graph: Graph) -> dict[str, list[Node]]:
    """Variable -> live nodes that read it, directly or through constants."""
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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a number per output channel can be added to a product's output.

    Attributes:
        path: of a variable: a bias, or the mean that a BatchNorm takes off.
        sign: of its part in the output: 1 or -1.
        value: the output with it.
    """

    path: str
    sign: int
    value: int


def bias_place(traced: TracedNet, product: Product, read: Mapping[str, list[Node]]) -> Place | None:
    """Returns where to correct a product's output: its bias, its BatchNorm's mean, or a new bias.

    A new one, for a layer without either, lies at `quant/<layer>/folded/bias`. None where a layer
    runs more than once, or is not one that adds such a bias.
    """
    graph, value = traced.graph, product.node.outputs[0]
    while (node := graph.sole_consumer(value)) is not None:
        if node.op in ("add", "sub") and node.inputs[0] == value != node.inputs[1]:
            path = _leaf(graph, node.inputs[1], _SPREAD)
        elif node.op == "add" and node.inputs[1] == value != node.inputs[0]:
            path = _leaf(graph, node.inputs[0], _SPREAD)
        elif node.op in IDENTITY:
            value = node.outputs[0]
            continue
        else:
            break
        if path is None or read[path] != [node]:
            break
        return Place(path, 1 if node.op == "add" else -1, node.outputs[0])
    alone = sum(p.path == product.path for p in products(graph)) == 1
    features = [out for out in product.operands[1].output_axes if out is not None]
    if not alone or product.path not in traced.layers or features != [product.rank - 1]:
        return None
    path = folded_path(product.path, "bias")
    return Place(path, 1, product.node.outputs[0])


def add_to(variables: Tree, place: Place, delta: np.ndarray) -> Tree:
    """Returns variables with `delta` added to the output at a place."""
    try:
        old = np.asarray(get(variables, place.path), np.float64)
    except KeyError:
        old = np.zeros(delta.size)
    return put(variables, place.path, old + place.sign * delta.reshape(old.shape))


def is_relu(graph: Graph, node: Node) -> bool:
    """Whether a node is max(x, 0)."""
    return node.op == "max" and sum(_zero(graph, v) for v in node.inputs) == 1


def _follow(
    traced: TracedNet,
    by_node: Mapping[Node, Product],
    read: Mapping[str, list[Node]],
    root: int,
    channels: int,
    origin: tuple[Product | None, Kernel | None, str | None],
) -> Link | None:
    """Follows a factor on `root` to the products that take it up, or to a reader that cannot."""
    graph = traced.graph
    scaled = {root}
    shifts: list[str] = []
    targets: list[Target] = []
    norms: set[str] = set()
    path: list[Node] = []
    for node in graph.nodes:
        hits = [i for i, v in enumerate(node.inputs) if v in scaled]
        if not hits:
            continue
        if node in by_node:
            taken = kernel(graph, by_node[node], read) if hits == [0] else None
            if taken is None or taken.in_axis is None:
                return None
            size = by_node[node].operands[1].shape[taken.in_axis] * taken.groups
            if size % channels:
                return None
            targets.append(Target(by_node[node], taken))
            continue
        if node.op in ("add", "sub") and len(hits) == 1:
            shift = _vector(graph, node.inputs[1 - hits[0]], channels, read, node)
            if shift is None:
                return None
            shifts.append(shift)
        elif not _passes(graph, node, hits, channels):
            return None
        norms |= norms_of(traced, node)
        path.append(node)
        scaled.update(node.outputs)
    if not targets or scaled.intersection(graph.outputs):
        return None
    source, taken, gain = origin
    return Link(
        source,
        taken,
        gain,
        channels,
        tuple(shifts),
        tuple(targets),
        frozenset(norms),
        root,
        tuple(path),
    )


def _passes(graph: Graph, node: Node, hits: list[int], channels: int) -> bool:
    """Whether a node writes s * y where it reads s * y, s > 0 per entry of the last axis."""
    before, after = graph.shape(node.inputs[hits[0]]), graph.shape(node.outputs[0])
    params = node.params
    if not after or len(node.outputs) > 1:
        return False
    if node.op in MARKERS:
        return hits == [0] and len(node.inputs) == 1
    if node.op in IDENTITY or node.op in ("abs", "neg"):
        return True
    if node.op in ("max", "min"):
        return len(hits) == 1 and _zero(graph, node.inputs[1 - hits[0]])
    if node.op == "mul":
        return len(hits) == 1
    if node.op == "div":
        return hits == [0]
    if node.op in _REDUCTIONS:
        return len(before) - 1 not in params["axes"]
    if node.op in _WINDOWS:
        return params["window_dimensions"][-1] == 1
    if node.op in ("reshape", "squeeze", "expand_dims"):
        # In the row-major order of both, an element's place in the last axis, modulo the number of
        # channels, stays as it is.
        return after[-1] % channels == 0
    if node.op == "slice":
        return before[-1] == after[-1] and (params["strides"] or (1,))[-1] == 1
    if node.op == "pad":
        whole = tuple(params["padding_config"][-1]) == (0, 0, 0)
        return hits == [0] and whole and _zero(graph, node.inputs[1])
    if node.op == "rev":
        return len(before) - 1 not in params["dimensions"]
    if node.op == "transpose":
        return params["permutation"][-1] == len(before) - 1
    if node.op == "broadcast_in_dim":
        last = params["broadcast_dimensions"][-1:] == (len(after) - 1,)
        return last and before[-1] == after[-1]
    return False


def _zero(graph: Graph, value: int) -> bool:
    return value in graph.constants and not np.any(graph.constants[value])


def _leaf(graph: Graph, value: int, through: frozenset[str]) -> str | None:
    """Follows a constant back to the one variable that it is, through some operations."""
    while value not in graph.leaves:
        node = graph.producer(value)
        if node is None or node.op not in through:
            return None
        value = node.inputs[0]
    return graph.leaves[value]


def _vector(
    graph: Graph, value: int, channels: int, read: Mapping[str, list[Node]], node: Node
) -> str | None:
    """Returns the variable [channels] that a constant spreads along the last axis, or None."""
    path = _leaf(graph, value, _SPREAD)
    if path is None or read[path] != [node]:
        return None
    whole = np.asarray(graph.constants[value])
    leaf = next(v for v, p in graph.leaves.items() if p == path)
    vector = np.asarray(graph.constants[leaf]).reshape(-1)
    if vector.size != channels or not whole.ndim or whole.shape[-1] != channels:
        return None
    return path if np.array_equal(whole, np.broadcast_to(vector, whole.shape)) else None


def _gain(graph: Graph, node: Node, channels: int, read: Mapping[str, list[Node]]) -> str | None:
    """Returns the variable [channels] that multiplies a value that is no constant, or None."""
    constants = [v for v in node.inputs if v in graph.constants]
    if len(constants) != 1:
        return None
    pending = constants
    while pending:
        value = pending.pop()
        at: Node | None = None
        while value not in graph.leaves:
            at = graph.producer(value)
            if at is None or at.op not in (*_SPREAD, "mul"):
                break
            if at.op == "mul":  # an evaluated BatchNorm multiplies its gain with constants
                pending.extend(at.inputs)
                break
            value = at.inputs[0]
        path = graph.leaves.get(value, "")
        if path.startswith("params/") and read[path] == [node]:
            if np.size(graph.constants[value]) == channels > 1:
                return path
    return None


def norms_of(traced: TracedNet, node: Node) -> set[str]:
    """The BatchNorms whose variables a node reads as constants."""
    paths = {p for v in node.inputs for p in traced.graph.sources.get(v, ())}
    return {p.partition("/")[2].rpartition("/")[0] for p in paths} & traced.norms
