"""Hadamard matrices against SciPy's and their definition, and transforms against the matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qkd_jax.numerics.hadamard import (
    factors_of,
    hadamard_matrix,
    hadamard_transform,
    is_hadamard_order,
    largest_order,
    random_rotation,
)


def test_matrices_of_all_orders_by_their_definition():
    known = [n for n in range(1, 130) if is_hadamard_order(n)]
    # Every multiple of 4 that one of Paley's primes reaches; 52, 92, 100, 116 need others.
    missing = [n for n in range(4, 130, 4) if n not in known]
    assert [n for n in known if n % 4] == [1, 2] and missing == [52, 92, 100, 116]
    for n in known:
        h = hadamard_matrix(n).astype(int)
        np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=int))
        assert (h[0] == 1).all() and set(np.unique(h)) <= {-1, 1}


def test_powers_of_two_are_those_of_scipy():
    for n in (1, 2, 4, 8, 64):
        np.testing.assert_array_equal(hadamard_matrix(n), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("size", [8, 12, 96, 28, 100, 256, 30, 7])
def test_transforms_are_products_with_the_matrix(size):
    order = largest_order(size)
    matrices = [hadamard_matrix(n).astype(float) for n in factors_of(order)]
    block = functools.reduce(np.kron, matrices)
    np.testing.assert_array_equal(block @ block.T, order * np.eye(order))
    x = np.random.default_rng(0).normal(size=(3, 5, size))
    with jax.enable_x64(True):
        found = hadamard_transform(jnp.asarray(x))
    np.testing.assert_allclose(found, x @ np.kron(np.eye(size // order), block).T, atol=1e-12)


def test_large_orders_are_cut_into_small_factors():
    assert factors_of(4096) == (64, 64) and factors_of(768) == (12, 64) and factors_of(1) == (1,)
    assert max(factors_of(2**15)) <= 64 and np.prod(factors_of(2**15)) == 2**15


def test_an_unknown_order_is_refused_with_the_largest_that_divides_it():
    with pytest.raises(ValueError, match=r"order is 100, .* divides it is 20"):
        hadamard_matrix(100)


@pytest.mark.parametrize("size", [16, 12, 10])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_rotations_are_orthogonal_and_commute_with_layernorm(size, keeps_mean):
    q = random_rotation(size, np.random.default_rng(0), keeps_mean=keeps_mean)
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
    x = np.random.default_rng(1).normal(size=(4, size)) + 3
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    apart = np.abs(norm(x @ q) - norm(x) @ q).max()
    assert apart < 1e-12 if keeps_mean else apart > 0.1
    assert np.abs(q).max() < 0.95  # it mixes
