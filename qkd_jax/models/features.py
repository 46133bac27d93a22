"""Named features of a net: its inner activations, for losses that look at them."""

from __future__ import annotations

import flax.linen as nn
import jax

__all__ = ["sow_feature"]


def sow_feature(module: nn.Module, name: str, x: jax.Array) -> None:
    """Sows `x` into the collection "features" of `module` under `name`, unless initialising.

    `init` makes every collection mutable. Features sown then would stay in the variables, be
    carried through training and checkpoints, and come first in the tuple that a later `apply`
    returns.
    """
    if not module.is_initializing():
        module.sow("features", name, x)
