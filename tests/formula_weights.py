"""Weights that a formula gives, so that golden files of whole nets need not store them."""

import numpy as np


def fill(name, shape, number):
    """Weights of an array, the `number`-th of its net: float32, from whole numbers."""
    size = int(np.prod(shape, dtype=np.int64))
    ramp = ((np.arange(size, dtype=np.int64) * 7919 + number * 104729) % 1013) / 1013 - 0.5
    if name.endswith("running_var"):
        values = ramp + 1.25
    elif len(shape) > 1:
        values = ramp * 3.5 / np.sqrt(np.prod(shape[1:]))
    else:  # a gain around 1, or an offset
        values = ramp + name.endswith(("weight", "gamma", "lambda1", "scale", "scale_parameter"))
    return values.reshape(shape).astype(np.float32)
