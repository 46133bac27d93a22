"""Response losses against closed forms, published golden numbers and PyTorch's values."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.losses import (
    LOSSES,
    TABLE,
    ce,
    dkd,
    dml,
    hard_target,
    kd,
    logit_regression,
    lskd,
    nkd,
)

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "losses.npz"))
# Files of qkd_jax/losses whose every loss has numbers in losses.npz.
FAMILIES = ("response", "decoupled")
STUDENT = GOLDEN["golden|student_logits"]
TEACHER = GOLDEN["golden|teacher_logits"]
LABELS = GOLDEN["golden|labels"]


def softmax(z):
    e = np.exp(np.float64(z) - np.max(z, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_golden_inputs_are_the_formula():
    i = np.arange(80, dtype=np.float64)
    for k, array in ((1, STUDENT), (2, TEACHER)):
        wanted = np.float32(1.5 * np.sin(0.7 * i + k) + np.cos(0.013 * i**2 + 2 * k))
        np.testing.assert_allclose(array.ravel(), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(LABELS, (3 * np.arange(8)) % 10)


def test_golden_numbers():
    np.testing.assert_allclose(jnp.mean(kd(STUDENT, TEACHER, temperature=4.0)), 1.2777909, 1e-5)
    np.testing.assert_allclose(jnp.mean(dml(STUDENT, TEACHER)), 0.9625223, 1e-5)
    np.testing.assert_allclose(jnp.mean(lskd(STUDENT, TEACHER)), 0.6169003, 1e-5)
    np.testing.assert_allclose(jnp.mean(dkd(STUDENT, TEACHER, LABELS)), 10.8895696, 1e-5)
    for gamma, temperature, wanted in ((1.5, 1.0, 4.5404987), (3.5, 3.0, 71.7755972)):
        value = nkd(STUDENT, TEACHER, LABELS, gamma=gamma, temperature=temperature)
        np.testing.assert_allclose(jnp.mean(value), wanted, 1e-5)


def test_dkd_with_the_right_beta_is_kd():
    p = softmax(TEACHER / 4)[np.arange(8), LABELS]
    for row, share in enumerate(p):
        found = dkd(STUDENT, TEACHER, LABELS, beta=float(1 - share))[row]
        np.testing.assert_allclose(found, kd(STUDENT, TEACHER)[row], rtol=1e-5)


def test_hard_target_is_the_limit_of_a_cold_teacher():
    cold = -(softmax(TEACHER / 1e-3) * np.log(softmax(STUDENT))).sum(-1)
    np.testing.assert_allclose(hard_target(STUDENT, TEACHER), cold, rtol=1e-5)


def test_golden_file_covers_every_response_loss():
    covered = {key.split("|")[0] for key in GOLDEN if key.endswith("|value")}
    families = {n for n in LOSSES if LOSSES[n].__module__.split(".")[-1] in FAMILIES}
    assert covered == families - {"ctkd"}  # it learns its temperature: in features.npz


@pytest.mark.parametrize("key", [k.removesuffix("|value") for k in GOLDEN if k.endswith("|value")])
def test_values_and_gradients_equal_pytorch(key):
    name, hyper, inputs = key.split("|")
    keywords: dict = {k: float(v) for k, v in (h.split("=") for h in hyper.split(",") if h)}
    if "standardize" in keywords:
        keywords["standardize"] = bool(keywords["standardize"])
    student = GOLDEN[f"{inputs}|student_logits"]
    positional = list(inspect.signature(LOSSES[name]).parameters)[1:3]
    others = [GOLDEN[f"{inputs}|{p}"] for p in positional if p in ("labels", "teacher_logits")]

    def total(z):
        value = LOSSES[name](z, *others, **keywords)
        return jnp.sum(value), value

    gradient, value = jax.grad(total, has_aux=True)(student)
    # Float32 against float64. The absolute terms are a few float32 roundings of sums that cancel:
    # of log-probabilities for the value, of probabilities times T for the gradient.
    scale = max(1.0, float(np.abs(student).max()))
    np.testing.assert_allclose(value, GOLDEN[f"{key}|value"], rtol=1e-5, atol=5e-7 * scale)
    np.testing.assert_allclose(gradient, GOLDEN[f"{key}|gradient"], rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_ce_closed_form(smoothing):
    log_p = np.log(softmax(STUDENT))
    target = (1 - smoothing) * np.eye(10)[LABELS] + smoothing / 10
    value = ce(STUDENT, LABELS, label_smoothing=smoothing)
    np.testing.assert_allclose(value, -(target * log_p).sum(-1), rtol=1e-5)
    grad = jax.grad(lambda z: jnp.sum(ce(z, LABELS, label_smoothing=smoothing)))(STUDENT)
    np.testing.assert_allclose(grad, softmax(STUDENT) - target, rtol=1e-5, atol=1e-6)


def test_ce_of_equal_logits_is_log_classes():
    np.testing.assert_allclose(ce(np.zeros((3, 7)), np.array([0, 3, 6])), np.log(7), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 10])
def test_ce_label_out_of_range_is_nan_not_a_number(label):
    labels = LABELS.copy()
    labels[3] = label
    for smoothing in (0.0, 0.1):
        value = np.asarray(ce(STUDENT, labels, label_smoothing=smoothing))
        np.testing.assert_array_equal(np.isnan(value), np.arange(8) == 3)


def test_ce_small_label_dtypes_and_many_classes():
    # 300 classes do not fit the labels' own dtype; class indices must not wrap around in it.
    logits = np.linspace(-1, 1, 600, dtype=np.float32).reshape(2, 300)
    labels = np.array([0, 255], np.uint8)
    wanted = ce(logits, labels.astype(np.int32))
    np.testing.assert_array_equal(ce(logits, labels), wanted)


def test_ce_forbidden_class():
    logits = np.array([[0.0, 0.0, -np.inf]], np.float32)
    np.testing.assert_allclose(ce(logits, np.array([0])), np.log(2), rtol=1e-6)
    grad = jax.grad(lambda z: jnp.sum(ce(z, np.array([0]))))(logits)
    np.testing.assert_allclose(grad, [[-0.5, 0.5, 0.0]], atol=1e-6)


def test_ce_refuses_one_hot_and_floating_labels():
    with pytest.raises(ValueError, match=r"labels has dtype float32.*argmax"):
        ce(STUDENT, np.eye(10, dtype=np.float32)[LABELS])
    with pytest.raises(ValueError, match="labels has dtype float32"):
        ce(STUDENT, LABELS.astype(np.float32))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_gradient_closed_form(temperature):
    grad = jax.grad(lambda z: jnp.sum(kd(z, TEACHER, temperature=temperature)))(STUDENT)
    wanted = temperature * (softmax(STUDENT / temperature) - softmax(TEACHER / temperature))
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=2e-6)


def test_kd_at_temperature_one_is_dml():
    np.testing.assert_allclose(kd(STUDENT, TEACHER, temperature=1.0), dml(STUDENT, TEACHER), 1e-6)


def test_kd_tends_to_logit_regression_over_classes():
    student = STUDENT - STUDENT.mean(-1, keepdims=True)
    teacher = TEACHER - TEACHER.mean(-1, keepdims=True)
    with jax.enable_x64(True):
        hot = kd(np.float64(student), np.float64(teacher), temperature=1e4)
        limit = logit_regression(np.float64(student), np.float64(teacher)) / 10
        # The next term of the expansion is of order z / T.
        np.testing.assert_allclose(hot, limit, rtol=1e-3)


def test_kd_is_not_symmetric_and_ignores_a_shift_of_the_logits():
    forward, backward = kd(STUDENT, TEACHER), kd(TEACHER, STUDENT)
    assert not np.allclose(forward, backward, rtol=1e-3)
    np.testing.assert_allclose(kd(STUDENT + 3.0, TEACHER - 5.0), forward, rtol=1e-4)


def test_a_class_that_both_nets_forbid_adds_nothing():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, 3] = teacher[:, 3] = -np.inf
    keep = np.arange(10) != 3
    for loss in (kd, dml):
        wanted = loss(student[:, keep], teacher[:, keep])
        np.testing.assert_allclose(loss(student, teacher), wanted, rtol=1e-5)
        grad = jax.grad(lambda z, loss=loss: jnp.sum(loss(z, teacher)))(student)
        assert np.isfinite(grad).all()


def test_logit_regression_is_the_half_sum():
    value = logit_regression(np.array([[1.0, 2.0]]), np.array([[0.0, 5.0]]))
    np.testing.assert_allclose(value, [5.0])
    grad = jax.grad(lambda z: jnp.sum(logit_regression(z, TEACHER)))(STUDENT)
    np.testing.assert_allclose(grad, STUDENT - TEACHER, rtol=1e-6)


def test_temperature_zero_is_refused_with_the_range():
    with pytest.raises(ValueError, match=r"temperature is 0; it must be a finite number in \(0"):
        kd(STUDENT, TEACHER, temperature=0)


@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if row.by_softmax])
def test_the_largest_logits_and_the_sum_of_the_others_do_where_softmax_is_all(name):
    """At temperature 1 a flat tail of the same sum pulls the largest classes as the true one."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, 6)).astype(np.float32)
    kept = np.argsort(-teacher, axis=1)[:, :3]
    others = np.ones((4, 6), bool)
    np.put_along_axis(others, kept, False, axis=1)
    tail = np.log(np.sum(np.exp(teacher), axis=1, where=others) / 3)
    flat = np.where(others, tail[:, None], teacher)
    parameters = inspect.signature(LOSSES[name]).parameters
    given = {"labels": np.int32([0, 1, 2, 5]), "temperature": np.float32(1.0)}
    inputs = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    keywords = {"temperature": 1.0} if {"temperature"} & set(parameters) - set(inputs) else {}

    def slope(z):
        known = given | {"teacher_logits": z, "teachers_logits": (z, z)}
        rest = [known[n] for n in inputs]
        return jax.grad(lambda s: jnp.sum(LOSSES[name](s, *rest, **keywords)))(student)

    exact, cached = (np.take_along_axis(np.asarray(slope(z)), kept, 1) for z in (teacher, flat))
    np.testing.assert_allclose(cached, exact, rtol=1e-4, atol=1e-6)
