"""Batches: a pure function of (seed, step), each example once an epoch, exact padding."""

import numpy as np
import pytest

from qkd_jax import data

AUGMENT = ("pad_crop:2", "flip")


@pytest.fixture(scope="module")
def dataset():
    return data.load(
        "synthetic", image_shape=(6, 5, 2), num_classes=3, train_examples=23, test_examples=11
    )


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_has_the_promised_arrays(dataset):
    batch = data.train_batches(dataset, batch_size=4, seed=0)[0]
    assert batch["image"].shape == (4, 6, 5, 2) and batch["image"].dtype == np.float32
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    assert batch["index"].shape == (4,) and batch["index"].dtype == np.int64
    np.testing.assert_array_equal(batch["label"], dataset.train_labels[batch["index"]])
    np.testing.assert_array_equal(
        batch["image"], dataset.normalize(dataset.train_images[batch["index"]])
    )


@pytest.mark.parametrize("batch_size", [1, 4, 23, 60])
def test_every_example_comes_once_an_epoch(dataset, batch_size):
    batches = data.train_batches(dataset, batch_size=batch_size, seed=0)
    assert batches.steps_per_epoch == 23 / batch_size
    drawn = np.concatenate([batches.indices(step) for step in range(-(-69 // batch_size))])[:69]
    epochs = drawn.reshape(3, 23)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(23))
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    first = data.train_batches(dataset, batch_size=4, seed=9, augment=AUGMENT)
    second = data.train_batches(dataset, batch_size=4, seed=9, augment=AUGMENT)
    forwards = [first[step] for step in range(15)]
    for step in (14, 0, 7, 7, 3):
        equal(second[step], forwards[step])
    other = data.train_batches(dataset, batch_size=4, seed=10, augment=AUGMENT)
    assert not np.array_equal(other[0]["index"], forwards[0]["index"])


def test_batches_are_pinned(dataset):
    """A stored run must replay on any later version."""
    batches = data.train_batches(dataset, batch_size=6, seed=1, augment=AUGMENT)
    batch = batches[1000]
    assert batch["index"].tolist() == [8, 4, 22, 22, 15, 19]
    image = batch["image"].astype(np.float64).ravel()
    assert image.sum() == pytest.approx(-351.222906, abs=1e-3)
    assert image @ np.arange(image.size) == pytest.approx(-63355.65537, abs=1e-1)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iteration_starts_anywhere(dataset, prefetch):
    batches = data.train_batches(dataset, batch_size=4, seed=2, augment=AUGMENT)
    drawn = list(batches.iter(5, 12, prefetch=prefetch))
    assert len(drawn) == 7
    for step, batch in enumerate(drawn, 5):
        equal(batch, batches[step])
    assert list(batches.iter(3, 3, prefetch=prefetch)) == []
    endless = batches.iter(100, prefetch=prefetch)
    equal(next(endless), batches[100])
    equal(next(endless), batches[101])


def test_batches_do_not_share_memory(dataset):
    batches = data.train_batches(dataset, batch_size=4, seed=2)
    first = batches[0]
    kept = {key: value.copy() for key, value in first.items()}
    for value in first.values():
        value[...] = 0
    equal(batches[0], kept)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_eval_batches_cover_a_split_once_in_order(dataset, split, batch_size):
    batches = data.eval_batches(dataset, split, batch_size)
    images, labels = dataset.arrays(split)
    assert len(batches) == -(-len(images) // batch_size) == len(list(batches))
    real = {key: [] for key in ("image", "label", "index")}
    for batch in batches:
        assert batch["mask"].dtype == bool
        assert {value.shape[0] for value in batch.values()} == {batch_size}
        for key, rows in real.items():
            rows.append(batch[key][batch["mask"]])
        padding = ~batch["mask"]
        assert not batch["image"][padding].any() and not batch["label"][padding].any()
        assert np.all(batch["index"][padding] == -1)
    np.testing.assert_array_equal(np.concatenate(real["index"]), np.arange(len(images)))
    np.testing.assert_array_equal(np.concatenate(real["label"]), labels)
    np.testing.assert_array_equal(np.concatenate(real["image"]), dataset.normalize(images))


def test_eval_batches_index_like_a_list(dataset):
    batches = data.eval_batches(dataset, "test", 4)
    equal(batches[-1], batches[2])
    assert len(batches[1:]) == 2
    with pytest.raises(IndexError):
        batches[3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: data.train_batches(d, batch_size=0, seed=0), "batch_size is 0"),
        (lambda d: data.train_batches(d, batch_size=4.0, seed=0), r"4.0 \(float\)"),
        (lambda d: data.train_batches(d, batch_size=4, seed=-1), "seed is -1"),
        (lambda d: data.train_batches(d, batch_size=4, seed=0)[-1], "step is -1"),
        (lambda d: data.train_batches(d, batch_size=4, seed=0).iter(5, 4), "stop_step is 4"),
        (lambda d: data.train_batches(d, batch_size=4, seed=0).iter(-1), "start_step is -1"),
        (lambda d: data.eval_batches(d, "tset", 4), "'tset'.*Did you mean 'test'"),
        (lambda d: data.eval_batches(d, "test", 0), "batch_size is 0"),
    ],
)
def test_errors_name_what_is_allowed(dataset, call, message):
    with pytest.raises(ValueError, match=message):
        call(dataset)


@pytest.mark.parametrize(
    ("augment", "views"), [(AUGMENT, 0), (("flip", "mixup", "shift:1"), 0), (AUGMENT, 3)]
)
def test_rows_of_a_batch_are_those_of_the_whole_batch(dataset, augment, views):
    options = dict(batch_size=10, seed=3, augment=augment, views=views)
    whole = data.train_batches(dataset, **options)
    for rows in (np.arange(5), np.array([0, 1, 4, 9]), np.arange(10)):
        part = data.train_batches(dataset, rows=rows, **options)
        for step in (0, 2, 7):  # the third batch straddles two epochs
            equal(part[step], {name: array[rows] for name, array in whole[step].items()})
    with pytest.raises(ValueError, match="rows holds 10"):
        data.train_batches(dataset, rows=np.array([10]), **options)
