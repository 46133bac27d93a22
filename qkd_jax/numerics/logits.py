"""Logits and masks as losses and metrics take them in: checked, and in float32 or wider."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkd_jax import checks

__all__ = ["prepare_logits"]


def prepare_logits(
    name: str, logits: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Checks logits and mask; returns the logits in float32 or wider and the mask as booleans."""
    logits = jnp.asarray(logits)
    checks.rank(name, logits, 2, "[batch, classes]")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if where is None:
        return logits, None
    where = jnp.asarray(where)
    checks.vector("where", where, logits.shape[0], f"one entry per row of {name} {logits.shape}")
    return logits, where != 0
