"""The range that holds all but a small share of the data.

Symmetric specs take the percentile of |x|, affine ones cut that share off each end. Read from a
histogram that grows without losing a count (`numerics.histogram`), linearly inside a bin, so the
error is below one bin: less than 1/1024 of the largest magnitude.

The share is a matter of taste, and of the number of bits: 99.99 % here, as in NVIDIA's tools;
brevitas starts activations at 99.999, NNCF cuts 0.01 % off each end. `options={"percentile": 99.9}`
of a spec changes it.

Reference: Wu et al., 2020, arXiv 2004.09602, who calibrate by maximum, entropy and percentile.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks, numerics
from qkd_jax.numerics import Spec, State
from qkd_jax.numerics.states import init_histogram
from qkd_jax.numerics.states import update_histogram as update

__all__ = ["NEEDS_STATS", "OPTIONS", "init", "range", "update"]

NEEDS_STATS = False
OPTIONS = {"percentile": 99.99}


def init(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: an empty histogram, and lo and hi.

    Raises:
        ValueError: a percentile outside (0, 100].
    """
    checks.number("option percentile", _percentile(spec), low=0.0, high=100.0, low_allowed=False)
    return init_histogram(shape, spec)


def _percentile(spec: Spec) -> float:
    return spec.option("percentile", OPTIONS["percentile"])


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi), inside that of the data.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-1.0, 0.5, 3.0]), qk.Spec(4)
        >>> state = qk.observers.percentile.update(qk.observers.percentile.init((), spec), x, spec)
        >>> qk.observers.percentile.range(state, spec)
        (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    lo, hi = state["lo"], state["hi"]
    numerics.check_data(lo, hi, empty=lo > hi)
    width = jnp.ldexp(jnp.ones_like(lo), state["exponent"])
    share = _percentile(spec) / 100
    if spec.symmetric:
        end = width * _quantile(numerics.magnitudes(state["counts"]), share)
        return jnp.maximum(lo, -end), jnp.minimum(hi, end)
    half = numerics.BINS // 2
    high = width * (_quantile(state["counts"], share) - half)
    # The lower end is the upper end of the mirrored data.
    low = -width * (_quantile(state["counts"][..., ::-1], share) - half)
    return jnp.maximum(lo, low), jnp.minimum(hi, high)


def _quantile(counts: jax.Array, share: float) -> jax.Array:
    """The value, in bins from the start of the first, below which a share of the counts lies."""
    known = not isinstance(counts, jax.core.Tracer)
    xp: Any = np if known else jnp  # NumPy has float64: exact for any count
    counts = xp.asarray(counts).astype(xp.float64 if known else xp.float32)
    below = xp.cumsum(counts, axis=-1)
    wanted = share * below[..., -1:]
    bin = xp.argmax(below >= wanted, axis=-1, keepdims=True)
    upto = xp.take_along_axis(below, bin, axis=-1)
    inside = xp.take_along_axis(counts, bin, axis=-1)
    part = 1 - (upto - wanted) / xp.maximum(inside, 1)
    return jnp.asarray((bin + part)[..., 0], jnp.float32)
