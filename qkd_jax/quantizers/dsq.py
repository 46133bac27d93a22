"""DSQ: differentiable soft quantization (Gong et al., 2019, arXiv 1908.05033)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Grid, Spec, Stats

__all__ = ["check", "fake_quant", "init", "integer_view"]

Params = dict[str, jax.Array]

OPTIONS = {"alpha": 0.2, "learned": True}
SIZE, ANNEALED = ("step",), "alpha"
# A range up to the largest value leaves 2-bit inputs at 0.
PRESET = {"weight": {"observer": "mse"}, "input": {"observer": "mse"}}
# The paper keeps alpha below 1/2; near 0 the slope at a threshold has no bound.
ALPHA_RANGE = (1e-2, 0.5)


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or another gradient than its own."""
    numerics.refuse_fields(
        spec,
        because="its gradient is its own",
        symmetric=True,
        mask=None,
        rounding="even",
        backward="ste",
    )
    numerics.refuse_one_bit(spec)
    numerics.refuse_learned_power_of_two(spec)
    numerics.check_option(spec, "learned", OPTIONS["learned"])
    low, high = ALPHA_RANGE
    numerics.check_option(spec, "alpha", OPTIONS["alpha"], low=low, high=high)


def init(stats: Stats, spec: Spec) -> Params:
    """The grid over the range, and the first alpha, the option `alpha`.

    It is learned, as in the paper; with the option `learned=False` it stays, or a train stage
    anneals it (`hygiene.<net>.anneal`).

    Returns:
        `step` and `alpha`, float32, of the statistics' shape.

    Raises:
        ValueError: an unsigned spec and data known to be negative.
    """
    check(spec)
    step, _ = numerics.range_parameters(stats.lo, stats.hi, spec)
    start = float(spec.option("alpha", OPTIONS["alpha"]))
    return {"step": step, "alpha": jnp.full_like(step, start)}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = code * step."""
    step = numerics.at_least(params["step"], numerics.MIN_SCALE)
    return Grid.symmetric(step, spec.format)


def fake_quant(
    x: jax.Array,
    params: Params,
    spec: Spec,
    *,
    batch_axes: Sequence[int] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Rounds `x` to the learned grid; the gradient is that of a staircase of tanh.

        u = x / s;  x_hat = clip(round(u), n, p) * s
        g' = g * k / (2 (1 - alpha)) * (1 - tanh(k f)^2),  f = u - floor(u) - 1/2
        dx = g' inside n < u < p;  ds = gs * sum (g round(u) - g' u) inside, g (n or p) outside
        d alpha = gs * sum g s d(soft staircase) / d alpha inside (0 with learned=False)

    with k = log(2 / alpha - 1); alpha -> 0 is the hard staircase, alpha = 1/2 close to the
    identity. Equations 3 to 9 of the paper, whose forward pass is hard too.

    Args:
        x: any shape; float. Computed in float32 (float64 for float64) and returned in x's dtype.
        params: of `init`; () or broadcasting against `x`.
        spec: static.
        batch_axes: axes of `x` that count examples; () for weights.
        key: randomness of stochastic rounding; None rounds half to even.

    Returns:
        x_hat, like `x`. NaN stays NaN, +-inf saturates.

    Raises:
        ValueError: parameters that do not fit `x`.

    Note:
        The paper learns both clipping ends; the grid is symmetric here (codes n to p of one step),
        so that zero is on it. alpha is kept within [0.01, 0.5], its gradient passing as if it were
        not.
    """
    numerics.check_operand(x, params, ("step", "alpha"))
    step, alpha = params["step"], numerics.within(params["alpha"], *ALPHA_RANGE)
    factor = numerics.gradient_scale(x.shape, step.size, spec.format.qmax, batch_axes=batch_axes)
    soft = dataclasses.replace(spec, backward="dsq")
    learned = spec.option("learned", OPTIONS["learned"])
    return numerics.staircase(
        x, step, soft, factor=factor, strength=alpha, learned=learned, key=key
    )
