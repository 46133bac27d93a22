"""scikit-learn's handwritten digits: a TFDS data set inside the package (`DIGITS.md`: CC BY 4.0).

The 1,797 images of 8x8 with levels 0 to 16 are written once as a TFDS set, offline and without
TensorFlow, and read like any other. A level x becomes the pixel round(x * 255 / 16), half to even:
17 different values, so `round(pixel * 16 / 255)` gives the level back.
"""

import hashlib
import os
import pathlib

import numpy as np

from qkd_jax.data import cache, record_writer, sources

NAME = "digits"
VERSION = "1.0.0"
SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # levels, then labels


def read(
    source: sources.Source, data_dir: str | os.PathLike[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [1797, 8, 8, 1] and labels int32 [1797], preparing the set if need be.

    Raises:
        OSError: where neither the data directory nor the cache can be written.
        ValueError: where the prepared set is not this one.
    """
    folder = prepare(data_dir)
    images, labels = sources.decoded(NAME, source, folder, ("train",))
    if content_hash(images, labels) != SHA256:
        raise ValueError(
            f"{folder} does not hold the digits of this package; remove that folder and it is made "
            "again."
        )
    return images, labels


def resized(images: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the images at another size, bilinear with half-pixel centres (Pillow's)."""
    from PIL import Image

    height, width, _ = image_shape
    size, method = (width, height), Image.Resampling.BILINEAR
    found = [np.asarray(Image.fromarray(image[..., 0]).resize(size, method)) for image in images]
    return np.stack(found)[..., None]


def content_hash(images: np.ndarray, labels: np.ndarray) -> str:
    """Returns the SHA-256 (hex) of the levels behind `images`, then of `labels`, as uint8."""
    levels = np.rint(images[..., 0] * (16 / 255)).astype(np.uint8)
    return hashlib.sha256(levels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()


def prepare(data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the folder of the prepared set, writing it where there is none.

    It goes to `data_dir` or TFDS_DATA_DIR if that can be written, else to the cache folder.
    """
    places = [cache.directory() / "tfds"]
    if data_dir or os.environ.get("TFDS_DATA_DIR"):
        places.insert(0, sources.data_directory(data_dir))
    for place in places:
        folder = place / NAME / VERSION
        if (folder / "dataset_info.json").is_file():
            return folder
        if _writable(place):
            return write(place)
    raise OSError(
        f"the digits can be prepared in none of {', '.join(map(str, places))}; set XDG_CACHE_HOME "
        "or data_dir to a folder that can be written."
    )


def _writable(place: pathlib.Path) -> bool:
    """Whether files can be made in `place`; without a write bit it is read-only for root too."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return bool(place.stat().st_mode & 0o222) and os.access(place, os.W_OK)


def write(directory: pathlib.Path) -> pathlib.Path:
    """Writes `<directory>/digits/1.0.0` from the package's file and returns it."""
    import tensorflow_datasets as tfds

    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
        levels, labels = file["levels"], file["labels"]
    images = np.rint(levels[..., None] * (255 / 16)).astype(np.uint8)
    return record_writer.write(
        NAME,
        VERSION,
        directory,
        {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        },
        {"train": ({"image": i, "label": int(n)} for i, n in zip(images, labels, strict=True))},
        description="Optical Recognition of Handwritten Digits, the 1,797 images of its test part.",
        homepage="https://archive.ics.uci.edu/dataset/80",
        citation="E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine "
        "Learning Repository, 1998. doi:10.24432/C50P49. CC BY 4.0.",
        keep_order=True,
    )
