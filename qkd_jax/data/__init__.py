"""Data sets and batches: uint8 images in memory or streamed, batches that depend on the step alone.

    dataset = load("digits", train_examples=300, seed=0)
    batches = train_batches(dataset, batch_size=64, seed=0, augment=("shift:1",))
    batch = batches[17]                       # the batch of step 17, whatever came before
    for batch in batches.iter(start_step=17): ...
    for batch in eval_batches(dataset, "test", 256): ...   # padded, with "mask"

No JAX and no TensorFlow. To add a data set that TFDS knows, write an entry in `DATASETS`; if it
should be prepared without TensorFlow too, add its reader to `official.py`.
"""

import os

import numpy as np

from qkd_jax import checks
from qkd_jax.data import digits, draws, sources, streamed_sets, synthetic
from qkd_jax.data.augment import AUGMENTATIONS
from qkd_jax.data.batches import EvalBatches, TrainBatches, eval_batches, train_batches
from qkd_jax.data.dataset import Arrays, Dataset
from qkd_jax.data.decoding import UnreadableError
from qkd_jax.data.sources import NotPreparedError, Recipe, Source

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Dataset",
    "EvalBatches",
    "NotPreparedError",
    "Recipe",
    "Source",
    "TrainBatches",
    "UnreadableError",
    "eval_batches",
    "load",
    "recipe_of",
    "train_batches",
]

DATASETS: dict[str, Source] = {
    "digits": Source(
        kind="embedded",
        image_shape=(8, 8, 1),
        num_classes=10,
        description="scikit-learn's handwritten digits, 1,797 images, inside the package",
        # 300 labels are the few-labels case, where a teacher has something to add.
        recipe=Recipe(64, epochs=100, augment=("shift:1",), train_examples=300),
        train_examples=300,
    ),
    "digits28": Source(
        kind="embedded",
        image_shape=(28, 28, 1),
        num_classes=10,
        description="the same digits at 28x28, the size of MNIST, for nets that go on from them",
        recipe=Recipe(128, epochs=200, augment=("pad_crop:4", "flip")),
        train_examples=1500,
    ),
    "mnist": Source(
        kind="prepared",
        image_shape=(28, 28, 1),
        num_classes=10,
        description="MNIST, 60,000 + 10,000 handwritten digits",
        recipe=Recipe(128, epochs=10, augment=("shift:2",)),
    ),
    "fashion_mnist": Source(
        kind="prepared",
        image_shape=(28, 28, 1),
        num_classes=10,
        description="Fashion-MNIST, 60,000 + 10,000 articles of clothing",
        recipe=Recipe(128, epochs=10, augment=("pad_crop:2", "flip")),
    ),
    "cifar10": Source(
        kind="prepared",
        image_shape=(32, 32, 3),
        num_classes=10,
        description="CIFAR-10, 50,000 + 10,000 colour images",
        recipe=Recipe(128, epochs=200, augment=("pad_crop:4", "flip")),
    ),
    "cifar100": Source(
        kind="prepared",
        image_shape=(32, 32, 3),
        num_classes=100,
        description="CIFAR-100, 50,000 + 10,000 colour images",
        recipe=Recipe(128, epochs=200, augment=("pad_crop:4", "flip")),
    ),
    "imagenet2012": Source(
        kind="streamed",
        image_shape=(224, 224, 3),
        num_classes=1000,
        description="ImageNet (ILSVRC 2012), 1,281,167 + 50,000 photographs, as TFDS prepares it",
        recipe=Recipe(256, epochs=90, augment=("random_resized_crop", "flip")),
        splits=("train", "validation"),
    ),
    "folder": Source(
        kind="folder",
        image_shape=(224, 224, 3),
        num_classes=1000,
        description="photographs in a folder, `data.dir`: `train/<class>/*`, `val/<class>/*`",
        recipe=Recipe(256, epochs=90, augment=("random_resized_crop", "flip")),
    ),
    "synthetic": Source(
        kind="generated",
        image_shape=(8, 8, 1),
        num_classes=10,
        description="learnable random patterns of any shape, for tests and benchmarks",
        recipe=Recipe(32, epochs=4, train_examples=256),
        train_examples=512,
        test_examples=256,
    ),
}


def recipe_of(name: str) -> Recipe:
    """Returns the training recipe of a data set.

    Raises:
        ValueError: an unknown name, or a data set whose entry has no recipe.
    """
    if name not in DATASETS:
        raise checks.unknown("data set", name, DATASETS)
    recipe = DATASETS[name].recipe
    if recipe is None:
        raise ValueError(
            f"data set {name!r} has no recipe, and batch size, epochs and augmentation depend on "
            "the data; add recipe=Recipe(batch_size=..., epochs=...) to its entry in DATASETS "
            "(qkd_jax/data/__init__.py), or take one of "
            f"{', '.join(known for known, source in DATASETS.items() if source.recipe)}."
        )
    return recipe


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    decoder: str = "pillow",
) -> Dataset:
    """Loads a data set into memory, or opens one that is streamed (`imagenet2012`, `folder`).

    `digits` is one pool of images: the first `train_examples` (default 300) of a random permutation
    keyed by `seed` train, all the others test; classes are not balanced by hand. The other sets
    keep their own two splits, of which `train_examples` and `test_examples` take the first so many
    of a random permutation keyed by `seed`: with one seed, a smaller subset lies within a larger.

    Args:
        name: A key of `DATASETS`.
        data_dir: where TFDS data sets lie; None for TFDS_DATA_DIR, else `~/tensorflow_datasets`.
        train_examples: size of the train split; None for the default, which is all of it except for
            `digits` (300) and `synthetic` (512).
        test_examples: size of the test split; None for all of it (`synthetic`: 256).
        seed: of the random split, subset or synthetic images.
        image_shape: (height, width, channels); for `synthetic` only.
        num_classes: number of classes; for `synthetic` only.
        image_size: side in pixels to which images are cut and resized; for streamed sets only,
            None for 224.
        decoder: "pillow" or "turbo", for streamed sets only; see `decoding`.

    Returns:
        A `Dataset`.

    Raises:
        NotPreparedError: (a ValueError) where the set is not there; it says the command that
            prepares it. Nothing is downloaded.
        ValueError: for an unknown name or a number out of range.
    """
    if name not in DATASETS:
        raise checks.unknown("data set", name, DATASETS)
    checks.integer_in("seed", seed, 0, draws.LARGEST_SEED)
    source = DATASETS[name]
    train = source.train_examples if train_examples is None else train_examples
    test = source.test_examples if test_examples is None else test_examples
    if not source.is_streamed and (image_size is not None or decoder != "pillow"):
        streamed = ", ".join(known for known, other in DATASETS.items() if other.is_streamed)
        raise ValueError(
            f"image_size is {image_size!r} and decoder {decoder!r}; {name!r} is in memory at its "
            f"own size, and only streamed sets take them: {streamed}."
        )
    if source.kind == "generated":
        shape, classes = image_shape or source.image_shape, num_classes or source.num_classes
        arrays = _generate(shape, classes, train, test, seed)
        return Dataset(name, classes, *arrays)
    for argument, value in (("image_shape", image_shape), ("num_classes", num_classes)):
        if value is not None:
            raise ValueError(f"{argument} is {value!r}; only 'synthetic' takes it, not {name!r}.")
    if source.is_streamed:
        return _stream(name, source, data_dir, train, test, seed, image_size, decoder)
    if source.kind == "embedded":
        images, labels = digits.read(DATASETS["digits"], data_dir)
        if source.image_shape != images.shape[1:]:
            images = digits.resized(images, source.image_shape)
        arrays = _split_pool(name, images, labels, train, test, seed)
        return Dataset(name, source.num_classes, *arrays)
    arrays = sources.read(name, source, data_dir)
    train_split = _subset("train_examples", name, *arrays[:2], train, seed, draws.TRAIN_EXAMPLES)
    test_split = _subset("test_examples", name, *arrays[2:], test, seed, draws.TEST_EXAMPLES)
    return Dataset(name, source.num_classes, *train_split, *test_split)


def _stream(name, source, data_dir, train, test, seed, image_size, decoder) -> Dataset:
    size = source.image_shape[0] if image_size is None else image_size
    if source.kind == "folder":
        found = streamed_sets.read_folder(data_dir, size, decoder)
    else:
        found = streamed_sets.read_prepared(name, source, data_dir, size, decoder)
    train_split = _subset("train_examples", name, *found[:2], train, seed, draws.TRAIN_EXAMPLES)
    test_split = _subset("test_examples", name, *found[2:4], test, seed, draws.TEST_EXAMPLES)
    return Dataset(name, found.num_classes, *train_split, *test_split)


def _generate(image_shape, num_classes, train, test, seed) -> Arrays:
    if len(image_shape) != 3:
        raise ValueError(
            f"image_shape is {image_shape!r}; it must be (height, width, channels), as (8, 8, 1)."
        )
    for axis, size in zip(("height", "width", "channels"), image_shape, strict=True):
        checks.integer_in(f"image_shape's {axis}", size, 1)
    checks.integer_in("num_classes", num_classes, 2)
    checks.integer_in("train_examples of 'synthetic'", train, 1)
    checks.integer_in("test_examples of 'synthetic'", test, 1)
    return synthetic.make(
        tuple(image_shape), num_classes, train_examples=train, test_examples=test, seed=seed
    )


def _split_pool(name, images, labels, train, test, seed) -> Arrays:
    checks.integer_in(f"train_examples of {name!r}", train, 1, len(images) - 1)
    if test is not None:
        checks.integer_in(f"test_examples of {name!r}", test, 1, len(images) - train)
    order = draws.permutation(len(images), seed=seed, stream=draws.SPLIT)
    chosen, rest = order[:train], order[train:][:test]
    return Arrays(images[chosen], labels[chosen], images[rest], labels[rest])


def _subset(argument, name, images, labels, count, seed, stream):
    if count is None:
        return images, labels
    checks.integer_in(f"{argument} of {name!r}", count, 1, len(images))
    chosen = draws.permutation(len(images), seed=seed, stream=stream)[:count]
    images = images[chosen] if isinstance(images, np.ndarray) else images.subset(chosen)
    return images, labels[chosen]
