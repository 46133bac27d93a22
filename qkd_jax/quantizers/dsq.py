"""DSQ: differentiable soft quantization (Gong et al., 2019, arXiv 1908.05033)."""

import dataclasses

import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Axes, Key, OnGrid, Params, Spec, Stats, Values
from qkd_jax.numerics import step_grid as integer_view

__all__ = ["check", "fake_quant", "init", "integer_view"]

OPTIONS = {"alpha": 0.2, "learned": True}
SIZE, ANNEALED = ("step",), "alpha"
# A range up to the largest value leaves 2-bit inputs at 0.
PRESET = {"weight": {"observer": "mse"}, "input": {"observer": "mse"}}
# The paper keeps alpha below 1/2; near 0 the slope at a threshold has no bound.
ALPHA_RANGE = (1e-2, 0.5)


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or another gradient than its own."""
    numerics.refuse_fields(
        spec, "symmetric", "mask", "rounding", "backward", because="its gradient is its own"
    )
    numerics.refuse_one_bit(spec)
    numerics.refuse_learned_power_of_two(spec)
    numerics.check_option(spec, "learned", OPTIONS["learned"])
    low, high = ALPHA_RANGE
    numerics.check_option(spec, "alpha", OPTIONS["alpha"], low=low, high=high)


def init(stats: Stats, spec: Spec) -> Params:
    """The `step` of a grid over the range, and the first `alpha`, the option of that name.

    Alpha is learned, as in the paper; with the option `learned=False` it stays, or a train stage
    anneals it (`hygiene.<net>.anneal`).
    """
    check(spec)
    step, _ = numerics.range_parameters(stats.lo, stats.hi, spec)
    start = float(spec.option("alpha", OPTIONS["alpha"]))
    return {"step": step, "alpha": jnp.full_like(step, start)}


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds `x` to the learned grid; the gradient is that of a staircase of tanh.

        u = x / s;  x_hat = clip(round(u), n, p) * s
        g' = g * k / (2 (1 - alpha)) * (1 - tanh(k f)^2),  f = u - floor(u) - 1/2
        dx = g' inside n < u < p;  ds = gs * sum (g round(u) - g' u) inside, g (n or p) outside
        d alpha = gs * sum g s d(soft staircase) / d alpha inside (0 with learned=False)

    with k = log(2 / alpha - 1); alpha -> 0 is the hard staircase, alpha = 1/2 close to the
    identity. Equations 3 to 9 of the paper, whose forward pass is hard too.

    Note:
        The paper learns both clipping ends; the grid is symmetric here (codes n to p of one step),
        so that zero is on it. alpha is kept within [0.01, 0.5], its gradient passing as if it were
        not.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(2, quantizer="dsq")
        >>> params = {"step": jnp.array(0.5), "alpha": jnp.array(0.2)}
        >>> qk.quantizers.dsq.fake_quant(x, params, spec)
        Array([-1. ,  0. ,  0. ,  0.5], dtype=float32)
    """
    numerics.check_operand(x, params, ("step", "alpha"))
    step, alpha = params["step"], numerics.within(params["alpha"], *ALPHA_RANGE)
    factor = numerics.gradient_scale(x.shape, step.size, spec.format.qmax, batch_axes=batch_axes)
    soft = dataclasses.replace(spec, backward="dsq")
    learned = spec.option("learned", OPTIONS["learned"])
    return numerics.staircase(
        x, step, soft, factor=factor, strength=alpha, learned=learned, key=key
    )
