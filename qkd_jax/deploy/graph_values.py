"""What the writers of files ask of a traced graph: its values, and what lies before its grids."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from qkd_jax.graph import Graph, Node, execute
from qkd_jax.quantize.traced import Operand, TracedNet, quantizer_params
from qkd_jax.quantizers import QUANTIZERS


class UnsupportedError(ValueError):
    """An operation of a net that a file has no form for; its message goes on after the writer."""


def unsupported(node: Node, why: str = "") -> UnsupportedError:
    """Builds the error for an operation that cannot be exported."""
    return UnsupportedError(f"cannot write {node.describe()}{': ' + why if why else ''}.")


class Values:
    """The values of a graph: which ones the input reaches, and the numbers of the others.

    Attributes:
        graph: the graph.
        dynamic: the values that depend on an input, or count the examples of its batch.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.dynamic = set(graph.inputs)
        for node in graph.nodes:
            counts = node.op == "iota" and self.shape(node.outputs[0])[node.params["dimension"]]
            if self.dynamic.intersection(node.inputs) or counts == -1:
                self.dynamic.update(node.outputs)

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns a value's shape with -1 for the batch (and for multiples of it)."""
        batch = self.graph.batch or 0
        return tuple(-1 if batch and n and n % batch == 0 else n for n in self.graph.shape(value))

    def fixed(self, value: int, batch: int = 1) -> np.ndarray:
        """Returns a value that no input reaches; one that depends on the batch has batch size 1."""
        if value in self.graph.constants:
            return np.asarray(self.graph.constants[value])
        node = self.graph.producer(value)
        assert node is not None
        first, second = (
            np.asarray(
                execute(node, [self.fixed(v, b) for v in node.inputs], self.graph.batch, b)[
                    node.outputs.index(value)
                ]
            )
            for b in (1, 2)
        )
        if batch == 2:
            return second
        # Sums of another batch size may be added in another order.
        floats = first.dtype.kind == "f"
        tolerance = 1e-5 * np.abs(first[np.isfinite(first)]).max(initial=0) if floats else 0
        if not np.allclose(first, second, rtol=0, atol=tolerance, equal_nan=True):
            raise unsupported(node, "its values differ along the batch")
        return first

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


def in_operand(operand: Operand, array: np.ndarray) -> np.ndarray:
    """Brings an array of the output's rank (or a scalar) to an operand's axes."""
    array = np.asarray(array)
    if array.ndim == 0:
        return array
    index = [array.shape[out] if out is not None else 1 for out in operand.output_axes]
    kept = [out for out in operand.output_axes if out is not None]
    moved = array.transpose([*kept, *(i for i in range(array.ndim) if i not in kept)])
    return moved.reshape(index)


def pre_affine(traced: TracedNet, marker: Node) -> tuple[float, float]:
    """Returns (gain, offset) of the affine function that a quantizer applies before its grid."""
    spec = traced.spec(marker)
    quantizer: Any = QUANTIZERS[spec.quantizer]
    if not hasattr(quantizer, "pre_affine"):
        return 1.0, 0.0
    gain, offset = quantizer.pre_affine(quantizer_params(traced, marker), spec)
    return float(gain), float(offset)


def is_transformed(traced: TracedNet, marker: Node) -> bool:
    """Whether a quantizer's codes are those of something other than what it is given."""
    spec = traced.spec(marker)
    if spec.rounding == "floor" and hasattr(QUANTIZERS[spec.quantizer], "pre_affine"):
        return True  # these round the magnitude down, which below zero is up
    return pre_affine(traced, marker) != (1.0, 0.0)
