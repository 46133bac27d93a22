"""A generator of images for distillation without data: a small convolutional net from noise.

`dafl` and `cmi` train one against a frozen net. It makes pixels in [0, 1]; `in_range` maps them to
the range in which nets take them.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qkd_jax.training.state import jit_once

SLOPE = 0.2


class Generator(nn.Module):
    """Noise [batch, latent] to pixels [batch, height, width, channels] in [0, 1].

    A dense layer to a quarter of the size, two doublings with a convolution each, and a last
    convolution with a sigmoid. Sizes that four does not divide are made larger and cut. BatchNorm
    uses the statistics of the batch at all times, so an image depends on those made with it.

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
    """Returns a generator's initial variables for noise of size `latent`."""
    return _init(generator.image_shape, generator.width)(key, np.zeros((2, latent), np.float32))


@functools.lru_cache(maxsize=16)
def _init(image_shape: tuple[int, int, int], width: int) -> Callable[..., Any]:
    return jit_once(Generator(image_shape, width).init)


def in_range(pixels: jax.Array, bounds: tuple[ArrayLike, ArrayLike]) -> jax.Array:
    """Returns low + (high - low) * pixels; bounds broadcast against [batch, H, W, C]."""
    low, high = (jnp.broadcast_to(bound, pixels.shape) for bound in bounds)
    return low + (high - low) * pixels
