"""Vision transformers: patches as tokens, blocks of attention and a perceptron, a head.

Reference: Dosovitskiy et al., 2020, arXiv 2010.11929; without a class token (the mean over tokens
goes to the head) as in Beyer, Zhai, Kolesnikov, 2022, arXiv 2205.01580. What later nets change are
options here: DeiT (Touvron et al., 2020, arXiv 2012.12877), DINOv2 (Oquab et al., 2023, arXiv
2304.07193), registers (Darcet et al., 2023, arXiv 2309.16588), SigLIP (Zhai et al., 2023, arXiv
2303.15343) and DINOv3 (Simeoni et al., 2025, arXiv 2508.10104). Their checkpoints give the same
outputs; `qkd_jax.weights` reads them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.attention import BIASES, GELUS, Attention, AttentionPool, gelu
from qkd_jax.models.components import layer_scale, logits_of
from qkd_jax.models.features import sow_feature
from qkd_jax.models.positions import RESAMPLINGS, resampled

POOLS = ("mean", "class", "class_mean", "attention")
POSITIONS = ("all", "patches", "rotary")


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside a shortcut (pre-LN).

        x = x + scale1 attention(norm1(x));  x = x + scale2 mlp2(gelu(mlp1(norm2(x))))

    Attributes:
        heads: attention heads; they divide the width.
        hidden: size of the perceptron's hidden layer.
        layer_scale: what the learned `scale1` and `scale2`, one number a channel, start from; None
            leaves them out.
        gelu: "tanh" or "exact".
        epsilon: of the LayerNorms.
        biases: which of attention's `query`, `key`, `value` and `out` have a bias.
        rotary: (rows, columns) of the patches where positions are rotary, else None.
    """

    heads: int
    hidden: int
    dtype: Any = None
    layer_scale: float | None = None
    gelu: str = "tanh"
    epsilon: float = 1e-6
    biases: tuple[str, ...] = BIASES
    rotary: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, tokens, width] to the same shape."""
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm1")(x)
        y = Attention(
            self.heads,
            dtype=self.dtype,
            biases=self.biases,
            rotary=self.rotary,
            name="attention",
        )(y)
        x = x + layer_scale(self, "scale1", y, self.layer_scale)
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm2")(x)
        y = gelu(nn.Dense(self.hidden, dtype=self.dtype, name="mlp1")(y), self.gelu)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp2")(y)
        return x + layer_scale(self, "scale2", y, self.layer_scale)


class ViT(nn.Module):
    """A vision transformer; the default sizes are for images of 28x28 to 32x32.

    Module names: `stem` (the patches' embedding), `block0` ... with `norm1`, `attention` (`query`,
    `key`, `value`, `out`, and for rules its two products `query_key` and `weights_value`), `norm2`,
    `mlp1`, `mlp2`; `norm`, `head`, and where the options ask for them `attention_pool` (see
    `AttentionPool`)
    and `head_distilled`. Parameters of the net itself: `positions`, `token` (class),
    `token_distilled`, `registers`.

    Features (collection "features"): `tokens1`, `tokens2`, ..., each block's output
    [batch, tokens, width]; `pooled`, the head's input, [batch, width].

    Attributes:
        patch: edge of a patch in pixels; images are padded with zeros to a multiple of it.
        depth: number of blocks.
        width: size of a token.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden size of the perceptrons, in widths; a product that is no integer is
            cut to one, as timm does (SigLIP's so400m: 3.7362 of 1152 is 4304).
        pool: what goes to the head: "mean" over the patches' tokens, a learned "class" token,
            "class_mean", both side by side (DINOv2's classifier), or "attention" (SigLIP).
        gelu: "tanh" (linen's) or "exact" (PyTorch's).
        epsilon: of the LayerNorms.
        layer_scale: start of the factors behind attention and perceptron; None for none.
        registers: tokens beside the patches' that nothing reads at the end.
        distilled: a second token with a head of its own, `head_distilled`; the logits are the mean
            of both (DeiT).
        positions: which tokens have learned ones: "all" but registers, or the "patches" alone;
            "rotary" has none and turns queries and keys instead (DINOv3).
        grid: side of the square of patches that learned positions are for; images with another
            one resample them. None: that of the images.
        resampling: "bicubic" or "bicubic_antialias", as PyTorch has them.
        biases: which of attention's `query`, `key`, `value` and `out` have a bias.
    """

    num_classes: int = 10
    patch: int = 4
    depth: int = 4
    width: int = 64
    heads: int = 4
    mlp_ratio: float = 2
    pool: str = "mean"
    dtype: Any = None
    gelu: str = "tanh"
    epsilon: float = 1e-6
    layer_scale: float | None = None
    registers: int = 0
    distilled: bool = False
    positions: str = "all"
    grid: int | None = None
    resampling: str = "bicubic"
    biases: tuple[str, ...] = BIASES

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Computes the logits; see the contract in `qkd_jax.models`.

        Without `grid` the number of positions depends on height and width; `train` changes nothing,
        as there is no dropout and no BatchNorm.
        """
        self._check(images)
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="SAME", dtype=self.dtype, name="stem")(images)
        rows, columns = x.shape[1:3]
        x, prefix = self._with_tokens(x.reshape(x.shape[0], -1, self.width), rows, columns)
        rotary = (rows, columns) if self.positions == "rotary" else None
        hidden = self._hidden()
        for block in range(self.depth):
            x = TransformerBlock(
                self.heads,
                hidden,
                self.dtype,
                self.layer_scale,
                self.gelu,
                self.epsilon,
                self.biases,
                rotary,
                name=f"block{block}",
            )(x)
            sow_feature(self, f"tokens{block + 1}_pre", x)  # a sum: no activation follows
            sow_feature(self, f"tokens{block + 1}", x)
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
        logits = logits_of(self, self._pooled(x, prefix, hidden))
        if not self.distilled:
            return logits
        head = nn.Dense(self.num_classes, dtype=self.dtype, name="head_distilled")
        return (logits + head(x[:, 1]).astype(logits.dtype)) / 2

    def _hidden(self) -> int:
        return int(self.mlp_ratio * self.width + 1e-3)  # 4304 / 1152 to six digits is 4304, too

    def _check(self, images: jax.Array) -> None:
        checks.images("images", images)
        for name in ("patch", "depth", "width", "heads"):
            checks.integer_in(name, getattr(self, name), 1)
        checks.number("mlp_ratio", self.mlp_ratio, low=0)
        checks.integer_in("the hidden size, mlp_ratio * width,", self._hidden(), 1)
        checks.integer_in("registers", self.registers, 0)
        checks.one_of("pool", self.pool, POOLS)
        checks.one_of("gelu", self.gelu, GELUS)
        checks.one_of("positions", self.positions, POSITIONS)
        checks.one_of("resampling", self.resampling, RESAMPLINGS)
        checks.positive("epsilon", self.epsilon)
        for name in self.biases:
            checks.one_of("biases", name, BIASES)
        if self.width % self.heads:
            raise ValueError(
                f"heads is {self.heads}, which does not divide the width of {self.width}; use a "
                "divisor."
            )
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"a head has {self.width // self.heads} channels, and rotary positions need a "
                "multiple of 4; change width or heads."
            )
        if self.distilled and self.pool != "class":
            raise ValueError(
                f"distilled adds a token beside the class token, and pool is {self.pool!r}; set "
                "pool='class'."
            )
        if self.grid is not None:
            checks.integer_in("grid", self.grid, 1)
            if self.positions == "rotary":
                raise ValueError(
                    "grid is the size of learned positions, and positions='rotary' learns none; "
                    "leave grid at None."
                )

    def _with_tokens(self, x: jax.Array, rows: int, columns: int) -> tuple[jax.Array, int]:
        """Adds positions and tokens: (class, distilled, registers, patches), and how many lead."""
        names = ["token"] * self.pool.startswith("class") + ["token_distilled"] * self.distilled
        leading = [self._token(name, 1) for name in names]
        if self.positions != "rotary":
            own = len(names) if self.positions == "all" else 0
            patches = rows * columns if self.grid is None else self.grid**2
            table = self.param(
                "positions", nn.initializers.normal(0.02), (1, own + patches, self.width)
            )
            if self.grid is not None:
                of_patches = resampled(table[:, own:], self.grid, rows, columns, self.resampling)
                table = jnp.concatenate([table[:, :own], of_patches], axis=1) if own else of_patches
            if own and not self.registers:  # all tokens have positions: one sum
                return self._led_by(leading, x) + table.astype(x.dtype), len(names)
            x = x + table[:, own:].astype(x.dtype)
            if own:
                leading = [token + table[:, i : i + 1] for i, token in enumerate(leading)]
        if self.registers:
            leading.append(self._token("registers", self.registers))
        return self._led_by(leading, x), len(names) + self.registers

    def _token(self, name: str, count: int) -> jax.Array:
        # Without positions of their own, equal tokens would stay equal.
        apart = name != "token" or self.positions != "all"
        start = nn.initializers.normal(0.02) if apart else nn.initializers.zeros
        return self.param(name, start, (1, count, self.width))

    def _led_by(self, tokens: list[jax.Array], x: jax.Array) -> jax.Array:
        """Puts learned tokens before those of each example."""
        if not tokens:
            return x
        joined = jnp.concatenate(tokens, axis=1) if len(tokens) > 1 else tokens[0]
        joined = jnp.broadcast_to(joined, (x.shape[0], *joined.shape[1:])).astype(x.dtype)
        return jnp.concatenate([joined, x], axis=1)

    def _pooled(self, x: jax.Array, prefix: int, hidden: int) -> jax.Array:
        """The head's input, of all tokens behind the last LayerNorm."""
        if self.pool == "class":
            return x[:, 0]
        patches = x[:, prefix:] if prefix else x
        if self.pool == "attention":
            pool = AttentionPool(
                self.heads, hidden, self.epsilon, self.gelu, self.dtype, name="attention_pool"
            )
            return pool(patches)
        mean = patches.mean(axis=1)
        return mean if self.pool == "mean" else jnp.concatenate([x[:, 0], mean], axis=-1)
