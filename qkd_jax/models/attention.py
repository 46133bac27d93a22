"""Attention of vision transformers: own biases, rotary positions, pooling by a learned query."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

GELUS = ("tanh", "exact")
BIASES = ("query", "key", "value", "out")


def gelu(x: jax.Array, form: str) -> jax.Array:
    """Computes GELU by its tanh approximation ("tanh", linen's default) or by erf ("exact")."""
    return nn.gelu(x, approximate=form == "tanh")


def rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotates each token's pairs (i, i + d/2) of a head's channels by the token's angles.

        out = x cos(a) + (-x2, x1) sin(a),  x = (x1, x2)

    Args:
        x: [..., tokens, heads, d].
        angles: [patches, d/2]; tokens before the last `patches` ones (class, registers) stay.

    Reference: Su et al., 2021, arXiv 2104.09864, with the channels paired as in DINOv3.
    """
    prefix = x.shape[-3] - len(angles)
    angles = np.concatenate([np.zeros((prefix, angles.shape[1])), angles])
    angles = np.tile(angles, 2).reshape((1,) * (x.ndim - 3) + (x.shape[-3], 1, x.shape[-1]))
    cos, sin = (jnp.asarray(f(angles), x.dtype) for f in (np.cos, np.sin))
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos + turned * sin


def rotary_angles(rows: int, columns: int, channels: int, base: float = 100.0) -> np.ndarray:
    """Returns the angles of a grid of patches, [rows * columns, channels / 2], float64.

    The centres of the patches are scaled to (-1, 1) on each axis; half of the frequencies turn with
    the row and half with the column:

        a = 2 pi position / base^(4 i / channels),  i = 0 ... channels / 4 - 1.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        channels: of one head, a multiple of 4.
        base: the largest period, about; 100 in DINOv3.

    Reference: Simeoni et al., 2025, arXiv 2508.10104, section 3.2.
    """
    frequencies = 2 * math.pi / base ** (np.arange(channels // 4) * 4 / channels)
    centres = [2 * (np.arange(n) + 0.5) / n - 1 for n in (rows, columns)]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    return (grid * frequencies).reshape(rows * columns, channels // 2)


class Attention(nn.MultiHeadDotProductAttention):
    """linen's attention, with a bias for some of its four products only, and rotary positions.

    Parameters, names and quantization are those of the class that it derives from. Its fields for
    masks, dropout, decoding and normalised queries are not read.

    Attributes:
        biases: which of `query`, `key`, `value` and `out` have a bias.
        rotary: (rows, columns) of the patches by whose places queries and keys are rotated; None
            for no rotation.
    """

    biases: tuple[str, ...] = BIASES
    rotary: tuple[int, int] | None = None

    @nn.compact
    def __call__(  # pyrefly: ignore[bad-override]
        self, x: jax.Array, context: jax.Array | None = None
    ) -> jax.Array:
        """Maps queries [batch, tokens, width] to the same shape.

        Args:
            x: what the queries are made of.
            context: what keys and values are made of, [batch, others, width]; None for `x`.
        """
        context, width = x if context is None else context, x.shape[-1]

        def heads(name: str, given: jax.Array) -> jax.Array:
            return nn.DenseGeneral(
                (self.num_heads, width // self.num_heads),
                use_bias=name in self.biases,
                dtype=self.dtype,
                name=name,
            )(given)

        query, key, value = heads("query", x), heads("key", context), heads("value", context)
        if self.rotary is not None:
            angles = rotary_angles(*self.rotary, width // self.num_heads)
            query, key = rotate(query, angles), rotate(key, angles)
        factories = self.qk_attn_weights_einsum_cls, self.attn_weights_value_einsum_cls
        scores, mix = (None if make is None else make() for make in factories)
        x = nn.dot_product_attention(
            query,
            key,
            value,
            deterministic=True,
            dtype=self.dtype,
            qk_attn_weights_einsum=scores,
            attn_weights_value_einsum=mix,
        )
        has_bias = "out" in self.biases
        return nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=has_bias, dtype=self.dtype, name="out"
        )(x)


class AttentionPool(nn.Module):
    """One vector of all tokens: a learned query attends to them, then a perceptron with a shortcut.

        p = attention(probe, tokens);  out = p + mlp2(gelu(mlp1(norm(p))))

    Attributes:
        heads: attention heads.
        hidden: size of the perceptron's hidden layer.
        epsilon: of the LayerNorm.
        gelu: "tanh" or "exact".

    Reference: Zhai, Mustafa, Kolesnikov, Beyer, 2023, arXiv 2303.15343 (SigLIP's head).
    """

    heads: int
    hidden: int
    epsilon: float = 1e-6
    gelu: str = "tanh"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [batch, tokens, width] to [batch, width]."""
        width = x.shape[-1]
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(x.dtype)
        x = Attention(self.heads, dtype=self.dtype, name="attention")(probe, x)
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        y = gelu(nn.Dense(self.hidden, dtype=self.dtype, name="mlp1")(y), self.gelu)
        return (x + nn.Dense(width, dtype=self.dtype, name="mlp2")(y))[:, 0]
