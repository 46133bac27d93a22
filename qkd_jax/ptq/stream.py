"""Calibration batches that move through a graph side by side, layer by layer.

A method that changes one layer and wants the next one to see the change would otherwise run the
net once per layer. A `Stream` stands at one node of the graph at a time and keeps what later nodes
need of every batch; values may be replaced before they are read.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.graph import Graph, Node, execute
from qkd_jax.quantize.calibration import model_arguments
from qkd_jax.quantize.traced import is_quantizer


class Stream:
    """Batches on their way through a graph.

    Args:
        graph: traced with `any_batch` and concrete variables, of one image argument.
        batches: arrays [batch, ...].
        quantized: whether calibrated quantizers act; if not, activations pass them unchanged.

    Attributes:
        index: node -> its place in the graph's order.
    """

    def __init__(self, graph: Graph, batches: Iterable[Any], *, quantized: bool = True):
        self.graph = graph
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._quantized = quantized
        self._next = 0
        self._envs = [{graph.inputs[0]: jnp.asarray(batch)} for batch in batches]
        self._sizes = [env[graph.inputs[0]].shape[0] for env in self._envs]
        self._last_use = {v: i for i, node in enumerate(graph.nodes) for v in node.inputs}

    def values(self, value: int) -> list[Any]:
        """Runs the graph until a value is known and returns it in every batch.

        Ask in the order of the graph: a value that no later node reads is gone.
        """
        producer = self.graph.producer(value)
        if producer in self.index:
            while self._next <= self.index[producer]:
                self._step(self.graph.nodes[self._next])
        return [self._read(env, value) for env in self._envs]

    def replace(self, value: int, function: Callable[[Any], Any]) -> None:
        """Puts `function(value)` in a value's place."""
        for env in self._envs:
            env[value] = function(self._read(env, value))

    def _read(self, env: Mapping[int, Any], value: int) -> Any:
        return env[value] if value in env else self.graph.constants[value]

    def _step(self, node: Node) -> None:
        index = self._next
        self._next += 1
        passes = not self._quantized and is_quantizer(node)
        if not passes and all(v in self.graph.constants for v in node.outputs):
            return
        for env, size in zip(self._envs, self._sizes, strict=True):
            inputs = [self._read(env, v) for v in node.inputs]
            if passes:
                env[node.outputs[0]] = jnp.asarray(inputs[0])
                continue
            results = execute(node, inputs, self.graph.batch, size)
            env.update(zip(node.outputs, results, strict=True))
            # A node's inputs stay until the next node runs: they can still be asked for.
            for v in [v for v in env if self._last_use.get(v, len(self.graph.nodes)) < index]:
                del env[v]


def check_finite(name: str, array: Any) -> None:
    """Raises ValueError if an array [examples, ...] holds NaN or infinite values."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.inexact):  # tokens, random keys
        return
    array = np.asarray(array)
    if np.isfinite(array).all():
        return
    rows = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    bad = "NaN" if np.isnan(array).any() else "infinite values"
    raise ValueError(
        f"{name} holds {bad} in {np.count_nonzero(rows)} of {len(array)} examples, the first of "
        f"them example {int(np.argmax(rows))}; take these out."
    )


def image_batches(batches: Iterable[Any]) -> list[np.ndarray]:
    """Returns batches as image arrays; padding is left out.

    Args:
        batches: arrays [batch, ...], dicts with "image" (and "mask", 0 for padding), or tuples of
            one array.

    Raises:
        ValueError: no batch, one batch in place of a list, an empty one, more arguments, or an
            image with NaN or infinite values: one such pixel moves what a whole layer learns.
    """
    checks.list_of_batches(batches)
    arrays = []
    for index, batch in enumerate(batches):
        arguments = tuple(batch) if isinstance(batch, list) else model_arguments(batch)
        if len(arguments) != 1:
            raise ValueError(
                f"a batch is a tuple of {len(arguments)} arrays; this method runs models of one "
                "input. Give arrays of images, and other arguments by keyword."
            )
        if len(arguments[0]):
            arrays.append(np.asarray(arguments[0]))
            check_finite(f"batches[{index}]", arrays[-1])
    checks.at_least_one("batches", arrays)
    return arrays
