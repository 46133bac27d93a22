"""Softened distributions, softmax(z / T), compared without losing what a large T leaves of them.

At a large T every probability is 1 / classes and a little more, and that little is all that a loss
looks at: differences of logarithms lose it to rounding (all of it at T = 1e4). Written in the small
numbers themselves nothing cancels. With h(e) = exp(e) - 1 - e, which is never negative:

    log mean_k exp(c_k) = log(1 + mean_k h(c_k))                        for c of mean 0
    KL(p || q)          = log(1 + sum_k p_k h(e_k)),
                          e_k = sum_j p_j d_j - d_k,   d = (z_p - z_q) / T

The logarithms are taken where the numbers are not small.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qkd_jax.losses.inputs.shapes import Array, Scalar

# Of the series of exp(e) - 1 - e for |e| < 1: the rest is below 1e-15 of the sum.
_TERMS = 17


def divergence(
    target_logits: Float[Array, " *#batch classes"],
    logits: Float[Array, " *#batch classes"],
    temperature: Scalar = 1.0,
    *,
    log_weights: Array | None = None,
) -> Float[Array, " *_"]:
    """Returns KL(p || q) over the last axis, p and q the softmax of logits / temperature.

    A logit of -inf in both forbids a class. `log_weights`, [classes], are added to both after the
    division: the same prior in both, for which nothing is lost at a large temperature either.
    """
    t = jnp.asarray(temperature, target_logits.dtype)
    prior = jnp.zeros((), t.dtype) if log_weights is None else log_weights
    prior = prior.reshape((1,) * (logits.ndim - prior.ndim) + prior.shape)
    log_target = jax.nn.log_softmax(target_logits / t + prior)
    log_p = jax.nn.log_softmax(logits / t + prior)
    target = jnp.exp(log_target)
    # 0 log 0 is 0: classes whose target underflows are left out before the product, so that an
    # infinite log-probability (a class masked with -inf in both nets) does not become NaN.
    some = target > 0
    far = jnp.sum(target * jnp.where(some, log_target - log_p, 0), axis=-1)

    shift = (jnp.where(some, target_logits, 0) - jnp.where(some, logits, 0)) / t
    shift = jnp.where(some, shift, 0)
    away = jnp.sum(target * shift, axis=-1, keepdims=True) - shift
    both = some | (log_p == -jnp.inf)
    near = jnp.all(both & (jnp.abs(away) < 1), axis=-1)
    away = jnp.where(some & near[..., None], away, 0)
    close = jnp.log1p(jnp.sum(target * _excess(away), axis=-1))
    return jnp.where(near, close, far)


def log_mean_exp(x: Array, *, where: Array | None = None) -> Array:
    """Returns log mean_k exp(x_k) over the last axis, over the entries of `where`."""
    kept = jnp.ones(x.shape, bool) if where is None else where
    count = jnp.maximum(jnp.sum(kept, axis=-1), 1).astype(x.dtype)
    x = jnp.where(kept, x, 0)
    mean = jnp.sum(x, axis=-1) / count
    centred = jnp.where(kept, x - mean[..., None], 0)
    near = jnp.max(jnp.abs(centred), axis=-1) < 1
    small = jnp.where(near[..., None], centred, 0)
    close = mean + jnp.log1p(jnp.sum(_excess(small), axis=-1) / count)
    far = jax.nn.logsumexp(x, axis=-1, where=kept) - jnp.log(count)
    return jnp.where(near, close, far)


def relative_log_probabilities(logits: Array) -> Array:
    """Returns log (classes p) over the last axis, p = softmax(logits): 0 where p is uniform."""
    return logits - log_mean_exp(logits)[..., None]


def _excess(e: Array) -> Array:
    """exp(e) - 1 - e for |e| < 1, with a small relative error."""
    series = jnp.ones_like(e)
    for n in range(_TERMS, 2, -1):
        series = 1 + e / n * series
    return jnp.square(e) / 2 * series
