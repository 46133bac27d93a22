"""Names for inner activations: as features, for losses, and as modules, for rules."""

from collections.abc import Callable

import flax.linen as nn
import jax


class Activation(nn.Module):
    """A function as a module: a tensor that several layers read gets a path that rules can name."""

    function: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes function(x)."""
        return self.function(x)


def sow_feature(module: nn.Module, name: str, x: jax.Array) -> None:
    """Sows `x` into the collection "features" of `module` under `name`, unless initialising.

    `init` makes every collection mutable. Features sown then would stay in the variables, be
    carried through training and checkpoints, and come first in the tuple that a later `apply`
    returns.
    """
    if not module.is_initializing():
        module.sow("features", name, x)
