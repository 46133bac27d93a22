"""Collects ONNX nodes and constants, and keeps track of how each tensor's axes are ordered.

ONNX convolutions want channels first, linen has them last. Instead of transposing, a `Tensor` says
which of the model's axes each ONNX axis holds, and operations are written for that order. Where a
map is flattened, the order of the flat features is remembered too (`order`), and the dense layer
behind it permutes the rows of its weight. A Transpose is written only where an operation cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class OnnxNode(NamedTuple):
    """A node to be written."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An ONNX tensor that holds a value of the model.

    Attributes:
        name: in the ONNX graph.
        shape: of the model's value, in the model's axes; the batch axis is -1.
        perm: ONNX axis i holds the model's axis perm[i].
        order: (axis, index): along this axis of the model, the ONNX tensor's entry i is the
            model's entry index[i]. None where entries stand in the model's order.
    """

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    order: tuple[int, np.ndarray] | None = None

    def renumbered(self, name: str, shape: tuple[int, ...], axes: Sequence[int]) -> Tensor:
        """Returns the tensor where axis a of the model has become axes[a]; -1 has gone."""
        order = None
        if self.order is not None and axes[self.order[0]] >= 0:
            order = axes[self.order[0]], self.order[1]
        return Tensor(name, shape, tuple(axes[a] for a in self.perm if axes[a] >= 0), order)

    def without(self, name: str, axes: Sequence[int]) -> Tensor:
        """Returns the tensor without some axes of the model."""
        kept = [a for a in range(len(self.shape)) if a not in axes]
        numbers = [kept.index(a) if a in kept else -1 for a in range(len(self.shape))]
        return self.renumbered(name, tuple(self.shape[a] for a in kept), numbers)


class Writer:
    """Nodes, constants and names of an ONNX graph being written."""

    def __init__(self, opset: int):
        self.opset = opset
        self.nodes: list[OnnxNode] = []
        self.constants: dict[str, np.ndarray] = {}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._nodes: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._names: set[str] = set()

    def unique(self, hint: str) -> str:
        """Returns a name that no tensor has, made from a hint."""
        name, count = hint, 1
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def constant(self, array: Any, hint: str, owner: str = "") -> str:
        """Adds a constant; equal ones share a name, unless they have different owners."""
        array = np.asarray(array)
        key = (array.dtype.name, array.shape, array.tobytes(), owner)
        if key not in self._constants:
            self._constants[key] = self.unique(hint)
            self.constants[self._constants[key]] = array
        return self._constants[key]

    def shape_constant(self, values: Sequence[int], hint: str = "shape") -> str:
        """Adds an int64 vector, as shapes, axes and pads are given since opset 13."""
        return self.constant(np.asarray(values, np.int64), hint)

    def add(self, op: str, inputs: Sequence[str], scope: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name; equal nodes are one."""
        return self.add_several(op, inputs, scope, 1, **attributes)[0]

    def add_several(
        self, op: str, inputs: Sequence[str], scope: str, count: int, **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node with several outputs and returns their names; equal nodes are one."""
        key = (op, tuple(inputs), repr(sorted(attributes.items())))
        if key not in self._nodes:
            name = self.unique(f"{scope}/{op}" if scope else op)
            outputs = tuple(f"{name}:{i}" for i in range(count))
            self.nodes.append(OnnxNode(op, tuple(inputs), outputs, attributes, name))
            self._nodes[key] = outputs
        return self._nodes[key]

    def producer(self, name: str) -> OnnxNode | None:
        """Returns the node that writes a tensor."""
        return next((n for n in reversed(self.nodes) if name in n.outputs), None)

    def live(self, outputs: Sequence[str]) -> tuple[list[OnnxNode], dict[str, np.ndarray]]:
        """Returns the nodes and constants that the outputs depend on."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        kept.reverse()
        return kept, {name: a for name, a in self.constants.items() if name in needed}

    def arranged(self, tensor: Tensor, perm: Sequence[int], scope: str) -> Tensor:
        """Returns the tensor with its axes in another order, transposed if it must be."""
        perm = tuple(perm)
        if tensor.perm == perm:
            return tensor
        moves = [tensor.perm.index(axis) for axis in perm]
        name = self.add("Transpose", [tensor.name], scope, perm=moves)
        return dataclasses.replace(tensor, name=name, perm=perm)

    def ordered(self, tensor: Tensor, scope: str) -> Tensor:
        """Returns the tensor with its entries in the model's order, gathered if they must be."""
        if tensor.order is None:
            return tensor
        axis, index = tensor.order
        indices = self.constant(np.argsort(index).astype(np.int64), "order")
        name = self.add("Gather", [tensor.name, indices], scope, axis=tensor.perm.index(axis))
        return dataclasses.replace(tensor, name=name, order=None)

    def plain(self, tensor: Tensor, scope: str) -> Tensor:
        """Returns the tensor in the model's own order of axes and entries."""
        ordered = self.ordered(tensor, scope)
        return self.arranged(ordered, range(len(tensor.shape)), scope)

    def like(self, array: np.ndarray, tensor: Tensor) -> np.ndarray:
        """Returns a constant of the model in a tensor's order of axes and entries."""
        if array.ndim == 0:
            return array
        if tensor.order is not None:
            axis, index = tensor.order
            if array.shape[axis] != 1:
                array = np.take(array, index, axis)
        array = array.transpose(tensor.perm)
        while array.ndim and array.shape[0] == 1:  # leading ones broadcast by themselves
            array = array[0]
        return array
