"""LSQ: learned step size quantization (Esser et al., 2019, arXiv 1902.08153).

The step is a parameter, trained with the network by the gradient of the quantization error. With
the option `learn_bits` the number of bits is one too.
"""

import functools
import math

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Array, Axes, Key, OnGrid, Params, Spec, Stats, Values
from qkd_jax.numerics import step_grid as integer_view

__all__ = ["check", "fake_quant", "fewest_bits", "init", "integer_view", "used_bits"]

OPTIONS = {"learn_bits": False}
SIZE, STEP = ("step",), "step"


def check(spec: Spec) -> None:
    """Raises ValueError for an affine spec, a mask, or fields that learning the bits excludes."""
    if not spec.symmetric:
        raise ValueError(
            "quantizer 'lsq' came with symmetric=False; LSQ has a step and no zero point. "
            "Use symmetric=True, quantizer='lsq_plus' for a learned offset, or "
            "quantizer='uniform' for an affine grid."
        )
    numerics.refuse_fields(spec, "mask", because="its gradient is fixed by the paper")
    numerics.refuse_one_bit(spec)
    numerics.refuse_learned_power_of_two(spec)
    numerics.check_option(spec, "learn_bits", OPTIONS["learn_bits"])
    if spec.option("learn_bits", False):
        numerics.refuse_fields(spec, "rounding", "backward", "dynamic", because="bits are learned")


def init(stats: Stats, spec: Spec) -> Params:
    """The first `step`, in input units per code: 2 E|x| / sqrt(p), or that of the observer's range.

    With `spec.observer` named, the step is that of the range [stats.lo, stats.hi] instead
    (`numerics.range_parameters`). The paper's value (section 2.1) suits few bits: it clips much of
    the range at 2 and uses a small part of the grid at 8. All-zero data give step 1. Learned `bits`
    start at `spec.bits`.
    """
    check(spec)
    if spec.observer is not None:
        step, _ = numerics.range_parameters(stats.lo, stats.hi, spec)
    else:
        numerics.check_sign(stats.lo, spec.format)
        step = numerics.guarded(2 * stats.abs_mean / math.sqrt(spec.format.qmax))
    if not spec.option("learn_bits", False):
        return {"step": step}
    return {"step": step, "bits": jnp.full_like(step, spec.bits)}


def fewest_bits(spec: Spec) -> int:
    """The fewest bits that learned bits can come to: one, and one for a sign."""
    return 1 + int(spec.signed)


def used_bits(params: Params, spec: Spec) -> Array:
    """The bits that learned bits stand for: rounded, between the fewest possible and `spec.bits`.

    The gradient passes as if they were neither rounded nor clipped, so that bits which an update
    took out of their range come back.
    """
    return numerics.round_ste(numerics.within(params["bits"], fewest_bits(spec), spec.bits))


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds `x` to the learned grid.

        u = x / s;  x_hat = clip(round(u), n, p) * s
        dx = g * [n < u < p]
        ds = gs * sum g * (round(u) - u  if n < u < p,  n  if u <= n,  p  if u >= p)

    with gs = 1 / sqrt(N p) (`numerics.gradient_scale`). Sections 2.1 to 2.3 of the paper.

    Learned bits b make n = -2^(b-1), p = 2^(b-1) - 1 (unsigned: 0 and 2^b - 1) of the rounded b,
    with the gradient that the clipped elements have through n and p:

        db = gs * sum g * s * (ln 2 * 2^(b-1) above,  -ln 2 * 2^(b-1) below,  0 inside)

    They shrink under a penalty on the size (`training.hygiene`), after Uhlich et al., 2019
    (arXiv 1905.11452), who learn the step and the range instead and get b from both.

    A step below MIN_SCALE counts as MIN_SCALE, and its gradient is the one there, so that an
    optimizer can bring it back.

    Note:
        The paper has one step per tensor; with one per channel, N counts the weights of a channel.
        `spec.backward` other than "ste" shapes dx and, with it, ds (`numerics.staircase`).

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(2, quantizer="lsq")
        >>> qk.quantizers.lsq.fake_quant(x, {"step": jnp.array(0.5)}, spec)
        Array([-1. ,  0. ,  0. ,  0.5], dtype=float32)
    """
    learn_bits = spec.option("learn_bits", False)
    numerics.check_operand(x, params, ("step", "bits") if learn_bits else ("step",))
    step = params["step"]
    qmax = 1 if learn_bits else spec.format.qmax  # that of the bits in use: `_backward`
    factor = numerics.gradient_scale(x.shape, step.size, qmax, batch_axes=batch_axes)
    if not learn_bits:
        return numerics.staircase(x, step, spec, factor=factor, key=key)
    return _learned_bits(x, step, used_bits(params, spec), spec, factor)


def _ends(bits: Array, spec: Spec) -> tuple[Array, Array, Array]:
    """Returns (n, p, 2^(bits - signed)) of a number of bits."""
    # Not exp2, which misses some powers by a bit.
    power = jnp.ldexp(jnp.ones_like(bits), bits.astype(jnp.int32) - int(spec.signed))
    low = spec.format.narrow_range - power if spec.signed else jnp.zeros_like(power)
    return low, power - 1, power


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _learned_bits(x: Array, step: Array, bits: Array, spec: Spec, factor: float) -> Array:
    step = jnp.maximum(step, numerics.MIN_SCALE)
    low, high, _ = _ends(bits, spec)
    u = x.astype(numerics.compute_dtype(x)) * (1 / step)
    return (jnp.clip(jnp.round(u), low, high) * step).astype(x.dtype)


def _forward(x, step, bits, spec, factor):
    return _learned_bits(x, step, bits, spec, factor), (x, step, bits)


def _backward(spec, factor, residuals, g):
    x, step, bits = residuals
    s = jnp.maximum(step, numerics.MIN_SCALE)
    low, high, power = _ends(bits, spec)
    dtype = numerics.compute_dtype(x)

    def slope(x, g):
        u = x.astype(dtype) * (1 / s)
        return jnp.where((low < u) & (u < high), g, 0)

    def terms(x, g, _):
        u, wide = x.astype(dtype) * (1 / s), g.astype(dtype)
        inside = (low < u) & (u < high)
        end = jnp.where(u >= high, power, -power if spec.signed else 0)
        return (
            wide * jnp.where(inside, jnp.round(u) - u, jnp.clip(u, low, high)),
            wide * jnp.where(inside, 0, s * math.log(2) * end),
        )

    return numerics.cotangents(x, g, (step, bits), slope, terms, factor=factor / jnp.sqrt(high))


_learned_bits.defvjp(_forward, _backward)
