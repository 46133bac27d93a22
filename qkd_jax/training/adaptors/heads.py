"""Further classifiers on a net's hidden features: they train it, and are no part of it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qkd_jax.training.adaptors.maps import Features, Shape, as_map, batch_norm, map_shape

__all__ = ["ShallowHeads", "byot"]


class ShallowHeads(nn.Module):
    """A bottleneck and a dense layer on each tap.

    The bottleneck is a 1x1 convolution to a quarter of the deepest feature's channels, one whose
    kernel and stride shrink the map to the deepest one's size, and a 1x1 convolution to its
    channels, BatchNorm and ReLU behind each. Its mean over positions is the classifier's feature.

    Attributes:
      deepest: map (height, width, channels) of the feature that teaches.
      classes: number of logits.

    Reference: Zhang, Song, Gao, Chen, Bao, Ma, 2019, arXiv 1905.08094, figure 2; the bottleneck
    follows a re-implementation.
    """

    deepest: tuple[int, int, int]
    classes: int

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`; without `teachers` there is no feature of theirs among the outputs."""
        height, width, channels = self.deepest
        thin = max(channels // 4, 1)
        features, logits = [], []
        for index, x in enumerate(students):
            x = as_map(x)
            shrink = max(x.shape[1] // height, 1), max(x.shape[2] // width, 1)
            for place, (wide, size) in enumerate(
                ((thin, (1, 1)), (thin, shrink), (channels, (1, 1))), 1
            ):
                name = f"head{index}_conv{place}"
                x = nn.Conv(wide, size, size, padding="VALID", use_bias=False, name=name)(x)
                x = nn.relu(batch_norm(train, f"head{index}_bn{place}")(x))
            features.append(jnp.mean(x, axis=(1, 2)))
            logits.append(nn.Dense(self.classes, name=f"head{index}")(features[-1]))
        found: dict[str, Any] = {
            "heads_logits": tuple(logits),
            "student_features": tuple(features),
        }
        if teachers:
            found["teacher_feature"] = jnp.mean(as_map(teachers[-1]), axis=(1, 2))
        return found


def byot(student: tuple[Shape, ...], teacher: tuple[Shape, ...], classes: int):
    """A head for each of the student's taps, at the size of the deepest feature."""
    del student
    return ShallowHeads(map_shape(teacher[-1]), classes)
