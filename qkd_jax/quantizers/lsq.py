"""LSQ: learned step size quantization (Esser et al., 2019, arXiv 1902.08153).

The step is a parameter, trained with the network by the gradient of the quantization error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import IntFormat, Spec, Stats

__all__ = ["check", "fake_quant", "gradient_scale", "init", "integer_view"]

Params = dict[str, jax.Array]


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec or a mask: the paper fixes both."""
    if not spec.symmetric:
        raise ValueError(
            "quantizer 'lsq' came with symmetric=False; LSQ has a step and no zero point. "
            "Use symmetric=True, or quantizer='uniform' for an affine grid."
        )
    if spec.mask is not None:
        raise ValueError(
            f"quantizer 'lsq' came with mask={spec.mask!r}; its gradient is fixed by the paper. "
            "Leave mask=None, or use quantizer='uniform'."
        )


def init(stats: Stats, spec: Spec) -> Params:
    """The first step: 2 E|x| / sqrt(p) (section 2.1), or the observer's range.

    With `spec.observer` named, the step is that of the range [stats.lo, stats.hi] instead
    (`numerics.symmetric_scale`). The paper's value suits few bits: it clips much of the range at 2
    and uses a small part of the grid at 8. All-zero data give step 1.

    Returns:
        `step`, float32, of the statistics' shape, in input units per code.

    Raises:
        ValueError: an unsigned spec and data known to be negative.
    """
    check(spec)
    if spec.observer is not None:
        return {"step": numerics.symmetric_scale(stats.lo, stats.hi, spec.format)}
    numerics.check_sign(stats.lo, spec.format)
    step = 2 * stats.abs_mean / math.sqrt(spec.format.qmax)
    step = jnp.where(step == 0, jnp.ones_like(step), jnp.maximum(step, numerics.MIN_SCALE))
    return {"step": step}


def integer_view(params: Params, spec: Spec) -> tuple[jax.Array, jax.Array, IntFormat]:
    """What a code means: (step, 0, format), x_hat = code * step."""
    step = numerics.at_least(params["step"], numerics.MIN_SCALE)
    return step, jnp.zeros_like(step), spec.format


def gradient_scale(
    shape: Sequence[int], steps: int, spec: Spec, *, batch_axes: Sequence[int] = ()
) -> float:
    """The factor 1 / sqrt(N p) on the step's gradient (section 2.2).

    N is the number of elements that share a step: weights of the tensor or of the channel, features
    of one example for activations. Batch axes are left out, so the training result does not depend
    on how a batch is cut over devices.

    Args:
        shape: of the quantized tensor.
        steps: number of steps.
        spec: gives p.
        batch_axes: axes of `shape` that count examples.
    """
    batch = {axis % len(shape) for axis in batch_axes}
    elements = math.prod(size for i, size in enumerate(shape) if i not in batch)
    return 1 / math.sqrt(max(elements / steps, 1) * spec.format.qmax)


def fake_quant(
    x: jax.Array,
    params: Params,
    spec: Spec,
    *,
    batch_axes: Sequence[int] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Rounds `x` to the learned grid.

        u = x / s;  x_hat = clip(round(u), n, p) * s
        dx = g * [n < u < p]
        ds = gs * sum g * (round(u) - u  if n < u < p,  n  if u <= n,  p  if u >= p)

    with gs = 1 / sqrt(N p) (`gradient_scale`). Sections 2.1 to 2.3 of the paper.

    Args:
        x: any shape; float. Computed in float32 (float64 for float64) and returned in x's dtype.
        params: `step`, () or broadcasting against `x`. A step below MIN_SCALE counts as MIN_SCALE,
            and its gradient is the one there, so that an optimizer can bring it back.
        spec: static.
        batch_axes: axes of `x` that count examples; () for weights.
        key: randomness of stochastic rounding; None rounds half to even.

    Returns:
        x_hat, like `x`. NaN stays NaN, +-inf saturates.

    Raises:
        ValueError: parameters that do not fit `x`.

    Note:
        The paper has one step per tensor; with one per channel, N counts the weights of a channel.
    """
    numerics.check_operand(x, params, ("step",))
    step = params["step"]
    factor = gradient_scale(x.shape, step.size, spec, batch_axes=batch_axes)
    return _fake_quant(x, step, spec.format, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fake_quant(x: jax.Array, step: jax.Array, format: IntFormat, factor: float) -> jax.Array:
    step = jnp.maximum(step, numerics.MIN_SCALE)
    codes = numerics.encode(x, step, 0, format)
    return numerics.decode(codes, step, 0).astype(x.dtype)


def _forward(x, step, format, factor):
    # Only the input and the step are kept: codes are cheaper to recompute than to store.
    return _fake_quant(x, step, format, factor), (x, step)


def _backward(format, factor, residuals, g):
    x, step = residuals
    n, p = format.qmin, format.qmax
    u = x.astype(numerics.compute_dtype(x)) * (1 / jnp.maximum(step, numerics.MIN_SCALE))
    inside = (n < u) & (u < p)
    dx = jnp.where(inside, g, jnp.zeros_like(g))
    # Outside, u clips to n or p. A NaN is outside and stays one, so a bad step is noticed.
    slope = jnp.where(inside, jnp.round(u) - u, jnp.clip(u, n, p))
    dstep = numerics.match_cotangent(g.astype(u.dtype) * slope, step) * factor
    return numerics.match_cotangent(dx, x), dstep.astype(step.dtype)


_fake_quant.defvjp(_forward, _backward)
