"""Uniform quantization on a fixed grid, symmetric or affine, with a straight-through gradient.

Jacob et al., 2017 (arXiv 1712.05877); Krishnamoorthi, 2018 (arXiv 1806.08342). The grid comes from
calibration and is not trained.
"""

import functools

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Grid, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "fake_quant", "init", "integer_view"]

STEP, RANGE_GRID = "scale", True
OPTIONS = {"scale_format": "float32"}
# A range up to the largest value leaves 2-bit inputs at 0.
PRESET = {"weight": {"observer": "mse"}, "input": {"observer": "mse"}}


def check(spec: Spec) -> None:
    """Raises ValueError for a grid without a positive code, or scales that do not fit it."""
    numerics.refuse_one_bit(spec)
    numerics.check_scale_format(spec)


def init(stats: Stats, spec: Spec, *, tensor_scale: Array | None = None) -> Params:
    """`scale` and `zero_point` (0 when symmetric) of the grid that spans [stats.lo, stats.hi].

    The option `scale_format` rounds the scale (`numerics.scale_formats`), before the zero point is
    taken: with "e8m0", 8 bits and granularity=32 this is MXINT8; "e4m3fn" has `tensor_scale` too.
    """
    scale, zero_point = numerics.range_parameters(stats.lo, stats.hi, spec)
    if numerics.scale_format(spec) == "float32":
        return {"scale": scale, "zero_point": zero_point}
    format = spec.format
    if spec.symmetric:
        # In multiples of the highest code, so that `scaling` is respected; zeros stay zeros.
        zeros = (stats.lo == 0) & (stats.hi == 0)
        far = jnp.where(zeros, 0, scale * format.qmax)
        if numerics.scale_format(spec) == "e8m0":
            far = jnp.maximum(-stats.lo, stats.hi)  # exactly: the rule reads its exponent
        scales = numerics.scale_params(far, format.qmax, spec, tensor_scale=tensor_scale)
        return {**scales, "zero_point": zero_point}
    width = scale * (format.qmax - format.qmin)
    scale = numerics.scale_params(width, format.qmax - format.qmin, spec)["scale"]
    lo = jnp.minimum(stats.lo, 0)
    zero_point = jnp.clip(jnp.round(format.qmin - lo * (1 / scale)), format.qmin, format.qmax)
    return {"scale": scale, "zero_point": zero_point}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = (code - zero_point) * scale."""
    scale = numerics.at_least(numerics.total_scale(params), numerics.MIN_SCALE)
    return Grid(scale, params["zero_point"], spec.format)


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
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

    Raises:
        ValueError: parameters that do not fit `x`; a scale that is NaN, zero or negative (outside
            `jit`, where values are known).

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(4)
        >>> params = {"scale": jnp.array(0.25), "zero_point": jnp.array(0.0)}
        >>> qk.quantizers.uniform.fake_quant(x, params, spec)
        Array([-1.  , -0.25,  0.  ,  0.5 ], dtype=float32)
    """
    del batch_axes
    numerics.check_operand(x, params, (*numerics.scale_names(spec), "zero_point"))
    scale = numerics.total_scale(params)
    numerics.check_scale("params['scale']", scale)
    return _fake_quant(x, scale, params["zero_point"], key, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fake_quant(x: Array, scale: Array, zero_point: Array, key: Key, spec: Spec) -> Array:
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
