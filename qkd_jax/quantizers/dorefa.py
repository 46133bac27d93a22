"""DoReFa: low-bit weights, activations, gradients (Zhou et al., 2016, arXiv 1606.06160)."""

import functools
import zlib
from typing import Any

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
    "live",
]

OPTIONS = {"gradient_bits": 0, "restore": True}
MIN_BITS, SIGNED_INPUTS = 1, False


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or a gradient width out of range."""
    numerics.refuse_fields(
        spec,
        "symmetric",
        "mask",
        "scaling",
        "power_of_two",
        "narrow_range",
        because="its grid is fixed by the paper",
    )
    numerics.refuse_odd_codes_of_16_bits(spec)
    numerics.check_option(spec, "restore", OPTIONS["restore"])
    bits = spec.option("gradient_bits", 0)
    if bits not in range(1 if spec.signed else 9) or isinstance(bits, bool):
        raise ValueError(
            f"option gradient_bits of quantizer 'dorefa' is {bits} with signed={spec.signed}; it "
            "belongs to unsigned specs (activations, whose gradients it rounds) and is 1 to 8, or "
            "0 for float gradients."
        )


def init(stats: Stats, spec: Spec) -> Params:
    """The `bound` of the weights' grid: the largest tanh|w|, or E|w| for 1 bit; see `live`.

    For activations it is the 1 that they are clipped to.
    """
    check(spec)
    numerics.check_sign(stats.lo, spec.format)
    if not spec.signed:
        return {"bound": jnp.ones_like(stats.hi)}
    if spec.bits == 1:
        return {"bound": numerics.guarded(stats.abs_mean)}
    return {"bound": numerics.guarded(jnp.tanh(jnp.maximum(-stats.lo, stats.hi)))}


def live(x: Values, params: Params, spec: Spec) -> Params:
    """The grid of these weights: M = max tanh|w|, or E|w| for 1 bit, without gradient."""
    return _live(x, params["bound"], spec) if spec.signed else params


@functools.partial(jax.jit, static_argnums=2)  # not one operation at a time, which rounds more
def _live(x: Values, bound: Array, spec: Spec) -> Params:
    wide = jax.lax.stop_gradient(x).astype(numerics.compute_dtype(x))
    if spec.bits == 1:
        bound = numerics.mean_of(jnp.abs, wide, bound)
    else:
        top = jnp.max(jnp.abs(wide), axis=numerics.shared_axes(x, bound))
        bound = jnp.tanh(jnp.reshape(top, bound.shape))
    return {"bound": numerics.guarded(bound)}


def _levels(spec: Spec) -> int:
    return 2**spec.bits - 1


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = code * scale.

    Activations: (1 / L, 0, format) with L = 2^b - 1. Weights have the odd codes -L, -L + 2, .. L:
    zero lies between two of them, and b bits of information take a format of b + 1.
    """
    scale = params["bound"] if spec.option("restore", True) else jnp.ones_like(params["bound"])
    if spec.signed and spec.bits == 1:
        scale = params["bound"]
    scale = jnp.maximum(scale * (1 / _levels(spec)), numerics.MIN_SCALE)
    format = IntFormat(spec.bits + 1, True, True) if spec.signed else spec.format
    return Grid.symmetric(scale, format)


def grid_sizes(params: Params, spec: Spec) -> Params:
    """The bound."""
    del spec
    return {"bound": params["bound"]}


def clip_range(params: Params, spec: Spec) -> tuple[Array, Array]:
    """[0, 1] for activations; weights are squeezed by tanh and clipped nowhere."""
    bound = jnp.ones_like(params["bound"])
    return (-jnp.inf * bound, jnp.inf * bound) if spec.signed else (0 * bound, bound)


def code_stride(spec: Spec) -> int:
    """2 for weights, whose codes are odd."""
    return 2 if spec.signed else 1


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds weights (signed) or activations (unsigned) as the paper does.

    Weights, with t = tanh(w), M = max|t| and L = 2^b - 1:

        w_hat = M (2 round(L (t / (2 M) + 1/2)) / L - 1);  dw = g (1 - t^2)
        1 bit: w_hat = E|w| sign(w);  dw = g

    Activations: x_hat = round(L clip(x, 0, 1)) / L;  dx = g * [0 < x < 1].

    With the option `gradient_bits` the gradient of a layer's output is rounded too: see
    `output_gradient`. Equations 5, 8, 9 and 11 of the paper.

    Returns:
        x_hat, like `x`. NaN stays NaN, +-inf saturates (not in weights of 1 bit).

    Note:
        The paper's weights lie in [-1, 1] and need a BatchNorm behind; times M (of which no
        gradient is taken) they keep their size, so that the layer stays a drop-in. The option
        `restore=False` is the paper's. Its code differentiates M as well.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x = jnp.array([0.0, 0.3, 0.7, 2.0])
        >>> spec = qk.Spec(2, quantizer="dorefa", signed=False)
        >>> qk.quantizers.dorefa.fake_quant(x, {"bound": jnp.array(1.0)}, spec)
        Array([0.        , 0.33333334, 0.6666667 , 1.        ], dtype=float32)
    """
    numerics.check_operand(x, params, ("bound",))
    del batch_axes
    return _fake_quant(x, live(x, params, spec)["bound"], key, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quant(x, bound, key, spec):
    scale, _, _ = integer_view({"bound": bound}, spec)
    wide = x.astype(numerics.compute_dtype(x))
    levels = _levels(spec)
    if not spec.signed:
        codes = numerics.encode(x, scale, 0, spec.format, rounding=spec.rounding, key=key)
    elif spec.bits == 1:
        codes = jnp.where(wide >= 0, 1.0, jnp.where(jnp.isnan(wide), wide, -1.0))
    else:
        u = levels * (jnp.tanh(wide) * (1 / (2 * bound)) + 0.5)
        codes = 2 * jnp.clip(numerics.round_codes(u, spec.rounding, key), 0, levels) - levels
    return (codes * scale).astype(x.dtype)


def _forward(x, bound, key, spec):
    return _fake_quant(x, bound, key, spec), (x, bound)


def _backward(spec, residuals, g):
    x, bound = residuals
    wide, gain = x.astype(numerics.compute_dtype(x)), g.astype(numerics.compute_dtype(x))
    levels = _levels(spec)
    if not spec.signed:
        through = numerics.through_rounding(gain, jnp.clip(wide, 0, 1) * levels, spec)
        dx = jnp.where((0 < wide) & (wide < 1), through, 0)
    elif spec.bits == 1:
        dx = gain
    else:
        t = jnp.tanh(wide)
        u = levels * (t * (1 / (2 * bound)) + 0.5)
        dx = numerics.through_rounding(gain, u, spec) * (1 - t * t)
        if not spec.option("restore", True):
            dx = dx / bound
    return numerics.match_cotangent(dx.astype(g.dtype), x), jnp.zeros_like(bound), None


def output_gradient(out: Array, spec: Spec, *, batch_axes: Axes = (), key: Key = None) -> Array:
    """Returns what a layer computed, unchanged; the gradient that arrives there is rounded.

    From the option `gradient_bits` k of the layer's input, with K = 2^k - 1, m = max|g| of an
    example and N uniform on [-1/2, 1/2) / K from `key` (0 without):

        g_hat = 2 m (round(K (g / (2 m) + 1/2 + N)) / K - 1/2)

    Equation 12 of the paper, where its algorithm 1 has it: before the layer's backward products, so
    that both of them, for the input and for the weights, are products with k-bit gradients.
    """
    bits = spec.option("gradient_bits", 0)
    return _round_gradient(out, key, bits, tuple(batch_axes)) if bits else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _round_gradient(out, key, bits, batch_axes):
    del key, bits, batch_axes
    return out


def _round_gradient_forward(out, key, bits, batch_axes):
    return out, key


def _round_gradient_backward(bits, batch_axes, key, g):
    wide = g.astype(numerics.compute_dtype(g))
    return _rounded_gradient(wide, bits, batch_axes, key).astype(g.dtype), None


_round_gradient.defvjp(_round_gradient_forward, _round_gradient_backward)


def _rounded_gradient(g: Array, bits: int, batch_axes: Axes, key: Any) -> Array:
    axes = tuple(i for i in range(g.ndim) if i not in {a % g.ndim for a in batch_axes})
    top = jnp.max(jnp.abs(g), axis=axes, keepdims=True)
    top = jnp.where(top > 0, top, 1)
    steps = 2**bits - 1
    noise = 0.0
    if key is not None:
        # Apart from the key of the forward rounding, of which it must be independent.
        own = jax.random.fold_in(key, zlib.crc32(b"gradient"))
        noise = jax.random.uniform(own, g.shape, g.dtype, -0.5, 0.5)
    codes = jnp.clip(jnp.round(steps * (g / (2 * top) + 0.5) + noise), 0, steps)
    return 2 * top * (codes / steps - 0.5)


_fake_quant.defvjp(_forward, _backward)
