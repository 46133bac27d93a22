import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.numerics import at_least, compute_dtype, match_cotangent, round_ste


def test_round_ste_is_half_even_with_gradient_one():
    x = jnp.array([-2.5, -1.5, -0.5, 0.0, 0.49, 0.5, 1.5, 2.5, 7.2])
    np.testing.assert_array_equal(round_ste(x), [-2, -2, 0, 0, 0, 0, 2, 2, 7])
    g = jax.grad(lambda v: (round_ste(v) * jnp.arange(9.0)).sum())(x)
    np.testing.assert_array_equal(g, np.arange(9.0))


def test_at_least_is_exact_and_passes_the_gradient():
    x = jnp.array([-1.0, 0.0, 0.25, 3.0])
    np.testing.assert_array_equal(at_least(x, 0.25), [0.25, 0.25, 0.25, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda v: at_least(v, 0.25).sum())(x), np.ones(4))


def test_composed_clip_of_round_would_be_wrong_at_the_edge():
    # Why the quantizers carry masks: an element that lands on an end gets half of its gradient.
    g = jax.grad(lambda u: jnp.clip(round_ste(u), -2.0, 1.0).sum())(jnp.array([1.2, 0.3]))
    np.testing.assert_array_equal(g, [0.5, 1.0])


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 3), (4, 1), (4, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_match_cotangent_undoes_a_broadcast(shape, dtype):
    g = np.arange(12, dtype=np.float32).reshape(4, 3)
    out = match_cotangent(jnp.asarray(g), jnp.zeros(shape, dtype))
    axes = tuple(i for i, n in enumerate(shape) if n == 1) if shape else (0, 1)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out.astype(np.float32), g.sum(axes, keepdims=bool(shape)))


def test_compute_dtype():
    assert compute_dtype(jnp.zeros((), jnp.bfloat16)) == jnp.float32
    assert compute_dtype(np.zeros((), np.float32)) == jnp.float32
    assert compute_dtype(np.zeros((), np.float64)) == jnp.float64
