"""Means with intervals, paired tests, the correction for several comparisons, Pareto fronts."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Differences of equal floats leave rounding: a spread below this share of the values is none.
_ROUNDING = 1e-12


class Mean(NamedTuple):
    """A mean over seeds: `sd` needs two values, `low` and `high` (Student's t) too."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """A mean difference over paired seeds.

    `low`, `high` and `p`, of the two-sided paired t test, are None below two pairs, and where the
    differences have no spread: accuracies are multiples of one test image, so that few seeds may
    agree by chance, of which an interval without width would know nothing. `same` says that both
    sides are equal in every pair.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    same: bool


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Mean:
    """Returns mean, standard deviation (n - 1) and the two-sided t interval.

        mean +- t(n - 1, (1 + level) / 2) sd / sqrt(n)

    Args:
        values: one value a seed.
        level: coverage.

    Raises:
        ValueError: no value.

    Example:
        >>> from qkd_jax.report.intervals import mean_interval
        >>> print([round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])])
        [3, 2.0, 1.0, -0.484, 4.484]
    """
    if not values:
        raise ValueError("values is empty; a mean needs one value at least.")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Mean(1, mean, None, None, None)
    sd = _spread(values, values)
    half = _half_width(sd, len(values), level)
    return Mean(len(values), mean, sd, mean - half, mean + half)


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95
) -> Difference:
    """Returns the mean of `first - second` with its t interval and the paired t test's p.

        t = mean(d) / (sd(d) / sqrt(n)),  p = 2 P(T(n - 1) > |t|),  d = first - second

    What makes a seed easy or hard for both sides cancels.

    Args:
        first: one value a seed.
        second: the same seeds, in the same order.
        level: coverage of the interval.

    Raises:
        ValueError: lengths differ, or there is no pair.

    Example:
        >>> from qkd_jax.report.intervals import paired_difference
        >>> d = paired_difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
        >>> print(d.n, d.mean, round(d.low, 3), round(d.high, 3), round(d.p, 4))
        3 2.0 -0.484 4.484 0.0742
    """
    from scipy.special import stdtr

    if len(first) != len(second) or not first:
        raise ValueError(
            f"{len(first)} and {len(second)} values; paired differences need the same seeds on "
            "both sides, one at least."
        )
    found = [a - b for a, b in zip(first, second, strict=True)]
    n, mean, same = len(found), statistics.fmean(found), not any(found)
    if n < 2:
        return Difference(n, mean, None, None, None, None, same)
    sd = _spread(found, [*first, *second])
    if not sd:
        return Difference(n, mean, sd, None, None, None, same)
    half = _half_width(sd, n, level)
    p = 2 * float(stdtr(n - 1, -abs(mean) / (sd / math.sqrt(n))))
    return Difference(n, mean, sd, mean - half, mean + half, p, same)


def _spread(values: Sequence[float], of: Sequence[float]) -> float:
    """The standard deviation; 0 where it is the rounding of the numbers `of`."""
    sd = statistics.stdev(values)
    return sd if sd > _ROUNDING * max(map(abs, of)) else 0.0


def _half_width(sd: float, n: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.5 + level / 2)) * sd / math.sqrt(n)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Returns p values adjusted for their number by Holm's step-down method.

    With p_(1) <= ... <= p_(m), adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)): to
    reject where it is below 0.05 keeps the chance of any false rejection below 5 %.

    Args:
        ps: a p value for each comparison; None, a comparison without a test, counts among the m.

    Example:
        >>> from qkd_jax.report.intervals import holm
        >>> print(holm([0.25, 0.125, None]))
        [0.5, 0.375, None]

    Reference:
        Holm, 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(ps) - rank) * p))
        adjusted[i] = largest
    return adjusted


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each of (cost, accuracy) is on the Pareto front: no other point dominates it.

    A point dominates another that it equals or beats in both and beats in one; equal points do not
    dominate each other.

    Example:
        >>> from qkd_jax.report.intervals import pareto_front
        >>> print(pareto_front([(1, 0.5), (2, 0.5), (2, 0.7), (2, 0.7)]))
        [True, False, True, True]
    """
    # By cost, best first among equals: a point is on the front if it beats all that are cheaper,
    # and ties with the best of its own cost.
    best, of_cost, front = -math.inf, (-math.inf, -math.inf), [False] * len(points)
    for cost, accuracy, i in sorted(
        ((c, a, i) for i, (c, a) in enumerate(points)), key=lambda p: (p[0], -p[1])
    ):
        if accuracy > best:
            front[i], best, of_cost = True, accuracy, (cost, accuracy)
        else:
            front[i] = (cost, accuracy) == of_cost
    return front
