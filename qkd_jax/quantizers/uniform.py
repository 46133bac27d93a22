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
from qkd_jax.numerics import Grid, Spec, Stats

__all__ = ["check", "fake_quant", "init", "integer_view"]

Params = dict[str, jax.Array]

STEP, RANGE_GRID = "scale", True
# A range up to the largest value leaves 2-bit inputs at 0.
PRESET = {"weight": {"observer": "mse"}, "input": {"observer": "mse"}}


def check(spec: Spec) -> None:
    """Accepts every spec whose grid has a positive code."""
    numerics.refuse_one_bit(spec)


def init(stats: Stats, spec: Spec) -> Params:
    """The grid that spans [stats.lo, stats.hi].

    Returns:
        `scale` and `zero_point` (0 when symmetric), float32, of the statistics' shape.

    Raises:
        ValueError: an unsigned symmetric spec and data known to be negative.
    """
    scale, zero_point = numerics.range_parameters(stats.lo, stats.hi, spec)
    return {"scale": scale, "zero_point": zero_point}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = (code - zero_point) * scale."""
    scale = numerics.at_least(params["scale"], numerics.MIN_SCALE)
    return Grid(scale, params["zero_point"], spec.format)


def fake_quant(
    x: jax.Array,
    params: Params,
    spec: Spec,
    *,
    batch_axes: Sequence[int] = (),
    key: jax.Array | None = None,
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

    Inside the grid `spec.backward` may shape it further (`numerics.through_rounding`).

    Args:
        x: any shape; float. Computed in float32 (float64 for float64) and returned in x's dtype.
        params: of `init`; () or broadcasting against `x`.
        spec: static.
        batch_axes: unused here; part of the interface.
        key: randomness of stochastic rounding; None rounds half to even in its place.

    Returns:
        x_hat, like `x`. NaN stays NaN, +-inf saturates.

    Raises:
        ValueError: parameters that do not fit `x`; a scale that is NaN, zero or negative (outside
            `jit`, where values are known).
    """
    del batch_axes
    numerics.check_operand(x, params, ("scale", "zero_point"))
    numerics.check_scale("params['scale']", params["scale"])
    return _fake_quant(x, params["scale"], params["zero_point"], key, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fake_quant(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, key: jax.Array | None, spec: Spec
) -> jax.Array:
    step = jnp.maximum(scale, numerics.MIN_SCALE)
    codes = numerics.encode(x, step, zero_point, spec.format, rounding=spec.rounding, key=key)
    return numerics.decode(codes, step, zero_point).astype(x.dtype)


def _forward(x, scale, zero_point, key, spec):
    # Only the input and the parameters are kept: codes are cheaper to recompute than to store.
    return _fake_quant(x, scale, zero_point, key, spec), (x, scale, zero_point)


def _backward(spec, residuals, g):
    x, scale, zero_point = residuals
    n, p = spec.format.qmin, spec.format.qmax
    u = x.astype(numerics.compute_dtype(x)) * (1 / jnp.maximum(scale, numerics.MIN_SCALE))
    if spec.mask == "none":
        inside = None
    elif spec.mask == "strict":
        inside = (n < u + zero_point) & (u + zero_point < p)
    else:
        codes = numerics.round_codes(u, spec.rounding) + zero_point
        inside = (n <= codes) & (codes <= p)
    dx = g
    if spec.backward != "ste":
        # Where no mask stops it, a clipped value's gradient is that of the end it is clipped to.
        clipped = jnp.clip(u, n - zero_point, p - zero_point)
        dx = numerics.through_rounding(g.astype(u.dtype), clipped, spec).astype(g.dtype)
    if inside is not None:
        dx = jnp.where(inside, dx, jnp.zeros_like(dx))
    zeros = (jnp.zeros_like(scale), jnp.zeros_like(zero_point))
    return numerics.match_cotangent(dx, x), *zeros, None


_fake_quant.defvjp(_forward, _backward)
