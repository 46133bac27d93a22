"""A multilayer perceptron: the smallest net of the project, for quick runs and tests."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from qkd_jax import checks
from qkd_jax.models.components import conv_and_norm, logits_of
from qkd_jax.models.features import sow_feature


class MLP(nn.Module):
    """Flattened images through dense layers with ReLU, then a dense head.

    Module names: `dense1`, `dense1_bn`, `dense2`, ..., `head`.

    Features (collection "features"), each [batch, size]: `hidden1`, `hidden2`, ... after the ReLU;
    `hidden1_pre`, ... before it; `pooled`, the head's input. (The names differ from the modules'
    because linen wants the two apart.)

    Hidden layers start from He's normal initialisation over fan-in; the head keeps linen's default.

    Attributes:
        hidden: sizes of the hidden layers; empty makes it a linear classifier.
        batch_norm: whether a BatchNorm (decay 0.9, epsilon 1e-5) stands before every ReLU; the
            dense layer before it then has no bias.
    """

    num_classes: int = 10
    hidden: Sequence[int] = (128, 128)
    batch_norm: bool = False
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, head: bool = True) -> jax.Array:
        """Computes the logits; see the contract in `qkd_jax.models`.

        The parameters depend on height * width * channels of the images.
        """
        checks.images("images", images)
        _, norm = conv_and_norm(self, train)
        x = images.reshape(images.shape[0], -1)
        for number, size in enumerate(self.hidden, start=1):
            checks.integer_in(f"hidden[{number - 1}]", size, 1)
            x = nn.Dense(
                size,
                use_bias=not self.batch_norm,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f"dense{number}",
            )(x)
            if self.batch_norm:
                x = norm(name=f"dense{number}_bn")(x)
            sow_feature(self, f"hidden{number}_pre", x)
            x = nn.relu(x)
            sow_feature(self, f"hidden{number}", x)
        if not head:
            return x
        return logits_of(self, x)
