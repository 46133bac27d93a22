"""Exponential moving average of a net's variables, beside its optimizer.

    average <- average + (1 - d) (variables - average),   d = min(decay, (1 + t) / (10 + t))

or d = decay without the warm-up, which is that of TensorFlow's ExponentialMovingAverage; t counts
updates from 0. Weights, parameters of quantizers and running statistics of BatchNorm are all
averaged, as timm's ModelEmaV3 does by default (PyTorch's AveragedModel copies the statistics
instead). Copied are integers and what `hygiene` anneals, whose value at the end is the point of it.

An average of positive steps is positive, and one of values within a limit is within it. Averaged
weights may lie between two codes where the weights themselves jump from one to the other.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.trees import flatten

Tree = Any


def init(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"count": int32 scalar, "average": the variables, in float32 at least}."""
    return {"count": jnp.zeros((), jnp.int32), "average": jax.tree.map(_wide, dict(variables))}


def _wide(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def update(
    state: Mapping[str, Any],
    variables: Mapping[str, Any],
    decay: jax.Array,
    *,
    warmup: bool,
    copied: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the state after a step of the net.

    Args:
        state: of `init` or of the step before.
        variables: the net's, after its update.
        decay: float32 scalar in [0, 1).
        warmup: whether the first steps forget faster.
        copied: {path in `quant`: anything} of parameters that are copied.
    """
    count = state["count"].astype(jnp.float32)
    if warmup:
        decay = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    exempt = {f"quant/{path}" for path in copied or {}}
    paths = flatten(dict(variables))

    def blend(path: str, average: jax.Array, new: jax.Array) -> jax.Array:
        if path in exempt or not jnp.issubdtype(new.dtype, jnp.floating):
            return new.astype(average.dtype)
        # Of equal values this form gives exactly that value: what is frozen stays as it is.
        return average + (1.0 - decay) * (new.astype(average.dtype) - average)

    old, structure = jax.tree.flatten(state["average"])
    leaves = [
        blend(path, average, new) for (path, new), average in zip(paths.items(), old, strict=True)
    ]
    return {"count": state["count"] + 1, "average": jax.tree.unflatten(structure, leaves)}


def averaged(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the average in the dtypes of the net's variables `like`."""
    return jax.tree.map(lambda a, v: a.astype(v.dtype), state["average"], dict(like))
