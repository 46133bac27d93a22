"""What of an environment changes numbers is part of what states are shared by."""

import jax
import numpy as np
import pytest

from qkd_jax.record.environment import numeric_environment


@pytest.mark.parametrize(
    "option",
    [
        lambda: jax.default_prng_impl("rbg"),
        lambda: jax.threefry_partitionable(False),
    ],
    ids=["generator", "partitionable"],
)
def test_options_of_jax_that_change_random_numbers_are_told_apart(option):
    draw = lambda: np.asarray(jax.random.normal(jax.random.key(0), (3, 5)))
    here, numbers = numeric_environment.__wrapped__(), draw()
    with option():
        there = numeric_environment.__wrapped__()
        assert not np.array_equal(draw(), numbers)
    assert there != here and numeric_environment.__wrapped__() == here
