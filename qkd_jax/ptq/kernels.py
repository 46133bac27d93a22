"""A layer's weight as a bilinear map between input and output channels, in any layout."""

import dataclasses

import numpy as np

from qkd_jax.graph import Graph, Node
from qkd_jax.ptq.leaves import IDENTITY, Readers, entries, leaf
from qkd_jax.quantize.traced import TracedContraction, TracedNet


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """The weight of a product that reads one variable, as it is and alone.

    Attributes:
        product: the product.
        path: of the variable.
        entries: which of the variable's entries these are, as flat indices.
        out_axis: the axis that becomes the last axis of the output, or None.
        in_axis: the axis summed with the last axis of the input, or None.
        groups: of a grouped convolution; input channel g * n + i is entry i of group g.
    """

    product: TracedContraction
    path: str
    entries: np.ndarray
    out_axis: int | None
    in_axis: int | None
    groups: int

    @property
    def layer(self) -> str:
        """The layer's path."""
        return self.product.path

    @property
    def one_output(self) -> bool:
        """Whether one axis alone reaches the output: no members of a vmapped layer, no heads."""
        reach = [i for i, out in enumerate(self.product.operands[1].output_axes) if out is not None]
        return reach == [self.out_axis]

    @property
    def in_channels(self) -> int:
        """Number of input channels, of all groups."""
        assert self.in_axis is not None
        return self.product.operands[1].shape[self.in_axis] * self.groups

    @property
    def depthwise(self) -> bool:
        """Whether each input channel has one output channel of its own."""
        if self.in_axis is None or self.out_axis is None or self.groups == 1:
            return False
        shape = self.product.operands[1].shape
        return shape[self.in_axis] == 1 and shape[self.out_axis] == self.groups

    def out_ranges(self, array: np.ndarray) -> np.ndarray:
        """Returns the largest |w| of each output channel."""
        assert self.out_axis is not None
        axes = tuple(i for i in range(array.ndim) if i != self.out_axis)
        return np.abs(array).max(axis=axes)

    def in_ranges(self, array: np.ndarray, channels: int) -> np.ndarray:
        """Returns the largest |w| of each input channel; a flattened map's positions share one."""
        largest = np.abs(self._split(array)).max(axis=(0, 3)).T.reshape(-1)
        return largest.reshape(-1, channels).max(axis=0)

    def scale_out(self, array: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Multiplies the output channels."""
        assert self.out_axis is not None
        return array * _along(array.ndim, factor, self.out_axis)

    def scale_in(self, array: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Multiplies the input channels."""
        assert self.in_axis is not None
        grouped = self._by_group(factor).T  # [in / groups, groups]
        if self.out_axis is None:
            return array * _along(array.ndim, grouped, self.in_axis)
        factors = np.repeat(grouped, array.shape[self.out_axis] // self.groups, axis=1)
        shape = [1] * array.ndim
        shape[self.in_axis], shape[self.out_axis] = factors.shape
        return array * (factors if self.in_axis < self.out_axis else factors.T).reshape(shape)

    def through(self, array: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Returns the output [out] for an input that is `x` per channel at every position."""
        return np.einsum("rigo,gi->go", self._split(array), self._by_group(x)).reshape(-1)

    def _by_group(self, x: np.ndarray) -> np.ndarray:
        """Returns a number per channel as [groups, in / groups], repeated over positions."""
        return np.tile(x, self.in_channels // x.size).reshape(self.groups, -1)

    def _split(self, array: np.ndarray) -> np.ndarray:
        """Returns [rest, in / groups, groups, out / groups]."""
        assert self.in_axis is not None
        if self.out_axis is None:
            moved = np.moveaxis(array, self.in_axis, -1)[..., None]
        else:
            moved = np.moveaxis(array, (self.in_axis, self.out_axis), (-2, -1))
        *rest, inputs, outputs = moved.shape
        return moved.reshape(int(np.prod(rest)), inputs, self.groups, outputs // self.groups)


def _along(rank: int, factor: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * rank
    shape[axis] = -1
    return factor.reshape(shape)


def kernel(
    traced: TracedNet, product: TracedContraction, readers: Readers, *, part: bool = False
) -> Kernel | None:
    """Returns a product's weight; None where it is shared, rearranged, or no layer's weight.

    Args:
        traced: the net.
        product: the product.
        readers: of its variables.
        part: also take a part of a variable that no other product reads (a step of a scan).
    """
    weight = product.operands[1]
    if weight.name != "weight" or weight.marker is None or weight.moves:
        return None
    found = entries(traced.graph, weight.marker.inputs[0])
    if found is None:
        return None
    path, index = found
    whole = leaf(traced.graph, weight.marker.inputs[0], IDENTITY) is not None
    if whole and readers[path] != [weight.marker]:
        return None
    if not whole and not (part and is_alone(traced.graph, weight.marker, path, index, readers)):
        return None
    params, groups = product.node.params, 1
    numbers = params["dimension_numbers"]
    last_in, last_out = len(product.operands[0].shape) - 1, product.rank - 1
    if product.node.op == "conv_general_dilated":
        if params["batch_group_count"] != 1:
            return None
        groups = params["feature_group_count"]
        contracted = {numbers.lhs_spec[1]: numbers.rhs_spec[1]}
    else:
        contracted = dict(zip(*numbers[0], strict=True))
    axes = weight.output_axes
    out_axis = axes.index(last_out) if last_out in axes else None
    return Kernel(product, path, index, out_axis, contracted.get(last_in), groups)


def is_alone(graph: Graph, marker: Node, path: str, index: np.ndarray, readers: Readers) -> bool:
    """Whether nothing but a marker reads some entries of a variable."""
    own = np.zeros(int(index.max(initial=0)) + 1, bool)
    own[index] = True
    for reader in readers[path]:
        if reader is marker:
            continue
        found = entries(graph, reader.inputs[0])
        others = [v for v in reader.inputs[1:] if path in graph.sources.get(v, ())]
        if found is None or found[0] != path or others:
            return False
        if own[found[1][found[1] < own.size]].any():
            return False
    return True
