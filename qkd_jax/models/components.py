"""Parts that the models share: convolution, BatchNorm and head with the project's settings."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax.models.features import sow_feature

# One pixel on every side also under stride 2, as the papers' code has it. "SAME" would pad an even
# map on one side only.
ONE_PIXEL = ((1, 1), (1, 1))


def conv_and_norm(module: Any, train: bool) -> tuple[Callable[..., Any], ...]:
    """Returns the constructors of a convolution and a BatchNorm for a module's compact call.

    Convolutions have no bias and start from He's normal initialisation over fan-out; BatchNorm has
    decay 0.9 and epsilon 1e-5.

    Args:
        module: with `dtype` and `axis_name`.
        train: whether BatchNorm uses the batch's statistics and updates its running ones.
    """
    conv = functools.partial(
        nn.Conv,
        use_bias=False,
        dtype=module.dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=module.dtype,
        axis_name=module.axis_name,
    )
    return conv, norm


def logits_of(module: Any, pooled: jax.Array) -> jax.Array:
    """Returns the logits of a dense layer `head` in a module's compact call.

    Args:
        module: with `num_classes` and `dtype`; the head's input is sown as its feature `pooled`.
        pooled: [batch, channels].

    Returns:
        [batch, num_classes], float32 or wider.
    """
    sow_feature(module, "pooled", pooled)
    logits = nn.Dense(module.num_classes, dtype=module.dtype, name="head")(pooled)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def layer_scale(module: Any, name: str, y: jax.Array, start: float | None) -> jax.Array:
    """Returns y times a learned parameter, one number a channel, in a module's compact call.

    Args:
        module: whose parameter it is.
        name: the parameter's.
        y: [..., channels].
        start: what the numbers start from; None leaves `y` as it is.

    Reference: Touvron, Cord, Sablayrolles, Synnaeve, Jegou, 2021, arXiv 2103.17239.
    """
    if start is None:
        return y
    scale = module.param(name, nn.initializers.constant(start), (y.shape[-1],))
    return y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
