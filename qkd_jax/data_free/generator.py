"""A generator of images for distillation without data: a small convolutional net from noise.

`dafl` and `cmi` train one against a frozen net. It makes pixels in [0, 1]; `in_range` gives them
the range in which nets take them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qkd_jax import checks
from qkd_jax.data_free.inversion import Synthesis
from qkd_jax.training.state import jit_once

__all__ = [
    "Generator",
    "check_fields",
    "finite",
    "in_range",
    "new_generator",
    "random_crops",
    "random_shifts",
    "told",
    "window",
]

SLOPE = 0.2
TELL_EVERY = 50  # steps between two losses that are waited for


class Generator(nn.Module):
    """Noise [batch, latent] to pixels [batch, height, width, channels] in [0, 1].

    A dense layer to a quarter of the size, two doublings with a convolution each, and a last
    convolution with a sigmoid. Sizes that four does not divide are made larger and cut. BatchNorm
    takes the statistics of the batch at all times, so an image depends on those made with it.

    Attributes:
        image_shape: (height, width, channels).
        width: channels of the last hidden layer; those before have twice as many.
    """

    image_shape: tuple[int, int, int]
    width: int = 64

    @nn.compact
    def __call__(self, noise: jax.Array) -> jax.Array:
        """Makes a batch of images; apply it with mutable=["batch_stats"]."""
        height, width, channels = self.image_shape
        rows, columns = -(-height // 4), -(-width // 4)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.BatchNorm(use_running_average=False, name=name)(x)

        def doubled(x: jax.Array) -> jax.Array:
            return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

        x = nn.Dense(rows * columns * 2 * self.width, name="seed")(noise)
        x = norm(x.reshape(-1, rows, columns, 2 * self.width), "seed_bn")
        for k, size in enumerate((2 * self.width, self.width)):
            x = nn.Conv(size, (3, 3), use_bias=False, name=f"conv{k}")(doubled(x))
            x = nn.leaky_relu(norm(x, f"conv{k}_bn"), SLOPE)
        x = nn.Conv(channels, (3, 3), name="pixels")(x)
        return nn.sigmoid(x[:, :height, :width])


def new_generator(generator: Generator, key: jax.Array, latent: int) -> dict[str, Any]:
    """Returns a generator's first variables for noise of size `latent`."""
    return _init(generator.image_shape, generator.width)(key, np.zeros((2, latent), np.float32))


@functools.lru_cache(maxsize=16)
def _init(image_shape: tuple[int, int, int], width: int) -> Any:
    return jit_once(Generator(image_shape, width).init)


def in_range(pixels: jax.Array, bounds: tuple[Any, Any]) -> jax.Array:
    """Returns low + (high - low) * pixels; bounds broadcast against [batch, H, W, C]."""
    low, high = (jnp.broadcast_to(bound, pixels.shape) for bound in bounds)
    return low + (high - low) * pixels


def check_fields(
    fields: Mapping[str, Any],
    *,
    sizes: Sequence[str],
    rates: Sequence[str],
    weights: Sequence[str],
) -> None:
    """Refuses, by name, sizes below 1, rates that are not above 0 and weights below 0."""
    for name in sizes:
        checks.integer_in(name, fields[name], 1)
    for name in rates:
        checks.positive(name, fields[name])
    for name in weights:
        checks.in_range(name, fields[name], 0, math.inf)


def told(loss: jax.Array, step: int, steps: int) -> float | None:
    """A loss as a number now and then, at the last of `steps` too; else None, without waiting."""
    return float(loss) if step == steps or step % TELL_EVERY == 0 else None


def finite(images: np.ndarray, labels: np.ndarray, lr: float) -> Synthesis:
    """Returns what was made.

    Raises:
        ValueError: It is not finite.
    """
    if not np.isfinite(images).all():
        raise ValueError(f"the images are not finite in the end; lower lr, now {lr}.")
    return Synthesis(images.astype(np.float32), labels.astype(np.int32))


def window(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Enlarges one window of each image to the whole size, linearly between pixels.

    Args:
        images: [batch, H, W, C].
        boxes: [batch, 4], top, left, height and width of each window in pixels; outside of the
            image there are zeros.
    """
    size = jnp.asarray(images.shape[1:3], jnp.float32)

    def of_one(image: jax.Array, box: jax.Array) -> jax.Array:
        scale = size / box[2:]
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -box[:2] * scale, "linear", antialias=False
        )

    return jax.vmap(of_one)(images, boxes)


def random_shifts(key: jax.Array, count: int, size: tuple[int, int], amount: int) -> jax.Array:
    """Boxes [count, 4] of whole images, shifted by up to `amount` pixels along each axis."""
    corners = jax.random.randint(key, (count, 2), -amount, amount + 1).astype(jnp.float32)
    whole = jnp.broadcast_to(jnp.asarray(size, jnp.float32)[None], (count, 2))
    return jnp.concatenate([corners, whole], axis=1)


def random_crops(
    key: jax.Array, count: int, size: tuple[int, int], smallest: ArrayLike
) -> jax.Array:
    """Boxes [count, 4] within images: area from `smallest` of the whole, sides 3:4 to 4:3.

    A side that would be longer than the image's is as long as that.
    """
    keys = jax.random.split(key, 3)
    area = jax.random.uniform(keys[0], (count,), minval=smallest)
    bound = math.log(4 / 3)
    ratio = jnp.exp(jax.random.uniform(keys[1], (count,), minval=-bound, maxval=bound))
    sides = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=1)), 1)
    sides = sides * jnp.asarray(size, jnp.float32)[None]
    room = jnp.asarray(size, jnp.float32)[None] - sides
    return jnp.concatenate([jax.random.uniform(keys[2], (count, 2)) * room, sides], axis=1)
