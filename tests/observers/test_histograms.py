"""Histograms that grow, and the observers that read them, against NumPy and published loops."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

import qkd_jax as qk
from qkd_jax import numerics
from qkd_jax.numerics import BINS, IntFormat, Spec
from qkd_jax.observers import entropy, percentile, rms
from qkd_jax.quantize import Rule

ADD = jax.jit(numerics.add_to_histogram, static_argnames="channel_axes")


def grown(parts, **kw):
    shape = () if "channel_axes" not in kw else (1, parts[0].shape[1])
    state = numerics.empty_histogram(shape)
    for part in parts:
        state = ADD(state, jnp.asarray(part), **kw)
    return state


@pytest.mark.parametrize("order", [1, -1])
def test_growing_loses_no_count_and_forgets_the_order(order):
    rng = np.random.default_rng(0)
    # From tiny to huge: the width is doubled some forty times on the way.
    parts = [np.float32(rng.normal(0, 10.0**k, 700 + k)) for k in range(-6, 7)][::order]
    state = grown(parts)
    data = np.float64(np.concatenate(parts))
    assert int(state["counts"].sum()) == data.size
    width = 2.0 ** int(state["exponent"])
    assert BINS / 4 * width < abs(data).max() <= BINS / 2 * width  # no wider than it must be
    edges = (np.arange(BINS + 1) - BINS / 2) * width
    np.testing.assert_array_equal(state["counts"], np.histogram(data, edges)[0])
    whole = grown([np.concatenate(parts)])
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_channels_have_histograms_of_their_own():
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(0, 1, (500, 3)) * [0.01, 1, 300])
    state = grown([x[:200], x[200:]], channel_axes=(1,))
    for c in range(3):
        one = grown([x[:, c]])
        np.testing.assert_array_equal(state["counts"][0, c], one["counts"])
        assert state["exponent"][0, c] == one["exponent"]


def test_zeros_edges_and_what_is_not_finite():
    state = grown([np.zeros(5, np.float32), np.float32([np.nan, np.inf, -np.inf])])
    assert int(state["counts"].sum()) == 5 and int(state["counts"][BINS // 2]) == 5
    state = grown([np.float32([1.0, -1.0, 0.5])])  # 1.0 is 2^0: the range must reach beyond it
    assert int(state["counts"].sum()) == 3 and float(2.0 ** int(state["exponent"])) * BINS / 2 == 2
    state = grown([np.float32([3e38, -3e38, 1e-30])])
    assert int(state["counts"].sum()) == 3


def observed(module, spec, parts):
    state = module.init((), spec)
    for part in parts:
        state = module.update(state, jnp.asarray(part), spec)
    return [float(v) for v in module.range(state, spec)]


@pytest.mark.parametrize("share", [50.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("fields", [{}, {"signed": False}, {"symmetric": False}])
def test_percentiles_are_those_of_the_data_to_a_bin(share, fields):
    rng = np.random.default_rng(2)
    spec = Spec(8, observer="percentile", options={"percentile": share}, **fields)
    x = np.float32(rng.standard_t(4, 50_000) + 0.3)
    x = abs(x) if not spec.signed else x
    lo, hi = observed(percentile, spec, np.split(x, 5))
    bin = 2 * abs(x).max() / (BINS / 2)
    if spec.symmetric:
        end = np.quantile(abs(x), share / 100)
        wanted = (max(-end, x.min()), min(end, x.max()))
    else:
        wanted = np.quantile(x, [1 - share / 100, share / 100])
    np.testing.assert_allclose((lo, hi), wanted, atol=bin)


def double_loop(hist, levels, start=128):
    """The published formulation (NVIDIA's modelopt), restated: one pass over bins for each cut."""
    bins = np.array(hist, np.float64)
    bins[0] = bins[1]
    divergences, cuts = [], []
    for i in range(start, len(bins) + 1):
        edges = np.linspace(0, i, levels + 1)
        chunk = np.digitize(np.arange(i), edges) - 1
        chunk[bins[:i] == 0] = -1
        mass, filled = collections.Counter(), collections.Counter()
        for j, c in enumerate(chunk):
            if c != -1:
                mass[c] += bins[j]
                filled[c] += 1
        q = np.array([mass[c] / filled[c] if c != -1 else 0.0 for c in chunk])
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        divergences.append(stats.entropy(p, q) if q.sum() > 0 else np.inf)
        cuts.append(i)
    best = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return cuts[best], np.array(divergences)


def histograms():
    rng = np.random.default_rng(3)
    for k, draw in enumerate(
        (
            lambda: abs(rng.normal(0, 1, 30_000)),
            lambda: np.maximum(rng.normal(0, 1, 30_000), 0),
            lambda: abs(rng.standard_t(3, 30_000)),
            lambda: rng.uniform(0, 1, 30_000),
            lambda: rng.exponential(1, 300),  # most bins empty
            lambda: np.concatenate([rng.normal(1, 0.1, 5000), [40.0]]),
        )
    ):
        x = draw()
        yield k, np.histogram(x, 512, (0, abs(x).max()))[0]


@pytest.mark.parametrize("levels", [8, 16, 128])
def test_entropy_finds_the_cut_of_the_published_loops(levels):
    for k, hist in histograms():
        wanted, divergences = double_loop(hist, levels)
        found = int(entropy.thresholds(hist, levels))
        # Two cuts that differ by the last bits of float64 are equally good.
        gap = divergences[found - 128] - divergences[wanted - 128]
        assert found == wanted or abs(gap) <= 1e-12, (k, found, wanted)


def test_entropy_of_several_histograms_at_once():
    rows = np.stack([h for _, h in histograms()]).reshape(2, 3, -1)
    found = entropy.thresholds(rows, 128)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert found[i, j] == entropy.thresholds(rows[i, j], 128)


def test_entropy_clips_a_lone_outlier_and_minmax_does_not():
    rng = np.random.default_rng(4)
    x = np.float32(np.concatenate([rng.normal(0, 1, 20_000), [60.0]]))
    lo, hi = observed(entropy, Spec(8), [x])
    assert hi < 12 and lo == -x[np.argmin(x)] * -1


@pytest.mark.parametrize("format", [IntFormat(2), IntFormat(4), IntFormat(8), IntFormat(3, False)])
def test_the_gaussian_multiple_minimises_the_integral(format):
    def error(k):
        step = k / format.qmax
        codes = np.arange(format.qmin, format.qmax + 1)
        bounds = np.concatenate([[-np.inf if format.signed else 0], codes[:-1] + 0.5, [np.inf]])
        if not format.signed:
            bounds[1:-1] = codes[:-1] + 0.5
        return sum(
            integrate.quad(lambda x, c=c: (x - c * step) ** 2 * stats.norm.pdf(x), a, b)[0]
            for c, a, b in zip(codes, bounds[:-1] * step, bounds[1:] * step, strict=True)
        )

    best = optimize.minimize_scalar(error, bounds=(0.5, 6), method="bounded").x
    found = rms.gaussian_multiple(format)
    assert error(found) <= error(best) * 1.001


def test_rms_sums_over_batches():
    rng = np.random.default_rng(5)
    x = np.float32(rng.normal(0, 3, 4000))
    lo, hi = observed(rms, Spec(4), [x[:100], x[100:]])
    wanted = rms.gaussian_multiple(Spec(4).format) * np.sqrt(np.mean(np.float64(x) ** 2))
    np.testing.assert_allclose([-lo, hi], [wanted, wanted], rtol=1e-5)


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'percentile'"):
        Rule(".*", weight=Spec(4, observer="percentile", options={"percentil": 99.0}))
    with pytest.raises(ValueError, match="option percentile is 0"):
        percentile.init((), Spec(4, observer="percentile", options={"percentile": 0.0}))
    assert Rule(".*", weight=Spec(4, observer="percentile", options={"percentile": 99.0}))
    assert {"percentile", "entropy", "rms"} <= set(qk.OBSERVERS)
