"""Axes that lifted layers (`nn.scan`, `nn.vmap`) add to the arrays that are kept of an operand.

Flax stacks what a lifted layer writes along an axis of its transform (`variable_axes`), counted
from either end of the array. A number has no axis 1, and the last axis of an array of three axes is
not that of one of two. So inside the layer every array has the rank of its operand or one more, and
outside `StackedAxes` knows which of its axes are stacked. A scale that is kept so broadcasts
against the stacked weight, wherever the members lie.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class StackedAxes:
    """The stacked axes of the arrays that are kept of one operand.

    Attributes:
        rank: of the operand inside its layer, its groups cut.
        shared: whether all of the operand shares its parameters, which are numbers then.
        axes: rank of an array inside the layer -> its stacked axes outside, ascending; empty for a
            layer that is not lifted.
    """

    rank: int
    shared: bool
    axes: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def in_front(self, tree: Any) -> Any:
        """Returns arrays with their stacked axes first, and numbers where there are none."""
        if not self.axes:
            drop = self.rank if self.shared else 0
            return jax.tree.map(lambda a: jnp.reshape(a, a.shape[drop:]) if drop else a, tree)
        count = len(self.axes[self.rank])
        return jax.tree.map(
            lambda a: jnp.moveaxis(a, self.axes[a.ndim - count], range(count)), tree
        )

    def in_place(self, tree: Any) -> Any:
        """Returns arrays of `in_front`, or made of them, as the layer's transform stacks them."""
        if not self.axes:
            return tree
        count = len(self.axes[self.rank])
        return jax.tree.map(
            lambda a: jnp.moveaxis(a, range(count), self.axes[a.ndim - count]), tree
        )

    def stacked(self, tree: Any, template: Any) -> Any:
        """Returns arrays of the layer as its transform stacks those that all members share."""
        if not self.axes:
            return tree
        return jax.tree.map(
            lambda a, one: jnp.broadcast_to(jnp.expand_dims(a, self.axes[a.ndim]), one.shape),
            tree,
            template,
        )


def of_rank(tree: Any, rank: int, *, shared: bool) -> Any:
    """Returns arrays with leading axes of size 1, so that they can be stacked along any axis.

    Args:
        tree: arrays; numbers, and all of them where the operand shares its parameters, get `rank`
            axes more.
        rank: of the operand.
        shared: whether all of the operand shares its parameters.
    """
    return jax.tree.map(
        lambda a: a.reshape((*(1,) * rank, *a.shape)) if shared or a.ndim == 0 else a, tree
    )


def like(tree: Any, template: Any) -> Any:
    """Returns arrays of `of_rank` in the shapes of a template."""
    return jax.tree.map(lambda a, one: jnp.reshape(a, one.shape), tree, template)


def probes(rank: int) -> dict[str, dict[str, jax.Array]]:
    """Returns arrays of the ranks that are kept, in two sizes: what stays the same is stacked."""
    return {
        str(size): {str(n): jnp.zeros((size,) * n) for n in (rank, rank + 1)} for size in (1, 2)
    }


def stacked_axes(rank: int, shared: bool, probed: Mapping[str, Any]) -> StackedAxes:
    """Returns the stacked axes that `probes` show outside their layer."""
    axes = {}
    for n in (rank, rank + 1):
        shapes = (probed[str(size)][str(n)].shape for size in (1, 2))
        axes[n] = tuple(i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a == b)
    return StackedAxes(rank, shared, axes if axes[rank] else {})
