"""Further classifiers on a net's hidden features: they train it, and are no part of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.distillation.adaptors.maps import Features, Shape, as_map, batch_norm, map_shape
from qkd_jax.models.resnet import BasicBlock


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

    @nn.nowrap
    def head_names(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the classifiers on these taps: each has its own."""
        return taps

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
        adapted: dict[str, Any] = {
            "heads_logits": tuple(logits),
            "student_features": tuple(features),
        }
        if teachers:
            adapted["teacher_feature"] = jnp.mean(as_map(teachers[-1]), axis=(1, 2))
        return adapted


def shallow_heads(student: tuple[Shape, ...], teacher: tuple[Shape, ...], classes: int):
    """A head for each of the student's taps, at the size of the deepest feature."""
    del student
    return ShallowHeads(map_shape(teacher[-1]), classes)


class Branches(nn.Module):
    """Further ends of a net on the last tap but one, and the gate that weighs all ends.

    A branch comes to the size and channels of the last tap by residual blocks on a map, by a dense
    layer with BatchNorm and ReLU on a vector; a dense layer on its mean over positions gives its
    logits. The gate is a dense layer on the trunk's mean, BatchNorm, ReLU and softmax.

    Attributes:
        deepest: shape of the net's own last feature, without the batch.
        classes: number of logits.
        branches: ends in all, the net's own among them.
        blocks: residual blocks of a branch.

    Reference: Lan, Zhu, Gong, 2018, arXiv 1806.04606, where branches repeat the net's own last
    stage. For the ResNets for small images they do so here, given as many blocks; the further
    branches of any other net on maps are a ResNet's.
    """

    deepest: Shape
    classes: int
    branches: int = 3
    blocks: int = 1

    @nn.nowrap
    def head_names(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the classifiers beside the net's own."""
        del taps
        return tuple(f"branch{k}" for k in range(1, self.branches))

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        del teachers
        trunk, height = as_map(students[-2]), map_shape(self.deepest)[0]
        channels, stride = self.deepest[-1], max(round(trunk.shape[1] / height), 1)
        mean, logits = jnp.mean(trunk, axis=(1, 2)), []
        for branch in range(1, self.branches):
            if students[-2].ndim == 2:
                x = nn.Dense(channels, use_bias=False, name=f"branch{branch}_dense")(mean)
                x = nn.relu(batch_norm(train, f"branch{branch}_bn")(x))
            else:
                x = trunk
                for block in range(self.blocks):
                    name = f"branch{branch}_block{block}"
                    x = BasicBlock(channels, 1 if block else stride, name=name)(x, train)
                x = jnp.mean(x, axis=(1, 2))
            logits.append(nn.Dense(self.classes, name=f"branch{branch}_head")(x))
        gate = nn.Dense(self.branches, use_bias=False, name="gate")(mean)
        gate = jax.nn.softmax(nn.relu(batch_norm(train, "gate_bn")(gate)))
        return {"heads_logits": tuple(logits), "gate": gate}


def branches(
    student: tuple[Shape, ...],
    teacher: tuple[Shape, ...],
    classes: int,
    *,
    branches: int = 3,
    blocks: int = 1,
):
    """`branches` counts the net's own end too; `blocks` are the residual blocks of each other."""
    del teacher
    checks.integer_in("branches", branches, 2)
    checks.integer_in("blocks", blocks, 1)
    if len(student) < 2:
        raise ValueError(
            f"taps has {len(student)} entry; branches leave the net at the last tap but one and "
            "come to the size of the last, so give two or more."
        )
    return Branches(student[-1], classes, int(branches), int(blocks))
