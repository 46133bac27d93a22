"""MobileNetV3 for large images: inverted residuals with gates over channels and hard swish.

Reference: Howard et al., 2019, arXiv 1905.02244, tables 1 and 2. Layer names and numbers (padding,
roundings, activations) are such that a checkpoint of torchvision or timm gives the same logits;
`qkd_jax.weights` reads one. They differ in BatchNorm's epsilon, 1e-3 and 1e-5, and timm's `tf_*`
nets, whose weights come from TensorFlow, in padding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.components import conv_and_norm, logits_of
from qkd_jax.models.features import Activation, sow_feature

# Of each block: kernel, hidden channels, channels out, gate, activation, stride. A stage begins
# where the stride is 2 or the width changes.
Row = tuple[int, int, int, bool, str, int]
SMALL: tuple[tuple[Row, ...], ...] = (
    ((3, 16, 16, True, "relu", 2),),
    ((3, 72, 24, False, "relu", 2), (3, 88, 24, False, "relu", 1)),
    (
        (5, 96, 40, True, "hard_swish", 2),
        (5, 240, 40, True, "hard_swish", 1),
        (5, 240, 40, True, "hard_swish", 1),
    ),
    ((5, 120, 48, True, "hard_swish", 1), (5, 144, 48, True, "hard_swish", 1)),
    (
        (5, 288, 96, True, "hard_swish", 2),
        (5, 576, 96, True, "hard_swish", 1),
        (5, 576, 96, True, "hard_swish", 1),
    ),
)
LARGE: tuple[tuple[Row, ...], ...] = (
    ((3, 16, 16, False, "relu", 1),),
    ((3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1)),
    ((5, 72, 40, True, "relu", 2), (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1)),
    (
        (3, 240, 80, False, "hard_swish", 2),
        (3, 200, 80, False, "hard_swish", 1),
        (3, 184, 80, False, "hard_swish", 1),
        (3, 184, 80, False, "hard_swish", 1),
    ),
    ((3, 480, 112, True, "hard_swish", 1), (3, 672, 112, True, "hard_swish", 1)),
    (
        (5, 672, 160, True, "hard_swish", 2),
        (5, 960, 160, True, "hard_swish", 1),
        (5, 960, 160, True, "hard_swish", 1),
    ),
)
TABLES = {"small": (SMALL, 576, 1024), "large": (LARGE, 960, 1280)}  # blocks, `last`, `last_dense`
PADDINGS = ("equal", "same")
_ACTIVATIONS = {"relu": nn.relu, "hard_swish": nn.hard_swish}


def squeezed(channels: int) -> int:
    """Channels inside a gate: a quarter, to the nearest multiple of 8, and no tenth less."""
    quarter = channels // 4
    near = max(8, (quarter + 4) // 8 * 8)
    return near + 8 if near < 0.9 * quarter else near


def _padding(kind: str, kernel: int) -> Any:
    """Zeros around a map: as many on every side, or TensorFlow's, fewer at the start."""
    return "SAME" if kind == "same" else ((kernel // 2,) * 2,) * 2


class Gate(nn.Module):
    """Squeeze and excitation: every channel times a number in [0, 1] that all channels decide.

        y = x * hard_sigmoid(expand(relu(reduce(mean over positions of x))))

    Reference: Hu, Shen, Sun, 2017, arXiv 1709.01507, with the hard sigmoid of MobileNetV3.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to the same shape."""
        channels = x.shape[-1]
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = nn.relu(nn.Conv(squeezed(channels), (1, 1), dtype=self.dtype, name="reduce")(y))
        return x * nn.hard_sigmoid(nn.Conv(channels, (1, 1), dtype=self.dtype, name="expand")(y))


class GatedResidual(nn.Module):
    """V3's block: 1x1 up, depthwise, gate, 1x1 down without activation; the sum joins thin ends.

    `expand` is left out where the hidden channels are those that come in.

    Attributes:
        width: channels that come out.
        hidden: channels of the depthwise convolution.
        kernel: its edge.
        stride: its stride.
        gate: whether it is followed by a `Gate`.
        activation: "relu" or "hard_swish".
        epsilon: of the BatchNorms.
        padding: "equal" or "same".
    """

    width: int
    hidden: int
    kernel: int = 3
    stride: int = 1
    gate: bool = False
    activation: str = "hard_swish"
    epsilon: float = 1e-3
    dtype: Any = None
    axis_name: str | None = None
    padding: str = "equal"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [batch, height, width, channels] to [batch, height/stride, width/stride, width]."""
        checks.one_of("activation", self.activation, tuple(_ACTIVATIONS))
        conv, norm = conv_and_norm(self, train)
        act, y = _ACTIVATIONS[self.activation], x
        if self.hidden != x.shape[-1]:
            y = conv(self.hidden, (1, 1), name="expand")(y)
            y = act(norm(epsilon=self.epsilon, name="expand_bn")(y))
        y = conv(
            self.hidden,
            (self.kernel, self.kernel),
            strides=(self.stride, self.stride),
            padding=_padding(self.padding, self.kernel),
            feature_group_count=self.hidden,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
            name="depthwise",
        )(y)
        y = act(norm(epsilon=self.epsilon, name="depthwise_bn")(y))
        if self.gate:
            y = Gate(self.dtype, name="gate")(y)
        y = conv(self.width, (1, 1), name="project")(y)
        y = norm(epsilon=self.epsilon, name="project_bn")(y)
        return y + x if y.shape == x.shape else y


class MobileNetV3(nn.Module):
    """MobileNetV3, small or large.

    Module names: `stem`, `stem_bn`, `stem_act`, `stage<s>_block<b>` with `expand`, `expand_bn`
    (where the block expands), `depthwise`, `depthwise_bn`, `gate` (with `reduce`, `expand`),
    `project`, `project_bn`; `last`, `last_bn`, `last_dense`; `head`.

    Features (collection "features"): `stage1`, ..., each stage's linear output,
    [batch, height, width, channels]; `pooled`, the head's input.

    Attributes:
        size: "small" or "large".
        depth: stages that are built; None for all. Fewer make a net for tests.
        epsilon: of the BatchNorms: 1e-3 in torchvision and the paper's code, 1e-5 in timm's own.
        padding: of the convolutions that are larger than 1x1: "equal", as much on every side, or
            "same", TensorFlow's, which puts less at the start of an even map under stride 2 (timm's
            `tf_mobilenetv3_*`).
    """

    num_classes: int = 1000
    size: str = "small"
    depth: int | None = None
    epsilon: float = 1e-3
    dtype: Any = None
    axis_name: str | None = None
    padding: str = "equal"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, head: bool = True) -> jax.Array:
        """Computes the logits of images of any size; see the contract in `qkd_jax.models`."""
        checks.one_of("size", self.size, tuple(TABLES))
        checks.one_of("padding", self.padding, PADDINGS)
        checks.positive("epsilon", self.epsilon)
        stages, last, last_dense = TABLES[self.size]
        if self.depth is not None:
            checks.integer_in("depth", self.depth, 1, len(stages))
        checks.images("images", images)
        conv, norm = conv_and_norm(self, train)
        x = conv(16, (3, 3), strides=(2, 2), padding=_padding(self.padding, 3), name="stem")(images)
        x = norm(epsilon=self.epsilon, name="stem_bn")(x)
        x = Activation(nn.hard_swish, name="stem_act")(x)
        for stage, rows in enumerate(stages[: self.depth], start=1):
            for block, (kernel, hidden, width, gate, activation, stride) in enumerate(rows):
                x = GatedResidual(
                    width,
                    hidden,
                    kernel,
                    stride,
                    gate,
                    activation,
                    self.epsilon,
                    self.dtype,
                    self.axis_name,
                    self.padding,
                    name=f"stage{stage}_block{block}",
                )(x, train)
            sow_feature(self, f"stage{stage}_pre", x)  # a linear bottleneck has no activation
            sow_feature(self, f"stage{stage}", x)
        x = norm(epsilon=self.epsilon, name="last_bn")(conv(last, (1, 1), name="last")(x))
        x = nn.hard_swish(x)
        if not head:
            return x
        x = nn.Dense(last_dense, dtype=self.dtype, name="last_dense")(jnp.mean(x, axis=(1, 2)))
        return logits_of(self, nn.hard_swish(x))
