"""The integers at which the code of a quantized value rises: the thresholds of a `Table`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax.deploy.integer.linear import Linear
from qkd_jax.numerics import Spec, codes_of
from qkd_jax.quantizers import QUANTIZERS


def search_thresholds(
    x: Linear, params: Mapping[str, Any], spec: Spec, scale: np.ndarray, ends: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Searches, for every channel and code, the smallest sum with at least that code.

    By bisection with the quantizer itself, so that it is exact for any monotone quantizer.

    Args:
        x: what the quantizer reads, of one term: clip(multiplier * sum + bias, low, high).
        params: the quantizer's parameters.
        spec: its spec.
        scale: of its grid, a number.
        ends: the lowest and the highest centred code.

    Returns:
        (thresholds int64 [codes - 1, ...], sign int64 [...]), `...` being the shape of multiplier
        and bias. Where a multiplier is negative the sign is -1 and the thresholds are those of the
        negated sum. A code that no sum reaches has a threshold beyond the sums' bound.
    """
    ((_, multiplier, bound),) = x.terms
    quantizer = QUANTIZERS[spec.quantizer]
    shape = np.broadcast_shapes(multiplier.shape, x.bias.shape)
    m = np.broadcast_to(multiplier, shape).astype(np.float32)
    b = np.broadcast_to(x.bias, shape).astype(np.float32)
    sign = np.broadcast_to(np.where(multiplier < 0, -1, 1).astype(np.int64), shape)

    def codes_at(sums: np.ndarray) -> np.ndarray:
        # The float operations of the trained net, on every sum that can occur.
        real = np.clip((sums * sign).astype(np.float32) * m + b, x.low, x.high)
        hat = quantizer.fake_quant(jnp.asarray(real, jnp.float32), params, spec)
        return codes_of(np.asarray(hat), np.float32(scale))

    levels = np.arange(ends[0] + 1, ends[1] + 1).reshape(-1, *(1,) * len(shape))
    # Invariant: the code is below the level at `low` and at least the level at `high`. At first
    # these lie one beyond the sums that occur, on either side, where no code is computed.
    low = np.full((len(levels), *shape), -bound - 1, np.int64)
    high = np.full((len(levels), *shape), bound + 1, np.int64)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        reached = codes_at(middle) >= levels
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    # A level that no sum reaches stays beyond the bound, one that all reach at the lowest sum.
    return high, sign
