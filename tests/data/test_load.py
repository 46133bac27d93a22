"""`load`: the contract of every entry of DATASETS, the splits, and the errors."""

import json
import shutil

import numpy as np
import pytest

from qkd_jax import data
from qkd_jax.data import augment, cache, digits, draws, sources


def same(a, b):
    return a.fingerprint == b.fingerprint


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_data_set_loads_or_says_how_to_prepare_it(name, tmp_path):
    source = data.DATASETS[name]
    assert source.description
    missing = {
        "prepared": f"qkd_jax.data.prepare {name}",
        "streamed": f"tfds build {name} --file_format=array_record",
        "folder": r"'.*missing', which is no folder; it must hold <dir>/train/<class>",
    }
    if source.kind in missing:
        with pytest.raises(data.NotPreparedError, match=missing[source.kind]):
            data.load(name, data_dir=tmp_path / "missing")
        return
    dataset = data.load(name)
    assert dataset.name == name
    assert dataset.image_shape == source.image_shape
    assert dataset.num_classes == source.num_classes
    assert len(dataset.train_images) == source.train_examples
    for split in ("train", "test"):
        images, labels = dataset.arrays(split)
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert set(labels.tolist()) == set(range(dataset.num_classes))
        with pytest.raises(ValueError, match="read-only"):
            images[0] = 0
    assert same(dataset, data.load(name))
    assert not same(dataset, data.load(name, seed=1))


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_recipe_can_be_followed(name):
    recipe = data.recipe_of(name)
    assert recipe.batch_size >= 1 and recipe.epochs >= 1 and recipe.train_examples >= 0
    images = np.zeros((2, *data.DATASETS[name].image_shape), np.uint8)
    parsed = augment.parse(recipe.augment)
    made = augment.batch(images, np.arange(len(images)), parsed, seed=0, step=0)
    assert made.shape == images.shape


@pytest.mark.parametrize("name", [n for n, s in data.DATASETS.items() if s.kind == "prepared"])
def test_a_prepared_set_reads_through_tfds(name, prepared_dir):
    if sources.find(name, sources.data_directory(prepared_dir)) is None:
        pytest.skip(f"{name} is not in TFDS_DATA_DIR")
    dataset = data.load(name, data_dir=prepared_dir)
    source = data.DATASETS[name]
    assert dataset.image_shape == source.image_shape
    assert len(dataset.train_images) > len(dataset.test_images) == 10_000
    assert np.bincount(dataset.test_labels).tolist() == [10_000 // source.num_classes] * (
        source.num_classes
    )
    # Decoding by Pillow equals TFDS's own.
    folder = sources.find(name, sources.data_directory(prepared_dir))
    import tensorflow_datasets as tfds

    records = tfds.data_source(
        name,
        split="test",
        data_dir=str(folder.parent.parent),
        download=False,
        builder_kwargs={"file_format": "array_record"},
    )
    for row in (0, 1, 4_999, 9_999):
        np.testing.assert_array_equal(records[row]["image"], dataset.test_images[row])
        assert records[row]["label"] == dataset.test_labels[row]
    # The second time comes from the cache, and a subset from the same arrays.
    assert same(dataset, data.load(name, data_dir=prepared_dir))
    small = data.load(name, data_dir=prepared_dir, train_examples=100, test_examples=50, seed=3)
    smaller = data.load(name, data_dir=prepared_dir, train_examples=60, test_examples=50, seed=3)
    assert small.train_images.shape[0] == 100 and small.test_images.shape[0] == 50
    np.testing.assert_array_equal(small.train_images[:60], smaller.train_images)


def test_digits_are_split_at_random_without_overlap():
    whole, labels = digits.read(data.DATASETS["digits"], None)
    dataset = data.load("digits", seed=5)
    assert dataset.train_images.shape == (300, 8, 8, 1)
    assert dataset.test_images.shape == (1497, 8, 8, 1)
    order = draws.permutation(1797, seed=5, stream=draws.SPLIT)
    np.testing.assert_array_equal(dataset.train_images, whole[order[:300]])
    np.testing.assert_array_equal(dataset.test_labels, labels[order[300:]])
    assert len(data.load("digits", train_examples=1437).test_images) == 360
    assert len(data.load("digits", test_examples=20).test_images) == 20


def test_digits_keep_their_17_levels():
    images, labels = digits.read(data.DATASETS["digits"], None)
    assert np.unique(images).tolist() == [round(level * 255 / 16) for level in range(17)]
    assert digits.content_hash(images, labels) == digits.SHA256
    # The first image of the set, as scikit-learn shows it.
    assert np.rint(images[0, 0, :, 0] * (16 / 255)).astype(int).tolist() == [
        0,
        0,
        5,
        13,
        9,
        1,
        0,
        0,
    ]
    assert labels[:10].tolist() == list(range(10))


def test_the_split_of_digits_is_pinned():
    """A change here changes every result on digits."""
    dataset = data.load("digits", seed=0)
    assert dataset.fingerprint == (
        "4f5e8b9b0e1786cda8171df51c1c6a8fcae8bf09bf3aaee93a313b7070a0a7d4"
    )


def test_moments_are_those_of_the_train_split():
    dataset = data.load("synthetic", image_shape=(5, 7, 3), num_classes=4, train_examples=40)
    pixels = dataset.train_images / 255.0
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-6)
    normalized = dataset.normalize(dataset.train_images)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, atol=1e-5)


def test_a_constant_channel_stays_finite():
    images = np.full((4, 2, 2, 1), 9, np.uint8)
    labels = np.zeros(4, np.int32)
    dataset = data.Dataset("flat", 2, images, labels, images, labels)
    np.testing.assert_allclose(dataset.normalize(images), 0, atol=1e-5)


def test_synthetic_is_pinned_and_learnable():
    dataset = data.load("synthetic", train_examples=400, test_examples=200, seed=2)
    assert dataset.fingerprint == (
        "667bf1ecbc4d3323c83013950b94c4308d73132b21c08da40e764d71d43db665"
    )
    # Nearest class mean.
    train, test = (
        dataset.normalize(dataset.arrays(s)[0]).reshape(-1, 64) for s in ("train", "test")
    )
    means = np.stack([train[dataset.train_labels == c].mean(0) for c in range(10)])
    found = ((test[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (found == dataset.test_labels).mean() > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="digit"), "unknown data set 'digit'.*Did you mean 'digits'"),
        (dict(name="digits", train_examples=0), "train_examples of 'digits' is 0.*at most 1796"),
        (dict(name="digits", train_examples=1797), "at most 1796"),
        (dict(name="digits", test_examples=1498), "test_examples of 'digits'.*at most 1497"),
        (dict(name="digits", train_examples=2.5), r"2.5 \(float\)"),
        (dict(name="digits", seed=-1), "seed is -1"),
        (dict(name="digits", num_classes=3), "num_classes is 3; only 'synthetic'"),
        (dict(name="synthetic", num_classes=1), "num_classes is 1"),
        (dict(name="synthetic", image_shape=(8, 8)), r"image_shape is \(8, 8\)"),
        (dict(name="synthetic", image_shape=(8, 0, 1)), "image_shape's width is 0"),
    ],
)
def test_errors_name_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_wrong_arrays_are_refused():
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int32)
    good = (images, labels, images, labels)
    for place, bad, message in (
        (0, images.astype(np.float32), "uint8"),
        (1, labels[:3], "one label an image"),
        (3, labels + 7, r"0\.\.1"),
        (2, np.zeros((4, 3, 2, 1), np.uint8), "must be the same"),
        (0, images[:0], "one label an image"),
    ):
        arrays = [*good]
        arrays[place] = bad
        with pytest.raises(ValueError, match=message):
            data.Dataset("bad", 2, *arrays)


def test_another_file_format_is_refused_with_the_repair(tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(data.NotPreparedError, match=r"'tfrecord'.*array_record.*prepare cifar10"):
        data.load("cifar10", data_dir=tmp_path)


def test_the_newest_prepared_version_is_found(tmp_path):
    for version in ("3.0.2", "3.0.10", "incomplete.3.0.11"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").touch()
    (tmp_path / "cifar10" / "4.0.0").mkdir()
    assert sources.find("cifar10", tmp_path).name == "3.0.10"
    assert sources.find("mnist", tmp_path) is None


def test_another_set_in_the_place_of_digits_is_refused(tmp_path):
    folder = digits.prepare(tmp_path)
    key = cache.key(folder)
    images, labels = digits.read(data.DATASETS["digits"], tmp_path)
    cache.store("digits", key, {"train_images": images[::-1], "train_labels": labels})
    with pytest.raises(ValueError, match="remove that folder"):
        data.load("digits", data_dir=tmp_path)
    shutil.rmtree(cache.directory() / "decoded")
