"""ConvNeXt: depthwise 7x7 convolutions and perceptrons over channels, behind LayerNorms.

Reference: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, 2022, arXiv 2201.03545. Layer names and
numbers are such that a checkpoint of torchvision, timm or Hugging Face gives the same logits;
`qkd_jax.weights` reads one.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.components import layer_scale, logits_of
from qkd_jax.models.features import sow_feature


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, LayerNorm and a perceptron over channels, beside a shortcut.

        y = x + scale * mlp2(gelu(mlp1(norm(depthwise(x)))))

    Attributes:
        layer_scale: what the learned `scale`, one number a channel, starts from.
        epsilon: of the LayerNorm.
    """

    layer_scale: float = 1e-6
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the same shape."""
        width = x.shape[-1]
        y = nn.Conv(
            width,
            (7, 7),
            padding=((3, 3), (3, 3)),
            feature_group_count=width,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(y)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp1")(y), approximate=False)
        y = nn.Dense(width, dtype=self.dtype, name="mlp2")(y)
        return x + layer_scale(self, "scale", y, self.layer_scale)


class ConvNeXt(nn.Module):
    """A ConvNeXt of four stages behind a 4x4 stem of stride 4; the default is the tiny one.

    Module names: `stem`, `stem_norm`, `stage<s>_norm` and `stage<s>_downsample` from stage 2 on,
    `stage<s>_block<b>` with `depthwise`, `norm`, `mlp1`, `mlp2`; `norm`, `head`.

    Features (collection "features"): `stage1` to `stage4`, each stage's output,
    [batch, height, width, channels]; `pooled`, the head's input, behind `norm`.

    Attributes:
        blocks: blocks of each stage.
        widths: channels of each stage.
        layer_scale: what each block's factors start from.
        epsilon: of the LayerNorms.
        head_epsilon: of the last one, behind the pooling; Hugging Face's configs say 1e-12 there.
    """

    num_classes: int = 1000
    blocks: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    layer_scale: float = 1e-6
    epsilon: float = 1e-6
    head_epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, head: bool = True) -> jax.Array:
        """Computes the logits; see the contract in `qkd_jax.models`.

        Rows and columns that 4 or 2 do not divide are cut off at the end, as the references do; a
        map smaller than the window is padded with zeros. `train` changes nothing, as there is no
        dropout and no BatchNorm.
        """
        checks.images("images", images)
        checks.at_least_one("blocks", self.blocks)
        if len(self.widths) != len(self.blocks):
            raise ValueError(
                f"widths has {len(self.widths)} stages and blocks has {len(self.blocks)}; give one "
                "number a stage in both."
            )
        for stage, counts in enumerate(zip(self.blocks, self.widths, strict=True), 1):
            checks.integer_in(f"blocks of stage {stage}", counts[0], 1)
            checks.integer_in(f"widths of stage {stage}", counts[1], 1)
        x = self._conv(images, 1, "stem")
        x = self._norm(x, "stem_norm", self.epsilon)
        for stage, count in enumerate(self.blocks, 1):
            if stage > 1:
                x = self._norm(x, f"stage{stage}_norm", self.epsilon)
                x = self._conv(x, stage, f"stage{stage}_downsample")
            for block in range(count):
                name = f"stage{stage}_block{block}"
                x = ConvNeXtBlock(self.layer_scale, self.epsilon, self.dtype, name=name)(x)
            sow_feature(self, f"stage{stage}_pre", x)  # a sum: no activation follows
            sow_feature(self, f"stage{stage}", x)
        if not head:
            return x
        return logits_of(self, self._norm(jnp.mean(x, axis=(1, 2)), "norm", self.head_epsilon))

    def _conv(self, x: jax.Array, stage: int, name: str) -> jax.Array:
        """Patches without overlap: 4x4 in the stem, 2x2 between the stages."""
        edge = 4 if name == "stem" else 2
        lacking = [max(0, edge - n) for n in x.shape[1:3]]
        padding = [(n // 2, n - n // 2) for n in lacking]
        size, width = (edge, edge), self.widths[stage - 1]
        return nn.Conv(width, size, size, padding=padding, dtype=self.dtype, name=name)(x)

    def _norm(self, x: jax.Array, name: str, epsilon: float) -> jax.Array:
        return nn.LayerNorm(epsilon=epsilon, dtype=self.dtype, name=name)(x)
