"""A data set: uint8 images in memory or streamed, int32 labels, and what is derived from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from qkd_jax import checks
from qkd_jax.data.streams import MEAN, STD, StreamedImages

Images = np.ndarray | StreamedImages
PART = 1 << 16  # numbers that are normalised at once


class Arrays(NamedTuple):
    """The two splits of a data set: images uint8 [examples, H, W, C], labels int32 [examples]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as the batches see it; the arrays are read-only.

    Attributes:
        name: the key in `DATASETS`.
        num_classes: labels are 0..num_classes-1.
        train_images: uint8 [train, H, W, C]; an array, or `StreamedImages`, of which rows are
            decoded when they are asked for.
        train_labels: int32 [train].
        test_images: uint8 [test, H, W, C], likewise.
        test_labels: int32 [test].
    """

    name: str
    num_classes: int
    train_images: Images
    train_labels: np.ndarray
    test_images: Images
    test_labels: np.ndarray

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = self.arrays(split)
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(
                    f"{split}_images of {self.name!r} is {images.dtype} {images.shape}; it must be "
                    "uint8 [examples, height, width, channels]."
                )
            if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{split}_labels of {self.name!r} is {labels.dtype} {labels.shape}; it must be "
                    f"int32 [{len(images)}], one label an image."
                )
            checks.at_least_one(f"{split}_images of {self.name!r}", images)
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise ValueError(
                    f"{split}_labels of {self.name!r} run from {labels.min()} to {labels.max()}; "
                    f"with num_classes={self.num_classes} they must lie in "
                    f"0..{self.num_classes - 1}."
                )
            if isinstance(images, np.ndarray):
                images.setflags(write=False)
            labels.setflags(write=False)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"train_images of {self.name!r} have shape {self.train_images.shape[1:]} and "
                f"test_images {self.test_images.shape[1:]}; they must be the same."
            )

    def arrays(self, split: str) -> tuple[Images, np.ndarray]:
        """Returns (images, labels) of "train" or "test"."""
        checks.one_of("split", split, ("train", "test"))
        if split == "train":
            return self.train_images, self.train_labels
        return self.test_images, self.test_labels

    def with_train(self, images: np.ndarray, labels: np.ndarray) -> Dataset:
        """Returns the set with other training images, normalised as these are.

        Args:
            images: uint8 [examples, H, W, C].
            labels: int32 [examples].
        """
        other = dataclasses.replace(self, train_images=images, train_labels=labels)
        # Nets know one normalisation, whatever the images: that of the split they learned on.
        other.__dict__["_moments"] = self._moments
        return other

    @property
    def is_streamed(self) -> bool:
        """Whether training images are decoded when they are asked for."""
        return isinstance(self.train_images, StreamedImages)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, height, width, channels = self.train_images.shape
        return height, width, channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every array: shape, dtype and content, in the order of the fields.

        Of streamed images it takes the names and sizes in bytes of their files (of TFDS, what it
        wrote about the set), the size they are decoded to and the decoder.
        """
        digest = hashlib.sha256()
        for split in ("train", "test"):
            for array in self.arrays(split):
                if isinstance(array, StreamedImages):
                    digest.update(array.digest)
                    continue
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Per channel, exact: from the 256 counts of each channel of the train split.

        Streamed images have ImageNet's.
        """
        if isinstance(self.train_images, StreamedImages):
            return np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
        levels = np.arange(256, dtype=np.float64) / 255.0
        mean, std = [], []
        for channel in range(self.image_shape[2]):
            counts = np.bincount(self.train_images[..., channel].ravel(), minlength=256)
            average = counts @ levels / counts.sum()
            mean.append(average)
            std.append(np.sqrt(counts @ (levels - average) ** 2 / counts.sum()))
        # A constant channel would divide by 0; one grey level is the smallest meaningful spread.
        return np.asarray(mean, np.float32), np.maximum(std, 1 / 255).astype(np.float32)

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel over the train split, float32 [C], of pixels scaled to 0..1.

        Of a streamed set it is that of ImageNet, as `std` is.
        """
        return self._moments[0]

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel over the train split, float32 [C], pixels in 0..1."""
        return self._moments[1]

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Inverse of `normalize`: float [..., H, W, C] to uint8, rounded and cut at 0 and 255."""
        return np.rint(np.clip((images * self.std + self.mean) * 255, 0, 255)).astype(np.uint8)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Returns (images / 255 - mean) / std.

        Args:
            images: uint8 [..., H, W, C].

        Returns:
            float32 [..., H, W, C], computed as images * gain + offset.
        """
        gain, offset = self.affine
        width, channels = images.shape[-2:]
        # NumPy is five times as fast along a row of pixels as along three channels, and a part that
        # stays in the cache need not be fetched again for the sum.
        rows = images.reshape(-1, width * channels)
        gain, offset = np.tile(gain, width), np.tile(offset, width)
        scaled = np.empty(rows.shape, np.float32)
        step = max(PART // max(rows.shape[1], 1), 1)
        for start in range(0, len(rows), step):
            part = scaled[start : start + step]
            np.multiply(rows[start : start + step], gain, out=part, dtype=np.float32)
            np.add(part, offset, out=part)
        return scaled.reshape(images.shape)

    @property
    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Gain and offset of `normalize`, float32 [C] each."""
        gain = (1 / (255.0 * self.std)).astype(np.float32)
        return gain, (-self.mean / self.std).astype(np.float32)
