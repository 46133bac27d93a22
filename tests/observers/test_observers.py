"""What each observer finds."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import Spec, Stats
from qkd_jax.observers import ema, entropy, minmax, mse
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantizers import QUANTIZERS

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "quantizers.npz")


INT4 = Spec(4)
UPDATE = {
    module: jax.jit(module.update, static_argnames=("spec", "channel_axes"))
    for module in (minmax, ema, mse)
}


def run(observer, data, spec=INT4, **kw):
    state = None
    for x in data:
        state = state or observer.init(kw["stats"].lo.shape if "stats" in kw else (), spec)
        state = UPDATE[observer](state, jnp.asarray(x), spec, **kw)
    return observer.range(state, spec)


def test_minmax_against_torch():
    data = GOLDEN["observers/batches"]
    lo, hi = run(minmax, data)
    assert (lo, hi) == (data.min(), data.max())
    state = minmax.init((1, 4), Spec(8))
    for x in data:
        state = minmax.update(state, jnp.asarray(x), Spec(8), channel_axes=(1,))
    np.testing.assert_array_equal(state["lo"][0], GOLDEN["observers/lo"])
    np.testing.assert_array_equal(state["hi"][0], GOLDEN["observers/hi"])


def test_ema_against_torch():
    lo, hi = run(ema, GOLDEN["observers/batches"])
    np.testing.assert_allclose(lo, GOLDEN["observers/ema_lo"], rtol=1e-6)
    np.testing.assert_allclose(hi, GOLDEN["observers/ema_hi"], rtol=1e-6)


def test_ema_starts_at_the_first_batch_and_moves_by_a_hundredth():
    assert run(ema, [np.array([-1.0, 2.0])]) == (-1, 2)
    lo, hi = run(ema, [np.array([-1.0, 2.0]), np.array([-2.0, 12.0])])
    np.testing.assert_allclose([lo, hi], [-1.01, 2.1], rtol=1e-6)
    half = Spec(4, observer="ema", options={"momentum": 0.5})
    lo, hi = run(ema, [np.array([-1.0, 2.0]), np.array([-2.0, 12.0])], spec=half)
    np.testing.assert_allclose([lo, hi], [-1.5, 7.0], rtol=1e-6)


def truth(x, lo, hi, spec, power=2):
    """The error of every candidate in float64, by a loop."""
    form, x = spec.format, x.astype(np.float64)
    losses = []
    for i in range(100, 0, -1):
        # The candidate's grid in float32, as the quantizer will have it.
        grid = numerics.range_parameters(
            np.float32(lo) * np.float32(i / 100), np.float32(hi) * np.float32(i / 100), spec
        )
        scale, zero_point = (float(v) for v in grid)
        codes = np.clip(np.round(x / scale) + zero_point, form.qmin, form.qmax)
        losses.append(np.sum(abs(x - (codes - zero_point) * scale) ** power))
    return np.array(losses)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(2),
        Spec(3, symmetric=False),
        Spec(4),
        Spec(4, signed=False),
        Spec(8),
        Spec(2, symmetric=False),
        Spec(3, observer="mse", options={"power": 2.4}),
        Spec(4, symmetric=False, observer="mse", options={"power": 1}),
    ],
    ids=lambda s: "-".join([*s.label.split(), *(f"{v}" for _, v in s.options)]),
)
def test_mse_against_a_loop_in_float64(spec):
    x = np.random.default_rng(0).normal(0.3, 1.0, (3, 200)).astype(np.float32)
    x = abs(x) if spec.symmetric and not spec.signed else x
    stats = numerics.finish(numerics.measure(x))
    losses = truth(x, stats.lo, stats.hi, spec, spec.option("power", 2))
    state = mse.init((), spec)
    for part in x:
        state = UPDATE[mse](state, jnp.asarray(part), spec, stats=stats)
    np.testing.assert_allclose(state["loss"], losses, rtol=1e-3, atol=1e-6)
    lo, hi = mse.range(state, spec)
    chosen = round(float(hi / stats.hi) * 100)
    assert losses[100 - chosen] <= losses.min() * 1.001
    np.testing.assert_allclose(lo / stats.lo, hi / stats.hi, rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(6, quantizer="float"),
        Spec(4, quantizer="float"),
        Spec(4, quantizer="codebook"),
        Spec(4, quantizer="apot"),
        Spec(4, rounding="floor"),
        Spec(4, quantizer="tqt"),
        Spec(3, quantizer="dsq"),
    ],
    ids=lambda s: f"{s.label} {s.rounding}",
)
def test_mse_scores_the_quantizer_itself(spec):
    """On heavy tails no range of the hundred has a smaller error behind this very quantizer."""
    x = np.random.default_rng(3).standard_t(3, size=3000).astype(np.float32)
    stats, quantizer = numerics.finish(numerics.measure(x)), QUANTIZERS[spec.quantizer]
    searched = dataclasses.replace(spec, observer="mse")

    def error(lo, hi):
        params = quantizer.init(stats._replace(lo=jnp.float32(lo), hi=jnp.float32(hi)), searched)
        x_hat = quantizer.fake_quant(jnp.asarray(x), params, searched)
        return float(np.sum(np.square(np.float64(x) - np.float64(x_hat))))

    state = UPDATE[mse](mse.init((), spec), jnp.asarray(x), spec, stats=stats)
    candidates = [i / 100 for i in range(1, 101)]
    best = min(error(stats.lo * f, stats.hi * f) for f in candidates)
    assert error(*mse.range(state, spec)) <= 1.0005 * best


@pytest.mark.parametrize("observer", ["rms", "entropy"])
def test_observers_of_codes_refuse_grids_without_codes(observer):
    x = jnp.ones((4, 3))
    net = quantize(nn.Dense(2), [Rule(".*", input=Spec(8, quantizer="float"))])
    with pytest.raises(ValueError, match=rf"observer '{observer}' of input.*'float' has none; use"):
        calibrate(net, net.init(jax.random.key(0), x), [x], observer=observer)


def test_entropy_counts_all_codes_of_data_that_are_never_negative():
    x = jnp.maximum(np.random.default_rng(5).standard_t(4, size=20_000).astype(np.float32), 0)
    found = {}
    for spec in (Spec(4, signed=False), Spec(4, signed=False, symmetric=False), Spec(4)):
        state = entropy.update(entropy.init((), spec), x, spec)
        found[spec.label] = float(entropy.range(state, spec)[1])
    unsigned, affine, signed = found.values()
    assert unsigned == affine != signed


def test_a_higher_power_clips_less():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32))
    net = quantize(nn.Dense(4), [Rule(".*", input=Spec(3))])
    variables = net.init(jax.random.key(0), x)
    scales = []
    for power in (1, 2, 2.4, 6):
        options = {"power": power}
        found = calibrate(net, variables, [x], observer="mse", observer_options=options)
        scales.append(float(found["quant"]["input_quantizer"]["scale"]))
    assert scales == sorted(scales) and scales[0] < scales[1] < scales[-1]
    plain = calibrate(net, variables, [x], observer="mse")
    assert float(plain["quant"]["input_quantizer"]["scale"]) == scales[1]
    named = Spec(3, observer="mse", options={"power": 6})
    own = quantize(nn.Dense(4), [Rule(".*", input=named)])
    found = calibrate(own, variables, [x])
    assert float(found["quant"]["input_quantizer"]["scale"]) == scales[-1]
    with pytest.raises(ValueError, match=r"observer_options.*option power is -1"):
        calibrate(net, variables, [x], observer="mse", observer_options={"power": -1})


def test_mse_beats_minmax_at_few_bits_and_keeps_the_range_at_many():
    x = np.random.default_rng(1).normal(size=4000).astype(np.float32)
    stats = numerics.finish(numerics.measure(x))
    shrunk = {}
    for bits in (2, 4, 16):
        spec = Spec(bits)
        lo, hi = run(mse, [x], spec, stats=stats)
        shrunk[bits] = float(hi / stats.hi)

        def error(lo, hi, form=spec.format):
            scale = numerics.symmetric_scale(lo, hi, form)
            return float(
                np.mean((numerics.decode(numerics.encode(x, scale, 0, form), scale, 0) - x) ** 2)
            )

        assert error(lo, hi) <= error(stats.lo, stats.hi)
    assert shrunk[2] < shrunk[4] < 0.9 and shrunk[16] >= 0.99


def test_mse_scores_all_batches_and_not_the_last():
    # A last batch of tiny values alone would choose a tiny range.
    rng = np.random.default_rng(2)
    first, last = rng.normal(size=1000), 0.01 * rng.normal(size=1000)
    data = [a.astype(np.float32) for a in (first, last)]
    stats = numerics.finish(numerics.measure(np.concatenate(data)))
    both = run(mse, data, stats=stats)
    assert both[1] == run(mse, data[::-1], stats=stats)[1]
    assert both[1] == run(mse, [np.concatenate(data)], stats=stats)[1]
    assert both[1] > 5 * run(mse, data[1:], stats=stats)[1]


def test_mse_of_equal_candidates_takes_the_widest():
    for x in (np.zeros(5, np.float32), np.full(5, 0.7, np.float32)):
        stats = numerics.finish(numerics.measure(x))
        assert run(mse, [x], stats=stats)[1] == stats.hi


def test_mse_needs_stats():
    assert mse.NEEDS_STATS and not minmax.NEEDS_STATS and not ema.NEEDS_STATS
    with pytest.raises(ValueError, match=r"stats is None.*first pass"):
        mse.update(mse.init((), Spec(4)), jnp.ones(3), Spec(4))


def test_mse_holds_no_hundred_copies():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    spec = Spec(4, symmetric=False)
    state = jax.eval_shape(lambda: mse.init((), spec))
    stats = Stats(*[jax.ShapeDtypeStruct((), jnp.float32)] * 6)
    step = jax.jit(lambda state, x, stats: mse.update(state, x, spec, stats=stats))
    temporary = step.lower(state, x, stats).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 256 * 256 * 4
