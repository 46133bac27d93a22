"""Tensors of a net whose channels can be rotated, and the weights that take the rotation up.

Where nothing but sums, reshapes and products lies between weights, the channels of all that they
write and read can be turned by one orthogonal matrix: weights that write the tensor are turned
along their outputs, those that read it along their inputs. A `RotationSite` is such a tensor with
all its names in the graph: the residual stream of a transformer, or the values of attention on
their way to its output layer. LayerNorm and RMSNorm let rotations pass once their gain is one.

To let another operation pass one on, add it to `_axis_after`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from qkd_jax.graph import IDENTITY, MARKERS, Graph, Node
from qkd_jax.ptq.kernels import Kernel, kernel
from qkd_jax.ptq.leaves import entries, is_zero, module_of, readers
from qkd_jax.quantize.calls import call_arguments, own_arguments
from qkd_jax.quantize.interceptors import intercepting
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions


@dataclasses.dataclass(eq=False)
class NormSite:
    """One call of a LayerNorm or RMSNorm over the last axis.

    Attributes:
        path: of the module.
        centred: whether it takes the mean off.
        value: what it reads.
        nodes: its operations.
        output: what it writes.
        gain: (variable, flat indices of the entries) of its scale, or None.
        shift: the same of its bias.
    """

    path: str
    centred: bool
    value: int
    nodes: list[Node] = dataclasses.field(default_factory=list)
    output: int = -1
    gain: tuple[str, np.ndarray] | None = None
    shift: tuple[str, np.ndarray] | None = None


@dataclasses.dataclass(eq=False)
class RotationSite:
    """A tensor whose channels can be rotated, under all its names.

    Attributes:
        channels: how many there are.
        axes: value -> the axis of it that holds the channels.
        writers: (weight, its axis that becomes the channels).
        readers: (weight, its axis that is summed with the channels).
        vectors: (variable, flat indices [..., channels]) of what is added on the way.
        norms: those that read the tensor.
        source: the norm that writes it, or None.
        nodes: the operations that were passed.
        problem: why it cannot be rotated, or "".
    """

    channels: int
    axes: dict[int, int] = dataclasses.field(default_factory=dict)
    writers: list[tuple[Kernel, int]] = dataclasses.field(default_factory=list)
    readers: list[tuple[Kernel, int]] = dataclasses.field(default_factory=list)
    vectors: list[tuple[str, np.ndarray]] = dataclasses.field(default_factory=list)
    norms: list[NormSite] = dataclasses.field(default_factory=list)
    source: NormSite | None = None
    nodes: set[Node] = dataclasses.field(default_factory=set)
    problem: str = ""


def rotation_sites(
    traced: TracedNet, variables: Mapping[str, Any], images: Any, kwargs: Mapping[str, Any]
) -> list[RotationSite]:
    """Lists the tensors that norms read or write, and those that products write.

    Those that cannot be rotated say why (`RotationSite.problem`).
    """
    search = _Search(traced, norm_sites(traced, variables, images, kwargs))
    found = [search.site(norm.value, _last(traced.graph, norm.value)) for norm in search.norms]
    found += [
        search.site(norm.output, _last(traced.graph, norm.output), norm) for norm in search.norms
    ]
    for node in search.products:
        if (own := search.kernels.get(node)) is not None and own.out_axis is not None:
            found.append(search.site(node.outputs[0], _last(traced.graph, node.outputs[0])))
    return [site for site in found if site is not None]


def norm_sites(
    traced: TracedNet, variables: Mapping[str, Any], images: Any, kwargs: Mapping[str, Any]
) -> list[NormSite]:
    """Returns the calls of `nn.LayerNorm` and `nn.RMSNorm` over the last axis, in order."""
    graph, modules = traced.graph, _norm_modules(traced, variables, images, kwargs)
    owner: dict[int, NormSite] = {}
    fixed: set[int] = set()
    found: list[NormSite] = []
    for node in graph.nodes:
        path = next((p for p in modules if node.scope == p or node.scope.startswith(p + "/")), None)
        if path is None or all(v in graph.constants for v in node.outputs):
            continue
        read = [v for v in node.inputs if v not in graph.constants and v not in fixed]
        if not read:  # a number, spread over the batch
            fixed.update(node.outputs)
            continue
        norm = next((owner[v] for v in read if v in owner and owner[v].path == path), None)
        if norm is None:
            norm = next((n for n in found if n.path == path and n.value in read), None)
        if norm is None:
            norm = NormSite(path, modules[path], read[0])
            found.append(norm)
        norm.nodes.append(node)
        owner.update(dict.fromkeys(node.outputs, norm))
        for value in node.inputs:
            at = entries(graph, value) if value in graph.constants else None
            if at is not None and module_of(at[0]) == path:
                kept = at[0], at[1].reshape(-1)
                norm.gain, norm.shift = (
                    (kept, norm.shift) if at[0].endswith("/scale") else (norm.gain, kept)
                )
    for norm in found:
        inside = set(norm.nodes)
        read_outside = [
            v
            for node in norm.nodes
            for v in node.outputs
            if v in graph.outputs or any(n not in inside for n in graph.consumers(v))
        ]
        norm.output = read_outside[0] if len(read_outside) == 1 else -1
    return [norm for norm in found if norm.output >= 0]


def _norm_modules(
    traced: TracedNet, variables: Mapping[str, Any], images: Any, kwargs: Mapping[str, Any]
) -> dict[str, bool]:
    """Returns {path: whether it takes the mean off} of the norms over the last axis."""
    found: dict[str, bool] = {}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            axes = np.ravel(module.reduction_axes), np.ravel(module.feature_axes)
            if all(a.tolist() == [-1] for a in axes):
                found["/".join(module.path)] = isinstance(module, nn.LayerNorm)
        return next_fun(*args, **kwargs)

    arguments = call_arguments(
        traced.net.model, kwargs.get("method"), images, own_arguments(kwargs)
    )

    def forward(variables: Any) -> Any:
        with intercepting(note):
            return traced.net.apply(variables, *arguments, **kwargs)

    jax.eval_shape(forward, dict(variables))
    return found


def _last(graph: Graph, value: int) -> int:
    return len(graph.shape(value)) - 1


class _Search:
    """Follows the names of tensors through a graph, each one once."""

    def __init__(self, traced: TracedNet, norms: Sequence[NormSite]):
        self.graph = traced.graph
        variable_readers = readers(traced.graph)
        self.products = {p.node: p for p in contractions(traced.graph)}
        self.kernels: dict[Node, Kernel | None] = {
            node: kernel(traced, product, variable_readers, part=True)
            for node, product in self.products.items()
        }
        self.norms = list(norms)
        self.norm_of = {node: norm for norm in norms for node in norm.nodes}
        self.seen: set[int] = set()

    def site(self, value: int, axis: int, source: NormSite | None = None) -> RotationSite | None:
        """Returns the site of a value, or None where it belongs to one that was found before."""
        if value in self.seen:
            return None
        site = RotationSite(self.graph.shape(value)[axis], source=source)
        pending = [(value, axis)]
        while pending:
            value, axis = pending.pop()
            if value in site.axes:
                if site.axes[value] != axis:
                    site.problem = site.problem or "its channels lie along two axes of one tensor"
                continue
            site.axes[value] = axis
            self.seen.add(value)
            if value in self.graph.outputs or value in self.graph.inputs:
                site.problem = site.problem or "the net's own input or output is part of it"
            if source is None or value != source.output:
                pending += self._written(site, value, axis)
            for node in self.graph.consumers(value):
                pending += self._read(site, node, value, axis)
        return site

    def _written(self, site: RotationSite, value: int, axis: int) -> list[tuple[int, int]]:
        """Takes in what writes a value; returns the further names of the tensor."""
        node = self.graph.producer(value)
        if node is None or node in self.norm_of:
            if node is not None:
                site.problem = site.problem or f"norm {self.norm_of[node].path!r} writes a part"
            return []
        if node not in self.products:
            return self._passed(site, node, axis)
        product, own = self.products[node], self.kernels[node]
        if axis in product.operands[1].output_axes and product.operands[1].name == "weight":
            if own is None or own.groups != 1:
                site.problem = site.problem or f"weight of {product.path!r} is shared or grouped"
            else:
                site.writers.append((own, product.operands[1].output_axes.index(axis)))
            return []
        return [
            (operand.value, operand.output_axes.index(axis))
            for operand in product.operands
            if axis in operand.output_axes
        ]

    def _read(self, site: RotationSite, node: Node, value: int, axis: int) -> list[tuple[int, int]]:
        """Takes in what reads a value; returns the further names of the tensor."""
        if node in self.norm_of:
            norm = self.norm_of[node]
            if norm.value != value:
                site.problem = site.problem or f"norm {norm.path!r} reads it beside another tensor"
            elif norm not in site.norms:
                site.norms.append(norm)
            return []
        if node not in self.products:
            out = _axis_after(self.graph, node, node.inputs.index(value), axis)
            if out is None:
                site.problem = site.problem or f"{node.op} in {node.scope or 'the net'!r} reads it"
                return []
            return [(node.outputs[0], out), *self._passed(site, node, out)]
        product, own = self.products[node], self.kernels[node]
        if node.inputs.count(value) > 1:  # x x^T would be turned along two axes
            site.problem = site.problem or f"product {product.path!r} multiplies it by itself"
            return []
        side = node.inputs.index(value)
        out = product.operands[side].output_axes[axis]
        if out is not None:
            return [(node.outputs[0], out)]
        partner = _partner(product, axis)
        if side or own is None or own.groups != 1 or partner is None:
            site.problem = site.problem or f"product {product.path!r} sums over its channels"
        elif (own, partner) not in site.readers:
            site.readers.append((own, partner))
        return []

    def _passed(self, site: RotationSite, node: Node, axis: int) -> list[tuple[int, int]]:
        """Takes in a node that passes the channels on to an axis of its output."""
        site.nodes.add(node)
        names = []
        for index, value in enumerate(node.inputs):
            rank = len(self.graph.shape(value))
            own = next(
                (a for a in range(rank) if _axis_after(self.graph, node, index, a) == axis), None
            )
            if value not in self.graph.constants:
                if own is None:
                    site.problem = site.problem or f"{node.op} in {node.scope or 'the net'!r}"
                else:
                    names.append((value, own))
            elif node.op in ("mul", "div", "pad") or is_zero(self.graph, value):
                continue  # checked by `_axis_after`, or the same rotated
            else:
                found = entries(self.graph, value)
                if own is None or found is None or self.graph.shape(value)[own] != site.channels:
                    site.problem = site.problem or "a constant is added that is no variable"
                    continue
                vector = found[0], np.moveaxis(found[1], own, -1).reshape(-1, site.channels)
                site.vectors.append(vector)
        return names


def _partner(product: TracedContraction, axis: int) -> int | None:
    """Returns the weight's axis that is summed with an axis of the input, channel by channel."""
    numbers = product.node.params["dimension_numbers"]
    if product.node.op == "conv_general_dilated":
        return numbers.rhs_spec[1] if numbers.lhs_spec[1] == axis else None
    return dict(zip(*numbers[0], strict=True)).get(axis)


def _axis_after(graph: Graph, node: Node, index: int, axis: int) -> int | None:
    """Returns where a node puts an axis of an input that it acts on entry by entry, linearly.

    Every matrix along that axis commutes with such a node; None for another one.
    """
    if len(node.outputs) != 1:
        return None
    before, after = graph.shape(node.inputs[index]), graph.shape(node.outputs[0])
    params, op = node.params, node.op
    if op in MARKERS or op in IDENTITY:
        return axis if index == 0 and len(node.inputs) == 1 else None
    if op in ("add", "sub", "neg"):  # a constant may be kept with axes of size 1
        return axis if len(before) == len(after) and before[axis] == after[axis] else None
    if op in ("mul", "div"):
        other = node.inputs[1 - index]
        if (op == "div" and index) or other not in graph.constants or before != after:
            return None
        factor = np.asarray(graph.constants[other])
        same = factor.ndim == 0 or factor.shape[axis] == 1
        return axis if same or np.ptp(factor, axis=axis).max() == 0 else None
    if op == "transpose":
        return params["permutation"].index(axis)
    if op == "broadcast_in_dim":
        out = params["broadcast_dimensions"][axis]
        return out if before[axis] == after[out] else None
    if op in ("reshape", "squeeze", "expand_dims"):
        # Row-major: the axis stays whole where as many entries lie before and behind it.
        ahead, size = math.prod(before[:axis]), before[axis]
        fits = (a for a, n in enumerate(after) if math.prod(after[:a]) == ahead and n == size)
        return None if params.get("dimensions") and op == "reshape" else next(fits, None)
    if op == "reduce_sum":
        return axis - sum(a < axis for a in params["axes"]) if axis not in params["axes"] else None
    if op == "concatenate":
        return axis if axis != params["dimension"] else None
    if op == "slice":
        return axis if before[axis] == after[axis] else None
    if op == "pad":
        untouched = tuple(params["padding_config"][axis]) == (0, 0, 0)
        return axis if index == 0 and untouched and is_zero(graph, node.inputs[1]) else None
    return None
