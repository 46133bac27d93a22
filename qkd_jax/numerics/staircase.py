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

from qkd_jax.numerics.arrays import Params
from qkd_jax.numerics.backward import cotangents
from qkd_jax.numerics.mapping import MIN_SCALE, Grid, decode, encode
from qkd_jax.numerics.rounding import at_least, compute_dtype, round_codes, through_rounding

if TYPE_CHECKING:
    from qkd_jax.numerics.spec import Spec


def snapped_zero_point(step: jax.Array, offset: jax.Array, spec: Spec) -> jax.Array:
    """The zero point nearest to an offset: clip(round(-offset / step), n, p)."""
    zero_point = jnp.round(-offset * (1 / jnp.maximum(step, MIN_SCALE)))
    return jnp.clip(zero_point, spec.format.qmin, spec.format.qmax)


def step_grid(params: Params, spec: Spec) -> Grid:
    """The grid of a learned `step`: x_hat = code * step.

    With learned bits the format is that of `spec.bits`, their upper bound.
    """
    return Grid.symmetric(at_least(params["step"], MIN_SCALE), spec.format)


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
    dtype, soft = compute_dtype(x), spec.backward != "ste"

    def parts(x, g):
        scaled = x.astype(dtype) * (1 / s)
        u = scaled + z
        # Outside, u clips to n or p. A NaN is outside and stays one, so a bad step is noticed.
        return scaled, u, (n < u) & (u < p), jnp.clip(u, n, p), g.astype(dtype)

    def slope(x, g):
        _, _, inside, clipped, wide = parts(x, g)
        return jnp.where(inside, through_rounding(wide, clipped, spec, strength=strength), 0)

    def terms(x, g, dx):
        scaled, u, inside, clipped, wide = parts(x, g)
        rounded = round_codes(scaled, spec.rounding, key)  # as in the forward pass, before z
        if not soft:
            yield wide * jnp.where(inside, rounded - scaled, clipped)
        else:
            bent = jnp.where(inside, dx.astype(dtype) * u, 0)  # u may be infinite outside
            yield wide * jnp.where(inside, rounded + z, clipped) - bent
        if offset is not None:
            yield wide - dx.astype(dtype) if soft else jnp.where(inside, 0, wide)
        if learned:
            yield jnp.where(inside, wide * s * _dsq_bend(clipped, strength), 0)

    params = [step, *(() if offset is None else (offset,)), *((strength,) if learned else ())]
    dx, *grads = cotangents(
        x,
        g,
        params,
        slope,
        lambda *arrays: tuple(terms(*arrays)),
        factor=factor,
        as_given=key is not None,
        apart=soft,
    )
    gradients = dict(zip(map(id, params), grads, strict=True))
    dstrength = None if strength is None else gradients.get(id(strength), jnp.zeros_like(strength))
    return dx, gradients[id(step)], gradients.get(id(offset)), dstrength, None


def _dsq_bend(u: jax.Array, alpha: jax.Array) -> jax.Array:
    """The derivative of DSQ's soft staircase by its alpha, in code units.

    The staircase is floor(u) + 1/2 + tanh(k f) / (2 (1 - alpha)), k = log(2 / alpha - 1).
    """
    k = jnp.log(2 / alpha - 1)  # as in `through_rounding`, so that a loop has one tanh for both
    phase = u - jnp.floor(u) - 0.5
    bent = jnp.tanh(k * phase)
    dk = -2 / (alpha * (2 - alpha))
    return 0.5 * (bent / jnp.square(1 - alpha) + (1 - bent**2) * phase * dk / (1 - alpha))


_staircase.defvjp(_forward, _backward)
