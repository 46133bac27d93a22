"""The range that keeps the most information: TensorRT's calibration (Migacz, GTC 2017).

The histogram of |x| is cut at each of its edges in turn; what lies beyond is added to the last bin
kept, and the cut histogram is compared with itself at the resolution of the format:

    argmin_i KL(P_i || Q_i),  i = 128 .. bins
    P_i: bins 0 .. i-1, the last one with all that lies beyond
    Q_i: bins 0 .. i-1 in `levels` equal chunks, each chunk's mass spread over its non-zero bins

The first bin, which holds the zeros of a ReLU, counts as the second one. Of equal divergences the
widest range wins. levels = 2^(b-1) for signed formats and 2^b for unsigned ones. An affine grid
takes 2^(b-1) levels for |x| and the same threshold at both ends: the method knows one.

Published code is two nested Python loops over the bins. Both sums are differences of cumulative
sums, so all cuts are one gather: see `thresholds`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import numerics
from qkd_jax.numerics import Spec, State
from qkd_jax.numerics.states import init_histogram as init
from qkd_jax.numerics.states import update_histogram as update

__all__ = ["NEEDS_STATS", "OF_CODES", "START", "init", "range", "thresholds", "update"]

NEEDS_STATS = False
OF_CODES = True
START = 128


def range(state: State, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The range (lo, hi): -threshold and threshold, inside the range of the data.

    The search runs in NumPy, in float64; under `jit` as a callback.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-1.0, 0.5, 3.0]), qk.Spec(4)
        >>> state = qk.observers.entropy.update(qk.observers.entropy.init((), spec), x, spec)
        >>> qk.observers.entropy.range(state, spec)
        (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    lo, hi = state["lo"], state["hi"]
    numerics.check_data(lo, hi, empty=lo > hi)

    def search(counts: Any, exponent: Any, lo: Any) -> Any:
        rows = numerics.magnitudes(np.asarray(counts, np.float64))
        # True: half of the codes are for values below 0.
        halved = np.broadcast_to(
            spec.signed if spec.symmetric else np.asarray(lo) < 0, np.shape(lo)
        )
        kept = np.zeros(np.shape(lo), np.int64)
        for half in np.unique(halved):
            kept = np.where(halved == half, thresholds(rows, 2 ** (spec.bits - half)), kept)
        return np.float32(np.ldexp(np.float64(kept), np.asarray(exponent)))

    arrays = state["counts"], state["exponent"], lo
    if any(isinstance(a, jax.core.Tracer) for a in arrays):
        end = jax.pure_callback(search, jax.ShapeDtypeStruct(lo.shape, jnp.float32), *arrays)
    else:
        end = jnp.asarray(search(*arrays))
    return jnp.maximum(lo, -end), jnp.minimum(hi, end)


def thresholds(counts: Any, levels: int, *, start: int = START) -> np.ndarray:
    """The best number of bins to keep, for each histogram of |x|.

    With C, Z and A the cumulative sums of the counts h, of the non-zero bins, and of h log h, T the
    total, and m_k, z_k the mass and the non-zero bins of chunk k, all differences of C and Z:

        T KL_i = A[i-1] + p log p - sum_k m_k log(m_k / z_k) - (T - C[i]) log q - T log(T / C[i])

    where p = h[i-1] + T - C[i] is the last bin of P and q = m_k / z_k its value in Q. Infinite
    where the last bin kept is empty and something lies beyond.

    Args:
        counts: [..., bins] float64.
        levels: number of chunks.
        start: the fewest bins to keep; all of them where the histogram ends before.

    Returns:
        [...] int64, from `start` to bins.
    """
    counts = np.array(counts, np.float64)
    lead, bins = counts.shape[:-1], counts.shape[-1]
    rows = counts.reshape(-1, bins)
    rows[:, 0] = rows[:, 1]
    keep = np.arange(min(start, bins), bins + 1)
    # Bin j belongs to chunk floor(j levels / i): chunk k starts at ceil(k i / levels).
    edges = -(-np.arange(levels + 1)[None, :] * keep[:, None] // levels)
    best = np.array([_threshold(row, keep, edges) for row in rows], np.int64)
    return best.reshape(lead)


def _threshold(h: np.ndarray, keep: np.ndarray, edges: np.ndarray) -> int:
    total = h.sum()
    if total == 0:
        return int(keep[-1])
    mass = np.concatenate([[0.0], np.cumsum(h)])
    filled = np.concatenate([[0], np.cumsum(h > 0)])
    logs = np.concatenate([[0.0], np.cumsum(_xlogx(h))])
    m, z = np.diff(mass[edges], axis=1), np.diff(filled[edges], axis=1)
    level = np.divide(m, z, out=np.zeros_like(m), where=z > 0)
    spread = np.sum(np.where(z > 0, m * np.log(np.where(z > 0, level, 1)), 0), axis=1)
    beyond = total - mass[keep]
    last = h[keep - 1]
    chunk = (keep - 1) * (edges.shape[1] - 1) // keep
    q = level[np.arange(len(keep)), chunk]
    tail = np.where(beyond > 0, beyond * np.log(np.where(q > 0, q, 1)), 0)
    divergence = logs[keep - 1] + _xlogx(last + beyond) - spread - tail
    inside = mass[keep]
    divergence -= total * np.log(total / np.where(inside > 0, inside, 1))
    divergence[(last == 0) & (beyond > 0)] = np.inf
    divergence[inside == 0] = np.inf
    # The last of the smallest: ties go to the wider range.
    return int(keep[len(keep) - 1 - np.argmin(divergence[::-1])])


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1))
