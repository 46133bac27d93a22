"""The range with the smallest quantization error, searched on a grid.

    argmin_i  sum |x - Q(x; i/100 lo, i/100 hi)|^p,   i = 1 .. 100,  p = 2

lo and hi are the ends of the data, shrunk together, and Q is the spec's own quantizer as it would
start from that range: its levels, its rounding, a power-of-two scale. The error of every candidate
is summed over all batches and one argmin is taken at the end, per channel where ranges are: an
argmin per batch would let the last batch decide.

The power p is the option `power`, of a spec (`options={"power": 2.4}`) or of `calibrate`. 2 is the
mean squared error. The larger it is the more do clipped outliers count: L_p norms come from LAPQ
(Nahshan et al., 2019, arXiv 1911.07190), and 2.4 is what the code of BRECQ (Li et al., 2021, arXiv
2102.05426) searches its steps with.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks, numerics
from qkd_jax.numerics import Axes, AxisName, Spec, State, Stats
from qkd_jax.quantizers import QUANTIZERS

__all__ = ["CANDIDATES", "NEEDS_STATS", "OPTIONS", "init", "range", "update"]

NEEDS_STATS = True
CANDIDATES = 100
OPTIONS = {"power": 2.0}


def _fractions() -> jax.Array:
    # Widest first: argmin takes the first of equals, and a wide range is the safer one.
    return jnp.arange(CANDIDATES, 0, -1, dtype=jnp.float32) / CANDIDATES


def init(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: `loss` [*shape, candidates] 0, `lo` +inf, `hi` -inf.

    The candidates lie last: a lifted layer (`nn.scan`, `nn.vmap`) stacks its states in front.

    Raises:
        ValueError: a power that is not above 0.
    """
    checks.number("option power", _power(spec), low=0.0, low_allowed=False)
    return {
        "lo": numerics.filled(shape, np.inf),
        "hi": numerics.filled(shape, -np.inf),
        "loss": numerics.filled((*shape, CANDIDATES), 0),
    }


def _power(spec: Spec) -> float:
    return spec.option("power", OPTIONS["power"])


def update(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Axes = (),
    stats: Stats | None = None,
    axis_name: AxisName = None,
) -> State:
    """Adds one batch's error to every candidate.

    Args:
        state: of `init` or the last `update`.
        x: the batch.
        spec: whose quantizer is scored.
        channel_axes: axes of `x` with ranges of their own.
        stats: of all the batches (and devices), so that every batch scores the same candidates.
        axis_name: mapped axes to sum over.

    Raises:
        ValueError: `stats` is missing.
    """
    if stats is None:
        raise ValueError(
            "stats is None; the mse observer scales its candidates by the range of all the data. "
            "Run a first pass (`numerics.measure`, `merge`, `finish`) and hand its Stats in."
        )
    axes = numerics.reduced_axes(x.ndim, channel_axes)
    wide, power = x.astype(numerics.compute_dtype(x)), _power(spec)
    # With an observer quantizers start from the range, and not from other moments.
    searched, quantizer = dataclasses.replace(spec, observer="mse"), QUANTIZERS[spec.quantizer]

    # The gaps' squares stay in float32; losses are compared with those of the same range alone.
    unit = numerics.unit_of(jnp.maximum(jnp.abs(stats.lo), jnp.abs(stats.hi)))

    def error(fraction: jax.Array) -> jax.Array:
        params = quantizer.init(
            stats._replace(lo=stats.lo * fraction, hi=stats.hi * fraction), searched
        )
        gap = jnp.abs(wide - quantizer.fake_quant(wide, params, searched)) * (1 / unit)
        gap = jnp.square(gap) if power == 2 else gap**power
        return jnp.sum(gap, axis=axes, keepdims=bool(channel_axes))

    # One candidate at a time: all at once would hold a hundred copies of the activations.
    loss = jnp.moveaxis(jax.lax.map(error, _fractions()), 0, -1)
    if axis_name is not None:
        loss = jax.lax.psum(loss, axis_name)
    dtype = state["loss"].dtype
    return {
        "lo": stats.lo.astype(dtype),
        "hi": stats.hi.astype(dtype),
        "loss": state["loss"] + loss.astype(dtype),
    }


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The best range (lo, hi); of equal ones the widest.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-1.0, 0.5, 3.0]), qk.Spec(4)
        >>> stats = qk.numerics.finish(qk.numerics.measure(x))
        >>> state = qk.observers.mse.update(qk.observers.mse.init((), spec), x, spec, stats=stats)
        >>> qk.observers.mse.range(state, spec)
        (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    del spec
    numerics.check_data(state["lo"], state["hi"], empty=state["lo"] > state["hi"])
    best = _fractions()[jnp.argmin(state["loss"], axis=-1)]
    return state["lo"] * best, state["hi"] * best
