"""Features of any net as maps, and the parts that adaptors are made of."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Features = tuple[jax.Array, ...]


def map_shape(shape: Shape) -> tuple[int, int, int]:
    """(height, width, channels) of the map that `as_map` makes of a feature without its batch."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 1:
        return 1, 1, shape[0]
    if len(shape) != 2:
        raise ValueError(
            f"a feature has shape {('batch', *shape)}; adaptors take vectors [batch, channels], "
            "maps [batch, height, width, channels] and tokens [batch, tokens, channels]."
        )
    side = math.isqrt(shape[0])
    if side * side == shape[0]:
        return side, side, shape[1]
    side = math.isqrt(shape[0] - 1)
    if side > 1 and side * side == shape[0] - 1:  # the first is the class token, no patch
        return side, side, shape[1]
    return shape[0], 1, shape[1]


def as_map(x: jax.Array) -> jax.Array:
    """A feature as [batch, height, width, channels].

    A vector is a map of one position. Tokens are laid out as a square where their number is one,
    without the first where the rest is one (a class token), else as a column.
    """
    height, width, channels = map_shape(x.shape[1:])
    if x.ndim == 3:
        x = x[:, x.shape[1] - height * width :]
    return x.reshape(x.shape[0], height, width, channels)


def conv(features: int, size: int = 1, *, stride: int = 1, bias: bool = False, name: str) -> Any:
    """A convolution with the project's padding, without bias unless asked for."""
    pad = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        name=name,
    )


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """BatchNorm with the project's settings; its axis name arrives from outside."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """Takes pixel floor(i H / height) for row i, and columns likewise: PyTorch's "nearest".

    `jax.image.resize` looks from the pixels' centres, which gives others where the sizes are no
    multiples of each other.
    """
    for axis, wanted in ((1, height), (2, width)):
        length = x.shape[axis]
        if wanted % length == 0:  # its gradient is a sum, not a scatter
            x = jnp.repeat(x, wanted // length, axis=axis)
        else:
            x = jnp.take(x, np.arange(wanted) * length // wanted, axis=axis)
    return x


def outputs(students: Features, teachers: Features, **more: Any) -> dict[str, Any]:
    """Returns an adaptor's outputs: features by both names, and arrays by names of their own."""
    return {
        "student_features": students,
        "teacher_features": teachers,
        "student_feature": students[-1],
        "teacher_feature": teachers[-1],
        **more,
    }


class Views(nn.Module):
    """No parameters: features of unlike kinds, or tokens, as maps.

    Attributes:
        vectors: whether vectors stay vectors.
    """

    vectors: bool = False

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        del train

        def view(x: jax.Array) -> jax.Array:
            return x if self.vectors and x.ndim == 2 else as_map(x)

        return outputs(tuple(map(view, students)), tuple(map(view, teachers)))


def views(student: tuple[Shape, ...], teacher: tuple[Shape, ...]) -> Views | None:
    """Features as maps, where they are of unlike kinds or tokens."""
    ranks = {len(shape) for shape in (*student, *teacher)}
    return Views() if ranks - {1} and ranks != {3} else None


def maps_and_vectors(student: tuple[Shape, ...], teacher: tuple[Shape, ...]) -> Views | None:
    """Tokens as maps, beside vectors that stay vectors."""
    return Views(vectors=True) if 2 in {len(shape) for shape in (*student, *teacher)} else None
