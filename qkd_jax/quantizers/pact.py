"""PACT: a learned clipping level for activations (Choi et al., 2018, arXiv 1805.06085)."""

import functools

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Grid, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "fake_quant", "init", "integer_view"]

OPTIONS = {"start": 0.0}
SIZE, SIGNED_INPUTS = ("alpha",), False
# The paper takes DoReFa's weights.
PRESET = {"weight": {"quantizer": "dorefa"}}


def check(spec: Spec) -> None:
    """Raises ValueError for a signed or affine spec, a mask, or a scale that is not alpha's."""
    if spec.signed:
        raise ValueError(
            "quantizer 'pact' came with signed=True; it clips to [0, alpha], for what follows a "
            "ReLU. Use signed=False there, and for weights quantizer='dorefa', as the paper does."
        )
    numerics.refuse_fields(
        spec,
        "symmetric",
        "mask",
        "scaling",
        because="its grid and its gradient are fixed by the paper",
    )
    numerics.refuse_learned_power_of_two(spec)
    numerics.check_option(spec, "start", OPTIONS["start"], low=0)


def init(stats: Stats, spec: Spec) -> Params:
    """The first `alpha`: the top of the range, or the option `start` where it is above 0.

    The paper starts higher than typical activations (and lets the decay of alpha pull it down).
    All-zero data give the level at which the scale is 1.
    """
    check(spec)
    numerics.check_sign(stats.lo, spec.format)
    start = float(spec.option("start", OPTIONS["start"]))
    top = jnp.full_like(stats.hi, start) if start > 0 else jnp.maximum(stats.hi, 0)
    return {"alpha": jnp.where(top == 0, jnp.full_like(top, spec.format.qmax), top)}


def _step(alpha: Array, spec: Spec) -> Array:
    # Multiplied by the constant 1 / p: compilers turn a division by a constant into that.
    return jnp.maximum(alpha * (1 / spec.format.qmax), numerics.MIN_SCALE)


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = code * alpha / p."""
    scale = _step(params["alpha"], spec)
    return Grid.symmetric(scale, spec.format)


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Clips to [0, alpha] and rounds.

        s = alpha / p;  x_hat = round(clip(x, 0, alpha) / s) * s
        dx = g * [0 < x < alpha]
        d alpha = gs * sum g * [x >= alpha]

    Equations 1 to 3 of the paper: the rounding residual, which differentiating the formula would
    add to d alpha, is left out.

    Note:
        Two deviations: d alpha is multiplied by LSQ's gs = 1 / sqrt(N p), so that one learning rate
        serves all quantizers (the L2 penalty that the paper puts on alpha is the regulariser
        "clip_l2"), and dx is 0 at x = 0, where a ReLU's output has no gradient anyway.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x = jnp.array([0.0, 0.3, 0.7, 2.0])
        >>> spec = qk.Spec(2, quantizer="pact", signed=False)
        >>> qk.quantizers.pact.fake_quant(x, {"alpha": jnp.array(1.5)}, spec)
        Array([0. , 0.5, 0.5, 1.5], dtype=float32)
    """
    numerics.check_operand(x, params, ("alpha",))
    alpha = params["alpha"]
    factor = numerics.gradient_scale(x.shape, alpha.size, spec.format.qmax, batch_axes=batch_axes)
    return _fake_quant(x, alpha, key, spec, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quant(x, alpha, key, spec, factor):
    del factor
    step = _step(alpha, spec)
    codes = numerics.encode(x, step, 0, spec.format, rounding=spec.rounding, key=key)
    return numerics.decode(codes, step, 0).astype(x.dtype)


def _forward(x, alpha, key, spec, factor):
    return _fake_quant(x, alpha, key, spec, factor), (x, alpha)


def _backward(spec, factor, residuals, g):
    x, alpha = residuals
    step, p, dtype = _step(alpha, spec), spec.format.qmax, numerics.compute_dtype(x)

    def slope(x, g):
        u = x.astype(dtype) * (1 / step)
        through = numerics.through_rounding(g.astype(dtype), jnp.clip(u, 0, p), spec)
        return jnp.where((0 < u) & (u < p), through, 0)

    def terms(x, g, _):
        return (jnp.where(x.astype(dtype) * (1 / step) >= p, g.astype(dtype), 0),)

    return *numerics.cotangents(x, g, (alpha,), slope, terms, factor=factor), None


_fake_quant.defvjp(_forward, _backward)
