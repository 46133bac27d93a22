"""Generators for distillation without data: losses against NumPy, closed forms, and descent."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import data_free, ptq
from qkd_jax.data_free import cmi as of_cmi
from qkd_jax.data_free import contrast, windows
from qkd_jax.data_free import dafl as of_dafl
from qkd_jax.data_free import generator as pieces
from qkd_jax.data_free.batch_norm import statistics_loss
from qkd_jax.distillation.forward import forward_taps
from qkd_jax.quantize import quantize

RNG = np.random.default_rng(0)
SHAPE = (5, 6, 1)
CLASSES = 3
REAL = RNG.normal(0.5, 0.5, (32, *SHAPE)).astype(np.float32)
BOUNDS = (np.full(1, -0.5, np.float32), np.full(1, 1.5, np.float32))


class Net(nn.Module):
    """A convolution and a dense layer, each with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, name=name)
        x = nn.relu(norm("stem_bn")(nn.Conv(3, (3, 3), name="stem")(x)))
        x = nn.relu(norm("hidden_bn")(nn.Dense(4, name="hidden")(x.reshape(x.shape[0], -1))))
        if not self.is_initializing():
            self.sow("features", "pooled", x)
        return nn.Dense(CLASSES, name="head")(x)


class WithoutNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def case():
    """A net that remembers the statistics of REAL."""
    net = quantize(Net())
    found = net.init(jax.random.key(1), jnp.zeros((2, *SHAPE)))
    return net, ptq.reestimate_batch_norm(net, found, [REAL])


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- losses ------------------------------------------------------------------------------------


def test_dafl_losses_against_numpy():
    logits = RNG.normal(0, 3, (7, 5)).astype(np.float32)
    features = RNG.normal(size=(7, 2, 4)).astype(np.float32)
    p = softmax(logits)
    want = -np.mean([np.log(row[row.argmax()]) for row in p])
    np.testing.assert_allclose(of_dafl.one_hot_loss(logits), want, rtol=1e-5)
    want = -sum(abs(float(x)) for x in features.ravel()) / features.size
    np.testing.assert_allclose(of_dafl.activation_loss(features), want, rtol=1e-5)
    q = p.sum(0) / len(p)
    want = sum(x * np.log10(x) for x in q)
    np.testing.assert_allclose(of_dafl.entropy_loss(logits), want, rtol=1e-5)


def test_dafl_losses_where_their_values_are_known():
    certain = 1e4 * jnp.eye(4)
    assert float(of_dafl.one_hot_loss(certain)) == 0
    np.testing.assert_allclose(of_dafl.one_hot_loss(jnp.zeros((3, 4))), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(of_dafl.entropy_loss(certain), -np.log10(4), rtol=1e-5)
    one_class = jnp.zeros((3, 4)).at[:, 1].set(1e4)
    assert float(of_dafl.entropy_loss(one_class)) == 0
    gradient = jax.grad(of_dafl.entropy_loss)(one_class)
    assert np.isfinite(np.asarray(gradient)).all()


def test_the_adversary_counts_where_both_agree():
    student = np.array([[2.0, 0, 1], [0, 3, 0], [1, 0, 0]], np.float32)
    teacher = np.array([[1.0, 0, 0], [5, 0, 0], [4, 1, 0]], np.float32)  # the second disagrees
    s, t = softmax(student), softmax(teacher)
    apart = (t * (np.log(t) - np.log(s))).sum(1)
    want = -(apart[0] + apart[2]) / 3
    np.testing.assert_allclose(contrast.adversarial_loss(student, teacher), want, rtol=1e-5)
    of_student, of_teacher = jax.grad(contrast.adversarial_loss, (0, 1))(student, teacher)
    # d KL(t || s) / d student = s - t, and nothing on the image where they differ.
    want = -(s - t) / 3 * np.array([[1], [0], [1]])
    np.testing.assert_allclose(of_student, want, atol=1e-6)
    assert np.all(np.asarray(of_teacher)[1] == 0) and np.any(np.asarray(of_teacher)[0] != 0)
    assert float(contrast.adversarial_loss(teacher, teacher)) == 0


@pytest.mark.parametrize("earlier", [0, 2, 3])
def test_contrast_against_numpy(earlier):
    rows, count, temperature = 6, 3, 0.3
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    u, v = (unit(RNG.normal(size=(rows, 4))) for _ in range(2))
    known = np.arange(rows) < count + earlier
    losses = []
    for i in range(count + earlier):
        scores = [np.exp(u[i] @ v[j] / temperature) for j in range(count + earlier)]
        losses.append(-np.log(scores[i] / sum(scores)))
    want = np.mean(losses[:count]) + (np.mean(losses[count:]) if earlier else 0)

    def loss(u, v):
        return contrast.contrast_loss(u, v, known, count=count, temperature=temperature)

    u, v = (jnp.asarray(x, jnp.float32) for x in (u, v))
    np.testing.assert_allclose(loss(u, v), want, rtol=1e-5)
    of_local, of_whole = jax.grad(loss, (0, 1))(u, v)
    assert np.all(np.asarray(of_whole) == 0) and np.isfinite(np.asarray(of_local)).all()
    assert np.all(np.asarray(of_local)[~known] == 0)


# --- views and the generator --------------------------------------------------------------------


def test_windows_of_a_ramp():
    """Linear interpolation is exact on a ramp, away from the borders; a shift moves pixels."""
    i, j = np.mgrid[:8, :10]
    ramp = (2.0 * i + 3.0 * j).astype(np.float32)
    boxes = [[1.5, 2.0, 4.0, 5.0], [0.0, 0.0, 8.0, 10.0], [-2.0, 1.0, 8.0, 10.0]]
    images = jnp.broadcast_to(ramp[None, :, :, None], (3, 8, 10, 1))
    part, whole, shifted = np.asarray(windows.window(images, jnp.asarray(boxes)))[..., 0]
    rows = 1.5 + (np.arange(8) + 0.5) * 4 / 8 - 0.5  # centres of pixels, at +0.5
    columns = 2.0 + (np.arange(10) + 0.5) * 5 / 10 - 0.5
    np.testing.assert_allclose(part, 2 * rows[:, None] + 3 * columns[None], rtol=1e-5)
    np.testing.assert_allclose(whole, ramp, rtol=1e-6)
    want = np.zeros((8, 10))
    want[2:, :-1] = ramp[:-2, 1:]
    np.testing.assert_allclose(shifted, want, atol=1e-4)


def test_random_views():
    shifts = np.asarray(windows.random_shifts(jax.random.key(0), 400, (8, 9), 1))
    assert {tuple(row) for row in shifts[:, :2]} == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert np.all(shifts[:, 2:] == [8, 9])
    crops = np.asarray(windows.random_crops(jax.random.key(1), 4000, (8, 12), 0.25), np.float64)
    corner, sides = crops[:, :2], crops[:, 2:] / [8, 12]
    assert corner.min() >= 0 and np.all(corner + crops[:, 2:] <= np.array([8, 12]) + 1e-5)
    area, ratio = sides.prod(1), sides[:, 1] / sides[:, 0]
    assert 0.249 < area.min() < 0.26 and 0.98 < area.max() <= 1
    assert 0.749 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.334
    # Uniform where no side can be cut, which is below an area of 3/4.
    assert abs(np.median(area[area < 0.74]) - (0.25 + 0.74) / 2) < 0.02


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (5, 7, 2)])
def test_a_generator_makes_images_of_any_shape(shape):
    @jax.jit
    def run(noise):
        generator = pieces.Generator(shape, 4)
        made = generator.init(jax.random.key(0), noise)
        return generator.apply(made, noise, mutable=["batch_stats"])[0]

    noise = RNG.normal(size=(3, 6)).astype(np.float32)
    if shape != (5, 7, 2):
        assert jax.eval_shape(run, noise).shape == (3, *shape)
        return
    pixels = np.asarray(run(noise))
    assert pixels.shape == (3, *shape) and pixels.min() >= 0 and pixels.max() <= 1
    assert np.all(np.std(pixels, axis=0) > 0)  # noise decides every pixel


# --- the methods --------------------------------------------------------------------------------


def options(**more):
    small = dict(width=4, latent=5, batch_size=8, lr=0.01)
    return dict(image_shape=SHAPE, key=jax.random.key(3), bounds=BOUNDS, **{**small, **more})


def test_dafl_descends_and_is_a_function_of_its_key(case):
    net, variables = case
    told = []
    more = options(count=11, steps=60, report=lambda step, loss: told.append((step, loss)))
    made = of_dafl.dafl(net, variables, **more)
    assert made.images.shape == (11, *SHAPE) and made.images.dtype == np.float32
    assert made.images.min() >= -0.5 and made.images.max() <= 1.5
    assert [step for step, _ in told] == list(range(1, 61))
    assert [step for step, loss in told if loss is not None] == [50, 60]
    answers = np.asarray(net.apply(variables, made.images)).argmax(-1)
    np.testing.assert_array_equal(made.labels, answers)
    again = of_dafl.dafl(net, variables, **more)
    np.testing.assert_array_equal(made.images, again.images)
    other = of_dafl.dafl(net, variables, **{**more, "key": jax.random.key(4)})
    assert not np.array_equal(made.images, other.images)

    def loss(images):
        logits, _, features = forward_taps(net, variables, images, taps=("pooled",))
        return float(
            of_dafl.one_hot_loss(logits)
            + 0.1 * of_dafl.activation_loss(features["pooled"])
            + 5 * of_dafl.entropy_loss(logits)
        )

    first = of_dafl.dafl(net, variables, **{**more, "steps": 1, "lr": 1e-9})
    assert loss(made.images) < loss(first.images) - 0.1


def test_dafl_needs_no_batch_norm():
    net = quantize(WithoutNorm())
    variables = net.init(jax.random.key(0), jnp.zeros((2, *SHAPE)))
    made = of_dafl.dafl(net, variables, **options(count=4, steps=2, tap="head"))
    assert made.images.shape == (4, *SHAPE)
    with pytest.raises(ValueError, match="unknown tap 'pooled' in tap"):
        of_dafl.dafl(net, variables, **options(count=4, steps=2))


@pytest.mark.slow
def test_cmi_descends_and_leaves_the_student_alone(case):
    net, variables = case
    student = quantize(Net())
    theirs = student.init(jax.random.key(9), jnp.zeros((2, *SHAPE)))
    before = jax.tree.map(np.array, theirs)
    told = []
    more = options(
        count=11, steps=40, shift=1, student_steps=3, embedding=4, student=(student, theirs)
    )
    more["report"] = lambda step, loss: told.append((step, loss))
    made = of_cmi.cmi(net, variables, **more)
    assert [step for step, _ in told] == list(range(1, of_cmi.cmi_steps(11, 8, 40, 3) + 1))
    assert [step for step, loss in told if loss is not None] == [40, 83]
    np.testing.assert_array_equal(made.labels, np.arange(11) % CLASSES)
    assert made.images.min() >= -0.5 and made.images.max() <= 1.5
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, theirs))
    again = of_cmi.cmi(net, variables, **more)
    np.testing.assert_array_equal(made.images, again.images)
    first = of_cmi.cmi(net, variables, **{**more, "steps": 1})
    after, at_first = (
        float(statistics_loss(net, variables, x[:6], "deep_inversion")[1])
        for x in (made.images, first.images)
    )
    assert after < at_first
    alone = of_cmi.cmi(net, variables, **{**more, "student": None})
    # The first batch meets an untrained adversary, the second one that has learned.
    assert not np.array_equal(made.images[:6], alone.images[:6])
    idle = of_cmi.cmi(net, variables, **{**more, "student_steps": 0})
    np.testing.assert_array_equal(made.images[:6], idle.images[:6])
    assert not np.array_equal(made.images[6:], idle.images[6:])


@pytest.mark.slow
def test_cmi_remembers_earlier_images(case):
    net, variables = case
    more = options(count=12, batch_size=4, steps=10, shift=1, embedding=4)
    all_of_them = of_cmi.cmi(net, variables, **more).images
    four = of_cmi.cmi(net, variables, **{**more, "memory": 4}).images
    # The third batch alone can tell whether the first is remembered.
    np.testing.assert_allclose(all_of_them[:4], four[:4], atol=1e-4)
    np.testing.assert_allclose(all_of_them[4:8], four[4:8], atol=1e-4)
    assert np.abs(all_of_them[8:] - four[8:]).max() > 1e-3


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("dafl", dict(count=0), "count is 0"),
        ("dafl", dict(width=0), "width is 0"),
        ("dafl", dict(lr=0.0), "lr is 0.0"),
        ("dafl", dict(entropy_weight=-1.0), "entropy_weight is -1.0"),
        ("cmi", dict(temperature=0.0), "temperature is 0.0"),
        ("cmi", dict(shift=5), "shift is 5"),
        ("cmi", dict(smallest_crop=2.0), "smallest_crop is 2.0"),
        ("cmi", dict(student_steps=-1), "student_steps is -1"),
        ("cmi", dict(labels=[0, 3]), "one class below 3 for each of the 2"),
    ],
)
def test_what_cannot_be_is_said(case, method, change, message):
    net, variables = case
    with pytest.raises(ValueError, match=message):
        data_free.GENERATORS[method](net, variables, **options(**{"count": 2, **change}))


def test_cmi_needs_what_a_net_remembers(case):
    net, variables = case
    plain = quantize(WithoutNorm())
    with pytest.raises(ValueError, match="calls no BatchNorm"):
        of_cmi.cmi(plain, plain.init(jax.random.key(0), jnp.zeros((1, *SHAPE))), **options(count=2))
    folded = ptq.fold_bn(net, variables, jnp.zeros((1, *SHAPE)))
    with pytest.raises(ValueError, match="folded"):
        of_cmi.cmi(net, folded, **options(count=2))


@pytest.mark.parametrize(("method", "more"), [("dafl", {}), ("cmi", dict(shift=1))])
def test_numbers_that_are_not_finite_make_no_images(case, method, more):
    net, variables = case
    stats = jax.tree.map(lambda x: x * np.nan, variables["batch_stats"])
    broken = {**variables, "batch_stats": stats}
    with pytest.raises(ValueError, match=r"finite.*lower lr"):
        data_free.GENERATORS[method](net, broken, **options(count=2, steps=2, **more))
