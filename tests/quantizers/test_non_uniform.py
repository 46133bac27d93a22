"""Levels that are not evenly spaced: additive powers of two, and normal quantiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.quantizers import apot, codebook

# As published, appendix E of arXiv 2305.14314.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def measured(x, **kw):
    return numerics.finish(numerics.measure(jnp.asarray(x), **kw))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 2, shape).astype(np.float32)


def test_nf4_is_the_published_table():
    np.testing.assert_allclose(codebook.values(4), NF4, atol=3e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_codebook_has_all_its_values_zero_and_both_ends(bits):
    values = np.array(codebook.values(bits))
    assert len(values) == 2**bits and np.all(np.diff(values) > 0)
    assert values[0] == -1 and values[-1] == 1 and 0 in values
    assert np.sum(values > 0) == 2 ** (bits - 1)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_codebook_takes_the_nearest_value_of_the_largest_magnitude(granularity):
    x = normal(40, 3)
    spec = Spec(4, quantizer="codebook", granularity=granularity)
    axes = (1,) if granularity == "channel" else ()
    params = codebook.init(measured(x, channel_axes=axes), spec)
    far = abs(x).max(0, keepdims=True) if axes else abs(x).max()
    np.testing.assert_array_equal(params["scale"], far)
    table = np.array(NF4)
    place = abs(np.float64(x / far)[..., None] - table)
    best = np.sort(place, -1)
    clear = best[..., 1] - best[..., 0] > 1e-6
    wanted = table[place.argmin(-1)] * far
    found = codebook.fake_quant(x, params, spec)
    np.testing.assert_allclose(found[clear], wanted[clear], rtol=1e-6, atol=1e-7)
    assert clear.mean() > 0.99


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_levels_are_sums_of_few_powers_of_two(bits):
    levels = apot.levels(bits)
    assert len(set(levels)) == len(levels) == 2**bits and levels[0] == 0
    assert list(levels) == sorted(levels)
    # At most one power for two bits, and one for an odd bit: that is what makes shifts cheap.
    assert max(bin(level).count("1") for level in levels) == (bits + 1) // 2


def test_weights_are_normalized_by_their_own_mean_and_deviation():
    x = normal(64, 8)
    spec = Spec(4, quantizer="apot", options={"normalize": True})
    start = apot.init(measured(x), spec)
    wide = np.float64(x)
    far = min(abs(wide).max(), max(3 * wide.std(), abs(wide.mean())))
    np.testing.assert_allclose(start["alpha"], far / wide.std(), rtol=1e-5)
    moved = apot.live(jnp.asarray(3 * x + 1), start, spec)
    np.testing.assert_allclose(moved["mean"], 3 * wide.mean() + 1, rtol=1e-5)
    np.testing.assert_allclose(moved["deviation"], 3 * wide.std(), rtol=1e-5)
    assert moved["alpha"] == start["alpha"]
    # Whatever their mean and size, normalized weights take the same levels.
    found = apot.fake_quant(jnp.asarray(3 * x + 1), moved, spec) / moved["deviation"]
    wanted = apot.fake_quant(x, start, spec) / start["deviation"]
    assert np.mean(np.isclose(found, wanted, rtol=1e-5, atol=1e-6)) > 0.99
    low, high = apot.clip_range(moved, spec)
    np.testing.assert_allclose(high - low, 2 * moved["alpha"] * moved["deviation"], rtol=1e-6)


def test_alpha_starts_at_three_sigma_or_the_largest_value():
    x = normal(5000)
    stats, spec = measured(x), Spec(4, quantizer="apot")
    np.testing.assert_allclose(apot.init(stats, spec)["alpha"], 3 * np.std(x), rtol=1e-5)
    ranged = Spec(4, quantizer="apot", observer="minmax")
    np.testing.assert_array_equal(apot.init(stats, ranged)["alpha"], abs(x).max())
    short = measured(np.array([-1.0, 1.0], np.float32))
    assert apot.init(short, spec)["alpha"] == 1
    assert apot.init(measured(np.zeros(4, np.float32)), spec)["alpha"] == 1


def test_gradient_descent_on_alpha_finds_the_least_error():
    x, spec = normal(2000), Spec(4, quantizer="apot")
    error = jax.jit(lambda a: jnp.mean((apot.fake_quant(x, {"alpha": a}, spec) - x) ** 2))
    best = min(float(error(jnp.float32(a))) for a in np.linspace(2, 10, 100))
    alpha, descend = jnp.float32(3.0), jax.jit(jax.grad(error))
    for _ in range(200):
        alpha = alpha - 100 * descend(alpha)  # takes gs out again
    assert error(alpha) < 1.05 * best


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (apot, dict(bits=8), "bits=8 and signed=True; it has 2 to 6 bits"),
        (apot, dict(bits=1), "bits=1 and signed=True; it has 2 to 6 bits"),
        (apot, dict(bits=4, symmetric=False), "symmetric=False; it works with symmetric=True"),
        (apot, dict(bits=4, mask="none"), "mask='none'"),
        (apot, dict(bits=4, signed=False, options={"normalize": True}), "for weights"),
        (apot, dict(bits=4, options={"normalize": 1}), "normalize of quantizer 'apot' is 1"),
        (codebook, dict(bits=8), "bits=8; its codebooks have 2 to 6 bits"),
        (codebook, dict(bits=4, signed=False), "for inputs use 'lsq'"),
        (codebook, dict(bits=4, rounding="stochastic"), "rounding='stochastic'"),
    ],
)
def test_refused_specs(module, fields, message):
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(ValueError, match=message):
        module.check(Spec(quantizer=name, **fields))
