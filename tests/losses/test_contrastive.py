"""CRD with banks: the estimator, its draws and its memory, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_inputs import waves

from qkd_jax.losses import crd, crd_in_batch, crd_memory
from qkd_jax.losses.contrastive import (
    _by_class,
    _draw_others,
    _draw_same,
    _noise_contrast,
    _products,
)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


STUDENT, TEACHER = waves((2, 6), 5), waves((2, 6), 6)
# Two examples of two classes: every negative of one is the other, however it is drawn.
LABELS, INDEX = np.array([4, 1]), np.array([1, 0])
MEMORY = crd_memory(2, 6, key=jax.random.key(3))
NEGATIVES = 5


def by_hand(memory, student, teacher, log_z=None):
    """Values in float64, and log Z, for the two examples above; the definition without logs."""
    value, used = np.zeros(2), []
    noise = NEGATIVES / 2
    for i, (own, bank) in enumerate(((student, "teacher"), (teacher, "student"))):
        bank = np.float64(memory[bank])
        ratio = np.exp(unit(np.float64(own)) @ bank.T / 0.07)
        positive, negative = ratio[range(2), INDEX], ratio[range(2), 1 - INDEX]
        if log_z is None:
            # The batch's mean, of 1 positive and 5 negatives each, times the number of examples.
            z = 2 * (positive.sum() + NEGATIVES * negative.sum()) / (2 * (1 + NEGATIVES))
        else:
            z = np.exp(log_z[i])
        positive, negative = positive / z, negative / z
        value -= np.log(positive / (positive + noise + 1e-7))
        value -= NEGATIVES * np.log(noise / (negative + noise + 1e-7))
        used.append(np.log(z))
    return value, used


def step(memory, student=STUDENT, teacher=TEACHER, seed=0, **keywords):
    key = jax.random.key(seed)
    return crd(student, teacher, LABELS, INDEX, memory, key, negatives=NEGATIVES, **keywords)


def test_golden_number_of_the_estimator():
    scores = np.abs(waves((8, 33), 9)) / 50 + 1e-4
    np.testing.assert_allclose(jnp.mean(_noise_contrast(np.log(scores), 500)), 9.8522246, 1e-5)


def test_two_steps_by_hand():
    value, memory = step(MEMORY)
    wanted, log_z = by_hand(MEMORY, STUDENT, TEACHER)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(memory["log_z"], log_z, rtol=1e-5)
    assert memory["started"] and not MEMORY["started"]
    np.testing.assert_array_equal(memory["label"], LABELS[np.argsort(INDEX)])
    for name, new in (("student", STUDENT), ("teacher", TEACHER)):
        old = np.float64(MEMORY[name])[INDEX]
        moved = unit(0.5 * old + 0.5 * unit(np.float64(new)))
        np.testing.assert_allclose(memory[name][INDEX], moved, rtol=1e-5)
    # The second step meets the moved banks, and the normalisers of the first.
    value, again = step(memory, student=TEACHER, teacher=STUDENT, seed=1)
    wanted, _ = by_hand(memory, TEACHER, STUDENT, log_z)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_array_equal(again["log_z"], memory["log_z"])


@pytest.mark.parametrize("size", [12, 100])
def test_products_with_a_small_and_a_large_bank(size):
    own, bank = waves((3, 6), 1), waves((size, 6), 2)
    chosen = np.random.default_rng(0).integers(0, size, (3, 8))
    wanted = np.array([[np.float64(bank[k]) @ own[b] for k in row] for b, row in enumerate(chosen)])
    np.testing.assert_allclose(_products(own, bank, chosen), wanted, rtol=1e-5, atol=1e-6)
    slopes = jnp.arange(8.0)[None, :]
    grad = jax.grad(lambda x: jnp.sum(slopes * _products(x, bank, chosen)))(own)
    wanted = np.einsum("k,bkd->bd", np.arange(8.0), np.float64(bank)[chosen])
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)


def test_gradient_is_the_closed_forms_slope():
    _, memory = step(MEMORY)
    grads = jax.grad(lambda s, t: jnp.sum(step(memory, s, t)[0]), (0, 1))(STUDENT, TEACHER)
    h = 1e-6
    for which, grad in enumerate(grads):
        for place in ((0, 0), (1, 4)):
            ends = []
            for sign in (h, -h):
                nets = [np.float64(STUDENT), np.float64(TEACHER)]
                nets[which][place] += sign
                ends.append(by_hand(memory, *nets, memory["log_z"])[0].sum())
            np.testing.assert_allclose(grad[place], (ends[0] - ends[1]) / (2 * h), rtol=1e-4)


def test_negatives_are_of_other_classes_and_uniform():
    labels = jnp.array([2, 0, 1, 2, 2, 0, -1, 1])
    order, classes = _by_class(labels)
    for label in (0, 1, 2, 7):
        drawn = np.asarray(_draw_others(jax.random.key(0), label, order, classes, 4000))
        others = np.flatnonzero(np.asarray(labels) != label)
        counts = np.bincount(drawn, minlength=8)
        assert set(drawn) == set(others)
        # 5 standard deviations of a binomial count.
        expected = 4000 / len(others)
        assert np.all(np.abs(counts[others] - expected) < 5 * np.sqrt(expected))


def test_relaxed_positives_are_of_the_class():
    labels = jnp.array([2, 0, 1, 2, 2, 0, -1, 1])
    order, classes = _by_class(labels)
    keys = jax.random.split(jax.random.key(0), 60)
    found = jax.vmap(lambda key: _draw_same(key, 2, order, classes))(keys)
    assert set(np.asarray(found)) == {0, 3, 4}
    # In the loss: with one example a class, relaxed and exact are the same.
    np.testing.assert_array_equal(step(MEMORY)[0], step(MEMORY, mode="relax")[0])


def test_one_class_alone_falls_back_to_all_examples():
    memory = crd_memory(4, 6, key=jax.random.key(0), labels=np.zeros(4, np.int32))
    value, _ = crd(STUDENT, TEACHER, np.zeros(2, int), INDEX, memory, jax.random.key(1))
    assert np.isfinite(value).all()


def test_draws_follow_the_key():
    memory = crd_memory(50, 6, key=jax.random.key(0))
    first, second, other = (
        crd(STUDENT, TEACHER, LABELS, INDEX, memory, jax.random.key(k), negatives=8)[0]
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, other)


def test_hidden_examples_leave_the_memory_alone():
    mask = np.array([True, False])
    index = np.array([1, 77])
    _, memory = crd(
        STUDENT, TEACHER, LABELS, index, MEMORY, jax.random.key(0), negatives=3, where=mask
    )
    np.testing.assert_array_equal(memory["student"][0], MEMORY["student"][0])
    np.testing.assert_array_equal(memory["label"], [-1, LABELS[0]])
    _, memory = step(MEMORY, where=np.zeros(2, bool))
    assert not memory["started"]


@pytest.mark.parametrize("negatives", [3, 64])  # a gather of rows, a product with the bank
@pytest.mark.parametrize("wrong", [-1, 40, 2**31 - 1, -(2**31)])
def test_an_id_that_is_none_is_not_a_number_and_changes_nothing_else(negatives, wrong):
    student, teacher = waves((4, 6), 5), waves((4, 6), 6)
    memory = crd_memory(40, 6, key=jax.random.key(3), labels=jnp.arange(40) % 4)
    labels, ids = np.array([0, 1, 2, 3]), np.array([4, 9, 2, wrong], np.int32)

    def run(where=None, mode="exact"):
        def total(student):
            value, new = crd(
                *(student, teacher, labels, ids, memory, jax.random.key(9)),
                negatives=negatives, mode=mode, where=where,
            )  # fmt: skip
            return jnp.sum(value[:3]), (value, new)

        return jax.value_and_grad(total, has_aux=True)(student)

    for mode in ("exact", "relax"):
        (_, (value, new)), slope = run(mode=mode)
        # Truth: what a batch gives that leaves the example out.
        (_, (want, kept)), want_slope = run(np.array([1, 1, 1, 0]), mode)
        assert np.isnan(value[3]) and want[3] == 0
        np.testing.assert_array_equal(value[:3], want[:3])
        np.testing.assert_array_equal(slope, want_slope)
        for name in kept:
            np.testing.assert_array_equal(new[name], kept[name], err_msg=name)
        changed = np.flatnonzero(np.any(new["student"] != memory["student"], axis=1))
        assert changed.tolist() == [2, 4, 9] and np.isfinite(new["log_z"]).all()


def test_a_first_batch_without_a_known_id_starts_nothing():
    ids = np.array([2, -1])
    value, new = crd(STUDENT, TEACHER, LABELS, ids, MEMORY, jax.random.key(0), negatives=3)
    assert np.isnan(value).all() and not new["started"]
    np.testing.assert_array_equal(new["student"], MEMORY["student"])
    np.testing.assert_array_equal(new["label"], MEMORY["label"])


def test_ids_in_64_bits_are_not_cut():
    with jax.enable_x64(True):
        ids = np.array([1, 2**32], np.int64)
        value, new = crd(STUDENT, TEACHER, LABELS, ids, MEMORY, jax.random.key(0), negatives=3)
    assert np.isnan(value[1]) and np.isfinite(value[0])
    np.testing.assert_array_equal(new["student"][0], MEMORY["student"][0])


def test_four_devices_keep_one_memory():
    student, teacher = waves((8, 6), 1), waves((8, 6), 2)
    labels, index = np.arange(8) % 3, np.arange(8)
    memory = crd_memory(9, 6, key=jax.random.key(0))

    def update(s, t, y, i, memory, **keywords):
        return crd(s, t, y, i, memory, jax.random.key(5), negatives=4, **keywords)

    value, wanted = jax.jit(update)(student, teacher, labels, index, memory)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in (student, teacher, labels, index)]
    mapped = jax.pmap(lambda *args: update(*args, memory, axis_name="batch"), axis_name="batch")(
        *split
    )
    np.testing.assert_allclose(mapped[0].reshape(-1), value, rtol=1e-5)
    for name, array in mapped[1].items():
        for device in array:
            np.testing.assert_allclose(device, wanted[name], rtol=1e-5)


def test_banks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"student_embedding has shape \(2, 4\).*vectors of 6"):
        step(MEMORY, STUDENT[:, :4], TEACHER[:, :4])
    with pytest.raises(ValueError, match="index has dtype float32"):
        crd(STUDENT, TEACHER, LABELS, STUDENT[:, 0], MEMORY, jax.random.key(0))
    with pytest.raises(ValueError, match="labels"):
        crd_memory(3, 6, key=jax.random.key(0), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"mode is 'exakt'.*Did you mean 'exact'"):
        step(MEMORY, mode="exakt")


def test_negatives_of_the_batch_are_of_other_classes():
    student, teacher = waves((4, 6), 1), waves((4, 6), 2)
    alone = crd_in_batch(student, teacher, np.zeros(4, int))
    np.testing.assert_allclose(alone, 0.0, atol=1e-6)
    scores = unit(np.float64(student)) @ unit(np.float64(teacher)).T / 0.07
    log_sum = [np.log(np.exp(s).sum(axis)) for s, axis in ((scores, 1), (scores, 0))]
    wanted = sum(log_sum) - 2 * np.diag(scores)
    np.testing.assert_allclose(crd_in_batch(student, teacher, np.arange(4)), wanted, rtol=1e-5)
