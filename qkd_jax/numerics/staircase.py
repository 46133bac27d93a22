"""The staircase that learned quantizers share: a grid with a learned step, and perhaps an offset.

    u = x / s + z,   z = clip(round(-B / s), n, p)    (z = 0 without an offset B)
    x_hat = (clip(round(u), n, p) - z) * s
    dx = g' inside n < u < p, 0 outside
    ds = sum  g round(u) - g' u  inside,   g (n or p)  outside
    dB = sum  g - g'  inside,   g  outside
    d alpha = sum  g s d(soft staircase)/d alpha  inside      ("dsq" with a learned strength)

g' is g for the straight-through estimate, else what `through_rounding` makes of it. These are the
derivatives of s R(clip((x - B) / s, n, p)) + B, which x_hat is but for the snapping of B. With
g' = g the step's is LSQ's (Esser et al., 2019, arXiv 1902.08153, equation 3), where B is zero, and
together with the offset's LSQ+'s (Bhalgat et al., 2020, arXiv 2004.09576, equations 4 and 5).
Residuals are the input, the parameters and the key; codes are cheaper to recompute than to store.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from qkd_jax.numerics.mapping import MIN_SCALE, decode, encode
from qkd_jax.numerics.rounding import (
    compute_dtype,
    computed_once,
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
    learned: bool = False,
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
        strength: in place of the spec's.
        learned: whether the strength has a gradient, which "dsq" alone knows; else it is zero.
        key: randomness of stochastic rounding.
    """
    return _staircase(x, step, offset, strength, key, spec, factor, learned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _staircase(x, step, offset, strength, key, spec, factor, learned):
    del strength, factor, learned
    step = jnp.maximum(step, MIN_SCALE)
    zero_point = 0 if offset is None else snapped_zero_point(step, offset, spec)
    codes = encode(x, step, zero_point, spec.format, rounding=spec.rounding, key=key)
    return decode(codes, step, zero_point).astype(x.dtype)


def _forward(x, step, offset, strength, key, spec, factor, learned):
    out = _staircase(x, step, offset, strength, key, spec, factor, learned)
    return out, (x, step, offset, strength, key)


def _backward(spec, factor, learned, residuals, g):
    x, step, offset, strength, key = residuals
    n, p = spec.format.qmin, spec.format.qmax
    s = jnp.maximum(step, MIN_SCALE)
    z = 0 if offset is None else snapped_zero_point(s, offset, spec)
    place = x.astype(compute_dtype(x)) * (1 / s)
    u = place + z
    inside = (n < u) & (u < p)
    rounded = round_codes(place, spec.rounding, key)  # as in the forward pass, before z
    wide = g.astype(u.dtype)
    # Outside, u clips to n or p. A NaN is outside and stays one, so a bad step is noticed.
    clipped = jnp.clip(u, n, p)
    if spec.backward == "ste":
        dx = jnp.where(inside, wide, 0)
        dstep = wide * jnp.where(inside, rounded - place, clipped)
    else:
        through = through_rounding(wide, clipped, spec, strength=strength)
        dx = computed_once(jnp.where(inside, through, 0), g)
        dstep = wide * jnp.where(inside, rounded + z, clipped) - dx * jnp.where(inside, u, 0)
    grads: list[jax.Array | None] = [
        match_cotangent(dx.astype(g.dtype), x),
        _reduced(dstep, step, factor),
        None if offset is None else _reduced(wide - dx, offset, factor),
    ]
    if strength is None:
        grads.append(None)
    elif learned:
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
    # Spelled otherwise than in `through_rounding`: XLA would recognise the tanh there as this one,
    # and write it to memory for both, which takes longer than computing it twice.
    k = jnp.log((2 - alpha) / alpha)
    place = u - jnp.floor(u) - 0.5
    bent = jnp.tanh(k * place)
    dk = -2 / (alpha * (2 - alpha))
    return 0.5 * (bent / jnp.square(1 - alpha) + (1 - bent**2) * place * dk / (1 - alpha))


_staircase.defvjp(_forward, _backward)
