"""A student and a teacher of other families, widths, depths and resolutions, as small as can be."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np

from qkd_jax.distillation.taps import DataShape
from qkd_jax.models import BorrowedClassifier
from qkd_jax.models.features import sow_feature
from qkd_jax.quantize import quantize
from qkd_jax.training.state import jit_once

DATA = DataShape(image=(8, 8, 1), examples=24)
CLASSES = 3
# One step of this moves every parameter by minus its gradient.
PLAIN = {"lr": 1.0, "momentum": 0.0, "schedule": "constant"}


class Conv(nn.Module):
    """Two stages of one 3x3 convolution, maps of 8x8 and 4x4."""

    width: int = 4
    dtype: str | None = None

    @nn.compact
    def __call__(self, x, train=False, head=True):
        """Returns logits [batch, 3]."""
        for stage in (1, 2):
            x = nn.Conv(
                self.width * stage, (3, 3), strides=(stage, stage), use_bias=False, name=f"c{stage}"
            )(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"n{stage}")(x)
            sow_feature(self, f"stage{stage}_pre", x)
            x = nn.relu(x)
            sow_feature(self, f"stage{stage}", x)
        if not head:
            return x
        x = x.mean((1, 2))
        sow_feature(self, "pooled", x)
        return nn.Dense(CLASSES, name="head")(x)


class Patches(nn.Module):
    """Patches of 2x2, then three stages of pointwise convolutions, the second with stride 2."""

    width: int = 6

    @nn.compact
    def __call__(self, x, train=False):
        """Returns logits [batch, 3]."""
        x = nn.Conv(self.width, (2, 2), strides=(2, 2), name="patches")(x)
        for stage in (1, 2, 3):
            stride = 2 if stage == 2 else 1
            x = nn.Conv(self.width * stage, (1, 1), strides=(stride, stride), name=f"p{stage}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"n{stage}")(x)
            sow_feature(self, f"stage{stage}_pre", x)
            x = nn.relu(x)
            sow_feature(self, f"stage{stage}", x)
        x = x.mean((1, 2))
        sow_feature(self, "pooled", x)
        return nn.Dense(CLASSES, name="head")(x)


def batch(seed: int = 0, rows: int = 8) -> dict[str, np.ndarray]:
    """One batch of noise."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(rows, *DATA.image)).astype(np.float32),
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "index": rng.choice(DATA.examples, rows, replace=False).astype(np.int32),
    }


@functools.cache
def nets():
    """({net: module}, {net: variables}); `borrower` ends in the teacher's classifier."""
    borrower = BorrowedClassifier(Conv(), num_classes=CLASSES, features=18)
    modules = {
        "student": quantize(Conv()),
        "borrower": quantize(borrower),
        "teacher": quantize(Patches()),
        "other": quantize(Patches(5)),
    }
    images = batch()["image"]
    variables = {
        net: jit_once(module.init)(jax.random.key(place), images)
        for place, (net, module) in enumerate(modules.items())
    }
    return modules, variables
