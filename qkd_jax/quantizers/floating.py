"""Small floats with a scale: fp8, fp6, fp4 (Micikevicius et al., 2022, arXiv 2209.05433).

The grid is not uniform: there is no integer view, and products run on x_hat.
"""

import functools

import jax
import jax.numpy as jnp

from qkd_jax import checks, numerics
from qkd_jax.numerics import (
    FLOAT_FORMATS,
    Array,
    Axes,
    FloatFormat,
    Grid,
    Key,
    OnGrid,
    Params,
    Spec,
    Stats,
    Values,
)

__all__ = ["check", "code_grid", "fake_quant", "grid_sizes", "init", "integer_view"]

OPTIONS = {"format": "", "learned": False, "scale_format": "float32"}
# Inputs have a sign too, which ReLUs leave unused.
PRESET = {
    "weight": {"options": {"learned": True}},
    "input": {"options": {"learned": True}, "signed": True},
}
# At 8 bits the scale stays at its start, the range over 448: learned, it lost 12 points of top-1 in
# 234 steps of QAT at the weights' rate, from nets that had lost at most one by calibration.
PRESET_8_BITS = {"input": {"signed": True}}
DEFAULTS = {4: "e2m1", 6: "e3m2", 8: "e4m3fn", 16: "bf16"}


def _format(spec: Spec) -> FloatFormat:
    return FLOAT_FORMATS[spec.option("format", "") or DEFAULTS[spec.bits]]


def check(spec: Spec) -> None:
    """Raises ValueError for a format that is unknown or of other bits, or an integer's choice."""
    name = spec.option("format", "")
    if name and name not in FLOAT_FORMATS:
        raise checks.unknown("option format of quantizer 'float'", name, FLOAT_FORMATS)
    if not name and spec.bits not in DEFAULTS:
        raise ValueError(
            f"quantizer 'float' came with bits={spec.bits}; its formats have "
            f"{', '.join(map(str, DEFAULTS))} bits: {', '.join(FLOAT_FORMATS)}."
        )
    if name and FLOAT_FORMATS[name].bits != spec.bits:
        raise ValueError(
            f"quantizer 'float' came with bits={spec.bits} and the format {name!r}, which has "
            f"{FLOAT_FORMATS[name].bits}. Use bits={FLOAT_FORMATS[name].bits}."
        )
    numerics.refuse_fields(
        spec,
        "signed",
        "symmetric",
        "narrow_range",
        "scaling",
        "rounding",
        "backward",
        because="a floating-point grid has a sign, a scale, and its own rounding",
    )
    numerics.check_scale_format(spec)


def init(stats: Stats, spec: Spec, *, tensor_scale: Array | None = None) -> Params:
    """The `scale` at which the largest magnitude is the format's highest value; 1 for zeros.

    The option `scale_format` rounds it (`numerics.scale_formats`): with "e8m0" and granularity=32
    these are the MX formats, with "e4m3fn" and granularity=16 NVFP4, which has `tensor_scale` too.
    """
    check(spec)
    far, highest = jnp.maximum(-stats.lo, stats.hi), _format(spec).max
    return numerics.scale_params(far, highest, spec, tensor_scale=tensor_scale)


def grid_sizes(params: Params, spec: Spec) -> Params:
    """The scale."""
    del spec
    return {"scale": numerics.total_scale(params)}


def integer_view(params: Params, spec: Spec) -> None:
    """None: the codes are bit patterns, not multiples of a scale."""
    del params, spec


def code_grid(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat is the format's value times the scale."""
    scale = jnp.maximum(numerics.total_scale(params), numerics.MIN_SCALE)
    return Grid.symmetric(scale, _format(spec))


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Casts x / scale to the format and back.

        u = x / s;  x_hat = s cast(u);  dx = g * [|u| <= max]
        ds = gs * sum g * (cast(u) - u  where |u| <= max,  +-max beyond)    with `learned`, else 0

    gs = 1 / sqrt(N max) as LSQ's, max being the format's highest value.

    Computed in float32. `mask="none"` passes the gradient of clipped values too.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(4, quantizer="float")
        >>> qk.quantizers.floating.fake_quant(x, {"scale": jnp.array(0.5)}, spec)
        Array([-1.  , -0.25,  0.  ,  0.5 ], dtype=float32)
    """
    del key
    numerics.check_operand(x, params, numerics.scale_names(spec))
    scale = numerics.total_scale(params)
    top = round(_format(spec).max)
    factor = numerics.gradient_scale(x.shape, scale.size, top, batch_axes=batch_axes)
    return _fake_quant(x, scale, spec, factor)


def _in_units(x: Array, scale: Array) -> Array:
    return x.astype(jnp.float32) * (1 / jnp.maximum(scale, numerics.MIN_SCALE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fake_quant(x: Array, scale: Array, spec: Spec, factor: float) -> Array:
    del factor
    cast = _format(spec).fake_cast(_in_units(x, scale))
    return (cast * jnp.maximum(scale, numerics.MIN_SCALE)).astype(x.dtype)


def _forward(x, scale, spec, factor):
    return _fake_quant(x, scale, spec, factor), (x, scale)


def _backward(spec, factor, residuals, g):
    x, scale = residuals
    format = _format(spec)

    def slope(x, g):
        return (
            g
            if spec.mask == "none"
            else jnp.where(jnp.abs(_in_units(x, scale)) <= format.max, g, 0)
        )

    if not spec.option("learned", False):
        return numerics.match_cotangent(slope(x, g), x), jnp.zeros_like(scale)

    def terms(x, g, _):
        u = _in_units(x, scale)
        cast = format.fake_cast(u)
        inside = jnp.abs(u) <= format.max
        return (g.astype(u.dtype) * jnp.where(inside, cast - u, cast),)

    return numerics.cotangents(x, g, (scale,), slope, terms, factor=factor)


_fake_quant.defvjp(_forward, _backward)
