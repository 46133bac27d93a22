"""What every entry of OBSERVERS must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.observers import OBSERVERS

every = pytest.mark.parametrize("name", OBSERVERS)
granular = pytest.mark.parametrize("channel_axes", [(), (1, 2)])
# Compiled once per shape: outside jit, the loop over candidates would compile in every call.
UPDATE = {
    name: jax.jit(module.update, static_argnames=("spec", "channel_axes"))
    for name, module in OBSERVERS.items()
}
SPECS = [Spec(4), Spec(4, symmetric=False), Spec(2, signed=False), Spec(8, quantizer="lsq")]


def batches(spec, count=3):
    x = np.random.default_rng(0).normal(0.2, 1.0, (count, 4, 6, 3)).astype(np.float32)
    x *= np.array([0.1, 1.0, 5.0], np.float32)
    return jnp.asarray(x if spec.signed or not spec.symmetric else abs(x))


def measured(data, **kw):
    return numerics.finish(
        functools.reduce(numerics.merge, [numerics.measure(x, **kw) for x in data])
    )


def observe(name, spec, data, *, channel_axes=(), stats=None, update=None):
    observer = OBSERVERS[name]
    stats = measured(data, channel_axes=channel_axes) if stats is None else stats
    state = observer.init(stats.lo.shape, spec)
    for x in data:
        state = (update or UPDATE[name])(state, x, spec, channel_axes=channel_axes, stats=stats)
    return state


@every
@granular
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label.replace(" ", "-"))
def test_the_range_is_within_the_data_and_makes_a_grid(name, channel_axes, spec):
    data = batches(spec)
    stats = measured(data, channel_axes=channel_axes)
    state = observe(name, spec, data, channel_axes=channel_axes)
    assert isinstance(state, dict) and all(hasattr(v, "shape") for v in state.values())
    lo, hi = OBSERVERS[name].range(state, spec)
    assert lo.shape == hi.shape == stats.lo.shape and lo.dtype == jnp.float32
    assert np.all(lo < hi)
    # A range may shrink, but not beyond the data and zero.
    assert np.all(lo >= np.minimum(stats.lo, 0)) and np.all(hi <= np.maximum(stats.hi, 0))
    scale, zero_point = numerics.range_parameters(lo, hi, spec)
    assert np.isfinite(scale).all() and np.all(scale > 0) and np.isfinite(zero_point).all()


@every
@pytest.mark.parametrize("exponent", [100, 60, -30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_huge_and_tiny_data_have_the_range_of_the_usual_ones(name, exponent, symmetric):
    spec = Spec(4, symmetric=symmetric)
    data = batches(spec)
    usual, moved = (
        OBSERVERS[name].range(observe(name, spec, x), spec)
        for x in (data, jnp.ldexp(data, exponent))
    )
    np.testing.assert_array_equal(np.asarray(moved), np.ldexp(np.asarray(usual), exponent))


@every
def test_data_at_the_end_of_float32_are_refused(name):
    spec = Spec(8)
    usual = measured(batches(spec))
    state = observe(name, spec, jnp.full((1, 4, 6, 3), 3.4e38), stats=usual._replace(hi=3.4e38))
    with pytest.raises(ValueError, match=r"3.4e\+38.*beyond"):
        OBSERVERS[name].range(state, spec)


@every
def test_a_channel_is_observed_alone(name):
    spec = Spec(4)
    data = batches(spec)
    lo, hi = OBSERVERS[name].range(observe(name, spec, data, channel_axes=(2,)), spec)
    for c in range(3):
        one = OBSERVERS[name].range(observe(name, spec, data[..., c]), spec)
        np.testing.assert_allclose([lo[0, 0, c], hi[0, 0, c]], one, rtol=1e-6)


@every
def test_jit_keeps_shapes_and_types_and_traces_once(name):
    spec = Spec(4)
    data = batches(spec, 4)
    traces = []

    @functools.partial(jax.jit, static_argnames=("spec", "channel_axes"))
    def update(state, x, spec, *, channel_axes, stats):
        traces.append(1)
        new = OBSERVERS[name].update(state, x, spec, channel_axes=channel_axes, stats=stats)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
            lambda a: (a.shape, a.dtype), state
        )
        return new

    compiled = observe(name, spec, data, channel_axes=(2,), update=update)
    assert len(traces) == 1
    plain = observe(name, spec, data, channel_axes=(2,), update=OBSERVERS[name].update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), compiled, plain)
    out = jax.jit(OBSERVERS[name].range, static_argnums=1)(plain, spec)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        out,
        OBSERVERS[name].range(plain, spec),
    )


@every
@granular
@pytest.mark.parametrize("runner", ["pmap", "shard_map"])
def test_four_devices_equal_one(name, channel_axes, runner):
    observer, spec = OBSERVERS[name], Spec(3, symmetric=False)
    data = batches(spec, 2)

    def calibrate(data):  # [batches, examples of this device, ...]
        stats = numerics.finish(
            functools.reduce(
                numerics.merge,
                [numerics.measure(x, channel_axes=channel_axes, axis_name="batch") for x in data],
            )
        )
        state = observer.init(stats.lo.shape, spec)
        for x in data:
            state = observer.update(
                state, x, spec, channel_axes=channel_axes, stats=stats, axis_name="batch"
            )
        return state

    if runner == "pmap":
        cut = data.reshape(2, 4, 1, 6, 3)
        state = jax.pmap(calibrate, axis_name="batch", in_axes=1)(cut)
        for value in jax.tree.leaves(state):  # every device holds the whole
            np.testing.assert_array_equal(value, jnp.broadcast_to(value[:1], value.shape))
        state = jax.tree.map(lambda a: a[0], state)
    else:
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        mapped = jax.shard_map(calibrate, mesh=mesh, in_specs=P(None, "batch"), out_specs=P())
        state = jax.jit(mapped)(data)
    one = observe(name, spec, data, channel_axes=channel_axes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        observer.range(state, spec),
        observer.range(one, spec),
    )


@every
def test_no_data_is_an_error_that_names_the_repair(name):
    spec = Spec(4)
    state = OBSERVERS[name].init((), spec)
    with pytest.raises(ValueError, match=r"no calibration data.*at least one non-empty batch"):
        OBSERVERS[name].range(state, spec)


@every
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("channel_axes", [(), (1,)])
def test_data_that_are_not_finite_are_an_error(name, bad, channel_axes):
    spec = Spec(4)
    data = jnp.ones((2, 3, 2)).at[1, 2, 0].set(bad)
    # Statistics that were finished inside jit did not raise.
    stats = jax.jit(functools.partial(measured, channel_axes=channel_axes))(data)
    state = observe(name, spec, data, channel_axes=channel_axes, stats=stats)
    with pytest.raises(ValueError, match=r"contain (NaN|infinite).*finite data"):
        OBSERVERS[name].range(state, spec)


@every
def test_an_empty_batch_changes_nothing(name):
    spec = Spec(4)
    data = batches(spec)
    stats = measured(data)
    state = observe(name, spec, data, stats=stats)
    after = OBSERVERS[name].update(state, jnp.zeros((0, 6, 3)), spec, stats=stats)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@every
@pytest.mark.parametrize("value", [0.0, 0.7, -0.3])
@pytest.mark.parametrize("shape", [(1,), (1, 5)])
def test_constant_and_single_element(name, value, shape):
    spec = Spec(4)
    lo, hi = OBSERVERS[name].range(observe(name, spec, [jnp.full(shape, value)]), spec)
    assert lo == hi
    scale = numerics.symmetric_scale(lo, hi, spec.format)
    back = numerics.decode(numerics.encode(value, scale, 0, spec.format), scale, 0)
    np.testing.assert_allclose(back, value, rtol=1e-6)


@every
def test_low_precision_data(name):
    spec = Spec(4)
    data = batches(spec).astype(jnp.bfloat16)
    state = observe(name, spec, data)
    wide = observe(name, spec, data.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, state, wide)


@every
def test_wrong_channel_axes(name):
    spec = Spec(4)
    x = jnp.ones((2, 3))
    stats = measured([x])
    with pytest.raises(ValueError, match="channel_axes is"):
        OBSERVERS[name].update(
            OBSERVERS[name].init((), spec), x, spec, channel_axes=(2,), stats=stats
        )
