"""Gradient building blocks that every quantizer's closed-form backward pass shares.

A straight-through gradient composed from `clip` and `round` is wrong at the ends of the grid:
`jnp.clip` sends half of the gradient through elements that land exactly on an end, `lax.clamp`
none. So quantizers write their backward pass out with a mask, and these are its pieces.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["at_least", "compute_dtype", "match_cotangent", "round_ste"]


def compute_dtype(x: Any) -> jnp.dtype:
    """The type quantizers compute in: float32, or float64 when `x` is."""
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def round_ste(x: jax.Array) -> jax.Array:
    """Rounds half to even; the gradient passes as if it were the identity."""
    return jnp.round(x)


round_ste.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_least(x: jax.Array, minimum: float) -> jax.Array:
    """Computes max(x, minimum); the gradient passes as if it were the identity.

    A step size that an optimizer pushed below the minimum can so be pulled up again, which the
    true gradient (zero there) would not allow.
    """
    return jnp.maximum(x, minimum)


at_least.defvjp(lambda x, minimum: (jnp.maximum(x, minimum), None), lambda minimum, _, g: (g,))


def _sum_inner_axes(x: jax.Array) -> jax.Array:
    """The first stage of a sum over everything: over some 16 or more neighbours.

    XLA:CPU sums an axis of more than 32 elements by windows, and stores the summand in full before
    it does: another pass over memory, and temporary memory of an activation's size. Sums over
    short axes are fused with what makes the summand and run on all threads. The barrier keeps XLA
    from joining the two stages again, as it does with sums of sums. A sum of short sums also loses
    less to rounding than a long one.
    """
    axes: list[int] = []
    summed = 1
    for axis in range(x.ndim - 1, 0, -1):
        if summed < 16 and x.shape[axis] <= 32:
            axes.append(axis)
            summed *= x.shape[axis]
    if summed < 4:
        return x
    return jax.lax.optimization_barrier(jnp.sum(x, axis=tuple(axes)))


def match_cotangent(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """Sums a cotangent to the shape, dtype and device variation of its primal.

    Undoes the broadcast of `primal` in the forward pass: axes that `primal` has with size 1 (all
    axes, for a scalar) are summed. Inside `jax.shard_map` a parameter is the same on all devices
    while the data differ; where JAX tracks that (`check_vma=True`), the sum runs over devices too,
    as it does behind an ordinary broadcast. Under `pmap` nothing is tracked and the caller reduces
    all gradients at once.
    """
    if primal.ndim == 0:
        cotangent = _sum_inner_axes(cotangent)
    # JAX's own transpose of a broadcast knows both sums; the sum it differentiates is dead code.
    _, transpose = jax.vjp(lambda p: p.astype(cotangent.dtype) + cotangent, primal)
    return transpose(cotangent)[0]
