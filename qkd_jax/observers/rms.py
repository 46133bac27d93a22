"""A multiple of the root mean square: the best one for Gaussian data of this format.

    lo, hi = -k rms, k rms          (affine: mean -+ k std)

k minimises E (x - Q(x))^2 for x ~ N(0, 1) (|x| for unsigned formats) and is computed once for each
format. Sums only: the cheapest observer that clips, and one that no single outlier moves.

Reference: after Banner et al., 2018, arXiv 1810.05723, who clip by the distribution too.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import numerics
from qkd_jax.numerics import Axes, AxisName, IntFormat, Spec, State, Stats, Sums
from qkd_jax.quantizers import code_format

__all__ = ["ANY_SPEC", "NEEDS_STATS", "OF_CODES", "gaussian_multiple", "init", "range", "update"]

NEEDS_STATS = False
ANY_SPEC = True
OF_CODES = True


def init(shape: Sequence[int], spec: Spec) -> State:
    """The state before any data: the sums of none."""
    del spec
    return numerics.empty(shape)._asdict()


def update(
    state: State,
    x: jax.Array,
    spec: Spec,
    *,
    channel_axes: Axes = (),
    stats: Stats | None = None,
    axis_name: AxisName = None,
) -> State:
    """Adds the sums of one batch."""
    del spec, stats
    seen = numerics.measure(x, channel_axes=channel_axes, axis_name=axis_name)
    merged = numerics.merge(Sums(**state), seen)
    return {k: v.astype(state[k].dtype) for k, v in merged._asdict().items()}


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi), inside that of the data.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-1.0, 0.5, 3.0]), qk.Spec(4)
        >>> state = qk.observers.rms.update(qk.observers.rms.init((), spec), x, spec)
        >>> qk.observers.rms.range(state, spec)
        (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    stats = numerics.finish(Sums(**state))
    if spec.symmetric:
        k = gaussian_multiple(code_format(spec))
        unit = numerics.unit_of(jnp.maximum(jnp.abs(stats.lo), jnp.abs(stats.hi)))
        squares = (jnp.square(moment * (1 / unit)) for moment in (stats.mean, stats.std))
        middle, deviation = 0.0, jnp.sqrt(sum(squares)) * unit
    else:
        k = gaussian_multiple(IntFormat(spec.bits))
        middle, deviation = stats.mean, stats.std
    return jnp.maximum(stats.lo, middle - k * deviation), jnp.minimum(
        stats.hi, middle + k * deviation
    )


@functools.lru_cache(maxsize=64)
def gaussian_multiple(format: IntFormat) -> float:
    """K at which the grid over [-k, k] has the least squared error on N(0, 1), to 1 %.

    For unsigned formats over [0, k], on |x|, whose root mean square is 1 as well.
    """
    # Midpoints of equal slices of probability would miss the tails: a fine grid with its density.
    x = (np.arange(200_000) + 0.5) / 20_000  # to 10 sigma
    density = np.exp(-x * x / 2)
    if format.signed:
        x, density = np.concatenate([-x[::-1], x]), np.concatenate([density[::-1], density])

    def error(k: float) -> float:
        # "cover": the step at which no end of [-k, k] is clipped.
        step = k / format.qmax
        gap = x - np.clip(np.rint(x / step), format.qmin, format.qmax) * step
        return float(np.sum(gap * gap * density))

    low, high = 0.1, 9.0
    while high / low > 1.005:  # golden section: the error has one minimum
        a, b = high**0.618 * low**0.382, high**0.382 * low**0.618
        a, b = min(a, b), max(a, b)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low * high) ** 0.5
