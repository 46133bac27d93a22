"""The graph of a traced function: its operations and the values between them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qkd_jax.graph.execution import Node, execute, is_exact


class Constants(Mapping[int, np.ndarray]):
    """Arrays known before the inputs are; computed when first read, then kept.

    They have the bits of the compiled function: what leads to them runs one operation after the
    other where each of these rounds by itself, and else as one compiled program.

    Args:
        known: value -> array: variables, literals and arrays of the model's code.
        nodes: what computes the others, in order.
        variables: the values that are variables; a compiler sees the numbers of the others.
        read: the values that the rest of the graph reads, which are compiled together.
    """

    def __init__(
        self,
        known: dict[int, Any],
        nodes: Sequence[Node],
        variables: Collection[int] = (),
        read: Collection[int] = (),
    ):
        self.known = known
        self.pending = {v: node for node in nodes for v in node.outputs}
        self.variables, self.read = frozenset(variables), frozenset(read)
        self.compiled: set[int] = set()  # values that an operation leads to which is not exact
        for node in nodes:
            if not is_exact(node) or not self.compiled.isdisjoint(node.inputs):
                self.compiled.update(node.outputs)

    def __getitem__(self, value: int) -> np.ndarray:
        if value not in self.known:
            # Also when first read while something else is traced.
            with jax.ensure_compile_time_eval():
                if value in self.compiled:
                    self._compile(value)
                else:
                    node = self.pending[value]
                    self._keep(node.outputs, execute(node, [self[v] for v in node.inputs]))
        return self.known[value]

    def _keep(self, values: Sequence[int], results: Sequence[Any]) -> None:
        self.known.update((v, np.asarray(r)) for v, r in zip(values, results, strict=True))

    def _compile(self, value: int) -> None:
        """Computes a value and the others of its kind that are read, in one compiled program."""
        wanted = [v for v in {value, *self.read} if v in self.compiled and v not in self.known]
        needed, nodes = set(wanted), []
        for node in reversed(dict.fromkeys(self.pending.values())):
            if not needed.isdisjoint(node.outputs):
                nodes.append(node)
                needed.update(node.inputs)
        variables = {v: self.known[v] for v in needed & self.variables}

        def program(variables: dict[int, Any]) -> list[Any]:
            env = {**self.known, **variables}
            for node in reversed(nodes):
                results = execute(node, [env[v] for v in node.inputs])
                env.update(zip(node.outputs, results, strict=True))
            return [env[v] for v in wanted]

        self._keep(wanted, jax.jit(program)(variables))

    def __contains__(self, value: object) -> bool:
        return value in self.known or value in self.pending

    def __iter__(self) -> Iterator[int]:
        return iter({**self.known, **self.pending})

    def __len__(self) -> int:
        return len({**self.known, **self.pending})


@dataclasses.dataclass(eq=False)
class Graph:
    """A traced function: values are integers, nodes are in topological order.

    Attributes:
        nodes: live operations whose result depends on the inputs, and all live markers.
        inputs: one value per array among the traced arguments (`jax.tree.leaves` order).
        outputs: one value per array among the results.
        leaves: value -> path of a variable, e.g. "params/conv/kernel".
        constants: value -> array, for leaves, literals and all that is computed from variables
            alone (evaluated when first read). Without concrete variables: literals only.
        sources: value -> paths of the leaves it depends on, for values fixed by the variables.
        avals: value -> shape and dtype.
        batch: the size of the traced batch axis if the graph serves any batch size, else None.
        out_tree: structure of the results.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    leaves: dict[int, str]
    constants: Constants
    sources: dict[int, frozenset[str]]
    avals: dict[int, jax.ShapeDtypeStruct]
    batch: int | None
    out_tree: Any

    def __post_init__(self) -> None:
        self._producer = {v: node for node in self.nodes for v in node.outputs}
        self._consumers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for v in dict.fromkeys(node.inputs):
                self._consumers.setdefault(v, []).append(node)

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns a value's shape (the batch axis as it was traced, see `batch`)."""
        return tuple(self.avals[value].shape)

    def dtype(self, value: int) -> np.dtype:
        """Returns a value's dtype."""
        return self.avals[value].dtype

    def batch_axis(self, value: int) -> int:
        """Returns the axis of a value that counts examples; 0 where none is recognised."""
        batch = self.batch
        if batch is None:
            return 0
        return next((i for i, n in enumerate(self.shape(value)) if n and n % batch == 0), 0)

    def producer(self, value: int) -> Node | None:
        """Returns the node that writes a value, a constant's too; None for inputs and leaves."""
        return self._producer.get(value) or self.constants.pending.get(value)

    def consumers(self, value: int) -> list[Node]:
        """Returns the nodes that read a value; being a result of the graph does not show here."""
        return self._consumers.get(value, [])

    def sole_consumer(self, value: int) -> Node | None:
        """Returns the only reader of a value, or None if there are several or it is a result."""
        readers = self.consumers(value)
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def run(self, *args: Any) -> Any:
        """Executes the graph as it was traced, at any batch size if it was traced so."""
        flat = jax.tree.leaves(args)
        env: dict[int, Any] = dict(zip(self.inputs, flat, strict=True))
        batch = flat[0].shape[0] if self.batch else None
        for node in self.nodes:
            if all(v in self.constants for v in node.outputs):
                continue
            values = [env[v] if v in env else self.constants[v] for v in node.inputs]
            results = execute(node, values, self.batch, batch)
            env.update(zip(node.outputs, results, strict=True))
        results = [env[v] if v in env else self.constants[v] for v in self.outputs]
        return jax.tree.unflatten(self.out_tree, results)
