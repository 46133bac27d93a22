"""Reading streamed sets: a folder of images, and TFDS's imagenet2012, listed but not decoded."""

import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from qkd_jax.data import cache, crops, sources
from qkd_jax.data.records import CHUNK, RANDOM_ACCESS, open_split
from qkd_jax.data.streams import Records, StreamedImages, classes_of, files_of

VALIDATION = ("val", "validation", "test")
# TFDS needs TensorFlow for it, and the official archives in <data_dir>/downloads/manual.
TFDS_COMMAND = "tfds build {name} --file_format=array_record"
LAYOUT = """\
<dir>/train/<class>/<image>.jpg and <dir>/val/<class>/<image>.jpg"""


class Streamed(NamedTuple):
    """Both splits of a streamed set, as `Dataset` takes them, and the number of classes."""

    train_images: StreamedImages
    train_labels: np.ndarray
    test_images: StreamedImages
    test_labels: np.ndarray
    num_classes: int


def read_folder(data_dir: str | os.PathLike[str] | None, image_size: int, decoder: str) -> Streamed:
    """Lists a folder of images, a split and a class each in a folder of its own.

    The classes are the folders of `train`, sorted by name as torchvision's ImageFolder sorts them;
    the validation split lies in `val`, `validation` or `test`.

    Args:
        data_dir: the folder.
        image_size: side in pixels.
        decoder: of `decoding`.

    Raises:
        NotPreparedError: no folder is named, or it is not there.
        ValueError: the folder has another layout, or the splits have different classes.
    """
    if not data_dir:
        raise sources.NotPreparedError(
            "data set 'folder' has no folder: give --config.data.dir (data_dir) a folder with "
            f"{LAYOUT}."
        )
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise sources.NotPreparedError(
            f"data_dir is {str(root)!r}, which is no folder; it must hold {LAYOUT}."
        )
    names = ["train", next((n for n in VALIDATION if (root / n).is_dir()), VALIDATION[0])]
    for name in names:
        if not (root / name).is_dir():
            raise ValueError(f"{root} has no folder {name!r}; it must hold {LAYOUT}.")
    train, test = (classes_of(root / name) for name in names)
    if not train:
        raise ValueError(f"{root / 'train'} has no folder of a class; {root} must hold {LAYOUT}.")
    if train != test:
        only = {names[0]: sorted({*train} - {*test}), names[1]: sorted({*test} - {*train})}
        listed = "; ".join(f"{n} alone has {', '.join(c[:5])}" for n, c in only.items() if c)
        raise ValueError(
            f"{root} has {len(train)} classes in {names[0]!r} and {len(test)} in {names[1]!r}: "
            f"{listed}. A label is the place of its class in the sorted list, so both splits need "
            "the same folders."
        )
    if len(train) < 2:
        raise ValueError(f"{root} has one class, {train[0]!r}; at least two are needed.")
    size = crops.image_size("image_size", image_size)
    found = []
    for name in names:
        files, labels = files_of(root / name, train)
        found += [StreamedImages(files, size, decoder=decoder), labels]
    return Streamed(*found, num_classes=len(train))


def read_prepared(
    name: str,
    source: sources.Source,
    data_dir: str | os.PathLike[str] | None,
    image_size: int,
    decoder: str,
) -> Streamed:
    """Opens a set that TFDS has prepared; its labels are read once and cached.

    Raises:
        NotPreparedError: where it is not on disk, or in a format without random access.
    """
    folder = sources.prepared_folder(name, data_dir, TFDS_COMMAND.format(name=name))
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob("*.json") if not p.name.startswith(".")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    for path in sorted(folder.glob(f"*.{RANDOM_ACCESS}*")):
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
    size = crops.image_size("image_size", image_size)
    splits = [open_split(name, folder, split) for split in source.splits]
    key = digest.hexdigest()
    labels = cache.load(f"{name}-labels", key, source.splits)
    if labels is None:
        labels = [_labels(records) for records in splits]
        cache.store(f"{name}-labels", key, dict(zip(source.splits, labels, strict=True)))
    found = []
    for split, records, own in zip(source.splits, splits, labels, strict=True):
        encoded = Records(name, str(folder), split, len(records), digest.digest())
        found += [StreamedImages(encoded, size, decoder=decoder), own]
    return Streamed(*found, num_classes=source.num_classes)


def _labels(records) -> np.ndarray:
    """Reads the label of every record; the images beside them are read too, once."""
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), CHUNK):
        rows = list(range(start, min(start + CHUNK, len(records))))
        labels[rows] = [record["label"] for record in records.__getitems__(rows)]
    return labels
