"""A size budget for weights whose numbers of bits are learned.

The penalty is max(size / budget - 1, 0), size being the bytes of those weights' codes (Uhlich et
al., 2019, arXiv 1905.11452, with a hinge in place of their squared one). The bits are kept between
the fewest and the most there can be, so that none falls further while others are still too many.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.stored_weights import StoredWeight, quantized_weights
from qkd_jax.quantize.variables import quantizer_key, quantizer_params
from qkd_jax.quantizers import fewest_bits, learns_bits, used_bits
from qkd_jax.trees import get, join


def excess(net: QuantizedModel, learned: Mapping[str, Any], budget: jax.Array) -> jax.Array:
    """Returns max(size / budget - 1, 0), with a gradient to the bits; `budget` is in bytes."""
    size = sum(_bytes(learned, weight) for weight in _with_learned_bits(net, learned))
    return jnp.maximum(size / budget - 1, 0)


def bounded_bits(
    leaves: Mapping[str, jax.Array], net: QuantizedModel, learned: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns {path: learned bits within their range} out of {path: parameter of a quantizer}."""
    values = {}
    for weight in _with_learned_bits(net, learned):
        path = join(weight.path, quantizer_key("weight"), "bits")
        low, high = fewest_bits(weight.spec), weight.spec.bits
        values[path] = jnp.clip(leaves[path], min=low, max=high)
    return values


def _with_learned_bits(net: QuantizedModel, learned: Mapping[str, Any]) -> Iterator[StoredWeight]:
    return (weight for weight in quantized_weights(net, learned) if learns_bits(weight.spec))


def _bytes(learned: Mapping[str, Any], weight: StoredWeight) -> jax.Array:
    bits = used_bits(quantizer_params(learned, weight.path, "weight"), weight.spec)
    return jnp.sum(bits) * (get(learned, weight.array).size / max(bits.size, 1)) / 8
