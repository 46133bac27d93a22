"""Batches on their way to the devices: moved ahead of their step, 8-bit images normalised there."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.training.parallel import CompiledStep

AHEAD = 2


def feed(
    batches: Iterator[Mapping[str, Any]],
    compiled: CompiledStep,
    *,
    affine: tuple[np.ndarray, np.ndarray],
    ahead: int = AHEAD,
) -> Iterator[Mapping[str, Any]]:
    """Yields batches that are on the devices of a step, `ahead` of them before they are used.

    Moving and normalising are asynchronous, so they overlap with the steps. Images of 8 bits become
    `images * gain + offset`, float32, on the devices: a quarter of the bytes travels. Under `pmap`,
    whose layout is the step's own, batches stay on the host and float.

    Args:
        batches: from the loader; "image" is uint8 or normalised already.
        compiled: the step; it says where a batch goes.
        affine: gain and offset of each channel, `Dataset.affine`.
        ahead: how many batches are on their way while one is in use.
    """
    gain, offset = (channels[None, None, None] for channels in affine)
    if compiled.mode != "jit":
        yield from batches
        return
    normalise: Any = None
    queue: collections.deque[Mapping[str, Any]] = collections.deque()
    for batch in batches:
        placed = compiled.shard_batch(batch)
        if placed["image"].dtype == jnp.uint8:
            if normalise is None:
                normalise = jax.jit(
                    lambda images: images.astype(jnp.float32) * gain + offset,
                    out_shardings=placed["image"].sharding,
                )
            placed = {**placed, "image": normalise(placed["image"])}
        queue.append(placed)
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def on_host(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a batch as NumPy arrays: of arrays over several processes, this one's rows."""
    found = {}
    for name, array in batch.items():
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            found[name] = np.asarray(jax.device_get(array))
            continue
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        found[name] = np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
    return found
