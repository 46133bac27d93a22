"""Rematerialisation: the backward pass of a net's blocks computes again what it would keep.

A forward pass keeps what the backward pass reads: for each layer the codes of its operands, and in
float what quantizers, norms and activations read. A block is a child of the net that is a module of
the model's own (a residual block, a transformer layer; not a single linen layer; a child that is a
whole classifier, with a field `num_classes`, is entered). What is kept of it, by name:

* "none": all of that;
* "products": its input, and the outputs of its convolutions and matrix products. What lies between
  them, which is cheap arithmetic, runs again;
* "blocks": its input alone. The block runs again, which adds up to one more forward pass.

A net without blocks keeps everything (see `has_blocks`). The operations are the same, in the same
order. A frozen teacher has no backward pass and keeps nothing.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calls import split_arrays
from qkd_jax.quantize.interceptors import intercepting

POLICIES: dict[str, Callable[..., Any] | None] = {
    "products": jax.checkpoint_policies.dots_saveable,
    "blocks": None,
}
REMAT = ("none", *POLICIES)


def rematerialised(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of arrays that keeps for its backward pass what `name` says.

    Args:
        name: one of REMAT.
        forward: a function of pytrees of arrays, which applies one linen model.
    """
    if name == "none":
        return forward

    def run(*args: Any) -> Any:
        with intercepting(_Blocks(POLICIES[name]), shared=("remat", name)):
            return forward(*args)

    return run


def has_blocks(net: QuantizedModel, images: Any) -> bool:
    """Whether a net has a block, whose backward pass can run it again.

    Args:
        net: the net.
        images: of a batch, [batch, ...], or their shape.
    """
    found = []

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and _is_block(context.module):
            found.append(context.module.path)
        return call(*args, **kwargs)

    def init(key: jax.Array, images: jax.Array) -> Any:
        with intercepting(look):
            return net.init(key, images)

    jax.eval_shape(init, jax.random.key(0), images)
    return bool(found)


class _Blocks:
    """An interceptor that runs each block under `nn.remat`; the block inside runs as it is."""

    def __init__(self, policy: Callable[..., Any] | None):
        self.policy = policy
        self.inside = False

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if self.inside or context.method_name != "__call__" or not _is_block(context.module):
            return call(*args, **kwargs)
        arrays, form = split_arrays((args, kwargs))

        def block(module: nn.Module, *arrays: Any) -> Any:
            args, kwargs = form(arrays)
            return module(*args, **kwargs)

        self.inside = True
        try:
            return nn.remat(block, policy=self.policy)(context.module, *arrays)
        finally:
            self.inside = False


def _is_block(module: nn.Module) -> bool:
    own = not type(module).__module__.startswith("flax.linen")
    return bool(module.path) and own and not hasattr(module, "num_classes")
