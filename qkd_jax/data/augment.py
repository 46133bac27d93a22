"""Augmentations of a whole batch: (images uint8 [B, H, W, C], words, amount) -> images.

Each is vectorised NumPy and takes its randomness as raw 64-bit words, one row an image, so that a
batch is a pure function of (seed, step). To add one, write the function and a line in
`AUGMENTATIONS`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qkd_jax import checks
from qkd_jax.data import draws


def shift(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Moves each image by up to `amount` pixels on each axis; pixels of value 0 come in."""
    batch, height, width, channels = images.shape
    padded = np.zeros((batch, height + 2 * amount, width + 2 * amount, channels), np.uint8)
    padded[:, amount : amount + height, amount : amount + width] = images
    top, left = draws.below(2 * amount + 1, words).T
    # Rows of width * channels bytes are contiguous: a window over them copies fastest.
    rows = padded.reshape(batch, height + 2 * amount, -1)
    windows = np.lib.stride_tricks.sliding_window_view(rows, (height, width * channels), (1, 2))
    return windows[np.arange(batch), top, left * channels].reshape(images.shape)


def flip(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = draws.below(2, words)[:, 0].astype(bool)
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def mixup(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Mixes each image with a random other of the batch: l x + (1 - l) x', l uniform in [0, 1].

    Zhang et al. 2017, arXiv 1710.09412, with its alpha = 1, and a weight for each image. Rounded to
    whole levels. The labels are not mixed: it is for losses that ask a teacher about the very
    images (Beyer et al. 2021, arXiv 2106.05237), and stages that use labels refuse it.
    """
    share = (words[:, 0] >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    partner = images[draws.below(len(images), words[:, 1:])[:, 0]]
    share = share[:, None, None, None]
    return np.rint(share * images + (1 - share) * partner).astype(np.uint8)


class Augmentation(NamedTuple):
    """One entry of `AUGMENTATIONS`: the function, its words an image, whether it needs `:N`.

    `keeps_labels` is False where an image's label is no longer its own.
    """

    function: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    words: int
    takes_amount: bool
    keeps_labels: bool = True


# `pad_crop:4` is the CIFAR papers' name for `shift:4`: pad by 4 zeros, crop at a random place.
AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": Augmentation(shift, words=2, takes_amount=True),
    "pad_crop": Augmentation(shift, words=2, takes_amount=True),
    "flip": Augmentation(flip, words=1, takes_amount=False),
    "mixup": Augmentation(mixup, words=2, takes_amount=False, keeps_labels=False),
}


def parse(augment: Sequence[str]) -> tuple[tuple[Augmentation, int], ...]:
    """Reads ("shift:1", "flip") into functions and amounts, in the order given.

    Raises:
        ValueError: for an unknown name, a missing amount, or one that is not a positive integer.
    """
    if isinstance(augment, str):
        raise ValueError(f"augment is the string {augment!r}; give a tuple, as ({augment!r},).")
    parsed = []
    for text in augment:
        name, colon, amount = str(text).partition(":")
        if name not in AUGMENTATIONS:
            raise checks.unknown("augmentation", name, AUGMENTATIONS)
        entry = AUGMENTATIONS[name]
        if entry.takes_amount and not (amount.isascii() and amount.isdigit() and int(amount) > 0):
            raise ValueError(
                f"augmentation {text!r} needs a number of pixels of at least 1, as '{name}:1'."
            )
        if not entry.takes_amount and colon:
            raise ValueError(f"augmentation {text!r} takes no amount; write {name!r}.")
        parsed.append((entry, int(amount or 0)))
    return tuple(parsed)


def apply(
    images: np.ndarray,
    augment: Sequence[tuple[Augmentation, int]],
    *,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Applies parsed augmentations to the batch of one step, or to some rows of it.

    Args:
        images: the batch, or its rows `rows`.
        augment: of `parse`; rows can be augmented by themselves where all `keeps_labels`.
        seed: of the draws.
        step: of the draws.
        rows: which rows of the batch the images are; each gets the draws of its row.
        batch_size: examples of the whole batch, with `rows`.
    """
    total = len(images) if batch_size is None else batch_size
    for slot, (entry, amount) in enumerate(augment):
        raw = draws.words(
            total * entry.words, seed=seed, stream=draws.AUGMENT, index=step, slot=slot
        ).reshape(total, entry.words)
        images = entry.function(images, raw if rows is None else raw[rows], amount)
    return images
