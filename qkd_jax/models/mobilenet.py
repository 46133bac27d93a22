"""MobileNets for small images: depthwise-separable convolutions and inverted residuals.

Both have the frame of this package's ResNets: a 3x3 stem, three stages on maps of size s, s/2, s/4,
global average pooling, one dense head. ImageNet's five halvings would leave nothing of 28 pixels;
their stem's stride of 2 is a field.

A depthwise convolution has one input channel a filter, so its kernel [3, 3, 1, channels] has a
range of its own for each channel, and these ranges differ a lot: the nets on which one scale a
tensor fails first.

References: Howard et al., 2017, arXiv 1704.04861 (V1); Sandler, Howard, Zhu, Zhmoginov, Chen, 2018,
arXiv 1801.04381 (V2).
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

_ACTIVATIONS = {"relu": nn.relu, "relu6": nn.relu6}
Module = Any  # any of the four below: they share dtype, axis_name and activation
SowPre = Callable[[jax.Array], Any]


def _layers(module: Module, train: bool) -> tuple[Callable[..., Any], ...]:
    """Returns constructors (conv, depthwise, norm) with the project's settings, and the ReLU."""
    checks.one_of("activation", module.activation, tuple(_ACTIVATIONS))
    conv, norm = conv_and_norm(module, train)
    conv = functools.partial(conv, padding="VALID")

    def depthwise(channels: int, stride: int, name: str) -> nn.Module:
        # Fan-out would count all channels although a filter feeds one: 1/sqrt(channels) too small.
        return conv(
            channels,
            (3, 3),
            strides=(stride, stride),
            padding=ONE_PIXEL,
            feature_group_count=channels,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
            name=name,
        )

    return conv, depthwise, norm, _ACTIVATIONS[module.activation]


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution, then a 1x1 one, each with BatchNorm and ReLU (V1's block).

        y = relu(pointwise_bn(pointwise(relu(depthwise_bn(depthwise(x))))))

    Attributes:
        width: channels that come out.
        stride: stride of the depthwise convolution.
        activation: "relu" or "relu6".
    """

    width: int
    stride: int = 1
    activation: str = "relu"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, sow_pre: SowPre | None = None
    ) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height/stride, width/stride, width].

        `sow_pre` is handed what goes into the last ReLU.
        """
        conv, depthwise, norm, relu = _layers(self, train)
        x = depthwise(x.shape[-1], self.stride, name="depthwise")(x)
        x = relu(norm(name="depthwise_bn")(x))
        x = norm(name="pointwise_bn")(conv(self.width, (1, 1), name="pointwise")(x))
        if sow_pre is not None:
            sow_pre(x)
        return relu(x)


class InvertedResidual(nn.Module):
    """V2's block: 1x1 up, depthwise 3x3, 1x1 down without ReLU; the sum joins the thin ends.

        y = project_bn(project(relu(depthwise_bn(depthwise(relu(expand_bn(expand(x))))))))
        y + x where the shape stays the same, else y

    What comes out has both signs.

    Attributes:
        width: channels that come out.
        stride: stride of the depthwise convolution.
        expansion: hidden channels for each channel that comes in; 1 leaves out `expand`.
        activation: "relu6" or "relu".
    """

    width: int
    stride: int = 1
    expansion: int = 6
    activation: str = "relu6"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height/stride, width/stride, width]."""
        conv, depthwise, norm, relu = _layers(self, train)
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = relu(norm(name="expand_bn")(conv(hidden, (1, 1), name="expand")(y)))
        y = relu(norm(name="depthwise_bn")(depthwise(hidden, self.stride, name="depthwise")(y)))
        y = norm(name="project_bn")(conv(self.width, (1, 1), name="project")(y))
        return y + x if y.shape == x.shape else y


class MobileNet(nn.Module):
    """MobileNet (V1) with three stages of separable blocks.

    Module names: `stem`, `stem_bn`, `stem_relu`, `stage<s>_block<b>` with `depthwise`,
    `depthwise_bn`, `pointwise`, `pointwise_bn`; `head`.

    Features (collection "features"): `stage1`, `stage2`, `stage3`, each stage's output after its
    ReLU, [batch, height, width, channels]; `stage1_pre` ... before it; `pooled`, the head's input,
    [batch, 8 * width].

    Convolutions have no bias and start from He's normal initialisation (over fan-out, the depthwise
    ones over fan-in); BatchNorm has decay 0.9 and epsilon 1e-5. The head keeps linen's default.

    Attributes:
        width: channels of the stem; the stages have twice, four and eight times as many. The
            paper's net has 32 (its multiplier is width / 32) and has two more stages.
        stem_stride: stride of the stem; 2, as in the paper, makes every later map a quarter as
            large.
        blocks: separable blocks of each of the three stages.
        activation: "relu", as in the paper, or "relu6".
    """

    num_classes: int = 10
    width: int = 8
    stem_stride: int = 2
    blocks: Sequence[int] = (1, 2, 2)
    activation: str = "relu"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, head: bool = True) -> jax.Array:
        """Computes the logits of images of any size; see the contract in `qkd_jax.models`."""
        x = _stem(self, images, train)
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                last = block == blocks - 1
                x = SeparableBlock(
                    width=self.width * 2**stage,
                    stride=2 if stage > 1 and block == 0 else 1,
                    activation=self.activation,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"stage{stage}_block{block}",
                )(
                    x,
                    train,
                    functools.partial(sow_feature, self, f"stage{stage}_pre") if last else None,
                )
            sow_feature(self, f"stage{stage}", x)
        return logits_of(self, jnp.mean(x, axis=(1, 2))) if head else x


class MobileNetV2(nn.Module):
    """MobileNetV2 with three stages of inverted residuals.

    Module names: `stem`, `stem_bn`, `stem_relu`, `stage<s>_block<b>` with `expand`, `expand_bn`
    (where the block expands), `depthwise`, `depthwise_bn`, `project`, `project_bn`; `last`,
    `last_bn`; `head`.

    The inputs of the `expand` layers and of `last` come from linear bottlenecks and have both
    signs: a rule for them is signed or affine, where other inputs follow a ReLU. `presets.rules`
    finds out by itself when it is given the model.

    Features (collection "features"): `stage1`, `stage2`, `stage3`, each stage's linear output,
    [batch, height, width, channels]; `pooled`, the head's input, [batch, 16 * width].

    Initialisation and BatchNorm are those of `MobileNet`.

    Attributes:
        width: channels of the stem and of stage 1; stages 2 and 3 have twice and four times as
            many, `last` sixteen times.
        stem_stride: stride of the stem; 2, as in the paper, makes every later map a quarter as
            large.
        blocks: inverted residuals of each of the three stages.
        expansion: hidden channels for each channel of a bottleneck; stage 1 does not expand, as in
            the paper.
        activation: "relu6", as in the paper, or "relu".
    """

    num_classes: int = 10
    width: int = 8
    stem_stride: int = 2
    blocks: Sequence[int] = (1, 2, 2)
    expansion: int = 6
    activation: str = "relu6"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, head: bool = True) -> jax.Array:
        """Computes the logits of images of any size; see the contract in `qkd_jax.models`."""
        checks.integer_in("expansion", self.expansion, 1)
        x = _stem(self, images, train)
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                x = InvertedResidual(
                    width=self.width * 2 ** (stage - 1),
                    stride=2 if stage > 1 and block == 0 else 1,
                    expansion=self.expansion if stage > 1 else 1,
                    activation=self.activation,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"stage{stage}_block{block}",
                )(x, train)
            sow_feature(self, f"stage{stage}_pre", x)  # a linear bottleneck has no activation
            sow_feature(self, f"stage{stage}", x)
        conv, _, norm, relu = _layers(self, train)
        x = relu(norm(name="last_bn")(conv(16 * self.width, (1, 1), name="last")(x)))
        return logits_of(self, jnp.mean(x, axis=(1, 2))) if head else x


def _stem(module: Module, images: jax.Array, train: bool) -> jax.Array:
    """Checks a net's fields and images, and computes its first layer."""
    checks.integer_in("width", module.width, 1)
    checks.integer_in("stem_stride", module.stem_stride, 1)
    if isinstance(module.blocks, str | int) or len(module.blocks) != 3:
        raise ValueError(
            f"blocks is {module.blocks!r}; it must be three numbers, the blocks of each stage, "
            "such as (1, 2, 2)."
        )
    for place, count in enumerate(module.blocks):
        checks.integer_in(f"blocks[{place}]", count, 1)
    checks.images("images", images)
    conv, _, norm, relu = _layers(module, train)
    strides = (module.stem_stride, module.stem_stride)
    x = conv(module.width, (3, 3), strides=strides, padding=ONE_PIXEL, name="stem")(images)
    return Activation(relu, name="stem_relu")(norm(name="stem_bn")(x))
