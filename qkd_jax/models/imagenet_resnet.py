"""Residual networks for large images, as torchvision and timm build them.

A 7x7 stem of stride 2, 3x3 max pooling of stride 2, four stages of basic or bottleneck blocks with
widths w, 2w, 4w, 8w, global average pooling, one dense head.

Reference: He, Zhang, Ren, Sun, 2015, arXiv 1512.03385, section 4.1. As in torchvision, a bottleneck
strides in its 3x3 convolution, where the paper strides in the first 1x1 ("v1.5": half a point
better on ImageNet). Layer names and numbers (padding, epsilon, decay) are such that a checkpoint of
torchvision or timm gives the same logits; `qkd_jax.weights` reads one.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.components import ONE_PIXEL, conv_and_norm, logits_of
from qkd_jax.models.resnet import BasicBlock, residual_stages

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, plus a shortcut; ReLU after the sum.

    The shortcut is a 1x1 convolution and BatchNorm where the shape changes (option B).

    Attributes:
        width: channels of the first two convolutions; the third has `EXPANSION` times as many.
        stride: stride of the 3x3 convolution and of the shortcut.
    """

    width: int
    stride: int = 1
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        sow_sum: Callable[[jax.Array], Any] | None = None,
    ) -> jax.Array:
        """Maps [batch, h, w, channels] to [batch, h/stride, w/stride, EXPANSION * width].

        `sow_sum` is handed the sum before the last ReLU.
        """
        conv, norm = conv_and_norm(self, train)
        stride, wide = (self.stride, self.stride), EXPANSION * self.width

        y = conv(self.width, (1, 1), padding="VALID", name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.width, (3, 3), strides=stride, padding=ONE_PIXEL, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(conv(wide, (1, 1), padding="VALID", name="conv3")(y))
        if self.stride != 1 or x.shape[-1] != wide:
            x = conv(wide, (1, 1), strides=stride, padding="VALID", name="shortcut")(x)
            x = norm(name="shortcut_bn")(x)
        y = y + x
        if sow_sum is not None:
            sow_sum(y)
        return nn.relu(y)


class ImageNetResNet(nn.Module):
    """A ResNet of four stages behind a 7x7 stem.

    Module names: `stem`, `stem_bn`, `stage<s>_block<b>` with `conv1`, `bn1`, ... and, where the
    shape changes, `shortcut`, `shortcut_bn`; `head`.

    Features (collection "features"): `stage1` to `stage4`, each stage's output after its ReLU;
    `stage1_pre` ... before it; `pooled`, the head's input.

    Attributes:
        blocks: blocks of each stage, such as (2, 2, 2, 2).
        bottleneck: whether the blocks are bottlenecks.
        width: channels of the stem and of stage 1.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    num_classes: int = 1000
    width: int = 64
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Computes the logits of images of any size; see the contract in `qkd_jax.models`."""
        checks.integer_in("width", self.width, 1)
        checks.at_least_one("blocks", self.blocks)
        for stage, count in enumerate(self.blocks, 1):
            checks.integer_in(f"blocks of stage {stage}", count, 1)
        checks.images("images", images)
        conv, norm = conv_and_norm(self, train)
        block_type = Bottleneck if self.bottleneck else BasicBlock

        x = conv(self.width, (7, 7), strides=(2, 2), padding=((3, 3), (3, 3)), name="stem")(images)
        x = nn.relu(norm(name="stem_bn")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=ONE_PIXEL)
        x = residual_stages(self, block_type, self.blocks, x, train)
        return logits_of(self, jnp.mean(x, axis=(1, 2)))
