"""Random views of images: windows, shifts and mirror images."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

View = tuple[jax.Array, jax.Array]
"""(boxes [batch, 4] for `window`, mirrored [batch] bool)."""


def show(images: jax.Array, view: View) -> jax.Array:
    """Returns the windows of images [batch, H, W, C], enlarged, and mirrored where that is due."""
    boxes, mirrored = view
    shown = window(images, boxes)
    return jnp.where(mirrored[:, None, None, None], shown[:, :, ::-1], shown)


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
    """Returns boxes [count, 4] of whole images, shifted by up to `amount` pixels on each axis."""
    corners = jax.random.randint(key, (count, 2), -amount, amount + 1).astype(jnp.float32)
    whole = jnp.broadcast_to(jnp.asarray(size, jnp.float32)[None], (count, 2))
    return jnp.concatenate([corners, whole], axis=1)


def random_crops(
    key: jax.Array, count: int, size: tuple[int, int], smallest: ArrayLike
) -> jax.Array:
    """Returns boxes [count, 4] in images: area from `smallest` of the whole, sides 3:4 to 4:3.

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
