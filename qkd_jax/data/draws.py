"""Random draws that are a pure function of (seed, stream, index).

Each draw has a Philox generator of its own, keyed by those three numbers, so nothing is carried
from one step to the next and any step can be asked for first. Only the generator's raw 64-bit words
are used: NumPy promises them for ever, while `Generator.permutation` and its kin may change between
versions.
"""

import numpy as np

# A stream keeps the draws of one purpose apart from those of another under the same seed.
SPLIT, ORDER, AUGMENT, PATTERN, TRAIN_EXAMPLES, TEST_EXAMPLES, VIEWS = range(1, 8)

LARGEST_SEED = 2**63 - 1


def words(count: int, *, seed: int, stream: int, index: int = 0, slot: int = 0) -> np.ndarray:
    """Returns `count` uint64 words; (stream, slot, index) take 8, 8 and 48 bits of the key."""
    place = (stream << 56) | (slot << 48) | index
    return np.random.Philox(key=np.array([seed, place], np.uint64)).random_raw(count)


def permutation(count: int, *, seed: int, stream: int, index: int = 0) -> np.ndarray:
    """Returns the numbers 0..count-1 in random order, int64 [count]."""
    return np.argsort(words(count, seed=seed, stream=stream, index=index), kind="stable")


def below(high: int, raw: np.ndarray) -> np.ndarray:
    """Maps uint64 words to integers 0..high-1 (high < 2**32; the bias is below high / 2**32)."""
    return (((raw >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)).astype(np.int64)
