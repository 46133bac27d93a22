"""Residual networks for small images, as in the CIFAR experiments of the ResNet paper.

A 3x3 stem, three stages of basic blocks with widths w, 2w, 4w on maps of size s, s/2, s/4, global
average pooling, one dense head. The depth is 6n + 2 with n blocks a stage.

Reference: He, Zhang, Ren, Sun, 2015, arXiv 1512.03385, section 4.2. The distillation literature's
variants with more filters (8x4, 32x4) follow Tian, Krishnan, Isola, 2019, arXiv 1910.10699: the
stages have four times the filters and the stem twice.

The blocks are written out one after another, not scanned: a convolution inside a scan is many times
slower on CPU, and a layer that has a path of its own can be given its own number of bits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.components import ONE_PIXEL, conv_and_norm, logits_of
from qkd_jax.models.features import Activation, sow_feature


def blocks_per_stage(depth: int) -> int:
    """Returns n for a depth of 6n + 2.

    Raises:
        ValueError: for any other depth, with the two that enclose it.
    """
    checks.integer_in("depth", depth, 8)
    n, rest = divmod(depth - 2, 6)
    if rest:
        raise ValueError(
            f"depth is {depth}; it must be 6n + 2 (three stages of n blocks of two convolutions, "
            f"stem and head). The nearest are {6 * n + 2} and {6 * n + 8}."
        )
    return n


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, plus a shortcut; ReLU after the sum.

        y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    Attributes:
        width: channels of both convolutions.
        stride: stride of the first convolution and of the shortcut.
        shortcut: "projection" (a 1x1 convolution and BatchNorm where the shape changes, option B of
            the paper) or "pad" (every stride-th pixel and zero channels at the end, without
            parameters, option A).
    """

    width: int
    stride: int = 1
    shortcut: str = "projection"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        sow_sum: Callable[[jax.Array], Any] | None = None,
    ) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height/stride, width/stride, width].

        `sow_sum` is handed the sum before the last ReLU, so that the net can sow it under a name of
        its own while the block's output stays one array.
        """
        checks.one_of("shortcut", self.shortcut, ("projection", "pad"))
        conv, norm = conv_and_norm(self, train)
        stride = (self.stride, self.stride)

        y = conv(self.width, (3, 3), strides=stride, padding=ONE_PIXEL, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.width, (3, 3), padding=ONE_PIXEL, name="conv2")(y)
        y = norm(name="bn2")(y)

        if self.stride != 1 or x.shape[-1] != self.width:
            if self.shortcut == "projection":
                x = conv(self.width, (1, 1), strides=stride, padding="VALID", name="shortcut")(x)
                x = norm(name="shortcut_bn")(x)
            else:
                x = self._pad(x)
        y = y + x
        if sow_sum is not None:
            sow_sum(y)
        return nn.relu(y)

    def _pad(self, x: jax.Array) -> jax.Array:
        """Takes every stride-th pixel and appends zero channels."""
        extra = self.width - x.shape[-1]
        if extra < 0:
            raise ValueError(
                f"shortcut is 'pad', but the block has {self.width} channels for an input of "
                f"{x.shape[-1]}: zero channels can only add. Use shortcut='projection'."
            )
        x = x[:, :: self.stride, :: self.stride, :]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))


def residual_stages(
    net: Any, block_type: Callable[..., Any], counts: Sequence[int], x: jax.Array, train: bool
) -> jax.Array:
    """Stages of residual blocks inside a net's compact call, each named and its features sown.

    Stage s has width w 2^(s - 1); every stage but the first halves the map in its first block.

    Args:
        net: the module that calls; its `width`, `dtype` and `axis_name` are the blocks'.
        block_type: constructor of a block.
        counts: blocks of each stage.
        x: [batch, height, width, channels], after the stem.
        train: as the net's.
    """
    for stage, count in enumerate(counts, 1):
        for block in range(count):
            last = block == count - 1
            x = block_type(
                width=net.width * 2 ** (stage - 1),
                stride=2 if stage > 1 and block == 0 else 1,
                dtype=net.dtype,
                axis_name=net.axis_name,
                name=f"stage{stage}_block{block}",
            )(
                x,
                train,
                functools.partial(sow_feature, net, f"stage{stage}_pre") if last else None,
            )
        sow_feature(net, f"stage{stage}", x)
    return x


class ResNet(nn.Module):
    """A ResNet of depth 6n + 2 with three stages.

    Module names: `stem`, `stem_bn`, `stem_relu`, `stage<s>_block<b>` with `conv1`, `bn1`, `conv2`,
    `bn2` and, where the shape changes, `shortcut`, `shortcut_bn`; `head`.

    Features (collection "features"): `stage1`, `stage2`, `stage3`, each stage's output after its
    ReLU, [batch, height, width, channels]; `stage1_pre` ... before it; `pooled`, the head's input,
    [batch, 4 * width].

    Convolutions have no bias and start from He's normal initialisation over fan-out, as in the code
    of arXiv 1910.10699; BatchNorm has decay 0.9 (0.1 in PyTorch's convention) and epsilon 1e-5. The
    head keeps linen's default initialisation.

    Attributes:
        depth: 6n + 2, at least 8: the number of weighted layers, projections not counted.
        width: channels of stage 1; stages 2 and 3 have twice and four times as many.
        stem_width: channels of the stem; None means `width`.
        shortcut: "projection" (option B) or "pad" (option A, what the paper's CIFAR nets use).
    """

    depth: int = 20
    num_classes: int = 10
    width: int = 16
    stem_width: int | None = None
    shortcut: str = "projection"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, head: bool = True) -> jax.Array:
        """Computes the logits of images of any size; see the contract in `qkd_jax.models`."""
        blocks = blocks_per_stage(self.depth)
        checks.integer_in("width", self.width, 1)
        checks.images("images", images)
        conv, norm = conv_and_norm(self, train)

        stem_width = self.width if self.stem_width is None else self.stem_width
        checks.integer_in("stem_width", stem_width, 1)
        x = conv(stem_width, (3, 3), padding=ONE_PIXEL, name="stem")(images)
        x = Activation(name="stem_relu")(norm(name="stem_bn")(x))
        block = functools.partial(BasicBlock, shortcut=self.shortcut)
        x = residual_stages(self, block, (blocks,) * 3, x, train)
        if not head:
            return x
        return logits_of(self, jnp.mean(x, axis=(1, 2)))
