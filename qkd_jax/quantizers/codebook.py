"""Weights from a codebook of normal quantiles: NF4 (Dettmers et al., 2023, arXiv 2305.14314).

Each of the values is taken by about as many weights as any other, if the weights are Gaussian. For
weights alone: the grid is not uniform, there is no integer view, and products run on x_hat.
"""

import functools
import statistics

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import (
    Array,
    Axes,
    Grid,
    Key,
    OnGrid,
    Params,
    Spec,
    Stats,
    TableFormat,
    Values,
)

__all__ = ["check", "code_grid", "fake_quant", "grid_sizes", "init", "integer_view", "values"]

OPTIONS = {"scale_format": "float32"}
PRESET = {"input": {"quantizer": "lsq"}}

# Finding a value costs 2^b comparisons.
MAX_BITS = 6


def check(spec: Spec) -> None:
    """Raises ValueError for bits outside 2 to 6, an unsigned or affine spec, or a free choice."""
    if not 2 <= spec.bits <= MAX_BITS:
        raise ValueError(
            f"quantizer 'codebook' came with bits={spec.bits}; its codebooks have 2 to {MAX_BITS} "
            "bits. Use quantizer='uniform' or 'lsq' for other widths."
        )
    numerics.refuse_fields(
        spec,
        "signed",
        "symmetric",
        "narrow_range",
        "mask",
        "scaling",
        "rounding",
        "backward",
        because="its values are normal quantiles with both signs (for inputs use 'lsq')",
    )
    numerics.check_scale_format(spec)


@functools.cache
def values(bits: int) -> tuple[float, ...]:
    """The codebook of `bits` bits, ascending from -1 to 1, with 0 in it.

        d = (1 / (2 L) + 1 / (2 (L - 1))) / 2,  L = 2^bits
        positive: Q(1 - d - (1/2 - d) i / (L/2)),  i = 0 .. L/2 - 1
        negative: -Q(1 - d - (1/2 - d) i / (L/2 - 1)),  i = 0 .. L/2 - 2

    all divided by Q(1 - d), Q being the quantile function of the standard normal. One more value is
    positive than negative, so that with 0 there are L. With 4 bits these are the 16 values that the
    paper prints in appendix E; for other bits d is ours (its code keeps the 4-bit one).
    """
    count = 2**bits
    tail = (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    quantile = statistics.NormalDist().inv_cdf

    def side(parts: int) -> list[float]:
        places = (1 - tail - (0.5 - tail) * i / parts for i in range(parts))
        return [quantile(p) / quantile(1 - tail) for p in places]

    return (*(-v for v in side(count // 2 - 1)), 0.0, *reversed(side(count // 2)))


def init(stats: Stats, spec: Spec, *, tensor_scale: Array | None = None) -> Params:
    """The `scale`: the largest magnitude (section 3), or the farther end of an observer's range.

    The option `scale_format` rounds it (`numerics.scale_formats`).
    """
    check(spec)
    far = jnp.maximum(-stats.lo, stats.hi)
    return numerics.scale_params(far, 1.0, spec, tensor_scale=tensor_scale)


def grid_sizes(params: Params, spec: Spec) -> Params:
    """The scale."""
    del spec
    return {"scale": numerics.total_scale(params)}


def integer_view(params: Params, spec: Spec) -> None:
    """None: the codes are places in a table, not multiples of a scale."""
    del params, spec


def code_grid(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat is a value of the codebook times the scale."""
    scale = jnp.maximum(numerics.total_scale(params), numerics.MIN_SCALE)
    return Grid.symmetric(scale, TableFormat(f"nf{spec.bits}", values(spec.bits)))


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Takes the nearest value of the codebook.

        u = x / s;  x_hat = s * (the value nearest to u);  dx = g * [|u| <= 1];  ds = 0

    The paper has granularity=64.

    Raises:
        ValueError: parameters that do not fit `x`; a scale that is NaN, zero or negative (outside
            `jit`, where values are known).

    Note:
        The paper quantizes frozen weights and learns low-rank additions to them; training the
        weights themselves, with the straight-through gradient above, is ours, and so is that the
        scale is float32 (the paper's "double quantization" rounds it to 8 bits in blocks of 256).

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(4, quantizer="codebook")
        >>> qk.quantizers.codebook.fake_quant(x, {"scale": jnp.array(1.0)}, spec)
        Array([-1.        , -0.1847734 ,  0.07958031,  0.5626169 ], dtype=float32)
    """
    del batch_axes, key
    numerics.check_operand(x, params, numerics.scale_names(spec))
    scale = numerics.total_scale(params)
    numerics.check_scale("params['scale']", scale)
    return _fake_quant(x, scale, spec)


def _in_units(x: Array, scale: Array) -> Array:
    return x.astype(numerics.compute_dtype(x)) * (1 / jnp.maximum(scale, numerics.MIN_SCALE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake_quant(x: Array, scale: Array, spec: Spec) -> Array:
    nearest = numerics.nearest_level(_in_units(x, scale), values(spec.bits))
    return (nearest * jnp.maximum(scale, numerics.MIN_SCALE)).astype(x.dtype)


def _forward(x, scale, spec):
    return _fake_quant(x, scale, spec), (x, scale)


def _backward(spec, residuals, g):
    del spec
    x, scale = residuals
    dx = jnp.where(jnp.abs(_in_units(x, scale)) <= 1, g, jnp.zeros_like(g))
    return numerics.match_cotangent(dx, x), jnp.zeros_like(scale)


_fake_quant.defvjp(_forward, _backward)
