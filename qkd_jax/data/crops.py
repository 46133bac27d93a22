"""Boxes of an image: the random-resized crop of training, the centre crop of evaluation.

A box is (top, left, height, width) in pixels of the stored image; it may have fractions.
"""

import math

import numpy as np

from qkd_jax import checks

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10
WORDS = 2 * TRIES + 2  # an area and a ratio for each try, then top and left
# Evaluation resizes the shorter side to size / SHARE and cuts out the centre: 256 for 224.
SHARE = 224 / 256

Box = tuple[float, float, float, float]


def random_box(words: np.ndarray, height: int, width: int) -> Box:
    """Draws the box of a random-resized crop.

    The area is uniform in 0.08 to 1 of the image's, the logarithm of width / height uniform in that
    of 3/4 to 4/3, the place uniform. Of ten tries the first that lies within the image counts;
    after them comes the largest centred box of a ratio in the range. This is torchvision's
    algorithm (Szegedy et al. 2014, arXiv 1409.4842).

    Args:
        words: uint64 [WORDS].
        height: of the image.
        width: of the image.
    """
    shares = [int(word) / 2**64 for word in words]
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(TRIES):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * shares[2 * attempt])
        ratio = math.exp(low + (high - low) * shares[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(shares[-2] * (height - h + 1)), int(shares[-1] * (width - w + 1))
            return min(top, height - h), min(left, width - w), h, w
    ratio = width / height
    h = height if ratio >= RATIO[0] else min(round(width / RATIO[0]), height)
    w = width if ratio <= RATIO[1] else min(round(height * RATIO[1]), width)
    return (height - h) // 2, (width - w) // 2, h, w


def centre_box(height: int, width: int, size: tuple[int, int]) -> Box:
    """Returns the box that "resize the shorter side, cut out the centre" shows.

    Args:
        height: of the image.
        width: of the image.
        size: (height, width) that is cut out of the resized image, in whole pixels.
    """
    shorter = round(max(size) / SHARE)
    new_h = shorter if height <= width else int(shorter * height / width)
    new_w = shorter if width <= height else int(shorter * width / height)
    top, left = round((new_h - size[0]) / 2), round((new_w - size[1]) / 2)
    down, across = height / new_h, width / new_w
    return top * down, left * across, size[0] * down, size[1] * across


def random_resized_crop(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Cuts a random box out of each image and resizes it to the image's size (`random_box`).

    Bilinear with antialiasing, Pillow's. A streamed set decodes its images this way at once.
    """
    from PIL import Image

    _, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(
            f"random_resized_crop takes images of 1 or 3 channels, not {channels}; take it out of "
            "augment."
        )
    out = np.empty_like(images)
    for image, row, raw in zip(images, out, words, strict=True):
        top, left, h, w = random_box(raw, height, width)
        whole = Image.fromarray(image[..., 0] if channels == 1 else image)
        part = whole.crop((int(left), int(top), int(left + w), int(top + h)))
        resized = part.resize((width, height), Image.Resampling.BILINEAR)
        row[...] = np.asarray(resized).reshape(row.shape)
    return out


def image_size(name: str, size: int) -> tuple[int, int]:
    """Returns (size, size) of a checked number of pixels."""
    checks.integer_in(name, size, 8, 4096)
    return int(size), int(size)
