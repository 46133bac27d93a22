"""Losses of classifiers on hidden features against float64 restatements of their formulas."""

import jax
import numpy as np
import pytest

from qkd_jax import losses

BATCH, CLASSES = 6, 4
LABELS = np.array([0, 3, 1, 1, 2, 0])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(scale=2.0, size=(BATCH, *shape)).astype(np.float32)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(target, z):
    p = log_softmax(target)
    return (np.exp(p) * (p - log_softmax(z))).sum(-1)


def cross_entropy(z):
    return -log_softmax(z)[np.arange(BATCH), LABELS]


HEADS = (normal(0, CLASSES), normal(1, CLASSES), normal(2, CLASSES))
FEATURES, DEEP = (normal(3, 5), normal(4, 5), normal(5, 5)), normal(6, 5)


@pytest.mark.parametrize(("alpha", "t", "hint"), [(0.1, 3.0, 1.28e-4), (1.0, 1.5, 0.25), (0, 1, 0)])
def test_byot(alpha, t, hint):
    z = normal(7, CLASSES)
    want = sum(
        (1 - alpha) * cross_entropy(own)
        + alpha * t**2 * kl(z / t, own / t)
        + hint * ((np.float64(feature) - DEEP) ** 2).sum(-1)
        for own, feature in zip(HEADS, FEATURES, strict=True)
    )
    found = losses.byot(HEADS, FEATURES, z, DEEP, LABELS, alpha=alpha, temperature=t, hint=hint)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_byot_is_zero_where_the_heads_know_what_the_deepest_knows():
    z = normal(7, CLASSES)
    given = ((z, z), (DEEP, DEEP), z, DEEP, LABELS)
    found, grads = jax.value_and_grad(
        lambda *heads: losses.byot(*heads, *given[2:], alpha=1.0, hint=3.0).sum(), argnums=(0, 1)
    )(*given[:2])
    assert abs(found) < 1e-5
    for grad in jax.tree.leaves(grads):
        np.testing.assert_allclose(grad, 0, atol=2e-6)


def gate():
    weights = np.exp(normal(9, 4))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("t", "distil"), [(3.0, 1.0), (1.5, 0.25), (2.0, 0.0)])
def test_one(t, distil):
    z, g = normal(7, CLASSES), gate()
    branches = np.stack([z, *HEADS], axis=1).astype(np.float64)
    ensemble = (g[:, :, None] * branches).sum(1)
    want = cross_entropy(ensemble) + sum(cross_entropy(x) for x in HEADS)
    want = want + distil * t**2 * sum(kl(ensemble / t, x / t) for x in branches.swapaxes(0, 1))
    found = losses.one(z, HEADS, g, LABELS, temperature=t, distil=distil)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_the_gate_of_one_learns_from_the_labels_and_the_net_from_the_ensemble():
    """In closed form, with p_e of the ensemble at temperature 1, q at T: what flows where."""
    z, g, t = normal(7, CLASSES), gate(), 2.0
    grads = jax.grad(lambda *x: losses.one(*x, LABELS, temperature=t, distil=0.5).sum(), (0, 1, 2))(
        z, HEADS, g
    )
    branches = np.stack([z, *HEADS], axis=1).astype(np.float64)
    ensemble = (g[:, :, None] * branches).sum(1)
    p, truth = (lambda x: np.exp(log_softmax(x))), np.eye(CLASSES)[LABELS]
    error = p(ensemble) - truth
    np.testing.assert_allclose(grads[2], (error[:, None] * branches).sum(-1), rtol=1e-4, atol=1e-5)
    # The net's own cross-entropy is another term's: it learns by the gate and from the ensemble.
    labels = [0.0, *(p(x) - truth for x in HEADS)]
    for i, found in enumerate((grads[0], *grads[1])):
        pull = p(branches[:, i] / t) - p(ensemble / t)
        want = labels[i] + g[:, i : i + 1] * error + 0.5 * t * pull
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads_logits=HEADS[:1]), r"gate has shape \(6, 4\); it must be \(6, 2\)"),
        (dict(heads_logits=(*HEADS[:2], normal(8, 5))), r"heads_logits\[2\]"),
        (dict(heads_logits=HEADS[0]), "heads_logits is one array"),
    ],
)
def test_one_says_what_is_wrong(change, message):
    given = dict(logits=normal(7, CLASSES), heads_logits=HEADS, gate=gate(), labels=LABELS)
    with pytest.raises(ValueError, match=message):
        losses.one(**given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads_logits=HEADS[0]), "heads_logits is one array"),
        (dict(student_features=FEATURES[:2]), "has 3 entries and student_features 2"),
        (dict(student_features=(*FEATURES[:2], normal(8, 4))), r"student_features\[2\]: "),
        (dict(alpha=1.5), r"alpha is 1.5; it must be a finite number in \[0, 1\]"),
        (dict(labels=LABELS[:, None] == np.arange(CLASSES)), "One-hot rows become indices"),
    ],
)
def test_byot_says_what_is_wrong(change, message):
    given = dict(
        heads_logits=HEADS,
        student_features=FEATURES,
        teacher_logits=normal(7, CLASSES),
        teacher_feature=DEEP,
        labels=LABELS,
    )
    with pytest.raises(ValueError, match=message):
        losses.byot(**given | change)


def test_a_label_that_is_no_class_gives_nan():
    labels = np.array([0, 4, 1, -1, 2, 0])
    found = losses.byot(HEADS, FEATURES, normal(7, CLASSES), DEEP, labels)
    np.testing.assert_array_equal(np.isnan(found), [0, 1, 0, 1, 0, 0])
