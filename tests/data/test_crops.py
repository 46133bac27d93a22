"""Boxes against torchvision's, which made the quantiles of the golden file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data import crops, draws

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "augment.npz")


def drawn(height, width, count):
    raw = draws.words(count * crops.WORDS, seed=0, stream=9).reshape(count, -1)
    return np.array([crops.random_box(words, height, width) for words in raw])


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (120, 640)])
def test_boxes_are_distributed_as_torchvisions(size):
    height, width = size
    boxes = drawn(height, width, 5_000)
    top, left, h, w = boxes.T
    assert (boxes[:, :2] >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    quantiles = GOLDEN[f"boxes/{height}x{width}"][1:-1]
    ranks = np.linspace(0, 1, 21)[1:-1]
    for values, theirs in zip(boxes.T, quantiles.T, strict=True):
        # Whole pixels, so many values may lie on a quantile: it is a rank between both shares.
        # sqrt(0.25 / 5000) = 0.007, and theirs are of 20,000; four standard deviations.
        low = (values[:, None] < theirs).mean(axis=0)
        high = (values[:, None] <= theirs).mean(axis=0)
        assert (low < ranks + 0.032).all() and (high > ranks - 0.032).all()


def test_an_image_without_a_box_in_range_gives_its_centre():
    # 2000 x 10: a box of a ratio up to 4/3 has at most 10 x 13 pixels, 0.7 % of the area.
    assert {tuple(box) for box in drawn(2000, 10, 20)} == {(993, 0, 13, 10)}
    assert {tuple(box) for box in drawn(10, 2000, 20)} == {(0, 993, 10, 13)}


def test_the_centre_box_of_known_sizes():
    # 256 x 256 to 224: the box itself. 512 x 1024: resized to 256 x 512, so everything twice.
    assert crops.centre_box(256, 256, (224, 224)) == (16, 16, 224, 224)
    assert crops.centre_box(512, 1024, (224, 224)) == (32, 288, 448, 448)


@pytest.mark.parametrize("channels", [1, 3])
def test_random_resized_crop_of_a_set_in_memory(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 20, 16, channels), np.uint8)
    raw = draws.words(5 * crops.WORDS, seed=2, stream=9).reshape(5, -1)
    for image, words, got in zip(
        images, raw, crops.random_resized_crop(images, raw, 0), strict=True
    ):
        top, left, h, w = crops.random_box(words, 20, 16)
        for channel in range(channels):
            part = Image.fromarray(image[top : top + h, left : left + w, channel])
            wanted = np.asarray(part.resize((16, 20), Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(got[..., channel], wanted)
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        crops.random_resized_crop(np.zeros((1, 4, 4, 2), np.uint8), raw[:1], 0)
