"""Binary weights: the sign, times the mean magnitude (Rastegari et al., 2016, arXiv 1603.05279).

XNOR-Net. With the option `static` the magnitude is the calibrated one: for activations, whose mean
must not depend on the batch.
"""

import functools

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Grid, IntFormat, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "code_stride", "fake_quant", "init", "integer_view", "live"]

OPTIONS = {"static": False}
# Without `static` alpha is computed from the tensor, and nothing learns it.
SIZE, SIZE_OPTION = ("alpha",), "static"
MIN_BITS = 1
PRESET = {"input": {"quantizer": "lsq"}}


def check(spec: Spec) -> None:
    """Raises ValueError for other bits than 1, an unsigned or affine spec, or a free choice."""
    if spec.bits != 1:
        raise ValueError(
            f"quantizer 'binary' came with bits={spec.bits}; its codes are -1 and 1. Use "
            "bits=1, or quantizer='lsq' for more."
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
    numerics.check_option(spec, "static", OPTIONS["static"])


def init(stats: Stats, spec: Spec) -> Params:
    """The magnitude E|x|: `alpha`; see `live`."""
    check(spec)
    return {"alpha": numerics.guarded(stats.abs_mean)}


def live(x: Values, params: Params, spec: Spec) -> Params:
    """The magnitude of this tensor, E|x| over what shares it (equation 6), without gradient."""
    return params if spec.option("static", False) else _live(x, params["alpha"])


@jax.jit  # one operation at a time the mean would round differently, and so would the weights
def _live(x: Values, alpha: Array) -> Params:
    wide = jax.lax.stop_gradient(x).astype(numerics.compute_dtype(x))
    return {"alpha": numerics.guarded(numerics.mean_of(jnp.abs, wide, alpha))}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid of scale alpha in a 2-bit narrow format; the codes are -1 and 1, one bit each."""
    alpha = jnp.maximum(params["alpha"], numerics.MIN_SCALE)
    return Grid.symmetric(alpha, IntFormat(2, True, True))


def code_stride(spec: Spec) -> int:
    """2: the codes are -1 and 1."""
    return 2


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """The sign of `x`, times its mean magnitude; the sign of 0 is 1.

        alpha = E|x|;  x_hat = alpha sign(x)
        dx = alpha g [|x| <= 1] + sign(x) / n * sum g sign(x)

    n elements share alpha. The first term is the straight-through estimate of the sign, the second
    the derivative through alpha. With `static`, alpha is a parameter: no second term in dx, and
    d alpha = gs * sum g sign(x), gs = 1 / sqrt(N).

    Returns:
        x_hat, like `x`. NaN stays NaN; +-inf saturates with `static`, else has no mean magnitude.

    Note:
        The paper prints dx_i = g_i (1 / n + alpha [|x_i| <= 1]): the second term with the sum's
        other elements left out.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(1, quantizer="binary")
        >>> qk.quantizers.binary.fake_quant(x, {"alpha": jnp.array(1.0)}, spec)
        Array([-0.45000002, -0.45000002,  0.45000002,  0.45000002], dtype=float32)
    """
    numerics.check_operand(x, params, ("alpha",))
    alpha = live(x, params, spec)["alpha"]
    factor = numerics.gradient_scale(x.shape, alpha.size, 1, batch_axes=batch_axes)
    return _fake_quant(x, alpha, spec, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fake_quant(x, alpha, spec, factor):
    del spec, factor
    wide = x.astype(numerics.compute_dtype(x))
    return (_sign(wide) * alpha).astype(x.dtype)


def _sign(x: Array) -> Array:
    """1 for 0 and above, -1 below, NaN for NaN."""
    return jnp.where(x >= 0, 1.0, jnp.where(jnp.isnan(x), x, -1.0))


def _forward(x, alpha, spec, factor):
    return _fake_quant(x, alpha, spec, factor), (x, alpha)


def _backward(spec, factor, residuals, g):
    x, alpha = residuals
    dtype = numerics.compute_dtype(x)

    def slope(x, g):
        return jnp.where(jnp.abs(x.astype(dtype)) <= 1, alpha * g.astype(dtype), 0)

    def terms(x, g, *_):
        return (g.astype(dtype) * _sign(x.astype(dtype)),)

    if spec.option("static", False):
        return numerics.cotangents(x, g, (alpha,), slope, terms, factor=factor)
    share = alpha.size / x.size
    if alpha.ndim:
        part = terms(x, g)[0] * share
    else:
        (part,) = numerics.partial_sums(terms, x, g, factor=share)
    pull = numerics.match_cotangent(part, alpha)
    dx = slope(x, g) + _sign(x.astype(dtype)) * pull
    return numerics.match_cotangent(dx.astype(g.dtype), x), jnp.zeros_like(alpha)


_fake_quant.defvjp(_forward, _backward)
