"""A staircase of sigmoids whose temperature rises (Yang et al., 2019, arXiv 1911.09464).

"Quantization Networks": rounding is the limit of a sum of sigmoids, one at each threshold.
"""

import dataclasses

import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Axes, Key, OnGrid, Params, Spec, Stats, Values
from qkd_jax.numerics import step_grid as integer_view

__all__ = ["check", "fake_quant", "init", "integer_view"]

OPTIONS = {"temperature": 5.0}
SIZE, ANNEALED = ("step",), "temperature"
# The paper starts from a clustering, which minimises the squared error too.
PRESET = {"weight": {"observer": "mse"}, "input": {"observer": "mse"}}


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or another gradient than its own."""
    numerics.refuse_fields(
        spec, "symmetric", "mask", "rounding", "backward", because="its gradient is its own"
    )
    numerics.refuse_one_bit(spec)
    numerics.refuse_learned_power_of_two(spec)
    numerics.refuse_fields(spec, "dynamic", because="the temperature is annealed over training")
    numerics.check_option(spec, "temperature", OPTIONS["temperature"], low=0, low_allowed=False)


def init(stats: Stats, spec: Spec) -> Params:
    """The `step` of a grid over the range, and the first `temperature`, the option of that name."""
    check(spec)
    step, _ = numerics.range_parameters(stats.lo, stats.hi, spec)
    start = float(spec.option("temperature", OPTIONS["temperature"]))
    return {"step": step, "temperature": jnp.full_like(step, start)}


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds `x` to the learned grid; the gradient is that of sigmoids of temperature T.

        u = x / s;  x_hat = clip(round(u), n, p) * s
        g' = g * T sigma(T f) (1 - sigma(T f)) / (2 sigma(T / 2) - 1),  f = u - floor(u) - 1/2
        dx = g' inside n < u < p;  ds = gs * sum (g round(u) - g' u) inside, g (n or p) outside
        dT = 0

    Equations 3 to 6 of the paper.

    Note:
        The paper's forward pass is the soft sum in training and the hard one afterwards; here it is
        hard from the start, so the net that trains is the net that is deployed, and the soft sum
        gives the gradient alone. Its thresholds, levels and biases per step are one learned step.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(2, quantizer="sigmoid")
        >>> params = {"step": jnp.array(0.5), "temperature": jnp.array(5.0)}
        >>> qk.quantizers.sigmoid.fake_quant(x, params, spec)
        Array([-1. ,  0. ,  0. ,  0.5], dtype=float32)
    """
    numerics.check_operand(x, params, ("step", "temperature"))
    step, temperature = params["step"], params["temperature"]
    factor = numerics.gradient_scale(x.shape, step.size, spec.format.qmax, batch_axes=batch_axes)
    soft = dataclasses.replace(spec, backward="sigmoid")
    return numerics.staircase(x, step, soft, factor=factor, strength=temperature, key=key)
