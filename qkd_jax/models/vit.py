"""Vision transformers: patches as tokens, blocks of attention and a perceptron, a head.

Reference: Dosovitskiy et al., 2020, arXiv 2010.11929; without a class token (the mean over tokens
goes to the head) as in Beyer, Zhai, Kolesnikov, 2022, arXiv 2205.01580.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.components import logits_of
from qkd_jax.models.features import sow_feature


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside a shortcut (pre-LN).

        x = x + attention(norm1(x));  x = x + mlp2(gelu(mlp1(norm2(x))))

    Attributes:
        heads: attention heads; they divide the width.
        hidden: size of the perceptron's hidden layer.
    """

    heads: int
    hidden: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to the same shape."""
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        attention: Any = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, name="attention"
        )
        x = x + attention(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="mlp1")(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp2")(y)


class ViT(nn.Module):
    """A vision transformer; the default sizes are for images of 28x28 to 32x32.

    Module names: `stem` (the patches' embedding), `block0` ... with `norm1`, `attention` (`query`,
    `key`, `value`, `out`, and for rules its two products `query_key` and `weights_value`), `norm2`,
    `mlp1`, `mlp2`; `norm`, `head`. The learned positions are the parameter `positions`, the class
    token is `token`.

    Features (collection "features"): `tokens1`, `tokens2`, ..., each block's output
    [batch, tokens, width]; `pooled`, the head's input, [batch, width].

    Attributes:
        patch: edge of a patch in pixels; images are padded with zeros to a multiple of it.
        depth: number of blocks.
        width: size of a token.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden size of the perceptrons, in widths.
        pool: what goes to the head: "mean" over the tokens, or a learned "class" token.
    """

    num_classes: int = 10
    patch: int = 4
    depth: int = 4
    width: int = 64
    heads: int = 4
    mlp_ratio: int = 2
    pool: str = "mean"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Computes the logits; see the contract in `qkd_jax.models`.

        The number of positions depends on height and width; `train` changes nothing, as there is no
        dropout and no BatchNorm.
        """
        checks.images("images", images)
        for name in ("patch", "depth", "width", "heads", "mlp_ratio"):
            checks.integer_in(name, getattr(self, name), 1)
        checks.one_of("pool", self.pool, ("mean", "class"))
        if self.width % self.heads:
            raise ValueError(
                f"heads is {self.heads}, which does not divide the width of {self.width}; use a "
                "divisor."
            )
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="SAME", dtype=self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        if self.pool == "class":
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(x.dtype)
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + positions.astype(x.dtype)
        for block in range(self.depth):
            hidden = self.mlp_ratio * self.width
            x = TransformerBlock(self.heads, hidden, self.dtype, name=f"block{block}")(x)
            sow_feature(self, f"tokens{block + 1}_pre", x)  # a sum: no activation follows
            sow_feature(self, f"tokens{block + 1}", x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.pool == "class" else x.mean(axis=1)
        return logits_of(self, x)
