"""QIL: a trainable quantization interval (Jung et al., 2018, arXiv 1808.05779).

The quantizer of QKD (Kim et al., 2019, arXiv 1911.12491), which uses it as a trainable uniform
quantizer: the exponent gamma of the paper's transformer is 1 here.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Grid, IntFormat, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "clip_range", "fake_quant", "grid_sizes", "init", "integer_view", "pre_affine"]

SIZE, NARROW = ("center", "half_width"), True

# The smallest half width. The slope inside the interval is of the order of 1 / half_width, so the
# floor is higher than that of a scale.
MIN_HALF_WIDTH = 1e-6


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or a full signed range."""
    if not spec.symmetric:
        raise ValueError(
            "quantizer 'qil' came with symmetric=False; its interval starts at or above 0 and "
            "needs no zero point. Use symmetric=True, or quantizer='uniform' for an affine grid."
        )
    numerics.refuse_fields(spec, "mask", because="its gradient is fixed by the paper")
    if spec.signed and spec.narrow_range is False:
        raise ValueError(
            "quantizer 'qil' came with signed=True and narrow_range=False; its signed codes are "
            "symmetric, -q to q with q = 2^(bits-1)-1. Leave narrow_range=None or set it True."
        )
    numerics.refuse_fields(
        spec, "scaling", "power_of_two", because="its scale is that of an interval"
    )
    _narrow(spec)  # raises for one signed bit


def _narrow(spec: Spec) -> Spec:
    """The spec with the range that its codes have: symmetric about zero at every width."""
    return dataclasses.replace(spec, narrow_range=spec.signed)


def _interval(center: Array, half_width: Array) -> tuple[Array, Array]:
    """The interval's lower end and half width, with the lower end kept at 0 or above.

    Where center < half_width, the interval is cut at 0 and keeps its upper end: zero must encode to
    0, for padding and for pruned values.
    """
    low = jnp.maximum(center - half_width, 0)
    return low, jnp.maximum((center + half_width - low) / 2, MIN_HALF_WIDTH)


def _scale(low: Array, half: Array, format: IntFormat) -> Array:
    """The size of a code, (center + half_width) / q.

    Multiplied by the constant 1 / q: compilers turn a division by a constant into that, eager code
    does not, and the last bit of the scale must not depend on who computed it.
    """
    return (low + 2 * half) * (1 / format.qmax)


def init(stats: Stats, spec: Spec) -> Params:
    """An interval from 0: nothing is pruned below it, and rounding has LSQ's first step.

        center = half_width = min(max|x|, 2 sqrt(q) E|x|) / 2

    This start is ours; the paper names none (its nets come down from 32 bits width by width). An
    interval up to max|x| is right for many bits; with two, where a weight is -1, 0 or 1, it has
    its threshold at half the largest weight and prunes nearly all of a layer. With `spec.observer`
    named the interval ends at its range's farther end. All-zero data give the grid of scale 1.
    """
    check(spec)
    numerics.check_sign(stats.lo, spec.format)
    far = jnp.maximum(-stats.lo, stats.hi) if spec.signed else jnp.maximum(stats.hi, 0)
    if spec.observer is None:
        far = jnp.minimum(far, 2 * math.sqrt(spec.format.qmax) * stats.abs_mean)
    half = jnp.where(far == 0, jnp.full_like(far, spec.format.qmax), far) / 2
    half = jnp.maximum(half, MIN_HALF_WIDTH)
    return {"center": half, "half_width": half}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = code * (center + half_width) / q.

    The signed format is narrow: 2-bit weights are ternary.
    """
    low, half = _interval(params["center"], params["half_width"])
    format = _narrow(spec).format
    scale = jax.lax.stop_gradient(_scale(low, half, format))
    return Grid.symmetric(scale, format)


def grid_sizes(params: Params, spec: Spec) -> Params:
    """The interval's half width, and its upper end."""
    del spec
    half = params["half_width"]
    return {"half_width": half, "center + half_width": params["center"] + half}


def clip_range(params: Params, spec: Spec) -> tuple[Array, Array]:
    """The interval's upper end, on both sides of zero where the spec is signed."""
    low, half = _interval(params["center"], params["half_width"])
    high = low + 2 * half
    return -high if spec.signed else jnp.zeros_like(high), high


def pre_affine(params: Params, spec: Spec) -> tuple[Array, Array]:
    """(gain, offset) such that the codes of an unsigned `x` are those of gain * x + offset.

    gain = (center + half_width) / (2 half_width), offset = -(center - half_width) * gain; (1, 0)
    while center = half_width. Signed codes are gain * |x| + offset with the sign of x.
    """
    low, half = _interval(params["center"], params["half_width"])
    gain = (low + 2 * half) / (2 * half)
    return gain, -low * gain


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds `x` to the interval's grid: pruned below it, saturated above it.

    With c = center, d = half_width and m = [0 < u < 1]:

        u = (|x| - c) / (2 d) + 1/2
        x_hat = (c + d) * sign(x) * round(q clip(u, 0, 1)) / q
        dx = g * (c + d) / (2 d) * m
        dc = -gs * sum g * (c + d) * sign(x) * m / (2 d)
        dd = -gs * sum g * (c + d) * sign(x) * m * (|x| - c) / (2 d^2)

    q is 2^(bits-1)-1 for signed tensors, so 2-bit weights are ternary, and 2^bits-1 for unsigned
    ones, whose formula has x for |x|.

    The interval is kept inside [0, inf) and wider than MIN_HALF_WIDTH; the gradient passes to the
    parameters as if it were not. `rounding` is that of the magnitude q u, so "floor" goes towards
    zero, and `backward` the gradient through it.

    Note:
        Two deviations. The paper's output lies in [-1, 1] and leaves the magnitude to a BatchNorm;
        here it is multiplied by c + d with the gradient stopped, so that the layer stays a drop-in
        and the gradients are the paper's, times c + d. And the gradient of c and d is multiplied by
        gs = 1 / sqrt(N q), LSQ's factor (N elements of one example per interval), where the paper
        has a learning rate 100 times smaller, which others found prone to divergence: the factor
        adapts to the size of the layer and keeps parameters of all quantizers at one learning rate.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(2, quantizer="qil")
        >>> params = {"center": jnp.array(0.25), "half_width": jnp.array(0.25)}
        >>> qk.quantizers.qil.fake_quant(x, params, spec)
        Array([-0.5, -0. ,  0. ,  0.5], dtype=float32)
    """
    numerics.check_operand(x, params, ("center", "half_width"))
    center, half_width = params["center"], params["half_width"]
    factor = numerics.gradient_scale(x.shape, center.size, spec.format.qmax, batch_axes=batch_axes)
    return _fake_quant(x, center, half_width, key, _narrow(spec), factor)


def _code_units(distance: Array, half: Array, format: IntFormat) -> Array:
    """Q u, which is rounded, from the distance to the interval's lower end.

    Subtracted first, then multiplied: a multiply and add would be contracted in some compilations
    and not in others, and move codes that lie near a half.
    """
    return distance * (1 / _scale(jnp.zeros_like(half), half, format))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fake_quant(
    x: Array,
    center: Array,
    half_width: Array,
    key: Key,
    spec: Spec,
    factor: float,
) -> Array:
    del factor
    format = spec.format
    low, half = _interval(center, half_width)
    wide = x.astype(numerics.compute_dtype(x))
    magnitude = jnp.abs(wide) if format.signed else wide
    codes = numerics.round_codes(_code_units(magnitude - low, half, format), spec.rounding, key)
    codes = jnp.clip(codes, 0, format.qmax)
    if format.signed:
        codes = codes * jnp.sign(wide)
    return (codes * _scale(low, half, format)).astype(x.dtype)


def _forward(x, center, half_width, key, spec, factor):
    # Only the input and the parameters are kept: codes are cheaper to recompute than to store.
    return _fake_quant(x, center, half_width, key, spec, factor), (x, center, half_width)


def _backward(spec, factor, residuals, g):
    x, center, half_width = residuals
    low, half = _interval(center, half_width)
    dtype = numerics.compute_dtype(x)
    rise = (low + 2 * half) / (2 * half)

    def parts(x, g):
        wide, through = x.astype(dtype), g.astype(dtype)
        sign = jnp.sign(wide) if spec.signed else 1
        distance = jnp.abs(wide) - low if spec.signed else wide - low
        inside = (distance > 0) & (distance < 2 * half)
        if spec.backward != "ste":
            # The magnitude is rounded, so its gradient is shaped.
            units = jnp.clip(_code_units(distance, half, spec.format), 0, spec.format.qmax)
            through = sign * numerics.through_rounding(sign * through, units, spec)
        return jnp.where(inside, through * rise, 0), inside, distance, sign

    def terms(x, g, dx):
        again, inside, distance, sign = parts(x, g)
        pull = -sign * (again if spec.backward == "ste" else dx.astype(dtype))
        # Zero outside, where the distance may be infinite.
        return pull, jnp.where(inside, pull * ((distance - half) * (1 / half)), 0)

    ends = (center, half_width)
    return *numerics.cotangents(x, g, ends, lambda *a: parts(*a)[0], terms, factor=factor), None


_fake_quant.defvjp(_forward, _backward)
