"""Draws: pinned values, since a stored run must replay on any later version."""

import numpy as np

from qkd_jax.data import draws


def test_words_are_pinned():
    got = draws.words(3, seed=0, stream=draws.ORDER, index=5)
    assert got.dtype == np.uint64
    assert got.tolist() == [711844959756085066, 10694741845245831870, 17380891118284212732]


def test_permutation_is_pinned_and_complete():
    got = draws.permutation(10, seed=1, stream=draws.SPLIT)
    assert got.tolist() == [2, 4, 9, 5, 6, 0, 1, 8, 3, 7]
    assert sorted(got.tolist()) == list(range(10))


def test_seed_stream_index_and_slot_each_change_the_draw():
    base = dict(seed=3, stream=draws.AUGMENT, index=7, slot=0)
    variants = [base, *({**base, key: base[key] + 1} for key in base)]
    drawn = {draws.words(2, **v).tobytes() for v in variants}
    assert len(drawn) == len(variants)


def test_a_longer_draw_starts_with_the_shorter():
    short, long = (draws.words(n, seed=1, stream=1) for n in (5, 50))
    np.testing.assert_array_equal(short, long[:5])


def test_below_covers_its_range_evenly():
    drawn = draws.below(7, draws.words(70_000, seed=0, stream=1))
    counts = np.bincount(drawn, minlength=7)
    assert drawn.min() == 0 and drawn.max() == 6 and len(counts) == 7
    # 10,000 expected of each; the standard deviation is 93.
    assert np.abs(counts - 10_000).max() < 500
    ends = draws.below(7, np.array([0, 2**64 - 1], np.uint64))
    assert ends.tolist() == [0, 6]
