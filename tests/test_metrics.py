"""Metrics: sums that add up exactly, ties, NaN, masks, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import metrics


def normal(batch, classes, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, classes)).astype(np.float32)
    return logits, rng.integers(0, classes, batch).astype(np.int32)


def floats(sums):
    return {k: float(v) for k, v in sums.items()}


@pytest.mark.parametrize("classes", [2, 4, 5, 12])
def test_classification_against_sorting(classes):
    logits, labels = normal(50, classes)
    sums = metrics.classification(logits, labels)
    assert {k: (v.shape, v.dtype) for k, v in sums.items()} == {
        k: ((), jnp.float32) for k in ("count", "top1", "top5", "loss")
    }
    ranking = np.argsort(-logits, axis=1)
    assert sums["count"] == 50
    assert sums["top1"] == np.sum(ranking[:, 0] == labels)
    assert sums["top5"] == np.sum(np.any(ranking[:, :5] == labels[:, None], axis=1))
    log_sum = np.log(np.sum(np.exp(np.float64(logits)), axis=1))
    np.testing.assert_allclose(sums["loss"], np.sum(log_sum - logits[range(50), labels]), 1e-5)


def test_ties_go_to_the_lowest_index():
    # A constant net predicts class 0; its five first classes are 0 to 4.
    zeros = np.zeros((5, 10), np.float32)
    sums = metrics.classification(zeros, np.arange(5))
    assert sums["top1"] == 1 and sums["top5"] == 5
    sums = metrics.classification(zeros, np.arange(5, 10))
    assert sums["top1"] == 0 and sums["top5"] == 0
    logits = np.array([[1.0, 3.0, 3.0], [3.0, 1.0, 3.0]], np.float32)
    assert metrics.classification(logits, np.array([1, 0]))["top1"] == 2
    assert metrics.classification(logits, np.array([2, 2]))["top1"] == 0


def test_nan_is_wrong_and_shows_in_the_loss():
    logits, _ = normal(3, 10)
    labels = np.argmax(logits, axis=1)
    logits[1, 7] = np.nan
    logits[2] = np.nan
    sums = metrics.classification(logits, labels)
    assert sums["count"] == 3 and sums["top1"] == 1 and sums["top5"] == 1
    assert np.isnan(sums["loss"])


@pytest.mark.parametrize("label", [-1, 4])
def test_label_out_of_range_is_wrong_and_shows_in_the_loss(label):
    sums = metrics.classification(np.zeros((1, 4), np.float32), np.array([label]))
    assert sums["top1"] == 0 and sums["top5"] == 0 and np.isnan(sums["loss"])


def test_infinite_logits_still_rank():
    logits = np.array([[0.0, np.inf, 1.0], [-np.inf, 0.0, -1.0]], np.float32)
    assert metrics.classification(logits, np.array([1, 1]))["top1"] == 2


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masked_examples_count_nowhere(dtype):
    logits, labels = normal(8, 6)
    wanted = floats(metrics.classification(logits[:5], labels[:5]))
    mask = np.array([1] * 5 + [0] * 3, dtype)
    logits[5], logits[6], labels[7] = np.nan, np.inf, -1
    got = floats(jax.jit(metrics.classification)(logits, labels, where=mask))
    assert got == pytest.approx(wanted, rel=1e-6)
    other = normal(8, 6, seed=1)[0]
    wanted = floats(metrics.agreement(logits[:5], other[:5]))
    assert floats(metrics.agreement(logits, other, where=mask)) == wanted


def test_agreement():
    logits = np.array([[1, 0, 0], [0, 2, 1], [0, 0, 3], [5, 5, 0]], np.float32)
    other = np.array([[9, 1, 1], [0, 1, 2], [0, np.nan, 3], [4, 0, 0]], np.float32)
    sums = metrics.agreement(logits, other)
    assert floats(sums) == {"count": 4.0, "agree": 2.0}
    assert floats(metrics.agreement(other, logits)) == floats(sums)


def test_batches_add_up_to_the_whole():
    logits, labels = normal(11, 10)
    total = {}
    for start in range(0, 12, 4):
        batch = jax.device_get(
            metrics.classification(logits[start : start + 4], labels[start : start + 4])
        )
        total = metrics.add(total, batch)
    assert all(type(v) is float for v in metrics.finish(total).values())
    whole = metrics.finish(metrics.classification(logits, labels))
    assert metrics.finish(total) == pytest.approx(whole, rel=1e-6)
    assert whole["count"] == 11.0


def test_add_under_jit():
    logits, labels = normal(6, 3)

    @jax.jit
    def both(logits, labels):
        first = metrics.classification(logits[:3], labels[:3])
        return metrics.add(first, metrics.classification(logits[3:], labels[3:]))

    whole = floats(metrics.classification(logits, labels))
    assert floats(both(logits, labels)) == pytest.approx(whole, rel=1e-6)


def test_long_sums_stay_exact():
    # In float32 a count stops growing at 2^24.
    sums = {"count": np.float32(2**24), "top1": np.float32(2**24)}
    total = metrics.add(metrics.add(sums, {"count": 1, "top1": 1}), {"count": 1, "top1": 1})
    assert total["count"] == 2**24 + 2


def test_sums_over_devices():
    logits, labels = normal(8, 6)
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    devices = jax.device_count()
    assert 8 % devices == 0

    def split(x):
        return x.reshape(devices, -1, *x.shape[1:])

    mapped = jax.pmap(
        lambda z, y, m: metrics.classification(z, y, where=m, axis_name="batch"), axis_name="batch"
    )(split(logits), split(labels), split(mask))
    wanted = floats(metrics.classification(logits, labels, where=mask))
    assert {k: float(v[0]) for k, v in mapped.items()} == pytest.approx(wanted, rel=1e-6)
    mapped = jax.pmap(functools.partial(metrics.agreement, axis_name="i"), axis_name="i")(
        split(logits), split(logits)
    )
    assert float(mapped["agree"][0]) == 8.0


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = normal(300, 4)
    sums = metrics.classification(jnp.asarray(logits, jnp.bfloat16), labels)
    # 300 is no bfloat16 number.
    assert sums["count"] == 300 and sums["loss"].dtype == jnp.float32


def test_errors_name_the_argument():
    logits, labels = normal(4, 3)
    with pytest.raises(ValueError, match="logits has shape"):
        metrics.classification(logits[0], labels)
    with pytest.raises(ValueError, match="labels"):
        metrics.classification(logits, labels[:3])
    with pytest.raises(ValueError, match="where has shape"):
        metrics.classification(logits, labels, where=np.ones(3))
    with pytest.raises(ValueError, match="other_logits"):
        metrics.agreement(logits, logits[:, :2])
    with pytest.raises(ValueError, match="sums of one kind"):
        metrics.add({"count": 1.0, "agree": 1.0}, {"count": 1.0, "top1": 1.0})
    with pytest.raises(ValueError, match="count 0"):
        metrics.finish({"count": 0.0, "top1": 0.0})
    with pytest.raises(ValueError, match="'count' must be among"):
        metrics.finish({"top1": 0.0})
