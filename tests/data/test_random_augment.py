"""RandAugment and colour jitter: torchvision's operations, and formulas in float64."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data import draws, random_augment

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "augment.npz")
OPERATIONS = [name for name in GOLDEN.files if name.count("/") == 2]


def test_every_operation_is_in_the_golden_file():
    assert {name.split("/")[0] for name in OPERATIONS} == set(random_augment.OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_torchvisions(name):
    operation, magnitude, sign = name.split("/")
    image = Image.fromarray(GOLDEN["image"])
    got = random_augment.operate(image, operation, int(magnitude), int(sign))
    np.testing.assert_array_equal(got, GOLDEN[name])


def test_randaugment_applies_two_operations_each_equally_likely():
    images = np.repeat(GOLDEN["image"][None], 4, axis=0)
    names = list(random_augment.OPERATIONS)
    # The upper 32 bits of a word, times 14, give the operation; below a half is the sign +1.
    chosen = [(0, 9), (13, 3), (6, 6), (5, 1)]
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    raw = np.array(
        [
            [
                word
                for o, s in zip(ops, ss, strict=True)
                for word in ((o + 0.5) / 14, 0.25 if s > 0 else 0.75)
            ]
            for ops, ss in zip(chosen, signs, strict=True)
        ]
    )
    got = random_augment.randaugment(images, (raw * 2**63).astype(np.uint64) * np.uint64(2), 9)
    for image, ops, ss, found in zip(images, chosen, signs, got, strict=True):
        image = Image.fromarray(image)
        for operation, sign in zip(ops, ss, strict=True):
            image = random_augment.operate(image, names[operation], 9, sign)
        np.testing.assert_array_equal(found, image)
    words = draws.words(40_000, seed=0, stream=9).reshape(10_000, 4)
    # 20,000 draws of 14: 1,429 each, the standard deviation is 36.
    counts = np.bincount(draws.below(14, words[:, ::2]).ravel())
    assert len(counts) == 14 and np.abs(counts - 1429).max() < 4 * 36


def jittered(image, order, factors):
    """Brightness, contrast and saturation by their formulas, with a level of rounding each."""
    x = image.astype(np.float64)
    for kind in order:
        grey = np.rint(x @ [0.299, 0.587, 0.114])[..., None]
        other = (np.zeros_like(x), np.rint(grey.mean()), grey)[kind]
        x = np.clip(other + factors[kind] * (x - other), 0, 255)
    return x


def test_color_jitter_equals_its_formulas():
    images = np.repeat(GOLDEN["image"][None], 60, axis=0)
    words = draws.words(60 * 6, seed=4, stream=9).reshape(60, 6)
    got = random_augment.color_jitter(images, words, 40)
    orders = np.argsort(words[:, :3], axis=1)
    factors = 0.6 + 0.8 * (words[:, 3:] / 2**64)
    for image, order, scale, found in zip(images, orders, factors, got, strict=True):
        # Three roundings of at most a level, each of which the next factor (at most 1.4) stretches.
        np.testing.assert_allclose(found, jittered(image, order, scale), atol=4.5)
    assert len({tuple(order) for order in orders}) == 6
