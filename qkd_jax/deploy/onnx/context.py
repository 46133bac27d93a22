"""The state of one ONNX export: which tensor holds which value of the graph."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qkd_jax import graph as graphs
from qkd_jax.deploy.onnx.engines import import_engine
from qkd_jax.deploy.onnx.writer import Tensor, Writer
from qkd_jax.graph import Node
from qkd_jax.numerics import IntFormat
from qkd_jax.quantize.traced import TracedNet, products

__all__ = ["Export", "Found", "UnsupportedError", "needs_opset_21", "unsupported"]


class UnsupportedError(ValueError):
    """An operation of a net that cannot be written in ONNX."""


def unsupported(node: Node, why: str = "") -> UnsupportedError:
    """Builds the error for an operation that cannot be exported."""
    return UnsupportedError(f"to_onnx cannot write {node.describe()}{': ' + why if why else ''}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A tensor whose range is found at run time.

    Attributes:
        codes: its codes, in the format's own type.
        centred: its codes less the zero point, as floats.
        scale: of each entry along `axes`; as many axes as the tensor, or none.
        zero_point: as scale, float; "" where it is 0.
        axes: of the model's value, with ranges of their own.
        format: of the codes.
    """

    codes: str
    centred: str
    scale: str
    zero_point: str
    axes: tuple[int, ...]
    format: IntFormat


def needs_opset_21(export: Export, path: str, format: IntFormat) -> None:
    """Raises ValueError for codes that the opset has no type for."""
    if format.bits > 8 and export.writer.opset < 21:
        raise ValueError(
            f"layer {path!r} has codes of {format.bits} bits, and ONNX quantizes to 16 bits since "
            f"opset 21; this export has opset={export.writer.opset}."
        )


class Export:
    """One export: walks the graph and remembers which ONNX tensor holds which value."""

    def __init__(
        self,
        traced: TracedNet,
        opset: int,
        *,
        int4: bool = False,
        activations: str = "uint8",
        offset_before_rounding: bool = False,
    ):
        self.traced, self.graph = traced, traced.graph
        self.int4, self.activations = int4, activations
        self.offset_before_rounding = offset_before_rounding
        self.stored: dict[str, tuple[str, str]] = {}  # layer -> its codes, and what holds them
        self.writer = Writer(opset)
        self.products = {p.node: p for p in products(traced.graph)}
        self.tensors: dict[int, Tensor] = {}
        self.absorbed: dict[Node, int] = {}  # nodes already computed, and by which value
        self.grids: dict[Any, str] = {}  # tensor and grid -> its dequantized form
        self.written: dict[str, Any] = {}  # dequantized form -> its grid
        self.largest: dict[str, int] = {}  # dequantized form -> its largest code
        self.found: dict[str, Found] = {}  # dequantized form -> its range, found at run time
        self.saturating: list[str] = []
        self.dynamic = set(self.graph.inputs)
        for node in self.graph.nodes:
            if self.dynamic.intersection(node.inputs):
                self.dynamic.update(node.outputs)

    def input(self, value: int) -> Tensor:
        """Declares an input; images come channels first."""
        shape = self.sizes(value)
        rank = len(shape)
        perm = (0, rank - 1, *range(1, rank - 1)) if rank >= 4 else tuple(range(rank))
        name = "images" if len(self.graph.inputs) == 1 else f"input{len(self.tensors)}"
        return Tensor(self.writer.fresh(name), shape, perm)

    def sums_of_grids(self) -> bool:
        """Whether a sum is written whose two sides are on grids."""
        makers = {name: node[0] for node in self.writer.nodes for name in node[2]}
        return any(
            op == "Add" and all(makers.get(name) == "DequantizeLinear" for name in inputs)
            for op, inputs, *_ in self.writer.nodes
        )

    # -- what the writers of operations use --------------------------------------------------

    def add(self, op: str, inputs: list[str], node: Node, **attributes: Any) -> str:
        """Adds an ONNX node named after the module of a graph node."""
        return self.writer.add(op, inputs, node.scope, **attributes)

    def sizes(self, value: int) -> tuple[int, ...]:
        """Returns a value's shape with -1 for the batch (and for multiples of it)."""
        batch = self.graph.batch or 0
        return tuple(-1 if batch and n and n % batch == 0 else n for n in self.graph.shape(value))

    def shape(self, node: Node) -> tuple[int, ...]:
        """Returns the shape of a node's result, with -1 for the batch."""
        return self.sizes(node.outputs[0])

    def operand(self, value: int) -> Any:
        """Returns a value as a Tensor, or as an array where the input does not reach it."""
        return self.tensors[value] if value in self.dynamic else self.fixed(value)

    def fixed(self, value: int, batch: int = 1) -> np.ndarray:
        """Returns a value that no input reaches; one that depends on the batch has batch size 1."""
        if value in self.graph.constants:
            return np.asarray(self.graph.constants[value])
        node = self.graph.producer(value)
        assert node is not None
        one, two = (
            graphs.execute(node, [self.fixed(v, b) for v in node.inputs], self.graph.batch, b)
            for b in (1, 2)
        )
        place = node.outputs.index(value)
        if batch == 2:
            return np.asarray(two[place])
        first, second = np.asarray(one[place]), np.asarray(two[place])
        if not np.array_equal(np.broadcast_to(first, second.shape), second, equal_nan=True):
            raise unsupported(node, "its values differ along the batch")
        return first

    def storage(self, path: str, format: IntFormat) -> np.dtype:
        """Returns the type that holds the codes of a layer's weight."""
        needs_opset_21(self, path, format)
        dtype = np.dtype(format.storage)
        if self.int4 and format.bits <= 4:
            dtype = np.dtype(jax.numpy.int4 if format.signed else jax.numpy.uint4)
        self.stored[path] = (format.name, dtype.name)
        return dtype

    def same(self, tensor: Tensor, name: str) -> Tensor:
        """Returns a tensor like another one under a new name."""
        return dataclasses.replace(tensor, name=name)

    def result(self, node: Node, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor for a node's result, ordered like one of its operands."""
        return dataclasses.replace(tensor, name=name, shape=self.shape(node))

    def element_type(self, dtype: np.dtype) -> int:
        """Returns ONNX's number for a NumPy type."""
        return int(import_engine("onnx").helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def aligned(self, node: Node, *operands: Any) -> tuple[list[str], Tensor]:
        """Brings operands of an elementwise operation to one order; returns names and order."""
        tensors = [o for o in operands if isinstance(o, Tensor) and o.perm]
        if not tensors:
            tensors = [o for o in operands if isinstance(o, Tensor)]
        # A channels-first map decides, so that the other one moves and not the map.
        guide = max(tensors, key=lambda t: t.perm != tuple(range(len(t.perm))))
        if any(not _same_order(t, guide) for t in tensors):
            tensors = [self.writer.ordered(t, node.scope) for t in tensors]
            guide = dataclasses.replace(guide, order=None)
        names = []
        for operand in operands:
            if not isinstance(operand, Tensor):
                array = self.writer.like(np.asarray(operand), guide)
                names.append(self.writer.constant(array, _hint(node)))
            elif operand.perm:
                if not _same_order(operand, guide):
                    operand = self.writer.ordered(operand, node.scope)
                names.append(self.writer.arranged(operand, guide.perm, node.scope).name)
            else:
                names.append(operand.name)
        return names, guide

    def takes_mean(self, node: Node, x: Tensor, axes: tuple[int, ...]) -> bool:
        """Whether the sum is only divided by its number of terms; that division is then done."""
        terms = int(np.prod([x.shape[a] for a in axes]))
        return terms > 0 and self._absorbs(node, lambda a: a.ndim == 0 and a == terms)

    def takes_average(self, node: Node, window: tuple[int, ...]) -> int:
        """Absorbs the division behind a sum over windows; returns count_include_pad."""
        if self._absorbs(node, lambda a: a.ndim == 0 and a == np.prod(window)):
            return 1
        ones = np.ones([1 if n == -1 else n for n in self.sizes(node.inputs[0])], np.float32)
        (counts,) = graphs.execute(node, [jax.numpy.asarray(ones)], self.graph.batch, 1)
        counts = np.asarray(counts)
        same = self._absorbs(
            node, lambda a: a.ndim == counts.ndim and bool(np.all(a - counts == 0))
        )
        return 0 if same else 1

    def averaged(self, node: Node) -> bool:
        """Whether the division behind a sum has been absorbed."""
        return node.outputs[0] in self.absorbed.values()

    def _absorbs(self, node: Node, wanted: Any) -> bool:
        (out,) = node.outputs
        reader = self.graph.sole_consumer(out)
        if reader is None or reader.op != "div" or reader.inputs[0] != out:
            return False
        if reader.inputs[1] in self.dynamic or not wanted(self.fixed(reader.inputs[1])):
            return False
        self.absorbed[reader] = out
        return True

    def constant_readers(self, value: int) -> Iterator[tuple[Node, bool, np.ndarray]]:
        """Follows a value through sums and products with constants, as long as it has one reader.

        Yields:
            (node, whether the value is the left operand, the constant).
        """
        while (node := self.graph.sole_consumer(value)) is not None:
            if node.op not in ("add", "sub", "mul", "div") or len(node.inputs) != 2:
                return
            left = node.inputs[0] == value
            other = node.inputs[1 if left else 0]
            if other in self.dynamic:
                return
            with contextlib.suppress(KeyError):
                yield node, left, self.fixed(other)
            value = node.outputs[0]


def _same_order(a: Tensor, b: Tensor) -> bool:
    if a.order is None or b.order is None:
        return a.order is b.order
    return a.order[0] == b.order[0] and np.array_equal(a.order[1], b.order[1])


def _hint(node: Node) -> str:
    return f"{node.scope}/{node.op}_constant" if node.scope else f"{node.op}_constant"
