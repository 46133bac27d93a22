"""Intervals, tests and fronts, against scipy.stats and tables worked by hand."""

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from qkd_jax.report.intervals import holm, mean_interval, paired_difference, pareto_front


@pytest.mark.parametrize("n", [2, 3, 8, 40])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_intervals_and_tests_are_those_of_scipy(n, level):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.9, 0.02, n), rng.normal(0.89, 0.03, n)
    found = mean_interval(a.tolist(), level=level)
    low, high = stats.t.interval(level, n - 1, loc=a.mean(), scale=stats.sem(a))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert (found.n, found.mean, found.sd) == pytest.approx((n, a.mean(), a.std(ddof=1)))
    paired = paired_difference(a.tolist(), b.tolist(), level=level)
    reference = stats.ttest_rel(a, b)
    interval = reference.confidence_interval(level)
    assert paired.p == pytest.approx(reference.pvalue, rel=1e-10)
    assert (paired.low, paired.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_a_textbook_example():
    # Differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3).
    found = paired_difference([3, 5, 7], [2, 3, 4])
    assert (found.mean, found.sd) == (2, 1)
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


def test_without_a_spread_there_is_no_test():
    one = paired_difference([0.5], [0.25])
    assert (one.mean, one.low, one.p, one.same) == (0.25, None, None, False)
    assert mean_interval([0.5]) == (1, 0.5, None, None, None)
    # 0.97 - 0.96 and 0.95 - 0.94 differ in the last bit, which is no spread.
    constant = paired_difference([0.97, 0.95], [0.96, 0.94])
    assert constant.p is None and constant.sd == 0
    # One test image more for each of two seeds is no proof: an interval [+1, +1] would be one.
    assert constant.low is None and constant.high is None
    assert constant.mean == pytest.approx(0.01)
    same = paired_difference([0.5, 0.25], [0.5, 0.25])
    assert same.same and same.p is None


def test_wrong_lengths():
    with pytest.raises(ValueError, match="empty"):
        mean_interval([])
    for pair in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="same seeds on both sides"):
            paired_difference(*pair)


def test_holm_on_a_table_by_hand():
    # 4 * 0.005, 3 * 0.011, 2 * 0.02, 1 * 0.04 is less than 0.04 before it.
    assert holm([0.02, 0.005, 0.04, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []
    # What cannot be tested counts all the same.
    assert holm([None, 0.01, 0.02]) == pytest.approx([None, 0.03, 0.04])


def test_holm_rejects_what_the_step_down_rule_rejects():
    rng = random.Random(0)
    for _ in range(200):
        ps = [rng.choice((0.001, 0.01, 0.02, 0.03, 0.2)) for _ in range(rng.randrange(1, 7))]
        rejected = set()
        for rank, p in enumerate(sorted(ps)):
            if p > 0.05 / (len(ps) - rank):
                break
            rejected.add(p)
        adjusted = holm(ps)
        assert {p for p, a in zip(ps, adjusted, strict=True) if a <= 0.05 + 1e-12} == rejected


def test_the_front_is_what_no_other_point_dominates():
    rng = random.Random(1)
    for _ in range(200):
        points = [(rng.randrange(4), rng.randrange(4)) for _ in range(rng.randrange(8))]
        dominated = [False] * len(points)
        for (i, a), (j, b) in itertools.permutations(enumerate(points), 2):
            del j
            dominated[i] |= b[0] <= a[0] and b[1] >= a[1] and a != b
        assert pareto_front(points) == [not d for d in dominated]
