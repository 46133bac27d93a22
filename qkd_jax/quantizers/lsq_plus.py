"""LSQ+: a learned step and a learned offset (Bhalgat et al., 2020, arXiv 2004.09576)."""

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import Axes, Grid, Key, OnGrid, Params, Spec, Stats, Values

__all__ = ["check", "fake_quant", "init", "integer_view"]

SIZE, STEP = ("step",), "step"
# The paper starts its inputs from the least squared error.
PRESET = {"input": {"symmetric": False, "observer": "mse"}}


def check(spec: Spec) -> None:
    """Raises ValueError for a mask, which the paper fixes, or a power-of-two step."""
    numerics.refuse_fields(spec, "mask", because="its gradient is fixed by the paper")
    numerics.refuse_one_bit(spec)
    numerics.refuse_learned_power_of_two(spec)


def init(stats: Stats, spec: Spec) -> Params:
    """The first `step`, and `offset` where affine (section 3.2).

    Symmetric (weights): step = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1), no offset. Affine
    (inputs): step = (hi - lo) / (p - n), offset = lo - n * step. The paper then minimises the
    squared error of inputs over both; here `observer="mse"` does that, and with any observer named
    both come from its range. All-zero data give step 1.
    """
    check(spec)
    if not spec.symmetric:
        step, zero_point = numerics.affine_parameters(stats.lo, stats.hi, spec.format)
        return {"step": step, "offset": -zero_point * step}
    if spec.observer is not None:
        return {"step": numerics.range_parameters(stats.lo, stats.hi, spec)[0]}
    numerics.check_sign(stats.lo, spec.format)
    far = jnp.abs(stats.mean) + 3 * stats.std
    return {"step": numerics.guarded(far / 2 ** (spec.bits - int(spec.signed)))}


def integer_view(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat = (code - zero_point) * step."""
    step = numerics.at_least(params["step"], numerics.MIN_SCALE)
    if spec.symmetric:
        return Grid.symmetric(step, spec.format)
    zero_point = numerics.snapped_zero_point(step, params["offset"], spec)
    return Grid(step, jax.lax.stop_gradient(zero_point), spec.format)


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Rounds `x` to the learned grid, shifted by the learned offset B.

        z = clip(round(-B / s), n, p);  u = x / s + z;  x_hat = (clip(round(u), n, p) - z) * s
        dx = g * [n < u < p]
        ds = gs * sum g * (round(u) - u  if n < u < p,  n  if u <= n,  p  if u >= p)
        dB = gs * sum g * (0  if n < u < p,  else 1)

    with gs = 1 / sqrt(N p). Equations 2, 4 and 5 of the paper, its B being -z s here.

    Note:
        The paper leaves B between two codes, so that zero is not on the grid: padding is then
        inexact, and an integer product has a term more. Here B is snapped to a whole number of
        steps with the gradients as if it were not; it moves by half a step at most.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x = jnp.array([-0.9, -0.2, 0.1, 0.6])
        >>> spec = qk.Spec(2, quantizer="lsq_plus", signed=False, symmetric=False)
        >>> params = {"step": jnp.array(0.5), "offset": jnp.array(-1.0)}
        >>> qk.quantizers.lsq_plus.fake_quant(x, params, spec)
        Array([-1. ,  0. ,  0. ,  0.5], dtype=float32)
    """
    names = ("step",) if spec.symmetric else ("step", "offset")
    numerics.check_operand(x, params, names)
    step = params["step"]
    factor = numerics.gradient_scale(x.shape, step.size, spec.format.qmax, batch_axes=batch_axes)
    if spec.symmetric:
        return numerics.staircase(x, step, spec, factor=factor, key=key)
    return numerics.staircase(x, step, spec, factor=factor, offset=params["offset"], key=key)
