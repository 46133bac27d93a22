"""Images from a net's BatchNorms: distances against NumPy, closed forms, and descent."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import ptq
from qkd_jax.data_free import batch_norm, inversion
from qkd_jax.quantize import quantize

RNG = np.random.default_rng(0)
SHAPE = (5, 4, 1)
REAL = RNG.normal(1.0, 0.5, (32, *SHAPE)).astype(np.float32)


class Net(nn.Module):
    """BatchNorms behind a convolution and a dense layer; one in a scan where `layers` are given."""

    layers: int = 0

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, name=name)
        x = nn.relu(norm("stem_bn")(nn.Conv(3, (3, 3), name="stem")(x)))
        x = nn.relu(norm("hidden_bn")(nn.Dense(4, name="hidden")(x.reshape(x.shape[0], -1))))
        if self.layers:
            body = nn.scan(
                Layer,
                {"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = body(train, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class Layer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.BatchNorm(use_running_average=not self.train, name="bn")(x)), None


class WithoutNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def variables_of(net):
    """Variables whose statistics are not those of noise."""
    found = net.init(jax.random.key(1), jnp.zeros((2, *SHAPE)))
    stats = jax.tree.map(
        lambda leaf: jnp.asarray(RNG.uniform(0.5, 1.5, leaf.shape), leaf.dtype),
        found["batch_stats"],
    )
    return {**found, "batch_stats": stats}


@pytest.fixture(scope="module")
def case():
    """A net that remembers the statistics of REAL."""
    net = quantize(Net())
    found = net.init(jax.random.key(1), jnp.zeros((2, *SHAPE)))
    return net, ptq.reestimate_batch_norm(net, found, [REAL])


def numpy_distance(method, x, mean, var):
    """Written from the papers, in float64: channels last."""
    x = np.asarray(x, np.float64)
    if method == "deep_inversion":
        flat = x.reshape(-1, x.shape[-1])
        found = flat.sum(0) / len(flat)
        spread = ((flat - found) ** 2).sum(0) / len(flat)
        return np.sqrt(((found - mean) ** 2).sum()) + np.sqrt(((spread - var) ** 2).sum())
    images = [image.reshape(-1, x.shape[-1]) for image in x] if x.ndim > 2 else [x]
    total = 0.0
    for flat in images:
        found = flat.sum(0) / len(flat)
        spread = ((flat - found) ** 2).sum(0) / (len(flat) - 1)
        total += ((found - mean) ** 2).sum()
        total += ((np.sqrt(spread + 1e-6) - np.sqrt(var + 1e-6)) ** 2).sum()
    return total / len(images)


@pytest.mark.parametrize("method", batch_norm.METHODS)
@pytest.mark.parametrize("shape", [(6, 3, 5, 2), (6, 2)])
def test_distances_against_numpy(method, shape):
    x = RNG.normal(1.0, 2.0, shape).astype(np.float32)
    mean, var = RNG.normal(0, 1, 2), RNG.uniform(0.5, 2, 2)
    got = batch_norm.METHODS[method](x, mean, var, (len(shape) - 1,))
    np.testing.assert_allclose(got, numpy_distance(method, x, mean, var), rtol=1e-5)


def test_channels_may_be_any_axes():
    x = RNG.normal(size=(4, 2, 3, 5)).astype(np.float32)
    mean, var = np.zeros(2), np.ones(2)
    for method, distance in batch_norm.METHODS.items():
        want = numpy_distance(method, np.moveaxis(x, 1, -1), mean, var)
        np.testing.assert_allclose(distance(x, mean, var, (1,)), want, rtol=1e-5)


def test_distances_are_zero_where_statistics_agree_and_descent_stands_still():
    x = jnp.asarray(RNG.normal(size=(4, 3, 3, 2)), jnp.float32)
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    value, gradient = jax.value_and_grad(batch_norm.deep_inversion_distance)(x, mean, var, (3,))
    assert float(value) == 0 and np.all(np.asarray(gradient) == 0)
    same = jnp.broadcast_to(x[:1], x.shape)  # every image has the remembered statistics itself
    mean, var = jnp.mean(same[0], (0, 1)), jnp.var(same[0], (0, 1), ddof=1)
    assert float(batch_norm.zeroq_distance(same, mean, var, (3,))) < 1e-10


def test_the_images_that_a_net_remembers_are_at_distance_zero(case):
    net, variables = case
    _, same = batch_norm.statistics_loss(net, variables, jnp.asarray(REAL), "deep_inversion")
    _, other = batch_norm.statistics_loss(net, variables, jnp.asarray(-REAL), "deep_inversion")
    assert float(same) < 1e-5 < 1e-2 < float(other)


def test_total_variation_of_a_ramp():
    """x = 2 i + 3 j: each difference is a constant, and each norm that times sqrt(pairs)."""
    i, j = np.mgrid[:4, :5]
    ramp = jnp.asarray(2.0 * i + 3.0 * j, jnp.float32)[None, :, :, None]
    want = 3 * np.sqrt(4 * 4) + 2 * np.sqrt(3 * 5) + 1 * np.sqrt(3 * 4) + 5 * np.sqrt(3 * 4)
    np.testing.assert_allclose(inversion.total_variation(ramp), want, rtol=1e-6)
    assert float(inversion.total_variation(jnp.ones((2, 3, 3, 1)))) == 0


@pytest.mark.parametrize("method", batch_norm.METHODS)
def test_every_batch_norm_counts_at_its_input(case, method):
    net, variables = case
    images = jnp.asarray(RNG.normal(size=(6, *SHAPE)), jnp.float32)
    logits, got = batch_norm.statistics_loss(net, variables, images, method)
    _, seen = net.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
    inputs = {name: seen["intermediates"][name]["__call__"][0] for name in ("stem", "hidden")}
    want = sum(
        numpy_distance(
            method,
            x,
            *(
                np.asarray(variables["batch_stats"][f"{n}_bn"][k], np.float64)
                for k in ("mean", "var")
            ),
        )
        for n, x in inputs.items()
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(logits, net.apply(variables, images))


def test_layers_of_a_scan_count_each():
    net = quantize(Net(layers=2))
    variables = variables_of(net)
    images = jnp.asarray(RNG.normal(size=(6, *SHAPE)), jnp.float32)
    _, whole = batch_norm.statistics_loss(net, variables, images, "deep_inversion")
    short = {c: {n: v for n, v in variables[c].items() if n != "layers"} for c in variables}
    plain = quantize(Net())
    _, first = batch_norm.statistics_loss(plain, short, images, "deep_inversion")
    _, seen = plain.apply(short, images, capture_intermediates=True, mutable=["intermediates"])
    x = np.maximum(np.asarray(seen["intermediates"]["hidden_bn"]["__call__"][0], np.float64), 0)
    want = 0.0
    stats = variables["batch_stats"]["layers"]["bn"]
    for k in range(2):
        mean, var = (np.asarray(stats[n][k], np.float64) for n in ("mean", "var"))
        want += numpy_distance("deep_inversion", x, mean, var)
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)  # scale 1, bias 0
    np.testing.assert_allclose(whole - first, want, rtol=1e-4)


@pytest.mark.parametrize("method", batch_norm.METHODS)
def test_images_come_nearer_to_the_statistics(case, method):
    net, variables = case
    losses = []
    options = dict(image_shape=SHAPE, key=jax.random.key(3), method=method, batch_size=6, lr=0.05)
    options["report"] = lambda batch, step, loss: losses.append((batch, step, loss))
    made = inversion.synthesize(net, variables, count=11, steps=60, **options)
    assert made.images.shape == (11, *SHAPE) and made.images.dtype == np.float32
    assert made.labels.dtype == np.int32 and losses[-1][:2] == (2, 60)
    noise = np.asarray(
        jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0), (6, *SHAPE)
        )
    )
    before, after = (
        float(batch_norm.statistics_loss(net, variables, x, method)[1])
        for x in (noise, made.images[:6])
    )
    assert after < 0.5 * before
    answers = np.asarray(net.apply(variables, made.images)).argmax(-1)
    if method == "zeroq":
        np.testing.assert_array_equal(made.labels, answers)
    else:
        np.testing.assert_array_equal(made.labels, np.arange(11) % 3)
    again = inversion.synthesize(net, variables, count=11, steps=60, **options)
    np.testing.assert_array_equal(made.images, again.images)


def test_images_stay_within_bounds(case):
    net, variables = case
    made = inversion.synthesize(
        net,
        variables,
        image_shape=SHAPE,
        count=6,
        batch_size=6,
        key=jax.random.key(3),
        steps=2,
        bounds=(np.full(1, -0.5, np.float32), np.full(1, 0.25, np.float32)),
    )
    assert made.images.min() == -0.5 and made.images.max() == 0.25


def test_what_cannot_be_is_said(case):
    net, variables = case
    options = dict(image_shape=SHAPE, key=jax.random.key(0))
    plain = quantize(WithoutNorm())
    with pytest.raises(ValueError, match="calls no BatchNorm"):
        inversion.synthesize(
            plain, plain.init(jax.random.key(0), jnp.zeros((1, *SHAPE))), count=2, **options
        )
    with pytest.raises(ValueError, match="method"):
        inversion.synthesize(net, variables, count=2, method="dafl", **options)
    with pytest.raises(ValueError, match="one class below 3 for each of the 2"):
        inversion.synthesize(net, variables, count=2, labels=[0, 3], **options)
    with pytest.raises(ValueError, match="jitter"):
        inversion.synthesize(net, variables, count=2, jitter=4, **options)
    folded = ptq.fold_bn(net, variables, jnp.zeros((1, *SHAPE)))
    with pytest.raises(ValueError, match="folded"):
        inversion.synthesize(net, folded, count=2, **options)
