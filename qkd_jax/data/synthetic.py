"""Images made from a seed, of any shape and number of classes, that a small net can learn.

Each class has a coarse random pattern; an example is its class's pattern at a random contrast, plus
noise. Integers only, so every machine makes the same bytes.
"""

import numpy as np

from qkd_jax.data import draws
from qkd_jax.data.dataset import Arrays

CELL = 3  # pixels a side of a pattern's cells, so that shifts and convolutions make sense
CONTRASTS = 65  # contrasts run from 64/128 to 128/128
NOISE = 48  # grey levels each way


def make(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    train_examples: int,
    test_examples: int,
    seed: int,
) -> Arrays:
    """Returns the two splits; both use the patterns of `seed`, with examples of their own."""
    height, width, channels = image_shape
    cells = (num_classes, -(-height // CELL), -(-width // CELL), channels)
    raw = draws.words(int(np.prod(cells)), seed=seed, stream=draws.PATTERN)
    patterns = draws.below(256, raw).reshape(cells).astype(np.int32) - 128
    patterns = patterns.repeat(CELL, axis=1).repeat(CELL, axis=2)[:, :height, :width]

    def split(count: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (np.arange(count) % num_classes).astype(np.int32)
        raw = draws.words(count, seed=seed, stream=stream)
        contrast = 64 + draws.below(CONTRASTS, raw).astype(np.int32)[:, None, None, None]
        size = count * height * width * channels
        raw = draws.words(-(-size // 8), seed=seed, stream=stream, slot=1)
        # "<u8" fixes the order of the bytes within a word on any machine.
        noise = raw.astype("<u8").view(np.uint8)[:size].reshape(count, *image_shape)
        noise = ((noise.astype(np.int32) - 128) * NOISE) >> 7
        images = 128 + ((patterns[labels] * contrast) >> 7) + noise
        return np.clip(images, 0, 255).astype(np.uint8), labels

    return Arrays(
        *split(train_examples, draws.TRAIN_EXAMPLES), *split(test_examples, draws.TEST_EXAMPLES)
    )
