"""Gradient building blocks that every quantizer's closed-form backward pass shares.

A straight-through gradient composed from `clip` and `round` is wrong at the ends of the grid:
`jnp.clip` sends half of the gradient through elements that land exactly on an end, `lax.clamp`
none. So quantizers write their backward pass out with a mask, and these are its pieces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics.arrays import Axes

if TYPE_CHECKING:
    from qkd_jax.numerics.spec import Spec


STRENGTHS = {"ewgs": 1e-3, "dsq": 0.2, "sigmoid": 5.0}
"""Default strength of each surrogate of the gradient of rounding."""


def compute_dtype(x: Any) -> jnp.dtype:
    """The type quantizers compute in: float32, or float64 when `x` is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """Returns `x` in `compute_dtype(x)`, with the values that its own type holds.

    A compiler may hand on what a product of bfloat16 or float16 was before it was rounded to that
    type (XLA's excess precision), and codes would depend on what is compiled together
    (findings/xla_keeps_bfloat16_products_in_float32.sh).
    """
    if x.dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    if x.dtype == jnp.float16:
        # Not reduce_precision, which takes numbers below float16's normal ones to zero
        # (findings/reduce_precision_is_no_cast_to_float16.sh).
        return jax.lax.optimization_barrier(x).astype(jnp.float32)
    return x


@jax.custom_vjp
def round_ste(x: jax.Array) -> jax.Array:
    """Rounds half to even; the gradient passes as if it were the identity."""
    return jnp.round(x)


round_ste.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def round_codes(u: jax.Array, rounding: str = "even", key: jax.Array | None = None) -> jax.Array:
    """Rounds numbers in code units to integers.

    Args:
        u: any shape.
        rounding: "even" (half to even), "away" (half away from zero), "floor", or "stochastic"
            (floor(u + U), U uniform on [0, 1): right in the mean).
        key: randomness of "stochastic"; without one (evaluation) it rounds half to even.
    """
    if rounding == "floor":
        return jnp.floor(u)
    if rounding == "away":
        # Not floor(|u| + 1/2): the sum rounds, and the float below 1/2 would become 1.
        whole = jnp.trunc(u)
        return whole + jnp.sign(u) * (jnp.abs(u - whole) >= 0.5)
    if rounding == "stochastic" and key is not None:
        # The fraction decides, not floor(u + U): that sum rounds where u is large.
        below = jnp.floor(u)
        return below + (jax.random.uniform(key, u.shape, u.dtype) < u - below)
    return jnp.round(u)


def gradient_scale(shape: Sequence[int], count: int, qmax: int, *, batch_axes: Axes = ()) -> float:
    """LSQ's factor 1 / sqrt(N qmax) on the gradient of a quantizer's parameter.

    N is the number of elements that share a parameter: weights of the tensor, channel or group,
    features of one example for activations. Batch axes are left out, so the training result does
    not depend on how a batch is cut over devices. Esser et al., 2019 (arXiv 1902.08153, section
    2.2).

    Args:
        shape: of the quantized tensor.
        count: number of parameters that share it.
        qmax: the highest code.
        batch_axes: axes of `shape` that count examples.
    """
    batch = {axis % len(shape) for axis in batch_axes}
    sizes = [size for i, size in enumerate(shape) if i not in batch]
    if not all(isinstance(size, int | np.integer) for size in sizes):
        return 1.0  # exported for any size, where nothing has a gradient
    elements = math.prod(sizes)
    return 1 / math.sqrt(max(elements / count, 1) * max(qmax, 1))  # 1-bit grids may end at 0


def through_rounding(
    g: jax.Array,
    u: jax.Array,
    spec: Spec,
    *,
    strength: jax.Array | float | None = None,
) -> jax.Array:
    """Returns the gradient with respect to `u` of `round(u)` from that of its result.

        ste      g
        ewgs     g * (1 + delta * sign(g) * (u - round(u)) / (levels - 1))
        dsq      g * s k / 2 * (1 - tanh(k f)^2),  k = log(2 / alpha - 1),  s = 1 / (1 - alpha)
        sigmoid  g * T sigma(T f) (1 - sigma(T f)) / (2 sigma(T / 2) - 1)

    with f = u - floor(u) - 1/2, the position in the cell between two codes. The last two are the
    slopes of a smoothed staircase that meets the true one in every code, so that they integrate to
    1 over a cell; alpha -> 0 and T -> inf concentrate them on the thresholds. Straight-through
    estimation: Bengio et al., 2013 (arXiv 1308.3432). EWGS: Lee et al., 2021 (arXiv 2104.00903, eq.
    4, where u spans [0, 1]). DSQ: Gong et al., 2019 (arXiv 1908.05033, eq. 3 to 7). Sigmoids: Yang
    et al., 2019 (arXiv 1911.09464, eq. 6).

    Args:
        g: gradient of the loss by the rounded codes (in any unit; for "ewgs" its sign matters).
        u: what was rounded, in code units, like `g`.
        spec: `backward`, `strength`, and the number of levels.
        strength: in place of the spec's: a number or an array that broadcasts.
    """
    if spec.backward == "ste":
        return g
    if strength is None:
        strength = spec.strength if spec.strength is not None else STRENGTHS[spec.backward]
    if spec.backward == "ewgs":
        distance = (u - jnp.round(u)) / (spec.format.levels - 1)
        return g * (1 + strength * jnp.sign(g) * distance)
    phase = u - jnp.floor(u) - 0.5
    if spec.backward == "dsq":
        k = jnp.log(2 / strength - 1)
        return g * (0.5 * k / (1 - strength) * (1 - jnp.square(jnp.tanh(k * phase))))
    soft = jax.nn.sigmoid(strength * phase)
    return g * (strength * soft * (1 - soft) / (2 * jax.nn.sigmoid(strength / 2) - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_least(x: jax.Array, minimum: float) -> jax.Array:
    """Computes max(x, minimum); the gradient passes as if it were the identity.

    A step size that an optimizer pushed below the minimum can so be pulled up again, which the
    true gradient (zero there) would not allow.
    """
    return jnp.maximum(x, minimum)


at_least.defvjp(lambda x, minimum: (jnp.maximum(x, minimum), None), lambda minimum, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def within(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips to [low, high]; the gradient passes as if it were the identity, as in `at_least`."""
    return jnp.clip(x, low, high)


within.defvjp(lambda x, low, high: (jnp.clip(x, low, high), None), lambda low, high, _, g: (g,))


def _sum_inner_axes(x: jax.Array) -> jax.Array:
    """The first stage of a sum over everything: over some 16 or more neighbours.

    XLA:CPU sums an axis of more than 32 elements by windows, and stores the summand in full before
    it does: another pass over memory, and temporary memory of an activation's size. Sums over
    short axes are fused with what makes the summand and run on all threads. The barrier keeps XLA
    from joining the two stages again, as it does with sums of sums. A sum of short sums also loses
    less to rounding than a long one.
    """
    axes: list[int] = []
    summed = 1
    for axis in range(x.ndim - 1, 0, -1):
        if summed < 16 and x.shape[axis] <= 32:
            axes.append(axis)
            summed *= x.shape[axis]
    if summed < 4:
        return x
    return jax.lax.optimization_barrier(jnp.sum(x, axis=tuple(axes)))


def sum_to(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Sums the axes that a parameter of this shape, () or broadcasting against `x`, shares."""
    if len(shape) == 0:
        return jnp.sum(_sum_inner_axes(x))
    return jnp.sum(x, axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def match_cotangent(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """Sums a cotangent to the shape, dtype and device variation of its primal.

    Undoes the broadcast of `primal` in the forward pass: axes that `primal` has with size 1 (all
    axes, for a scalar) are summed. Inside `jax.shard_map` a parameter is the same on all devices
    while the data differ; where JAX tracks that (`check_vma=True`), the sum runs over devices too,
    as it does behind an ordinary broadcast. Under `pmap` nothing is tracked and the caller reduces
    all gradients at once.
    """
    if primal.ndim == 0:
        cotangent = _sum_inner_axes(cotangent)
    # JAX's own transpose of a broadcast knows both sums; the sum it differentiates is dead code.
    _, transpose = jax.vjp(lambda p: p.astype(cotangent.dtype) + cotangent, primal)
    return transpose(cotangent)[0]
