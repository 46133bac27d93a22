"""Features as losses take them in: pooling, pairing, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.losses.inputs.feature_maps import (
    adaptive_avg_pool,
    pooled_alike,
    prepare_feature_lists,
    prepare_features,
    safe_norm,
    unit,
)
from qkd_jax.losses.inputs.gradients import reverse_gradient


@pytest.mark.parametrize(("height", "width"), [(4, 3), (7, 1), (2, 5), (9, 8)])
def test_adaptive_windows_overlap(height, width):
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3)).astype(np.float32)
    wanted = np.zeros((2, height, width, 3))
    for i in range(height):
        for j in range(width):
            rows = slice(i * 7 // height, -(-(i + 1) * 7 // height))
            columns = slice(j * 5 // width, -(-(j + 1) * 5 // width))
            wanted[:, i, j] = x[:, rows, columns].mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(adaptive_avg_pool(x, height, width), wanted, rtol=1e-5, atol=1e-6)


def test_seven_to_four():
    row = np.arange(7, dtype=np.float32).reshape(1, 7, 1, 1)
    np.testing.assert_allclose(adaptive_avg_pool(row, 4, 1).ravel(), [0.5, 2, 4, 5.5])


def test_only_what_is_larger_is_pooled():
    tall, wide = np.ones((1, 8, 2, 3)), np.ones((1, 4, 6, 5))
    assert [x.shape for x in pooled_alike(tall, wide)] == [(1, 4, 2, 3), (1, 4, 2, 5)]
    vector = np.ones((1, 3))
    assert pooled_alike(vector, vector)[0] is vector


def test_norms_have_a_finite_gradient_at_zero():
    for function in (lambda x: safe_norm(x).sum(), lambda x: unit(x).sum()):
        assert np.isfinite(jax.grad(function)(jnp.zeros((2, 3)))).all()
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0]])), [[0.6, 0.8]], rtol=1e-6)


def test_reversal():
    triple = lambda x, s: 3 * reverse_gradient(x, s)
    value, slope = jax.value_and_grad(triple, (0, 1))(jnp.float32(2.0), 0.5)
    assert value == 6 and slope == (-1.5, 0)


def test_messages():
    a, b = np.ones((2, 4, 4, 3), np.float32), np.ones((2, 4, 4, 5), np.float32)
    with pytest.raises(ValueError, match=r"student_feature has shape .*teacher_feature.*adapt"):
        prepare_features(a, b, None)
    with pytest.raises(ValueError, match="vectors or maps alike"):
        prepare_features(a, np.ones((2, 3), np.float32), None, alike="size")
    with pytest.raises(ValueError, match=r"must have 4 axes"):
        prepare_features(np.ones((2, 3)), np.ones((2, 3)), None, maps=True)
    with pytest.raises(ValueError, match="dtype int32"):
        prepare_features(a.astype(np.int32), a, None)
    with pytest.raises(ValueError, match=r"student_features is one array.*\(array,\) for one"):
        prepare_feature_lists(a, (a,), None)
    with pytest.raises(ValueError, match="student_features has 1 entries and teacher_features 2"):
        prepare_feature_lists((a,), (a, a), None)
    with pytest.raises(ValueError, match="teacher_features is empty"):
        prepare_feature_lists((a,), (), None)
    with pytest.raises(ValueError, match=r"student_features\[1\] has 1 examples"):
        prepare_feature_lists((a, a[:1]), (a, a[:1]), None)
    with pytest.raises(ValueError, match="height is 0"):
        adaptive_avg_pool(a, 0, 1)
