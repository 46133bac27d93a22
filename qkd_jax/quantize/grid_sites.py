"""The signs of a model's operands, and its grid sites: outputs that need a grid of their own.

Read from the graph of the float model, before any data: an operand is unsigned where its values are
proven not to be negative (they follow a ReLU, a softmax, a sum of such ...), and signed elsewhere.

An engine that computes on integers needs a grid on both inputs and the output of a residual sum, on
what is pooled, and on the logits; and one grid, at its source, for a tensor that several
layers read. These sites are outputs of modules, which a rule's `output` reaches.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import DenyList, unfreeze
from flax.errors import InvalidRngError, ModifyScopeVariableError

from qkd_jax import graph as graphs
from qkd_jax.graph import CONTRACTIONS, IDENTITY, LAYOUT, MARKERS, Graph, Node
from qkd_jax.quantize.calls import (
    call_arguments,
    explaining_failures,
    own_arguments,
    signature,
    split_arrays,
)
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.interceptors import intercepting, naming_interceptors
from qkd_jax.quantize.model import quantize

# Each number of the result is one of the operand.
MOVES = LAYOUT | IDENTITY | {"broadcast_in_dim", "slice", "gather", "dynamic_slice"}
# Keeps a tensor on its grid, beside `MOVES`: a choice among its values, or among them and zero.
CHOICES = frozenset({"reduce_window_max", "reduce_max", "max"})
# Of values that are not negative these make others that are not.
KEEP_SIGN = MOVES | frozenset(
    "add mul div reduce_sum reduce_max reduce_min reduce_window_sum reduce_window_max sqrt rsqrt "
    "cumsum cumprod concatenate pad dot_general conv_general_dilated min clamp integer_pow pow "
    "sort".split()
)
NEVER_NEGATIVE = frozenset({"exp", "exp2", "abs", "logistic", "square", "iota"})


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """The inputs of one layer with a contraction.

    Attributes:
        path: its path.
        unsigned: per operand ("input", "other"), whether its values are never negative.
        source: path of the module whose output its input is, unchanged, or "".
    """

    path: str
    unsigned: Mapping[str, bool]
    source: str


@dataclasses.dataclass(frozen=True)
class Site:
    """A module's output that needs a grid.

    Attributes:
        path: the module's path.
        unsigned: whether its values are never negative.
        readers: paths of the layers whose input it is, unchanged.
        why: "sum", "pool", "logits" or "several readers".
    """

    path: str
    unsigned: bool
    readers: tuple[str, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class GridSites:
    """The layers and grid sites of a model, as presets need them.

    Attributes:
        layers: those with a contraction, in the order in which they run.
        sites: outputs between them that need a grid.
        summed: {path: length of the axis that the layer's weight is summed over}, which groups must
            divide; 0 where nothing is summed (a table that is looked up).
    """

    layers: tuple[LayerInputs, ...]
    sites: tuple[Site, ...]
    summed: Mapping[str, int]


def find_grid_sites(model: nn.Module, images: Any, **kwargs: Any) -> GridSites:
    """Finds a model's layers and grid sites; nothing is computed.

    Args:
        model: a linen module.
        images: example input, or its shape: one argument of the call, any pytree, or a tuple of
            its positional arguments, or None where the keywords hold all. Sizes play no part in
            the answer.
        **kwargs: further arguments of the model's call, and `method`.

    Raises:
        ValueError: the call does not take these arguments, or runs in training mode.
    """
    method, rngs = kwargs.get("method"), kwargs.get("rngs") or {}
    kwargs = own_arguments(kwargs)  # what is mutable is decided below
    arguments = call_arguments(model, method, images, kwargs)
    arrays, joined = split_arrays((arguments, kwargs, rngs))
    shapes = list(map(graphs.shape_of, arrays))
    net = quantize(model)
    frame = Frame(net.spec_of)

    def start(arrays: list[Any]) -> Any:  # traced, never computed
        args, keywords, streams = joined(arrays)
        streams = {"params": jax.random.key(0), **streams}
        with intercepting(frame):
            kept = naming_interceptors(DenyList("intermediates"))
            return unfreeze(model.init(streams, *args, method=method, mutable=kept, **keywords))

    def forward(variables: Any, arrays: list[Any]) -> Any:
        args, keywords, streams = joined(arrays)
        out, _ = net.trace_apply(
            variables,
            *args,
            mark_outputs=True,
            method=method,
            rngs=streams,
            # A cache may be written; running averages are those of training.
            mutable=[name for name in variables if name not in ("params", "batch_stats")],
            **keywords,
        )
        return out

    with explaining_failures(images):
        variables = jax.eval_shape(start, shapes)
    summed = {
        path: use.shapes["weight"][use.group_axis] if use.group_axis >= 0 else 0
        for path, use in frame.seen.items()
        if "weight" in use.shapes
    }
    try:
        graph = graphs.trace(forward, variables, shapes, evaluate=False)
    except (ModifyScopeVariableError, InvalidRngError) as error:
        name = type(model).__name__
        raise ValueError(
            f"model {name} runs in training mode ({str(error).partition(' (http')[0]}). A preset "
            "is fitted to the mode that is deployed: give the call's own argument for it, such as "
            "train=False or deterministic=True, behind images. The call is "
            f"{name}{signature(model, method)}."
        ) from error
    return _SiteSearch(graph).run(summed)


class _SiteSearch:
    """Signs of values and grid sites of one graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.unsigned: dict[int, bool] = {}
        for node in graph.nodes:
            for value in node.outputs:
                self.unsigned[value] = self.sign(node)

    def run(self, summed: Mapping[str, int]) -> GridSites:
        layers: dict[str, LayerInputs] = {}
        readers: dict[str, list[str]] = {}  # origin of a tensor -> layers that read it unchanged
        for node in self.graph.nodes:
            operand = node.params.get("operand") if node.op in MARKERS else None
            if operand not in ("input", "other"):
                continue
            path, value = node.params["path"], node.inputs[0]
            marker = self.output_marker(value)
            source = "" if marker is None else marker.params["path"]
            known = layers.get(path)
            unsigned = dict(known.unsigned) if known else {}
            unsigned[operand] = unsigned.get(operand, True) and self.known(value)
            if operand == "input":
                same = source if known is None or known.source == source else ""
                layers[path] = LayerInputs(path, unsigned, same)
                readers.setdefault(source, []).append(path)
            else:
                layers[path] = dataclasses.replace(layers[path], unsigned=unsigned)
        return GridSites(tuple(layers.values()), tuple(self.sites(layers, readers)), summed)

    def sites(self, layers: dict[str, LayerInputs], readers: dict[str, list[str]]) -> list[Site]:
        wanted: dict[str, str] = {}
        unsigned: dict[str, bool] = {}

        def want(value: int, why: str) -> None:
            marker = self.origin(value)
            if marker is not None:
                path = marker.params["path"]
                wanted.setdefault(path, why)
                sign = self.known(marker.inputs[0])
                unsigned[path] = unsigned.get(path, True) and sign

        for node in self.graph.nodes:
            if node.op in MARKERS:
                if node.params["operand"] == "input":
                    source = layers[node.params["path"]].source
                    if source and len(set(readers[source])) > 1:
                        want(node.inputs[0], "several readers")
            elif node.op in ("add", "sub", "add_any") and not any(map(self.fixed, node.inputs)):
                if self.joins(node):
                    for value in node.inputs:
                        want(value, "sum")
            elif node.op in ("reduce_sum", "reduce_window_sum") and self.pools(node):
                want(node.inputs[0], "pool")
        for value in self.graph.outputs:
            want(value, "logits")
        return [
            Site(
                path,
                unsigned[path],
                tuple(p for p in readers.get(path, ()) if layers[p].source == path),
                why,
            )
            for path, why in wanted.items()
        ]

    def fixed(self, value: int) -> bool:
        """Whether a value comes from the variables or the code alone."""
        return value in self.graph.constants or value in self.graph.sources

    def joins(self, node: Node) -> bool:
        """Whether a sum joins two branches; a polynomial of one tensor (in GELU) does not."""
        a, b = node.inputs
        same = self.graph.shape(a) == self.graph.shape(b) and math.prod(self.graph.shape(a)) > 1
        return same and a not in self.elementwise(b) and b not in self.elementwise(a)

    def elementwise(self, value: int) -> set[int]:
        """Returns the values that one is computed from, back to the nearest contractions."""
        found, pending = {value}, [value]
        while pending:
            node = self.graph.producer(pending.pop())
            if node is not None and node.op not in CONTRACTIONS:
                pending += [v for v in node.inputs if v not in found]
                found.update(node.inputs)
        return found - {value}

    def pools(self, node: Node) -> bool:
        """Whether a reduction averages over positions and not over the features of one."""
        if node.op == "reduce_window_sum":
            return True
        return len(self.graph.shape(node.inputs[0])) - 1 not in node.params["axes"]

    def output_marker(self, value: int) -> Node | None:
        """The innermost mark of a module's output that a value is, unchanged."""
        found = None
        while (node := self.graph.producer(value)) is not None and node.op in MARKERS:
            if node.params["operand"] == "output":
                found = node
            value = node.inputs[0]
        return found

    def origin(self, value: int) -> Node | None:
        """The module's output that a value is, but for moves and choices among its entries."""
        while (node := self.graph.producer(value)) is not None:
            if (marker := self.output_marker(value)) is not None:
                return marker
            if node.op in MOVES or node.op in MARKERS:
                value = node.inputs[0]
            elif node.op in CHOICES:
                moving = [v for v in node.inputs if not self.fixed(v)]
                if len(moving) != 1:
                    return None
                value = moving[0]
            else:
                return None
        return None

    def known(self, value: int) -> bool:
        """Whether a value is known not to be negative."""
        if value in self.unsigned:
            return self.unsigned[value]
        if value in self.graph.constants:
            return bool(np.all(np.asarray(self.graph.constants[value]) >= 0))
        return False

    def sign(self, node: Node) -> bool:
        if node.op in NEVER_NEGATIVE:
            return True
        if node.op == "max":
            return any(map(self.known, node.inputs))
        if node.op == "select_n":
            return all(map(self.known, node.inputs[1:]))
        if node.op in ("mul", "dot_general") and len(set(node.inputs[:2])) == 1:
            return node.op == "mul" or self.known(node.inputs[0])
        if node.op == "integer_pow" and node.params["y"] % 2 == 0:
            return True
        if node.op in MARKERS or node.op in KEEP_SIGN:
            moved = node.inputs[:1] if node.op in MOVES or node.op in MARKERS else None
            return all(map(self.known, moved if moved is not None else node.inputs))
        return False
