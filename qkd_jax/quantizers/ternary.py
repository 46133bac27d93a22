"""Ternary weights: -1, 0 or 1 times a magnitude (Li et al., 2016, arXiv 1605.04711)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Grid, IntFormat, Spec, Stats

__all__ = ["check", "fake_quant", "init", "integer_view", "live"]

Params = dict[str, jax.Array]

OPTIONS = {"threshold": 0.7}
PRESET = {"input": {"quantizer": "lsq"}}


def check(spec: Spec) -> None:
    """Raises ValueError for other bits than 2, an unsigned or affine spec, or a free choice."""
    if spec.bits != 2:
        raise ValueError(
            f"quantizer 'ternary' came with bits={spec.bits}; its codes are -1, 0 and 1. Use "
            "bits=2, or quantizer='lsq' for more."
        )
    numerics.refuse_fields(
        spec,
        because="its codes and its magnitude are the paper's",
        signed=True,
        symmetric=True,
        mask=None,
        rounding="even",
        backward="ste",
        power_of_two=False,
        scaling="cover",
    )
    if spec.narrow_range is False:
        raise ValueError(
            "quantizer 'ternary' came with narrow_range=False; its codes are symmetric. Leave "
            "narrow_range=None or set it True."
        )
    numerics.check_option(spec, "threshold", OPTIONS["threshold"], low=0)


def init(stats: Stats, spec: Spec) -> Params:
    """Threshold and magnitude as for Gaussian weights, until `live` computes them.

    Returns:
        `alpha` and `threshold`, float32, of the statistics' shape.
    """
    check(spec)
    mean = jnp.where(stats.abs_mean == 0, jnp.ones_like(stats.abs_mean), stats.abs_mean)
    mean = jnp.maximum(mean, numerics.MIN_SCALE)
    # E[|x| : |x| > 0.7 E|x|] = sigma^2 2 phi(t / sigma) / P(|x| > t), about 1.47 E|x|.
    return {"alpha": 1.47 * mean, "threshold": spec.option("threshold", 0.7) * mean}


def live(x: jax.Array, params: Params, spec: Spec) -> Params:
    """Threshold 0.7 E|w| and magnitude E[|w| : |w| > threshold] of these weights (section 2.2)."""
    shape = params["alpha"].shape
    wide = jax.lax.stop_gradient(x).astype(numerics.compute_dtype(x))
    threshold = spec.option("threshold", 0.7) * numerics.mean_of(jnp.abs, wide, params["alpha"])

    def above(x):
        size = jnp.abs(x)
        kept = size > threshold
        return jnp.where(kept, size, 0), kept.astype(size.dtype)

    parts = above(wide) if shape else numerics.partial_sums(above, wide)
    alpha, count = (numerics.sum_to(part, shape) for part in parts)
    alpha = jnp.where(count > 0, alpha / jnp.maximum(count, 1), 1)
    return {"alpha": jnp.maximum(alpha, numerics.MIN_SCALE), "threshold": threshold}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid of scale alpha in a 2-bit narrow format; the codes are -1, 0 and 1."""
    alpha = jnp.maximum(params["alpha"], numerics.MIN_SCALE)
    return Grid.symmetric(alpha, IntFormat(2, True, True))


def fake_quant(
    x: jax.Array,
    params: Params,
    spec: Spec,
    *,
    batch_axes: Sequence[int] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Weights to -alpha, 0 or alpha.

        threshold = 0.7 E|w|;  alpha = E[|w| : |w| > threshold]
        w_hat = alpha sign(w) [|w| > threshold];  dw = g

    Equations 3 and 6 of the paper, which passes the gradient straight to the weights. The option
    `threshold` replaces 0.7.

    Args:
        x: any shape; float. Computed in float32 (float64 for float64) and returned in x's dtype.
        params: of `init`; () or broadcasting against `x`.
        spec: static.
        batch_axes: axes of `x` that count examples; () for weights.
        key: unused; part of the interface.

    Returns:
        x_hat, like `x`. NaN stays NaN. Weights that are not finite have no mean magnitude.

    Raises:
        ValueError: parameters that do not fit `x`.
    """
    del batch_axes, key
    numerics.check_operand(x, params, ("alpha", "threshold"))
    now = live(x, params, spec)
    return _fake_quant(x, now["alpha"], now["threshold"])


@jax.custom_vjp
def _fake_quant(x, alpha, threshold):
    wide = x.astype(numerics.compute_dtype(x))
    code = jnp.where(jnp.abs(wide) <= threshold, 0.0, jnp.sign(wide))
    return (code * alpha).astype(x.dtype)


def _forward(x, alpha, threshold):
    return _fake_quant(x, alpha, threshold), (alpha, threshold)


def _backward(residuals, g):
    return (g, *map(jnp.zeros_like, residuals))


_fake_quant.defvjp(_forward, _backward)
