"""Ternary weights: -1, 0 or 1 times a magnitude (Li et al., 2016, arXiv 1605.04711)."""

import functools

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Axes, Grid, IntFormat, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "fake_quant", "init", "integer_view", "live"]

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
        "signed",
        "symmetric",
        "mask",
        "rounding",
        "backward",
        "power_of_two",
        "scaling",
        because="its codes and its magnitude are the paper's",
    )
    if spec.narrow_range is False:
        raise ValueError(
            "quantizer 'ternary' came with narrow_range=False; its codes are symmetric. Leave "
            "narrow_range=None or set it True."
        )
    numerics.check_option(spec, "threshold", OPTIONS["threshold"], low=0)


def init(stats: Stats, spec: Spec) -> Params:
    """`threshold` and magnitude `alpha` as for Gaussian weights, until `live` computes them."""
    check(spec)
    mean = jnp.where(stats.abs_mean == 0, jnp.ones_like(stats.abs_mean), stats.abs_mean)
    mean = jnp.maximum(mean, numerics.MIN_SCALE)
    # E[|x| : |x| > 0.7 E|x|] = sigma^2 2 phi(t / sigma) / P(|x| > t), about 1.47 E|x|.
    return {"alpha": 1.47 * mean, "threshold": spec.option("threshold", 0.7) * mean}


@functools.partial(jax.jit, static_argnums=2)  # not one operation at a time, which rounds more
def live(x: Values, params: Params, spec: Spec) -> Params:
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
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Weights to -alpha, 0 or alpha.

        threshold = 0.7 E|w|;  alpha = E[|w| : |w| > threshold]
        w_hat = alpha sign(w) [|w| > threshold];  dw = g

    Equations 3 and 6 of the paper, which passes the gradient straight to the weights. The option
    `threshold` replaces 0.7.

    Returns:
        x_hat, like `x`. NaN stays NaN. Weights that are not finite have no mean magnitude.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(2, quantizer="ternary")
        >>> params = {"alpha": jnp.array(1.0), "threshold": jnp.array(0.5)}
        >>> qk.quantizers.ternary.fake_quant(x, params, spec)
        Array([-0.75,  0.  ,  0.  ,  0.75], dtype=float32)
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
