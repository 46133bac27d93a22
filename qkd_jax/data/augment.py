"""Augmentations of a whole batch: (images uint8 [B, H, W, C], words, amount) -> images.

Each is vectorised NumPy and takes its randomness as raw 64-bit words, one row an image, so that a
batch is a pure function of (seed, step). To add one, write the function and a line in
`AUGMENTATIONS`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qkd_jax import checks
from qkd_jax.data import crops, draws, random_augment
from qkd_jax.data.streams import StreamedImages


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


def is_mirrored(words: np.ndarray) -> np.ndarray:
    """Returns whether `flip` mirrors each image, bool [B]."""
    return draws.below(2, words)[:, 0].astype(bool)


def flip(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = is_mirrored(words)
    out = images.copy()
    out[mirrored] = images[mirrored, :, ::-1]
    return out


def partners(words: np.ndarray) -> np.ndarray:
    """Returns the row of the batch with which each image is mixed, from a mixing's words."""
    return draws.below(len(words), words[:, 1])


def mixup(
    images: np.ndarray, words: np.ndarray, amount: int, others: np.ndarray | None = None
) -> np.ndarray:
    """Mixes each image with a random other of the batch: l x + (1 - l) x', l uniform in [0, 1].

    Zhang et al. 2017, arXiv 1710.09412, with its alpha = 1, and a weight for each image. Rounded to
    whole levels. The labels are not mixed: it is for losses that ask a teacher about the very
    images (Beyer et al. 2021, arXiv 2106.05237), and stages that use labels refuse it.

    Args:
        images: uint8 [B, H, W, C].
        words: uint64 [B, 2]: the weight, the other.
        amount: unused.
        others: what each is mixed with; by default `images[partners(words)]`, of a whole batch.
    """
    share = (words[:, 0] >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    others = images[partners(words)] if others is None else others
    share = share[:, None, None, None]
    return np.rint(share * images + (1 - share) * others).astype(np.uint8)


def cutmix(
    images: np.ndarray, words: np.ndarray, amount: int, others: np.ndarray | None = None
) -> np.ndarray:
    """Pastes a box of a random other of the batch into each image, at the same place.

    The box has the image's proportions and the share 1 - l of its area before it is cut at the
    border, l uniform in [0, 1]; its centre is uniform. Yun et al. 2019, arXiv 1905.04899, with its
    alpha = 1, and a box for each image. The labels are not mixed; see `mixup`.

    Args:
        images: uint8 [B, H, W, C].
        words: uint64 [B, 4]: the area, the other, the centre's row and column.
        amount: unused.
        others: as for `mixup`.
    """
    others = images[partners(words)] if others is None else others
    _, height, width, _ = images.shape
    share = (words[:, 0] >> np.uint64(11)).astype(np.float64) / 2**53
    row, column = draws.below(height, words[:, 2]), draws.below(width, words[:, 3])
    half = 0.5 * np.sqrt(1 - share)
    tall, wide = (half * height).astype(np.int64), (half * width).astype(np.int64)
    out = images.copy()
    for k, other in enumerate(others):
        rows = slice(max(row[k] - tall[k], 0), row[k] + tall[k])
        columns = slice(max(column[k] - wide[k], 0), column[k] + wide[k])
        out[k, rows, columns] = other[rows, columns]
    return out


class Augmentation(NamedTuple):
    """One entry of `AUGMENTATIONS`.

    Attributes:
        function: (images uint8 [B, H, W, C], words uint64 [B, words], amount) -> images.
        words: how many an image.
        takes_amount: whether it needs `:N`.
        keeps_labels: False where an image is mixed with another of its batch, so that its label is
            no longer its own; the function then takes `others` too, and the second word says which.
        crops: whether a streamed set does it while it decodes; it comes first there.
        unit: what the amount counts.
        largest: of the amount; 0 for no bound.
    """

    function: Callable[..., np.ndarray]
    words: int
    takes_amount: bool
    keeps_labels: bool = True
    crops: bool = False
    unit: str = "a number of pixels"
    largest: int = 0


# `pad_crop:4` is the CIFAR papers' name for `shift:4`: pad by 4 zeros, crop at a random place.
AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": Augmentation(shift, words=2, takes_amount=True),
    "pad_crop": Augmentation(shift, words=2, takes_amount=True),
    "flip": Augmentation(flip, words=1, takes_amount=False),
    "random_resized_crop": Augmentation(
        crops.random_resized_crop, words=crops.WORDS, takes_amount=False, crops=True
    ),
    "color_jitter": Augmentation(
        random_augment.color_jitter, words=6, takes_amount=True, unit="a strength in per cent"
    ),
    "randaugment": Augmentation(
        random_augment.randaugment,
        words=random_augment.WORDS,
        takes_amount=True,
        unit="a magnitude",
        largest=random_augment.BINS - 1,
    ),
    "mixup": Augmentation(mixup, words=2, takes_amount=False, keeps_labels=False),
    "cutmix": Augmentation(cutmix, words=4, takes_amount=False, keeps_labels=False),
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
                f"augmentation {text!r} needs {entry.unit} of at least 1, as '{name}:1'."
            )
        if entry.largest and int(amount) > entry.largest:
            raise ValueError(
                f"augmentation {text!r} needs {entry.unit} of at most {entry.largest}, as "
                f"'{name}:{entry.largest}'."
            )
        if not entry.takes_amount and colon:
            raise ValueError(f"augmentation {text!r} takes no amount; write {name!r}.")
        parsed.append((entry, int(amount or 0)))
    return tuple(parsed)


def check_order(images: np.ndarray | StreamedImages, augment: Sequence[str]) -> None:
    """Refuses a crop of streamed images that is not the first augmentation.

    Raises:
        ValueError: naming the order that works.
    """
    crop = [k for k, (entry, _) in enumerate(parse(augment)) if entry.crops]
    if isinstance(images, StreamedImages) and any(crop):
        first = augment[crop[-1]]
        others = [text for k, text in enumerate(augment) if k not in crop]
        raise ValueError(
            f"augment is {tuple(augment)!r}; {first!r} is done while a streamed image is decoded, "
            f"so it comes first and once: {(first, *others)!r}."
        )


def view(
    images: np.ndarray | StreamedImages,
    index: np.ndarray,
    augment: Sequence[tuple[Augmentation, int]],
    words: Sequence[np.ndarray],
) -> np.ndarray:
    """Returns images of a split, augmented each by itself.

    Args:
        images: of the split.
        index: which of them, int [rows].
        augment: of `parse`; all keep labels.
        words: of each augmentation, [rows, its words].
    """
    if isinstance(images, StreamedImages) and augment and augment[0][0].crops:
        # A flip right after it is quickest on the way out of the decoder.
        flips = len(augment) > 1 and augment[1][0].function is flip
        cut = images.random_crops(index, words[0], is_mirrored(words[1]) if flips else None)
        return _applied(cut, augment[1 + flips :], words[1 + flips :])
    return _applied(images[index], augment, words)


def _applied(
    images: np.ndarray, augment: Sequence[tuple[Augmentation, int]], words: Sequence[np.ndarray]
) -> np.ndarray:
    for (entry, amount), raw in zip(augment, words, strict=True):
        images = entry.function(images, raw, amount)
    return images


def batch(
    images: np.ndarray | StreamedImages,
    index: np.ndarray,
    augment: Sequence[tuple[Augmentation, int]],
    *,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the augmented images of a step, or of some rows of its batch.

    The draws are those of the whole batch. An image that is mixed needs another of the batch, and
    no more than those that are needed are read.

    Args:
        images: of the split.
        index: the rows of the split that the whole batch takes, int [batch].
        augment: of `parse`.
        seed: of the draws.
        step: of the draws.
        rows: which rows of the batch; all by default.
    """
    total = len(index)
    words = [
        draws.words(
            total * entry.words, seed=seed, stream=draws.AUGMENT, index=step, slot=slot
        ).reshape(total, entry.words)
        for slot, (entry, _) in enumerate(augment)
    ]
    wanted = np.arange(total) if rows is None else np.asarray(rows)
    return _rows(images, index, augment, words, wanted)


def _rows(
    images: np.ndarray | StreamedImages,
    index: np.ndarray,
    augment: Sequence[tuple[Augmentation, int]],
    words: Sequence[np.ndarray],
    rows: np.ndarray,
) -> np.ndarray:
    """Returns rows of a batch after all of `augment`; `words` are those of the whole batch."""
    mixes = [k for k, (entry, _) in enumerate(augment) if not entry.keeps_labels]
    if not mixes:
        return view(images, index[rows], augment, [raw[rows] for raw in words])
    last = mixes[-1]
    both = np.concatenate([rows, partners(words[last])[rows]])
    needed, place = np.unique(both, return_inverse=True)
    before = _rows(images, index, augment[:last], words[:last], needed)
    own, others = before[place[: len(rows)]], before[place[len(rows) :]]
    entry, amount = augment[last]
    mixed = entry.function(own, words[last][rows], amount, others)
    return _applied(mixed, augment[last + 1 :], [raw[rows] for raw in words[last + 1 :]])
