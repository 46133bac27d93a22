"""Data sets on disk: found and read by `tfds.data_source` without TensorFlow, then from a cache.

TFDS keeps a prepared set in `<data_dir>/<name>/<version>`. Its images are decoded once, by Pillow,
into the cache of `cache.py`; after that neither TFDS nor Pillow is imported.
"""

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Literal

import numpy as np

from qkd_jax.data import cache
from qkd_jax.data.dataset import Arrays
from qkd_jax.data.records import CHUNK, RANDOM_ACCESS, open_split


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sizes of a training recipe that depend on the data set.

    Attributes:
        batch_size: examples a training step.
        epochs: passes over the training split for a float net.
        augment: names of `AUGMENTATIONS`, such as ("pad_crop:4", "flip").
        train_examples: labelled images to train on; 0 for the whole training split.
    """

    batch_size: int
    epochs: int
    augment: tuple[str, ...] = ()
    train_examples: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of `DATASETS`.

    Attributes:
        kind: "prepared" lies on disk as TFDS writes it; "embedded" ships in the package and
            prepares itself; "generated" is made from a seed; "streamed" lies on disk as TFDS writes
            it and is decoded while it is used, "folder" in a folder of image files.
        image_shape: (height, width, channels); of a streamed set, without `image_size`.
        num_classes: labels are 0..num_classes-1; a folder says itself how many it has.
        description: one line for people.
        recipe: the recipe of the configs; without one the set can be loaded, and `configs/` refuse
            it.
        train_examples: the default of `load`; None for all.
        test_examples: the default of `load`; None for all.
        splits: what TFDS calls the two splits.
    """

    kind: Literal["prepared", "embedded", "generated", "streamed", "folder"]
    image_shape: tuple[int, int, int]
    num_classes: int
    description: str
    recipe: Recipe | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    splits: tuple[str, str] = ("train", "test")

    @property
    def is_streamed(self) -> bool:
        """Whether images are decoded while they are used."""
        return self.kind in ("streamed", "folder")


class NotPreparedError(ValueError):
    """A data set is not on this machine; the message says the command that prepares it."""


def data_directory(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns `data_dir`, else TFDS_DATA_DIR, else TFDS's own default."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def find(name: str, directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the newest prepared version of a set in `directory`, or None."""
    prepared = []
    for info in (directory / name).glob("*/dataset_info.json"):
        version = info.parent.name.split(".")
        if all(part.isdigit() for part in version):
            prepared.append(([int(part) for part in version], info.parent))
    return max(prepared)[1] if prepared else None


def prepared_folder(
    name: str, data_dir: str | os.PathLike[str] | None, command: str = ""
) -> pathlib.Path:
    """Returns the folder of a prepared set.

    Args:
        name: the TFDS name.
        data_dir: where TFDS data sets lie.
        command: prepares the set; "" for our own.

    Raises:
        NotPreparedError: where it is not on disk, or in a format without random access.
    """
    directory = data_directory(data_dir)
    folder = find(name, directory)
    option = "" if data_dir is None else f" --data_dir={directory}"
    command = (command or f"python -m qkd_jax.data.prepare {name}") + option
    if folder is None:
        raise NotPreparedError(
            f"data set {name!r} is not prepared in {directory} (data_dir, or TFDS_DATA_DIR). "
            f"Prepare it with: {command}"
        )
    written = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
    if written != RANDOM_ACCESS:
        raise NotPreparedError(
            f"data set {name!r} in {folder} is stored as {written!r}, which has no random access; "
            f"it must be {RANDOM_ACCESS!r}. Move that folder away, then: {command}"
        )
    return folder


def read(name: str, source: Source, data_dir: str | os.PathLike[str] | None) -> Arrays:
    """Reads both splits of a prepared set.

    Raises:
        NotPreparedError: where it is not on disk, or in a format without random access.
    """
    folder = prepared_folder(name, data_dir)
    return Arrays(*decoded(name, source, folder, source.splits))


def decoded(
    name: str, source: Source, folder: pathlib.Path, splits: Iterable[str]
) -> list[np.ndarray]:
    """Returns [images, labels] of each split of a prepared folder, from the cache if it can."""
    names = [f"{split}_{part}" for split in splits for part in ("images", "labels")]
    key = cache.key(folder)
    arrays = cache.load(name, key, names)
    if arrays is None:
        arrays = [array for split in splits for array in read_split(name, source, folder, split)]
        cache.store(name, key, dict(zip(names, arrays, strict=True)))
    return arrays


def read_split(
    name: str, source: Source, folder: pathlib.Path, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split through TFDS: images uint8 [examples, H, W, C], labels int32 [examples]."""
    from PIL import Image

    found = open_split(name, folder, split)
    height, width, channels = source.image_shape
    mode = {1: "L", 3: "RGB"}[channels]
    images = np.empty((len(found), *source.image_shape), np.uint8)
    labels = np.empty(len(found), np.int32)
    for start in range(0, len(found), CHUNK):
        rows = range(start, min(start + CHUNK, len(found)))
        for row, record in zip(rows, found.__getitems__(list(rows)), strict=True):
            with Image.open(io.BytesIO(record["image"])) as image:
                if image.size != (width, height):
                    raise ValueError(
                        f"image {row} of {name!r} ({split}) in {folder} is {image.size[1]}x"
                        f"{image.size[0]}; DATASETS says {height}x{width}."
                    )
                images[row] = np.asarray(image.convert(mode)).reshape(source.image_shape)
            labels[row] = record["label"]
    return images, labels
