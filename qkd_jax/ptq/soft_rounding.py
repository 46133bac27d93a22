"""AdaRound's soft rounding: weights between two codes, and a penalty that drives them to one.

    W~ = s (clip(floor(W / s) + h(V) + z, n, p) - z)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),   zeta = 1.1, gamma = -0.1
    penalty = sum 1 - |2 h(V) - 1|^beta

V starts where h is the fraction of W / s, so that W~ = W on the grid's inside; beta falls from 20
to 2, which first lets h move and then presses it to 0 or 1. Nagel et al., 2020 (arXiv 2004.10568,
equations 21 to 24).
"""

import jax
import jax.numpy as jnp

from qkd_jax.numerics import Grid

ZETA, GAMMA = 1.1, -0.1
BETAS = (20.0, 2.0)
WARMUP = 0.2


def step_up(v: jax.Array) -> jax.Array:
    """h(V), in [0, 1]: how far a weight is rounded up."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def start(weight: jax.Array, grid: Grid) -> jax.Array:
    """The V at which h(V) is the fraction of weight / scale."""
    u = weight * (1 / grid.scale)
    return -jnp.log((ZETA - GAMMA) / (u - jnp.floor(u) - GAMMA) - 1)


def _placed(weight: jax.Array, up: jax.Array, grid: Grid) -> jax.Array:
    codes = jnp.floor(weight * (1 / grid.scale)) + up + grid.zero_point
    return (jnp.clip(codes, grid.format.qmin, grid.format.qmax) - grid.zero_point) * grid.scale


def soft_weight(weight: jax.Array, v: jax.Array, grid: Grid) -> jax.Array:
    """The weight between its two codes, at h(V)."""
    return _placed(weight, step_up(v), grid)


def hard_weight(weight: jax.Array, v: jax.Array, grid: Grid) -> jax.Array:
    """The weight on the grid: up where h(V) >= 1/2."""
    return _placed(weight, (step_up(v) >= 0.5).astype(weight.dtype), grid)


def penalty(v: jax.Array, beta: jax.Array | float) -> jax.Array:
    """Sum 1 - |2 h(V) - 1|^beta: 0 where every weight has chosen."""
    gap = jnp.abs(2 * step_up(v) - 1)
    # At a gap of 0 (half way) the power's own gradient would be 0 * inf for beta near 1.
    return jnp.sum(1 - jnp.maximum(gap, 1e-12) ** beta)


def beta_at(progress: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(beta, whether the penalty counts) at a share of the steps in [0, 1].

    No penalty for the first fifth, then beta falls linearly.
    """
    rest = jnp.clip((progress - WARMUP) / (1 - WARMUP), 0, 1)
    return BETAS[0] + (BETAS[1] - BETAS[0]) * rest, progress >= WARMUP
