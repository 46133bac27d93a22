"""Sets too large for memory: encoded images, read and decoded when a batch asks for them.

`StreamedImages` stands where a set in memory has its uint8 array: it has a shape and a length, and
`images[rows]` decodes those rows as evaluation sees them. What it holds is names alone, so it
travels to worker processes, which open the files themselves.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from qkd_jax.data import crops, decoding
from qkd_jax.data.records import open_split

# Decoding leaves Python's lock alone for most of its time; beyond some threads the rest holds it.
MOST_THREADS = 16
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
LEFT_BEHIND = ("thumbs.db", "desktop.ini")  # by file browsers, besides what begins with a dot
# Channel means and standard deviations of ImageNet's training images, pixels in 0..1: what
# published weights were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoded(Protocol):
    """Encoded images by row."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, row: int) -> bytes:
        """Returns the bytes of an image."""
        ...

    def where(self, row: int) -> str:
        """Names an image for a message."""
        ...

    def identity(self) -> bytes:
        """Returns what the fingerprint is of."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Images in files.

    Attributes:
        folder: the folder under which they lie.
        names: bytes [files], the path of each below `folder`, with "/".
        sizes: int64 [files], in bytes.
    """

    folder: str
    names: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """Returns the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self.names[row]))

    def read(self, row: int) -> bytes:
        """Returns the bytes of a file.

        Raises:
            OSError: it is not there, or has another size than when the run began.
        """
        with open(self.path(row), "rb", buffering=0) as file:
            content = file.read()
        if len(content) != self.sizes[row]:
            raise OSError(f"it has {len(content):,} bytes, and had {self.sizes[row]:,}")
        return content

    def where(self, row: int) -> str:
        """Names a file for a message."""
        return self.path(row)

    def identity(self) -> bytes:
        """Names and sizes: telling 1.3 million files apart must not take reading them."""
        return b"\n".join(self.names.tolist()) + b"\0" + self.sizes.astype("<i8").tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Images of one split of a set that TFDS has prepared as array_record.

    Attributes:
        name: the TFDS name.
        folder: the folder of its version.
        split: the TFDS split.
        count: how many records it has.
        digest: of what TFDS wrote about the set.
    """

    name: str
    folder: str
    split: str
    count: int
    digest: bytes

    def __len__(self) -> int:
        return self.count

    def read(self, row: int) -> bytes:
        """Returns the encoded image of a record."""
        return _records(self.name, self.folder, self.split)[row]["image"]

    def where(self, row: int) -> str:
        """Names a record for a message."""
        return f"record {row} of split {self.split!r} in {self.folder}"

    def identity(self) -> bytes:
        """The name, the split and what TFDS wrote about the set, with its checksums."""
        return f"{self.name}\0{self.split}\0{self.count}\0".encode() + self.digest


@functools.lru_cache(maxsize=8)
def _records(name: str, folder: str, split: str) -> Any:
    """Opens a split, once in a process."""
    return open_split(name, pathlib.Path(folder), split)


def _threads() -> int:
    """How many threads decode: the cores of this process, or one in a process of several."""
    if multiprocessing.parent_process() is not None:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_THREADS)
    return min(os.cpu_count() or 1, MOST_THREADS)


class StreamedImages:
    """Images that are decoded when asked for: `images[rows]`, uint8 [rows, H, W, 3].

    Args:
        encoded: where they come from.
        size: (height, width) in pixels.
        decoder: see `decoding`.
        rows: which of the encoded images, in which order; all by default.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        encoded: Encoded,
        size: tuple[int, int],
        *,
        decoder: str = "pillow",
        rows: np.ndarray | None = None,
    ) -> None:
        decoding.check(decoder)
        self.encoded = encoded
        self.size = size
        self.decoder = decoder
        self.rows = np.arange(len(encoded)) if rows is None else np.asarray(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(examples, height, width, 3)."""
        return (len(self), *self.size, 3)

    def subset(self, rows: np.ndarray) -> "StreamedImages":
        """Returns some of the images, in an order."""
        return StreamedImages(self.encoded, self.size, decoder=self.decoder, rows=self.rows[rows])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns images as evaluation sees them: the shorter side resized, the centre cut out.

        Args:
            index: a row, a slice, or integers or booleans [rows].

        Raises:
            UnreadableError: an image cannot be read or decoded; the message names its file.
        """
        found = self.rows[index]
        images = self._decoded(
            np.atleast_1d(found),
            [functools.partial(crops.centre_box, size=self.size)] * np.size(found),
            [False] * np.size(found),
            exact=True,
        )
        return images if np.ndim(found) else images[0]

    def random_crops(
        self, index: np.ndarray, words: np.ndarray, mirrored: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns images as `crops.random_box` cuts them.

        Args:
            index: rows, int [rows].
            words: uint64 [rows, crops.WORDS].
            mirrored: bool [rows]; None for none.
        """
        boxes = [functools.partial(crops.random_box, raw) for raw in words]
        flips = np.zeros(len(boxes), bool) if mirrored is None else mirrored
        return self._decoded(self.rows[index], boxes, flips.tolist(), exact=False)

    def _decoded(
        self,
        rows: np.ndarray,
        boxes: Sequence[decoding.Chooser],
        mirrored: Sequence[bool],
        *,
        exact: bool,
    ) -> np.ndarray:
        out = np.empty((len(rows), *self.size, 3), np.uint8)
        work = list(zip(rows.tolist(), boxes, mirrored, out, strict=True))
        one = functools.partial(self._decode, exact=exact)
        threads = min(_threads(), len(work))
        if threads < 2:
            for each in work:
                one(*each)
            return out
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, *zip(*work, strict=True)))
        return out

    def _decode(
        self, row: int, box: decoding.Chooser, mirrored: bool, out: np.ndarray, *, exact: bool
    ) -> None:
        try:
            encoded = self.encoded.read(row)
            decoding.decode(self.decoder, encoded, box, out, mirrored=mirrored, exact=exact)
        except (OSError, decoding.UnreadableError) as error:
            raise decoding.UnreadableError(
                f"image {row}, {self.encoded.where(row)}, cannot be read ({error}). Put a whole "
                "file of its size in its place and start again: the run continues at its last "
                "checkpoint. Without the file, or with one of another size, it is another set, for "
                "a run of its own."
            ) from error

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the identity of the encoded images, the rows and the view of evaluation."""
        found = hashlib.sha256(self.encoded.identity())
        found.update(f"\0{self.shape}{self.decoder}\0".encode())
        found.update(self.rows.astype("<i8").tobytes())
        return found.digest()


def classes_of(folder: pathlib.Path) -> list[str]:
    """Returns the names of a split's classes: its subfolders, sorted as torchvision sorts them."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def files_of(folder: pathlib.Path, classes: Sequence[str]) -> tuple[Files, np.ndarray]:
    """Lists the images of a split, by class and by name, and their labels, int32 [files].

    Args:
        folder: of the split, with a folder for each class.
        classes: their names; the place in this list is the label.

    Raises:
        ValueError: a class without an image, a file that is no image.
    """
    names, sizes, labels = [], [], []
    for label, name in enumerate(classes):
        found = sorted(_listed(folder / name, folder))
        if not found:
            raise ValueError(
                f"{folder / name} holds no image ({', '.join(EXTENSIONS)}): a class needs at least "
                "one. Add its images, or remove the folder in both splits."
            )
        names += [os.fsencode(path) for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    files = Files(str(folder), np.array(names, np.bytes_), np.array(sizes, np.int64))
    return files, np.array(labels, np.int32)


def _listed(folder: pathlib.Path, root: pathlib.Path) -> list[tuple[str, int]]:
    found = []
    above = {str(folder): {os.path.realpath(folder)}}  # of each folder, itself and those over it
    for place, inner, files in os.walk(folder, followlinks=True, onerror=_raise):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for path in (os.path.join(place, name) for name in inner):
            target = os.path.realpath(path)
            if target in above[place]:
                raise ValueError(f"{path} is a link to a folder that it lies in; remove the link.")
            above[path] = above[place] | {target}
        for name in files:
            if name.startswith(".") or name.lower() in LEFT_BEHIND:
                continue
            path = os.path.join(place, name)
            if not name.lower().endswith(EXTENSIONS):
                raise ValueError(
                    f"{path} has no extension of an image that is read here "
                    f"({', '.join(EXTENSIONS)}); take the file out of the folder."
                )
            found.append((os.path.relpath(path, root).replace(os.sep, "/"), _size(path)))
    return found


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that may not be read


def _size(path: str) -> int:
    try:
        about = os.stat(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is a link to nothing; remove it, or bring its file.") from error
    if not stat.S_ISREG(about.st_mode) or not about.st_size:
        kind = "empty" if stat.S_ISREG(about.st_mode) else "no file"
        raise ValueError(f"{path} is {kind}; put an image in its place, or remove it.")
    return about.st_size
