"""The values of a traced graph as a file sees them: those of the input, and constants."""

import contextlib
from collections.abc import Iterator

import numpy as np

from qkd_jax.graph import Graph, Node, execute


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
