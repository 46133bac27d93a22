"""EWGS: gradients scaled element by element (Lee et al., 2021, arXiv 2104.00903)."""

import functools

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Grid, IntFormat, Key, OnGrid, Params, Spec, Stats, Values

__all__ = [
    "check",
    "clip_range",
    "code_stride",
    "fake_quant",
    "grid_sizes",
    "init",
    "integer_view",
    "pre_affine",
]

OPTIONS = {"delta": 1e-3}
SIZE = ("lower", "upper", "gain")
MIN_BITS, SIGNED_INPUTS = 1, False
# The narrowest interval, as for QIL: the slope inside is of the order of 1 / (upper - lower).
MIN_WIDTH = 1e-6


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or another gradient than its own."""
    numerics.refuse_fields(
        spec,
        "symmetric",
        "mask",
        "backward",
        "scaling",
        "power_of_two",
        "narrow_range",
        because="its interval and its gradient are its own",
    )
    numerics.refuse_odd_codes_of_16_bits(spec)
    numerics.check_option(spec, "delta", OPTIONS["delta"], low=0)


def init(stats: Stats, spec: Spec) -> Params:
    """The first interval, `lower` to `upper`: 3 sigma for weights, the range for activations.

    The paper's upper end for activations is 3 sigma of the Gaussian before a ReLU, whose half has
    the standard deviation sigma sqrt(1 - 2 / pi): 3 std / sqrt(1 - 2 / pi); taken where it is below
    the largest value. Data with less spread than their mean take that. `gain`, the size of the
    output, starts at the interval's end.
    """
    check(spec)
    numerics.check_sign(stats.lo, spec.format)
    ones = jnp.ones_like(stats.hi)
    if spec.signed:
        upper = jnp.maximum(3 * stats.std, jnp.abs(stats.mean))
        upper = jnp.where(upper == 0, ones, jnp.maximum(upper, MIN_WIDTH))
        return {"lower": -upper, "upper": upper, "gain": upper}
    upper = jnp.maximum(3 * stats.std / (1 - 2 / jnp.pi) ** 0.5, stats.mean)
    upper = jnp.minimum(stats.hi, upper)
    upper = jnp.where(upper == 0, ones, jnp.maximum(upper, MIN_WIDTH))
    return {"lower": jnp.zeros_like(upper), "upper": upper, "gain": upper}


def _levels(spec: Spec) -> int:
    return 2**spec.bits - 1


def _scale(gain: Array, spec: Spec) -> Array:
    return jnp.maximum(jnp.abs(gain) * (1 / _levels(spec)), numerics.MIN_SCALE)


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = code * |gain| / L, L = 2^b - 1.

    Weights have the odd codes -L, -L + 2, .. L, which take a format of b + 1 bits.
    """
    scale = _scale(params["gain"], spec)
    format = IntFormat(spec.bits + 1, True, True) if spec.signed else spec.format
    return Grid.symmetric(scale, format)


def pre_affine(params: Params, spec: Spec) -> tuple[Array, Array]:
    """(gain, offset) such that the codes of an unsigned `x` are those of gain * x + offset.

    Raises:
        ValueError: a signed spec, whose odd codes no such map gives.
    """
    if spec.signed:
        raise ValueError(
            "quantizer 'ewgs' with signed=True has odd codes, which rounding a scaled input does "
            "not give. Quantize this input with signed=False, or with quantizer='lsq'."
        )
    width = jnp.maximum(params["upper"] - params["lower"], MIN_WIDTH)
    slope = jnp.abs(params["gain"]) * (1 / width)
    return slope, -params["lower"] * slope


def grid_sizes(params: Params, spec: Spec) -> Params:
    """The interval's width, and the size of the output."""
    del spec
    width = params["upper"] - params["lower"]
    return {"upper - lower": width, "|gain|": jnp.abs(params["gain"])}


def clip_range(params: Params, spec: Spec) -> tuple[Array, Array]:
    """The interval's ends."""
    del spec
    return params["lower"], params["upper"]


def _relative(x: Array, lower: Array, upper: Array) -> Array:
    """`x` relative to the interval: 0 at its lower end, 1 at its upper one."""
    width = jnp.maximum(upper - lower, MIN_WIDTH)
    return (x.astype(numerics.compute_dtype(x)) - lower) * (1 / width)


def code_stride(spec: Spec) -> int:
    """2 for weights, whose codes are odd."""
    return 2 if spec.signed else 1


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds inside a learned interval, and scales gradients by the distance to the code.

        t = (x - l) / (u - l);  xn = clip(t, 0, 1);  xq = round(L xn) / L,  L = 2^b - 1
        weights: x_hat = |gain| (2 xq - 1);   activations: x_hat = |gain| xq
        g_xn = g_xq (1 + delta sign(g_xq) (xn - xq))
        dx = g_xn [0 < t < 1] / (u - l);  dl = sum g_xn [..] (t - 1) / (u - l)
        du = -sum g_xn [..] t / (u - l);  dgain = sum g x_hat / gain

    An element that would move towards its code anyway is pushed a little harder, one that would
    leave it a little less. Equations 1 to 4 of the paper. delta=0 is the straight-through estimate.

    Note:
        The paper multiplies a layer's output by one learned |alpha|; here each operand has a
        `gain`, whose product that is. delta is fixed (the option `delta`, 1e-3 as in the paper's
        simple mode); the paper also refreshes it from the Hessian's trace. The gradients of l, u
        and gain are multiplied by LSQ's gs = 1 / sqrt(N L), where the paper trains them at a rate
        of their own.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x = jnp.array([0.0, 0.3, 0.7, 2.0])
        >>> spec = qk.Spec(2, quantizer="ewgs", signed=False)
        >>> params = {"lower": jnp.array(0.0), "upper": jnp.array(1.5), "gain": jnp.array(1.5)}
        >>> qk.quantizers.ewgs.fake_quant(x, params, spec)
        Array([0. , 0.5, 0.5, 1.5], dtype=float32)
    """
    numerics.check_operand(x, params, ("lower", "upper", "gain"))
    factor = numerics.gradient_scale(
        x.shape, params["upper"].size, _levels(spec), batch_axes=batch_axes
    )
    ends = params["lower"], params["upper"], params["gain"]
    return _fake_quant(x, *ends, key, spec, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _fake_quant(x, lower, upper, gain, key, spec, factor):
    del factor
    levels = _levels(spec)
    codes = numerics.round_codes(levels * _relative(x, lower, upper), spec.rounding, key)
    codes = jnp.clip(codes, 0, levels)
    if spec.signed:
        codes = 2 * codes - levels
    return (codes * _scale(gain, spec)).astype(x.dtype)


def _forward(x, lower, upper, gain, key, spec, factor):
    return _fake_quant(x, lower, upper, gain, key, spec, factor), (x, lower, upper, gain, key)


def _backward(spec, factor, residuals, g):
    x, lower, upper, gain, key = residuals
    levels, delta = _levels(spec), spec.option("delta", OPTIONS["delta"])
    dtype = numerics.compute_dtype(x)
    slopes = jnp.abs(gain) * ((1 + int(spec.signed)) / jnp.maximum(upper - lower, MIN_WIDTH))

    def parts(x, g):
        t, wide = _relative(x, lower, upper), g.astype(dtype)
        normal = jnp.clip(t, 0, 1)
        codes = numerics.round_codes(levels * t, spec.rounding, key)  # those of the forward pass
        rounded = jnp.clip(codes, 0, levels) * (1 / levels)
        # g (1 + delta sign(g) (xn - xq)), times what lies before and behind the rounding.
        dx = slopes * (wide + delta * jnp.abs(wide) * (normal - rounded))
        return t, wide, rounded, (t > 0) & (t < 1), dx

    def slope(x, g):
        _, _, _, inside, dx = parts(x, g)
        return jnp.where(inside, dx, 0)

    def terms(x, g, _):
        t, wide, rounded, inside, dx = parts(x, g)
        out = 2 * rounded - 1 if spec.signed else rounded
        lever = jnp.where(inside, dx * t, 0)  # t may be infinite
        return (
            lever - jnp.where(inside, dx, 0),
            -lever,
            wide * out * jnp.where(gain < 0, -1, 1),  # at 0 it can leave
        )

    ends = (lower, upper, gain)
    drawn = spec.rounding == "stochastic" and key is not None
    grads = numerics.cotangents(x, g, ends, slope, terms, factor=factor, as_given=drawn)
    return *grads, None


_fake_quant.defvjp(_forward, _backward)
