"""Gradients other than those of the value: reversal."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qkd_jax.losses.inputs.shapes import Array


@jax.custom_vjp
def reverse_gradient(x: Array, strength: ArrayLike = 1.0) -> Array:
    """Returns `x`; the gradient that comes back is multiplied by -strength.

    What is learned through it climbs the loss that everything else descends.

    Args:
        x: any array.
        strength: a scalar; no gradient flows into it.

    Reference:
        Ganin, Lempitsky, 2014, arXiv 1409.7495.
    """
    del strength
    return x


def _forward(x: Array, strength: ArrayLike) -> tuple[Array, ArrayLike]:
    return x, strength


def _backward(strength: ArrayLike, g: Array) -> tuple[Array, Array]:
    strength = jnp.asarray(strength)
    return -strength.astype(g.dtype) * g, jnp.zeros_like(strength)


reverse_gradient.defvjp(_forward, _backward)
