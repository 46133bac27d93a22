"""TQT: trained thresholds and power-of-two scales (Jain et al., 2019, arXiv 1903.08066)."""

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Grid, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "fake_quant", "init", "integer_view"]

SIZE = ("log2_threshold",)
# The paper starts its inputs from the KL divergence.
PRESET = {"input": {"observer": "entropy"}}

LN2 = 0.6931471805599453


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or another scale convention."""
    numerics.refuse_fields(
        spec,
        "symmetric",
        "mask",
        "scaling",
        because="it has power-of-two scales without a zero point",
    )
    numerics.refuse_one_bit(spec)


def init(stats: Stats, spec: Spec) -> Params:
    """`log2_threshold`, the first one: 3 sigma for signed data, the largest value for unsigned.

    The paper takes 3 sigma for weights and a range that minimises the KL divergence for inputs:
    `observer="entropy"`. With an observer named, the threshold is its range's farther end. All-zero
    data give the threshold at which the scale is 1.
    """
    check(spec)
    numerics.check_sign(stats.lo, spec.format)
    far = jnp.maximum(-stats.lo, stats.hi)
    if spec.signed and spec.observer is None:
        far = jnp.minimum(far, 3 * stats.std + jnp.abs(stats.mean))
    half = 2.0 ** (spec.bits - int(spec.signed))
    far = jnp.where(far == 0, half, jnp.maximum(far, numerics.MIN_SCALE * half))
    return {"log2_threshold": jnp.log2(far)}


@jax.custom_vjp
def _power_of_two(log2_threshold: Array) -> Array:
    """2^ceil(t); its derivative is taken as 2^ceil(t) ln 2, as if ceil were the identity."""
    power = jnp.ldexp(jnp.ones_like(log2_threshold), jnp.ceil(log2_threshold).astype(jnp.int32))
    return jnp.where(jnp.isnan(log2_threshold), log2_threshold, power)  # an integer hides a NaN


_power_of_two.defvjp(
    lambda t: (_power_of_two(t),) * 2, lambda power, g: (g * power * jnp.float32(LN2),)
)


def _step(params: Params, spec: Spec) -> Array:
    return _power_of_two(params["log2_threshold"]) * 2.0 ** -(spec.bits - int(spec.signed))


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid of scale 2^ceil(t) / 2^(b-1); unsigned 2^ceil(t) / 2^b."""
    step = numerics.at_least(_step(params, spec), numerics.MIN_SCALE)
    return Grid.symmetric(step, spec.format)


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds `x` to a grid whose scale is a power of two.

        s = 2^ceil(t) / 2^(b-1)   (unsigned: / 2^b),   t = log2 of the threshold
        u = x / s;  x_hat = clip(round(u), n, p) * s
        dx = g * [n < u < p]
        dt = gs * s ln 2 * sum g * (round(u) - u  if n < u < p,  n  if u <= n,  p  if u >= p)

    Equations 4 to 8 of the paper. A power-of-two scale makes every rescaling a shift.

    Note:
        Two deviations: the mask is on u and not on round(u), and the gradient of t is multiplied by
        LSQ's gs = 1 / sqrt(N p), where the paper trains t by Adam with a rate of its own, which
        does not see the factor.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(3, quantizer="tqt")
        >>> qk.quantizers.tqt.fake_quant(x, {"log2_threshold": jnp.array(-0.2)}, spec)
        Array([-1.  , -0.25,  0.  ,  0.5 ], dtype=float32)
    """
    numerics.check_operand(x, params, ("log2_threshold",))
    step = _step(params, spec)
    factor = numerics.gradient_scale(x.shape, step.size, spec.format.qmax, batch_axes=batch_axes)
    return numerics.staircase(x, step, spec, factor=factor, key=key)
