"""The staircase that learned quantizers share: a grid with a learned step, and perhaps an offset.

    u = x / s + z,   z = clip(round(-B / s), n, p)    (z = 0 without an offset B)
    x_hat = (clip(round(u), n, p) - z) * s
    dx = g' inside n < u < p, 0 outside
    ds = sum  (g (round(u) - z) - g' (u - z))  inside,   g (n or p)  outside
    dB = sum  g  outside, 0 inside
    d alpha = sum  g s d(soft staircase)/d alpha  inside      (backward "dsq")

g' is g for the straight-through estimate, else what `through_rounding` makes of it. With g' = g the
second line is LSQ's gradient (Esser et al., 2019, arXiv 1902.08153, equation 3), where z is zero,
and with the third LSQ+'s (Bhalgat et al., 2020, arXiv 2004.09576, equations 4 and 5), where the
step's gradient is taken at a fixed offset. Residuals are the input and the parameters; codes are
cheaper to recompute than to store.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from qkd_jax.numerics.mapping import MIN_SCALE, decode, encode
from qkd_jax.numerics.rounding import (
    compute_dtype,
    match_cotangent,
    round_codes,
    through_rounding,
)

if TYPE_CHECKING:
    from qkd_jax.numerics.spec import Spec

__all__ = ["snapped_zero_point", "staircase"]


def snapped_zero_point(step: jax.Array, offset: jax.Array, spec: Spec) -> jax.Array:
    """The zero point nearest to an offset: clip(round(-offset / step), n, p)."""
    zero_point = jnp.round(-offset * (1 / jnp.maximum(step, MIN_SCALE)))
    return jnp.clip(zero_point, spec.format.qmin, spec.format.qmax)


def staircase(
    x: jax.Array,
    step: jax.Array,
    spec: Spec,
    *,
    factor: float,
    offset: jax.Array | None = None,
    strength: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Rounds to the learned grid; see the formulas above.

    Args:
        x: any shape; float. Computed in float32 (float64 for float64) and returned in x's dtype.
        step: s, () or broadcasting against `x`. Below MIN_SCALE it counts as MIN_SCALE, and its
            gradient is the one there, so that an optimizer can bring it back.
        spec: format, rounding and backward.
        factor: multiplies the gradients of step, offset and strength.
        offset: B, the value that code 0 of an unsigned grid stands for, up to its snapping to a
            whole number of steps, which puts zero on the grid.
        strength: in place of the spec's; learned where the backward is "dsq".
        key: randomness of stochastic rounding.
    """
    return _staircase(x, step, offset, strength, key, spec, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _staircase(x, step, offset, strength, key, spec, factor):
    del strength, factor
    step = jnp.maximum(step, MIN_SCALE)
    zero_point = 0 if offset is None else snapped_zero_point(step, offset, spec)
    codes = encode(x, step, zero_point, spec.format, rounding=spec.rounding, key=key)
    return decode(codes, step, zero_point).astype(x.dtype)


def _forward(x, step, offset, strength, key, spec, factor):
    out = _staircase(x, step, offset, strength, key, spec, factor)
    return out, (x, step, offset, strength)


def _backward(spec, factor, residuals, g):
    x, step, offset, strength = residuals
    n, p = spec.format.qmin, spec.format.qmax
    s = jnp.maximum(step, MIN_SCALE)
    z = 0 if offset is None else snapped_zero_point(s, offset, spec)
    u = x.astype(compute_dtype(x)) * (1 / s) + z
    inside = (n < u) & (u < p)
    wide = g.astype(u.dtype)
    # Outside, u clips to n or p. A NaN is outside and stays one, so a bad step is noticed.
    clipped = jnp.clip(u, n, p)
    if spec.backward == "ste":
        through = wide
        slope = jnp.where(inside, round_codes(u, spec.rounding) - u, clipped)
        dstep = wide * slope
    else:
        through = through_rounding(wide, clipped, spec, strength=strength)
        dstep = wide * jnp.where(inside, jnp.round(u) - z, clipped)
        dstep = dstep - jnp.where(inside, through * (u - z), 0)
    dx = jnp.where(inside, through, 0).astype(g.dtype)
    grads: list[jax.Array | None] = [match_cotangent(dx, x), _reduced(dstep, step, factor)]
    outside = jnp.where(inside, 0, wide)
    grads.append(None if offset is None else _reduced(outside, offset, factor))
    if strength is None:
        grads.append(None)
    elif spec.backward == "dsq":
        bend = jnp.where(inside, wide * s * _dsq_bend(clipped, strength), 0)
        grads.append(_reduced(bend, strength, factor))
    else:
        grads.append(jnp.zeros_like(strength))
    return (*grads, None)


def _reduced(cotangent: jax.Array, param: jax.Array, factor: float) -> jax.Array:
    return (match_cotangent(cotangent, param) * factor).astype(param.dtype)


def _dsq_bend(u: jax.Array, alpha: jax.Array) -> jax.Array:
    """The derivative of DSQ's soft staircase by its alpha, in code units.

    The staircase is floor(u) + 1/2 + tanh(k f) / (2 (1 - alpha)), k = log(2 / alpha - 1).
    """
    k = jnp.log(2 / alpha - 1)
    place = u - jnp.floor(u) - 0.5
    bent = jnp.tanh(k * place)
    dk = -2 / (alpha * (2 - alpha))
    return 0.5 * (bent / jnp.square(1 - alpha) + (1 - bent**2) * place * dk / (1 - alpha))


_staircase.defvjp(_forward, _backward)
