"""The inputs of the golden numbers, of PyTorch's layout and, as maps, of this project's."""

import numpy as np


def waves(shape, k):
    """1.5 sin(0.7 i + k) + cos(0.013 i^2 + 2 k) for i = 0, 1, ..., as float32."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return np.float32(1.5 * np.sin(0.7 * i + k) + np.cos(0.013 * i**2 + 2 * k)).reshape(shape)


def maps(channels, size, *ks):
    """8 maps [8, size, size, channels] for each k, numbered as [8, channels, size, size]."""
    return tuple(np.moveaxis(waves((8, channels, size, size), k), 1, -1) for k in ks)
