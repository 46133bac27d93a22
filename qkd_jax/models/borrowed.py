"""A student that ends in its teacher's classifier: the network that SimKD trains and deploys."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.models.components import conv_and_norm, logits_of
from qkd_jax.models.features import sow_feature


class BorrowedClassifier(nn.Module):
    """A body without its head, a projector to another net's features, and that net's head.

        logits = head(mean over positions of p),
        p = relu(bn(1x1(relu(bn(3x3(relu(bn(1x1(body(x)))))))))),

    the first two layers of the projector `factor` times thinner than the features. All layers of
    the body keep their paths, so the rules of the body fit; the projector's are `projector1`,
    `projector1_bn`, ... `projector3_bn`, and `head` is a dense layer into which the other net's
    parameters go.

    Features (collection "features"): those of the body but for its `pooled`; `projected`, p,
    [batch, height, width, features], at the size of the body's last map; `pooled`, the head's
    input, [batch, features].

    Attributes:
        body: a module called as `body(images, train=False, head=False)`, which then returns its
            last map [batch, height, width, channels] or vector [batch, channels].
        features: channels of the other net's last map, the head's input.
        factor: how many times thinner the projector is inside.

    Reference: Chen, Mei, Zhang, Wang, Feng, Chen, 2022, arXiv 2203.14001. The paper pools a
    student's map that is larger than the teacher's before it is projected; here the loss pools
    after.
    """

    body: nn.Module
    num_classes: int = 10
    features: int = 64
    factor: int = 2
    dtype: Any = None
    axis_name: str | None = None

    def setup(self):
        """The body's layers lie beside the projector's instead of one level below."""
        nn.share_scope(self, self.body)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Computes the logits of what the body takes; see the contract in `qkd_jax.models`.

        Raises:
            ValueError: for numbers below 1, or a body that cannot leave out its head.
        """
        checks.integer_in("features", self.features, 1)
        checks.integer_in("factor", self.factor, 1)
        if "head" not in inspect.signature(type(self.body).__call__).parameters:
            raise ValueError(
                f"the body is a {type(self.body).__name__}, which cannot leave out its head; it "
                "must be callable as body(images, train=False, head=False), as the ResNets, "
                "MobileNets and the MLP are."
            )
        x = self.body(images, train=train, head=False)
        x = x.reshape(x.shape[0], 1, 1, -1) if x.ndim == 2 else x
        thin = max(self.features // self.factor, 1)
        conv, norm = conv_and_norm(self, train)
        for number, (channels, size) in enumerate(((thin, 1), (thin, 3), (self.features, 1)), 1):
            padding = ((size // 2, size // 2),) * 2
            x = conv(channels, (size, size), padding=padding, name=f"projector{number}")(x)
            x = nn.relu(norm(name=f"projector{number}_bn")(x))
        sow_feature(self, "projected", x)
        return logits_of(self, jnp.mean(x, axis=(1, 2)))
