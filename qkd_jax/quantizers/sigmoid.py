"""A staircase of sigmoids whose temperature rises (Yang et al., 2019, arXiv 1911.09464).

"Quantization Networks": rounding is the limit of a sum of sigmoids, one at each threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Grid, Spec, Stats

__all__ = ["check", "fake_quant", "init", "integer_view"]

Params = dict[str, jax.Array]

OPTIONS = {"temperature": 5.0}
SIZE, ANNEALED = ("step",), "temperature"
# The paper starts from a clustering, which minimises the squared error too.
PRESET = {"weight": {"observer": "mse"}, "input": {"observer": "mse"}}


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
    numerics.refuse_fields(spec, because="the temperature is annealed over training", dynamic=False)
    numerics.check_option(spec, "temperature", OPTIONS["temperature"], low=0, low_allowed=False)


def init(stats: Stats, spec: Spec) -> Params:
    """The grid over the range, and the first temperature.

    Returns:
        `step` and `temperature`, float32, of the statistics' shape. A train stage raises the
        temperature (`hygiene.<net>.anneal`); left alone it stays.

    Raises:
        ValueError: an unsigned spec and data known to be negative.
    """
    check(spec)
    step, _ = numerics.range_parameters(stats.lo, stats.hi, spec)
    start = float(spec.option("temperature", OPTIONS["temperature"]))
    return {"step": step, "temperature": jnp.full_like(step, start)}


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
    """Rounds `x` to the learned grid; the gradient is that of sigmoids of temperature T.

        u = x / s;  x_hat = clip(round(u), n, p) * s
        g' = g * T sigma(T f) (1 - sigma(T f)) / (2 sigma(T / 2) - 1),  f = u - floor(u) - 1/2
        dx = g' inside n < u < p;  ds = gs * sum (g round(u) - g' u) inside, g (n or p) outside
        dT = 0

    Equations 3 to 6 of the paper.

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
        The paper's forward pass is the soft sum in training and the hard one afterwards; here it is
        hard from the start, so the net that trains is the net that is deployed, and the soft sum
        gives the gradient alone. Its thresholds, levels and biases per step are one learned step.
    """
    numerics.check_operand(x, params, ("step", "temperature"))
    step, temperature = params["step"], params["temperature"]
    factor = numerics.gradient_scale(x.shape, step.size, spec.format.qmax, batch_axes=batch_axes)
    soft = dataclasses.replace(spec, backward="sigmoid")
    return numerics.staircase(x, step, soft, factor=factor, strength=temperature, key=key)
