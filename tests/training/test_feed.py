"""Batches on their way to the devices: the same batches, in order, normalised and placed."""

import jax
import numpy as np
import pytest

from qkd_jax.training.feed import feed, on_host
from qkd_jax.training.parallel import compile_step

AFFINE = np.array([0.5, 2.0], np.float32), np.array([1.0, -3.0], np.float32)


def batches(dtype, count=5):
    rng = np.random.default_rng(0)
    for step in range(count):
        image = rng.integers(0, 256, (8, 3, 4, 2)).astype(dtype)
        yield {"image": image, "label": np.arange(8, dtype=np.int32) + step}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_batches_come_in_order_placed_and_normalised(devices, dtype):
    compiled = compile_step(
        lambda state, *_, axis_name: (state, {}), devices=jax.devices()[:devices]
    )
    found = list(feed(batches(dtype), compiled, affine=AFFINE))
    assert len(found) == 5
    for batch, wanted in zip(found, batches(dtype), strict=True):
        assert batch["image"].dtype == np.float32
        assert compiled.shard_batch(batch)["image"] is batch["image"]  # in place already
        image = wanted["image"]
        if dtype == np.uint8:  # whole numbers and halves: exact
            image = image * AFFINE[0] + AFFINE[1]
        np.testing.assert_array_equal(on_host(batch)["image"], image)
        np.testing.assert_array_equal(on_host(batch)["label"], wanted["label"])


def test_two_batches_are_ahead_of_the_one_in_use():
    asked = []

    def counted():
        for step, batch in enumerate(batches(np.uint8)):
            asked.append(step)
            yield batch

    compiled = compile_step(lambda state, *_, axis_name: (state, {}), devices=jax.devices()[:1])
    fed = feed(counted(), compiled, affine=AFFINE)
    next(fed)
    assert asked == [0, 1, 2]
    next(fed)
    assert asked == [0, 1, 2, 3]


def test_pmap_takes_batches_from_the_host():
    compiled = compile_step(
        lambda state, *_, axis_name: (state, {}), mode="pmap", devices=jax.devices()[:2]
    )
    (first, *_) = feed(batches(np.float32), compiled, affine=AFFINE)
    assert isinstance(first["image"], np.ndarray)
