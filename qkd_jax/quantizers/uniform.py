"""Uniform quantization on a fixed grid, symmetric or affine, with a straight-through gradient.

Jacob et al., 2017 (arXiv 1712.05877); Krishnamoorthi, 2018 (arXiv 1806.08342). The grid comes from
calibration and is not trained.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import IntFormat, Spec, Stats

__all__ = ["check", "fake_quant", "init", "integer_view"]

Params = dict[str, jax.Array]


def check(spec: Spec) -> None:
    """Accepts every spec: symmetric and affine, all masks."""


def init(stats: Stats, spec: Spec) -> Params:
    """The grid that spans [stats.lo, stats.hi].

    Returns:
        `scale` and `zero_point` (0 when symmetric), float32, of the statistics' shape.

    Raises:
        ValueError: an unsigned symmetric spec and data known to be negative.
    """
    scale, zero_point = numerics.range_parameters(stats.lo, stats.hi, spec)
    return {"scale": scale, "zero_point": zero_point}


def integer_view(params: Params, spec: Spec) -> tuple[jax.Array, jax.Array, IntFormat]:
    """What a code means: (scale, zero_point, format), x_hat = (code - zero_point) * scale."""
    scale = numerics.at_least(params["scale"], numerics.MIN_SCALE)
    return scale, params["zero_point"], spec.format


def fake_quant(
    x: jax.Array, params: Params, spec: Spec, *, batch_axes: Sequence[int] = ()
) -> jax.Array:
    """Rounds `x` to the grid.

        x_hat = (clip(round(x / s) + z, n, p) - z) * s
        dx = g * mask;  ds = dz = 0

    `spec.mask` says where the gradient passes:

    - "rounded" (the default): n <= round(x / s) + z <= p. Elements that round to an end of the grid
      keep their gradient, up to half a step outside the range. This is PyTorch's rule, and it lets
      a value that sits on an end move both ways.
    - "strict": n < x / s + z < p. Zero on the ends too, as in the LSQ paper.
    - "none": everywhere, also for clipped values, as in TensorFlow's quantizers without range.

    Args:
        x: any shape; float. Computed in float32 (float64 for float64) and returned in x's dtype.
        params: of `init`; () or broadcasting against `x`.
        spec: static.
        batch_axes: unused here; part of the interface.

    Returns:
        x_hat, like `x`. NaN stays NaN, +-inf saturates.

    Raises:
        ValueError: parameters that do not fit `x`.
    """
    del batch_axes
    numerics.check_operand(x, params, ("scale", "zero_point"))
    return _fake_quant(x, params["scale"], params["zero_point"], spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quant(x: jax.Array, scale: jax.Array, zero_point: jax.Array, spec: Spec) -> jax.Array:
    step = jnp.maximum(scale, numerics.MIN_SCALE)
    codes = numerics.encode(x, step, zero_point, spec.format)
    return numerics.decode(codes, step, zero_point).astype(x.dtype)


def _forward(x, scale, zero_point, spec):
    # Only the input and the parameters are kept: codes are cheaper to recompute than to store.
    return _fake_quant(x, scale, zero_point, spec), (x, scale, zero_point)


def _backward(spec, residuals, g):
    x, scale, zero_point = residuals
    n, p = spec.format.qmin, spec.format.qmax
    u = x.astype(numerics.compute_dtype(x)) * (1 / jnp.maximum(scale, numerics.MIN_SCALE))
    if spec.mask == "none":
        dx = g
    elif spec.mask == "strict":
        u = u + zero_point
        dx = jnp.where((n < u) & (u < p), g, jnp.zeros_like(g))
    else:
        u = jnp.round(u) + zero_point
        dx = jnp.where((n <= u) & (u <= p), g, jnp.zeros_like(g))
    return numerics.match_cotangent(dx, x), jnp.zeros_like(scale), jnp.zeros_like(zero_point)


_fake_quant.defvjp(_forward, _backward)
