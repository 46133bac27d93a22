"""Schedules of the learning rate: position and numbers in, a factor of the peak rate out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Hyper = dict[str, Any]


def _progress(position: jax.Array, hyper: Hyper) -> jax.Array:
    """Fraction of the schedule after warm-up that has passed, in [0, 1]."""
    span = jnp.maximum(hyper["horizon"] - hyper["warmup"], 1.0)
    return jnp.clip((position - hyper["warmup"]) / span, 0.0, 1.0)


def constant(position: jax.Array, hyper: Hyper) -> jax.Array:
    """The peak rate, always."""
    return jnp.ones_like(position)


def cosine(position: jax.Array, hyper: Hyper) -> jax.Array:
    """Half a cosine from 1 to `final` at the horizon: final + (1 - final) (1 + cos(pi t)) / 2."""
    wave = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(position, hyper)))
    return hyper["final"] + (1.0 - hyper["final"]) * wave


def step(position: jax.Array, hyper: Hyper) -> jax.Array:
    """decay_factor ** (number of milestones that have been reached)."""
    reached = jnp.sum((position >= hyper["milestones"]).astype(jnp.float32))
    return hyper["decay_factor"] ** reached


# Of the decay of `wsd`: t in [0, 1] in, 1 to 0 out.
DECAY_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda t: 1.0 - t,
    "1-sqrt": lambda t: 1.0 - jnp.sqrt(t),
    "cosine": lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
}


def wsd(position: jax.Array, hyper: Hyper, *, shape: str) -> jax.Array:
    """Warm-up, stable, decay: the peak, and over the last `decay` steps down to `final`.

    final + (1 - final) f(t), t = (position - (horizon - decay)) / decay; f is 1 - t, 1 - sqrt(t) or
    half a cosine. Hu et al. 2024, arXiv 2404.06395; 1 - sqrt(t): Haegele et al. 2024, arXiv
    2405.18392, eq. 1.
    """
    begin = hyper["horizon"] - hyper["decay"]
    t = jnp.clip((position - begin) / jnp.maximum(hyper["decay"], 1.0), 0.0, 1.0)
    return hyper["final"] + (1.0 - hyper["final"]) * DECAY_SHAPES[shape](t)


SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "constant": constant,
    "cosine": cosine,
    "step": step,
    "wsd": wsd,
}
