import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qkd_jax.numerics import Stats, empty, finish, measure, merge, reduced_axes


def truth(x, axes):
    x = np.asarray(x, np.float64)
    keep = len(axes) < x.ndim
    f = lambda g, v: g(v, axis=axes, keepdims=keep)
    return Stats(
        f(np.min, x), f(np.max, x), f(np.mean, abs(x)), f(np.mean, x), f(np.std, x), x.size
    )


def agree(stats, wanted, rtol=1e-6):
    for name in ("lo", "hi", "abs_mean", "mean", "std"):
        np.testing.assert_allclose(
            getattr(stats, name), getattr(wanted, name), rtol=rtol, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("channel_axes", [(), (2,), (-1,), (0, 2), (0, 1, 2)])
def test_measure_against_float64(channel_axes):
    x = np.random.default_rng(0).normal(1.0, 2.0, (5, 4, 3)).astype(np.float32)
    axes = reduced_axes(3, channel_axes)
    stats = finish(measure(x, channel_axes=channel_axes))
    agree(stats, truth(x, axes))
    assert stats.lo.shape == (
        tuple(1 if i in axes else x.shape[i] for i in range(3)) if channel_axes else ()
    )
    np.testing.assert_array_equal(stats.count, x.size // stats.lo.size)
    assert stats.std.dtype == np.float32


@pytest.mark.parametrize("channel_axes", [(), (1,)])
def test_parts_of_any_size_add_up_to_the_whole(channel_axes):
    x = np.random.default_rng(1).normal(3.0, 1.0, (23, 6)).astype(np.float32)
    sums = empty((1, 6) if channel_axes else ())
    for part in np.split(x, [9, 9, 18]):  # one part is empty
        sums = merge(sums, measure(part, channel_axes=channel_axes))
    agree(finish(sums), truth(x, reduced_axes(2, channel_axes)))
    assert np.all(sums.count == x.size // sums.count.size)


def test_the_spread_survives_a_large_mean():
    # E x^2 - (E x)^2 in float32 would be off by more than the variance itself.
    x = (1e4 + np.random.default_rng(2).normal(0, 0.5, (64, 100))).astype(np.float32)
    sums = functools.reduce(merge, [measure(part) for part in x])
    np.testing.assert_allclose(finish(sums).std, x.astype(np.float64).std(), rtol=1e-4)


def test_low_precision_is_summed_in_float32():
    x = jnp.ones((1000,), jnp.bfloat16)
    assert measure(x).sum == 1000


@pytest.mark.parametrize("runner", ["pmap", "shard_map"])
@pytest.mark.parametrize("channel_axes", [(), (1,)])
def test_four_devices_equal_one(runner, channel_axes):
    x = np.random.default_rng(3).normal(2.0, 1.5, (8, 6)).astype(np.float32)
    f = functools.partial(measure, channel_axes=channel_axes, axis_name="batch")
    if runner == "pmap":
        sums = jax.pmap(f, axis_name="batch")(x.reshape(4, 2, 6))
        sums = jax.tree.map(lambda a: a[0], sums)
    else:
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        sums = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("batch"), out_specs=P()))(x)
    one = measure(x, channel_axes=channel_axes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), sums, one)
    agree(finish(sums), truth(x, reduced_axes(2, channel_axes)))


def test_no_data_and_bad_data_are_named_outside_jit():
    with pytest.raises(ValueError, match=r"no calibration data.*at least one non-empty batch"):
        finish(empty())
    with pytest.raises(ValueError, match="no calibration data"):
        finish(measure(np.zeros((0, 3), np.float32), channel_axes=(1,)))
    for value, word in ((np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")):
        with pytest.raises(ValueError, match=f"contain {word}"):
            finish(measure(np.array([1.0, value, 2.0], np.float32)))
    stats = jax.jit(lambda x: finish(measure(x)))(np.array([1.0, np.nan], np.float32))
    assert np.isnan(stats.lo) and np.isnan(stats.hi)


def test_channel_axes_are_checked():
    assert reduced_axes(4, (-1,)) == (0, 1, 2)
    for wrong in ((3,), (-4,), (0, 0), (1, -2)):
        with pytest.raises(ValueError, match="channel_axes is"):
            reduced_axes(3, wrong)


@pytest.mark.parametrize("exponent", [100, 60, -60, -100])
@pytest.mark.parametrize("channel_axes", [(), (1,)])
def test_huge_and_tiny_data_have_the_statistics_of_the_usual_ones(exponent, channel_axes):
    """A power of two moves every statistic by itself, exactly: no square leaves float32."""
    x = np.random.default_rng(2).normal(0.5, 1.0, (40, 3)).astype(np.float32)
    parts = lambda x: functools.reduce(merge, [measure(p, channel_axes=channel_axes) for p in x])
    usual = finish(parts(np.split(x, [7, 20])))
    moved = finish(parts(np.split(np.ldexp(x, exponent), [7, 20])))
    for name in ("lo", "hi", "abs_mean", "mean", "std"):
        wanted = np.ldexp(getattr(usual, name), exponent)
        np.testing.assert_array_equal(getattr(moved, name), wanted, err_msg=name)


def test_parts_of_different_size_are_added_in_the_larger_unit():
    x = np.concatenate([np.full(3, 1e-25), np.full(4, 2.0), np.full(5, -3e25)]).astype(np.float32)
    stats = finish(functools.reduce(merge, map(measure, np.split(x, [3, 7]))))
    agree(Stats(*(np.asarray(v) / 1e25 for v in stats)), truth(x.astype(np.float64) / 1e25, (0,)))


@pytest.mark.parametrize("x", [[0.0, 3.4e38], [-3.4e38, 1.0], [np.finfo(np.float32).min] * 2])
def test_data_at_the_end_of_float32_are_refused(x):
    with pytest.raises(ValueError, match=r"3.4\S*e\+38.*beyond the 1e\+37.*mask"):
        finish(measure(jnp.asarray(x, jnp.float32)))
