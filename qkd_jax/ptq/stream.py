"""Calibration batches that move through a graph side by side, layer by layer.

A method that changes one layer and wants the next one to see the change would otherwise run the
net once per layer. A `Stream` stands at one node of the graph at a time, with what later nodes need
of every batch; values may be replaced before it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.graph import Graph, Node, execute

__all__ = ["Stream", "image_batches"]


class Stream:
    """Batches on their way through a graph.

    Args:
        graph: traced with `any_batch` and concrete variables, of one image argument.
        batches: arrays [batch, ...].
    """

    def __init__(self, graph: Graph, batches: Iterable[Any]):
        self.graph = graph
        self._at = 0
        self._envs = [{graph.inputs[0]: jnp.asarray(batch)} for batch in batches]
        self._sizes = [env[graph.inputs[0]].shape[0] for env in self._envs]
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self._last_use = {v: i for i, node in enumerate(graph.nodes) for v in node.inputs}

    def run(self, node: Node) -> None:
        """Runs up to and including a node; one that lies behind is not run again."""
        while self._at <= self.place[node]:
            self._step(self.graph.nodes[self._at])

    def before(self, node: Node) -> None:
        """Runs what comes before a node, whose inputs are then there."""
        while self._at < self.place[node]:
            self._step(self.graph.nodes[self._at])

    def _step(self, node: Node) -> None:
        place = self._at
        self._at += 1
        if all(v in self.graph.constants for v in node.outputs):
            return
        for env, size in zip(self._envs, self._sizes, strict=True):
            inputs = [env[v] if v in env else self.graph.constants[v] for v in node.inputs]
            env.update(
                zip(node.outputs, execute(node, inputs, self.graph.batch, size), strict=True)
            )
            # A node's inputs stay until the next node runs: they can still be asked for.
            for v in [v for v in env if self._last_use.get(v, len(self.graph.nodes)) < place]:
                del env[v]

    def values(self, value: int) -> list[Any]:
        """The value in every batch: of the node that just ran, or what later nodes read."""
        constants = self.graph.constants
        return [env[value] if value in env else constants[value] for env in self._envs]

    def replace(self, value: int, function: Callable[[Any], Any]) -> None:
        """Puts `function(value)` in a value's place."""
        for env in self._envs:
            old = env[value] if value in env else self.graph.constants[value]
            env[value] = function(old)


def image_batches(batches: Iterable[Any]) -> list[np.ndarray]:
    """Returns batches as image arrays; padding is left out.

    Args:
        batches: arrays [batch, ...], dicts with "image" (and "mask", 0 for padding), or tuples of
            one array.

    Raises:
        ValueError: no batch, one batch in place of a list, an empty one, or more arguments.
    """
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        raise ValueError("batches is one batch; give a list of batches, such as [images].")
    found = []
    for batch in batches:
        if isinstance(batch, Mapping):
            if "image" not in batch:
                raise ValueError(
                    f"a batch has the keys {sorted(batch)}; a dict needs 'image', or give arrays."
                )
            images = np.asarray(batch["image"])
            batch = images[np.asarray(batch["mask"]) > 0] if "mask" in batch else images
        elif isinstance(batch, tuple | list):
            if len(batch) != 1:
                raise ValueError(
                    f"a batch is a tuple of {len(batch)} arrays; this method runs models of one "
                    "input. Give arrays of images, and other arguments by keyword."
                )
            batch = batch[0]
        if len(batch):
            found.append(np.asarray(batch))
    checks.at_least_one("batches", found)
    return found
