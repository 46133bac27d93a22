"""The contractions of a traced net: the layers they belong to, and their operands.

Folding, conversion and export all start from this list. An operand is followed back through
operations that only move numbers (`LAYOUT`) to the marker that the net's trace mode put on it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.core.scope import in_filter

from qkd_jax import graph as graphs
from qkd_jax.graph import CONTRACTIONS, LAYOUT, Axes, Graph, Node, output_axes
from qkd_jax.numerics import Grid, Spec, check_scale, check_zero_point
from qkd_jax.quantize.calls import (
    call_arguments,
    explaining_failures,
    own_arguments,
    own_batch_alone,
    split_arrays,
)
from qkd_jax.quantize.interceptors import intercepting
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.operands import split_groups
from qkd_jax.quantize.variables import is_calibrated, quantizer_path, split_multipliers
from qkd_jax.quantizers import (
    QUANTIZERS,
    check_sizes,
    dynamic_params,
    in_use,
    is_uniform,
    learns_bits,
)
from qkd_jax.trees import get, unboxed


@dataclasses.dataclass(frozen=True, eq=False)
class TracedNet:
    """A net's graph, and the modules that the folding of BatchNorm can speak to.

    Attributes:
        net: the net.
        variables: as traced, that is without the multipliers of layers that are folded already.
        graph: works at any batch size, unless it was traced for one.
        multipliers: layer path -> output multiplier of a folded layer.
        norms: paths of the `nn.BatchNorm` modules.
        layers: paths of the layers that honour `folded`: convolutions and dense layers.
        states: inputs of the graph that are no arguments, but a cache or other mutable collection.
    """

    net: QuantizedModel
    variables: dict[str, Any]
    graph: Graph
    multipliers: dict[str, np.ndarray]
    norms: frozenset[str]
    layers: frozenset[str]
    states: frozenset[int] = frozenset()

    def spec(self, marker: Node) -> Spec:
        """Returns the spec of a quantizer node."""
        spec = self.net.spec_of(marker.params["path"], marker.params["operand"])
        assert spec is not None
        return spec


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """One side of a contraction.

    Attributes:
        value: what the contraction reads.
        shape: its shape.
        output_axes: per axis, the output axis it becomes, or None where it is summed over.
        marker: the quantizer (or the mark of a skipped one) it comes from, or None.
        marker_shape: shape of what the marker writes.
        moves: the layout operations between the two, first one first. Casts are left out, for
            they change no code.
    """

    value: int
    shape: tuple[int, ...]
    output_axes: Axes
    marker: Node | None = None
    marker_shape: tuple[int, ...] = ()
    moves: tuple[Node, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the operand comes from a calibrated quantizer."""
        return is_quantizer(self.marker)

    def moved(self, array: np.ndarray) -> np.ndarray:
        """Returns an array of the marker's shape in the layout that the contraction reads."""
        for node in self.moves:
            array = np.asarray(graphs.execute(node, [array])[0])
        return array

    @property
    def name(self) -> str:
        """The operand's name: "input", "other", "weight", or "" without a marker."""
        return "" if self.marker is None else self.marker.params["operand"]


@dataclasses.dataclass(frozen=True, eq=False)
class TracedContraction:
    """A convolution or `dot_general` of the graph.

    Attributes:
        node: the operation.
        path: path of its layer; the scope, for a contraction in a model's own code.
        operands: left and right.
        rank: of the output.
    """

    node: Node
    path: str
    operands: tuple[Operand, Operand]
    rank: int

    @property
    def weight(self) -> Operand | None:
        """The operand that is a layer's weight."""
        return next((o for o in self.operands if o.name == "weight"), None)

    @property
    def quantized(self) -> bool:
        """Whether both operands are on a grid, so that the contraction is one of integers."""
        return all(o.quantized for o in self.operands)


def trace_net(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    any_batch: bool = True,
    **kwargs: Any,
) -> TracedNet:
    """Traces a net in eval mode, for any batch size or its own; `kwargs` go to the model's call.

    The graph's inputs are the arrays of `images` and then those of the collections that `mutable`
    names, such as a cache; arrays among `kwargs` are constants.
    """
    arguments = call_arguments(net.model, kwargs.get("method"), images, own_arguments(kwargs))
    arrays, joined = split_arrays(arguments)
    # A leaf's name is the parameter's path, without what boxes add to it.
    variables, multipliers = split_multipliers(unfreeze(unboxed(dict(variables))))
    carried = {name: variables[name] for name in variables if _is_carried(name, kwargs)}
    variables = {name: variables[name] for name in variables if name not in carried}
    norms: set[str] = set()
    layers: set[str] = set()

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if isinstance(context.module, nn.BatchNorm):
            norms.add(path)
        elif isinstance(context.module, nn.Conv | nn.DenseGeneral | nn.Dense):
            layers.add(path)
        return next_fun(*args, **kwargs)

    def forward(variables: Any, arrays: Any, carried: Any) -> Any:
        with intercepting(note):
            return net.trace_apply({**variables, **carried}, *joined(arrays), **kwargs)

    try:
        traced = graphs.trace(forward, variables, arrays, carried, any_batch=any_batch)
    except Exception as error:
        shapes = list(map(graphs.shape_of, arrays))
        with explaining_failures(images):
            jax.eval_shape(forward, variables, shapes, carried)
        batches = {a.shape[:1] for a in shapes}
        if any_batch and not carried and len(batches) == 1 and batches != {()}:
            other = [jax.ShapeDtypeStruct((a.shape[0] + 1, *a.shape[1:]), a.dtype) for a in shapes]
            try:
                jax.eval_shape(forward, variables, other, carried)
            except Exception as cause:
                raise own_batch_alone(batches, own_arguments(kwargs), cause) from cause
        raise error
    states = frozenset(traced.inputs[len(arrays) :])
    return TracedNet(
        net, variables, traced, multipliers, frozenset(norms), frozenset(layers), states
    )


def _is_carried(collection: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a collection is state that a call reads and gives back, as a decoder's cache."""
    if collection in ("params", "batch_stats", "quant"):
        return False
    return in_filter(kwargs.get("mutable", False), collection)


def is_quantizer(node: Node | None) -> bool:
    """Whether a node is a calibrated quantizer; before calibration it has no parameters."""
    return node is not None and node.op == "quantizer" and len(node.inputs) > 1


def refuse_uncalibrated(traced: TracedNet, *, float_passes: bool = False) -> None:
    """Raises ValueError for operands that have a spec and no quantizer.

    With `float_passes`, a net without any quantizer is taken for the float net that it is.
    """
    if float_passes and not is_calibrated(traced.variables):
        return
    missing = [
        f"{node.params['operand']} of layer {node.params['path']!r}"
        for node in traced.graph.nodes
        if node.op == "quantizer" and not is_quantizer(node)
    ]
    if missing:
        raise ValueError(
            f"NOT CALIBRATED: {', '.join(dict.fromkeys(missing))}. Rules quantize them, and they "
            "have no quantizer, so they would run in float. Calibrate them (a call of `calibrate` "
            "with another `method` keeps the quantizers that it does not reach), or leave them in "
            "float with a rule without specs before the others; `quantize(model, [])` is float."
        )


def contractions(graph: Graph) -> list[TracedContraction]:
    """Returns the contractions of a graph, in order."""
    found = []
    for node in graph.nodes:
        if node.op not in CONTRACTIONS:
            continue
        ranks = [len(graph.shape(value)) for value in node.inputs[:2]]
        axes = output_axes(node.op, node.params["dimension_numbers"], ranks)
        left, right = (_operand(graph, node.inputs[i], axes[i]) for i in (0, 1))
        paths = [o.marker.params["path"] for o in (right, left) if o.marker is not None]
        path = paths[0] if paths else node.scope
        rank = len(graph.shape(node.outputs[0]))
        found.append(TracedContraction(node, path, (left, right), rank))
    return found


def quantizer_params(traced: TracedNet, marker: Node) -> dict[str, np.ndarray]:
    """Returns the parameters of a calibrated quantizer node, by name."""
    names = get(traced.variables, quantizer_path(marker.params["path"], marker.params["operand"]))
    # The values come from the graph: under a scan, each step has its slice of the variables.
    values = (traced.graph.constants[v] for v in marker.inputs[1:])
    return dict(zip(sorted(names), values, strict=True))


def has_codes(traced: TracedNet, operand: Operand) -> bool:
    """Whether an operand is integer codes times a scale that can be taken out of its contraction.

    False for float operands, for grids that are not uniform (floating point, code books), for
    groups, whose scale varies along the sum, and for dynamic ranges.
    """
    marker = operand.marker
    if not operand.quantized or marker is None or is_dynamic(traced, marker):
        return False
    return has_integer_codes(traced, marker) and _known_grid_of(traced, marker) is not None


def has_integer_codes(traced: TracedNet, marker: Node) -> bool:
    """Whether a quantizer's values are integer codes, and its scales do not vary in groups."""
    return marker.params["group"] is None and is_uniform(traced.spec(marker))


def own_axes(marker: Node) -> tuple[int, ...]:
    """Returns the axes with dynamic ranges of their own, of the tensor with its groups cut."""
    return tuple(axis for axis, own in enumerate(marker.params["dynamic_axes"]) if own == "1")


def grid_of(traced: TracedNet, marker: Node) -> Grid:
    """Returns the grid of a calibrated quantizer node, its arrays NumPy's.

    Raises:
        ValueError: its values are not integer codes times one scale known beforehand, the scale is
            NaN, infinite, zero or negative, or the zero point no code.
    """
    spec = traced.spec(marker)
    where = named(traced, marker)
    if is_dynamic(traced, marker):
        raise ValueError(
            f"{where} finds its range at run time, and this needs scales that are known "
            "beforehand. Use dynamic=False and calibrate."
        )
    refuse_groups(where, spec)
    grid = _known_grid_of(traced, marker)
    if grid is None:
        raise not_uniform(where)
    check_scale(f"the scale of {where}", grid.scale)
    check_zero_point(where, grid.zero_point, grid.format)
    return Grid(np.asarray(grid.scale), np.asarray(grid.zero_point), grid.format)


def is_dynamic(traced: TracedNet, marker: Node | None) -> bool:
    """Whether a marker is a quantizer of an activation with a dynamic range."""
    if marker is None or not is_quantizer(marker) or not traced.spec(marker).dynamic:
        return False
    return marker.inputs[0] not in traced.graph.constants


def refuse_groups(where: str, spec: Spec) -> None:
    """Raises ValueError for scales that vary along a sum."""
    if isinstance(spec.granularity, int):
        raise ValueError(
            f"{where} has scales that vary along its product's sum, and the integer path scales "
            "sums once. Use granularity='channel'."
        )


def not_uniform(where: str) -> ValueError:
    """Returns the error of a grid without integer codes."""
    return ValueError(
        f"{where} lies on a grid that is not uniform, so it has no integer codes to compute "
        "with. Use a uniform quantizer, such as 'lsq' or 'uniform'."
    )


def _known_grid_of(traced: TracedNet, marker: Node) -> Grid | None:
    params = known_params(traced, marker)
    return None if params is None else known_grid(params, traced.spec(marker))


def known_params(traced: TracedNet, marker: Node) -> dict[str, Any] | None:
    """Returns a quantizer's parameters as they are for its tensor, known beforehand.

    Those that depend on the tensor are computed from it where it is a weight, its groups cut; for
    an activation they are known at run time only: None.

    Raises:
        ValueError: a scale that is NaN, infinite, zero or negative.
    """
    spec, x = traced.spec(marker), None
    params: Any = quantizer_params(traced, marker)
    quantizer = QUANTIZERS[spec.quantizer]
    if marker.inputs[0] in traced.graph.constants and (spec.dynamic or hasattr(quantizer, "live")):
        x = jnp.asarray(traced.graph.constants[marker.inputs[0]], jnp.float32)
        if marker.params["group"] is not None:
            x = split_groups(x, *marker.params["group"])
    if spec.dynamic:
        if x is None:
            return None
        params = dynamic_params(x, spec, own_axes(marker), known=params)
    if hasattr(quantizer, "live"):
        if x is not None:
            params = quantizer.live(x, params, spec)
        elif quantizer.live(np.zeros((1,), np.float32), params, spec) is not params:
            return None
    check_sizes(named(traced, marker), params, spec)
    return params


def known_grid(params: Any, spec: Spec) -> Grid | None:
    """Returns a quantizer's grid where its parameters are known; None for grids without codes.

    Learned bits are then a number: the format is that of the bits in use (the most that a channel
    uses), where `integer_view` has that of their upper bound.
    """
    grid = QUANTIZERS[spec.quantizer].integer_view(params, spec)
    return grid._replace(format=in_use(spec, params).format) if learns_bits(spec) else grid


def named(traced: TracedNet, marker: Node) -> str:
    """Returns a quantizer's name for messages: "weight of layer 'stem' (int4 lsq)"."""
    label = traced.spec(marker).label
    return f"{marker.params['operand']} of layer {marker.params['path']!r} ({label})"


def scale_in_output(contraction: TracedContraction, side: int, scale: np.ndarray) -> np.ndarray:
    """Reshapes an operand's scale, in the operand's own layout, to the contraction's output.

    Args:
        contraction: the contraction.
        side: 0 for the left operand, 1 for the right one.
        scale: a scalar, or one value per entry of the axes that reach the output; of the input of
            a grouped convolution also one for each group.

    Raises:
        ValueError: the scale varies along an axis that is summed over.
    """
    operand = contraction.operands[side]
    if scale.ndim == 0 or scale.size == 1:
        return scale.reshape(())
    if operand.marker is not None and operand.moves:
        # A scale per channel moves with the weight: move it whole and keep one entry an axis.
        whole = operand.moved(np.broadcast_to(scale, operand.marker_shape))
        first = (slice(0, 1) if out is None else slice(None) for out in operand.output_axes)
        scale = whole[tuple(first)]
        if operand.name != "weight":  # broadcast over examples, whose number is another one at run
            for axis in range(scale.ndim):
                one = scale.take([0], axis)
                if np.array_equal(np.broadcast_to(one, scale.shape), scale):
                    scale = one
        if not np.array_equal(np.broadcast_to(scale, whole.shape), whole):
            by_group = _scale_of_groups(contraction, side, whole)
            if by_group is not None:
                return by_group
            scale = whole  # refused below
    try:
        return graphs.scale_in_output(scale, operand.output_axes, contraction.rank)
    except ValueError as error:
        raise ValueError(f"layer {contraction.path!r}: {error}") from None


def _is_cast(graph: Graph, node: Node) -> bool:
    """Whether a node casts from one float type to another."""
    types = (graph.dtype(v) for v in (*node.inputs, *node.outputs))
    return node.op == "convert_element_type" and all(jnp.issubdtype(t, jnp.floating) for t in types)


def _scale_of_groups(
    contraction: TracedContraction, side: int, whole: np.ndarray
) -> np.ndarray | None:
    """Returns the scales of a grouped convolution's input in its output: one for each group.

    So `nn.vmap` runs convolutions: the members are the groups. None where there is no such scale.
    """
    params = contraction.node.params
    groups = params.get("feature_group_count", 1)
    if side == 1 or groups == 1:
        return None
    numbers = params["dimension_numbers"]
    moved = np.moveaxis(whole, numbers.lhs_spec[1], 0).reshape(groups, -1)
    if (moved != moved[:, :1]).any():
        return None
    channels = contraction.operands[1].shape[numbers.rhs_spec[0]]
    shape = [1] * contraction.rank
    shape[numbers.out_spec[1]] = channels
    return np.repeat(moved[:, 0], channels // groups).reshape(shape)


def _operand(graph: Graph, value: int, axes: tuple[int | None, ...]) -> Operand:
    moves: list[Node] = []
    at = value
    while (node := graph.producer(at)) is not None:
        if node.op in graphs.MARKERS:
            origin = graph.shape(node.outputs[0])
            return Operand(value, graph.shape(value), axes, node, origin, tuple(reversed(moves)))
        if node.op in LAYOUT:
            moves.append(node)
        elif not _is_cast(graph, node):
            break
        at = node.inputs[0]
    return Operand(value, graph.shape(value), axes)
