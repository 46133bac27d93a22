"""Oscillation of weights between two codes: measured, frozen, dampened.

Under a straight-through gradient a weight whose best value lies between two codes jumps between
them. A change of code against the direction of the last one is an oscillation (equation 4), and
f = m o + (1 - m) f its frequency (equation 5). A weight whose f passes a threshold can be pinned to
the rounded average of its codes (algorithm 1); dampening adds L = sum (clip(w) - w_hat)^2, w_hat
without gradient (equation 6).

Reference:
    Nagel, Fournarakis, Bondarenko, Blankevoort, 2022, arXiv 2203.11086.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.stored_weights import StoredWeight, quantized_weights, rounded, with_weight
from qkd_jax.trees import get

Tree = dict[str, Any]
# A weight counts as oscillating from this frequency on, as in the paper's table 1.
OSCILLATES = 0.005


def cosine(start: jax.Array, end: jax.Array, done: jax.Array) -> jax.Array:
    """Returns half a cosine from `start` (done = 0) to `end` (done = 1)."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * done))


def init_weight(learned: Mapping[str, Any], weight: StoredWeight, *, freeze: bool) -> Tree:
    """Returns what is kept of a weight, arrays of its shape, at the start of a stage."""
    codes = rounded(learned, weight).codes.astype(jnp.float32)
    state = {
        "codes": codes.astype(jnp.int32),
        "direction": jnp.zeros(codes.shape, jnp.int8),
        "frequency": jnp.zeros(codes.shape, jnp.float32),
    }
    if freeze:
        state |= {"mean": codes, "pinned": jnp.full(codes.shape, jnp.nan, jnp.float32)}
    return state


def update_weight(
    learned: Tree,
    weight: StoredWeight,
    state: Mapping[str, jax.Array],
    *,
    momentum: jax.Array,
    threshold: jax.Array | None,
) -> tuple[Tree, Tree]:
    """Runs a step of the paper's algorithm 1 for one weight.

    Args:
        learned: {"params", "quant"} after the optimizer's update.
        weight: the weight.
        state: of `init_weight` or of the step before.
        momentum: m.
        threshold: the frequency from which on a weight is pinned; None pins nothing.

    Returns:
        (learned, state).
    """
    grid = rounded(learned, weight)
    codes = grid.codes.astype(jnp.float32)
    if threshold is not None:
        codes = jnp.where(jnp.isnan(state["pinned"]), codes, state["pinned"])
    change = jnp.sign(codes.astype(jnp.int32) - state["codes"]).astype(jnp.int8)
    oscillated = (change != 0) & (change == -state["direction"])
    frequency = momentum * oscillated + (1 - momentum) * state["frequency"]
    new = {
        "codes": codes.astype(jnp.int32),
        "direction": jnp.where(change != 0, change, state["direction"]),
        "frequency": frequency,
    }
    if threshold is not None:
        mean = momentum * codes + (1 - momentum) * state["mean"]
        caught = jnp.isnan(state["pinned"]) & (frequency > threshold)
        pinned = jnp.where(caught, jnp.round(mean), state["pinned"])
        new |= {"mean": mean, "pinned": pinned}
        # The move to the average is not one more oscillation.
        new["codes"] = jnp.where(caught, pinned, codes).astype(jnp.int32)
        # Codes are pinned, not values: the step still learns, and the weight follows it.
        values = jnp.where(jnp.isnan(pinned), grid.values, pinned * grid.scale)
        learned = with_weight(learned, weight, values)
    return learned, new


def dampening(net: QuantizedModel, learned: Mapping[str, Any]) -> jax.Array:
    """Returns the sum over all weights of (clip(w) - w_hat)^2, float32 scalar."""
    squares = jnp.zeros((), jnp.float32)
    for weight in quantized_weights(net, learned):
        grid = rounded(learned, weight)
        values = get(learned, weight.array).reshape(grid.values.shape)
        squares += jnp.sum(jnp.square(jnp.clip(values, grid.low, grid.high) - grid.on_grid))
    return squares


def oscillating(state: Mapping[str, Any]) -> dict[str, float]:
    """Returns {path of a layer: share of its weights that oscillate} out of a hygiene's state."""
    return {
        path: float(np.mean(np.asarray(weight["frequency"]) > OSCILLATES))
        for path, weight in state.get("weights", {}).items()
    }
