"""Adaptors that mix features of several depths, and embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.distillation.adaptors.maps import (
    Features,
    Shape,
    as_map,
    batch_norm,
    conv,
    map_shape,
    nearest,
    outputs,
)
from qkd_jax.losses.inputs.feature_maps import adaptive_avg_pool, unit


class Review(nn.Module):
    """ReviewKD's attention-based fusion, from the deepest feature up to the shallowest.

    With x the student's map behind 1x1 and BatchNorm, y what the level below handed up (brought to
    its size by the nearest pixel) and [a, b] = sigmoid(1x1([x; y])): x <- a x + b y is handed up,
    and BatchNorm(3x3(x)) is compared with the teacher's feature.

    Deviation: where the teacher's map is of another size, the authors' code brings x to it before
    the 3x3 convolution, and this what comes out of it.

    Attributes:
        teachers: maps of the teacher, shallow to deep.
        middle: channels of x.

    Reference: Chen, Liu, Zhao, Jia, 2021, arXiv 2104.09044.
    """

    teachers: tuple[tuple[int, int, int], ...]
    middle: int

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        below = None
        adapted = []
        for index in reversed(range(len(students))):
            x = conv(self.middle, name=f"in{index}")(as_map(students[index]))
            x = batch_norm(train, f"in{index}_bn")(x)
            if below is not None:
                y = nearest(below, *x.shape[1:3])
                gates = conv(2, bias=True, name=f"gates{index}")(jnp.concatenate([x, y], axis=-1))
                gates = nn.sigmoid(gates)
                x = gates[..., :1] * x + gates[..., 1:] * y
            below = x
            height, width, channels = self.teachers[index]
            out = batch_norm(train, f"out{index}_bn")(conv(channels, 3, name=f"out{index}")(x))
            if out.shape[1] < height or out.shape[2] < width:
                out = nearest(out, max(height, out.shape[1]), max(width, out.shape[2]))
            adapted.append(adaptive_avg_pool(out, height, width))
        return outputs(tuple(reversed(adapted)), tuple(map(as_map, teachers)))


def review(student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, middle: int = 0):
    """`middle` channels inside; 0 takes the smaller of 512 and the deepest feature's."""
    checks.integer_in("middle", middle, 0)
    maps = tuple(map_shape(shape) for shape in teacher)
    return Review(maps, middle or min(512, map_shape(student[-1])[2]))


class Calibration(nn.Module):
    """SemCKD's adaptor: each student layer adapted to each teacher layer, and attention.

    f_ij is 1x1 - BatchNorm - ReLU - 3x3 - BatchNorm - ReLU - 1x1 of the student's map, pooled to
    the teacher's size where it is larger, with twice the teacher's channels inside. The attention
    a_ij is softmax over j of q_i . k_j, unit vectors that a two-layer perceptron makes of either
    layer's channels, averaged over positions.

    Deviation: the authors' perceptrons read an example's row of the batch's Gram matrix, so their
    weights belong to one batch size; these read the example alone.

    Attributes:
        teachers: maps of the teacher.
        dim: of queries and keys.

    Reference: Chen et al., 2020, arXiv 2012.03236.
    """

    teachers: tuple[tuple[int, int, int], ...]
    dim: int = 128

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        students, teachers = tuple(map(as_map, students)), tuple(map(as_map, teachers))
        rows = tuple(
            tuple(self._adapted(x, *to, train, f"f{i}_{j}") for j, to in enumerate(self.teachers))
            for i, x in enumerate(students)
        )
        queries = jnp.stack(
            [self._embedded(x, f"query{i}") for i, x in enumerate(students)], axis=1
        )
        keys = jnp.stack([self._embedded(x, f"key{j}") for j, x in enumerate(teachers)], axis=1)
        products = jnp.einsum("bnd,bmd->bnm", queries, keys)
        return {
            "student_features": rows,
            "teacher_features": teachers,
            "attention": jax.nn.softmax(products, axis=-1),
        }

    def _adapted(
        self, x: jax.Array, height: int, width: int, channels: int, train: bool, name: str
    ) -> jax.Array:
        x = adaptive_avg_pool(x, min(height, x.shape[1]), min(width, x.shape[2]))
        x = nn.relu(batch_norm(train, f"{name}_bn1")(conv(2 * channels, name=f"{name}_1")(x)))
        x = nn.relu(batch_norm(train, f"{name}_bn2")(conv(2 * channels, 3, name=f"{name}_2")(x)))
        return conv(channels, name=f"{name}_3")(x)

    def _embedded(self, x: jax.Array, name: str) -> jax.Array:
        x = nn.relu(nn.Dense(self.dim, name=f"{name}_1")(jnp.mean(x, axis=(1, 2))))
        return unit(nn.Dense(self.dim, name=f"{name}_2")(x))


def calibration(student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, dim: int = 128):
    """`dim` is that of queries and keys."""
    del student
    checks.integer_in("dim", dim, 1)
    return Calibration(tuple(map_shape(shape) for shape in teacher), dim)


class Embeddings(nn.Module):
    """One linear layer on either net's feature, averaged over positions if it is a map.

    The losses that take embeddings bring them to unit length themselves where their paper does.

    Attributes:
        dim: of the embeddings; 128 in contrastive distillation (Tian, Krishnan, Isola, 2019, arXiv
            1910.10699) and in the code of correlation congruence.
    """

    dim: int = 128

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        del train
        adapted = {}
        for name, feature in (("student", students[-1]), ("teacher", teachers[-1])):
            vector = jnp.mean(as_map(feature), axis=(1, 2))
            adapted[f"{name}_embedding"] = nn.Dense(self.dim, name=name)(vector)
        return adapted


def embeddings(student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, dim: int = 128):
    """`dim` is the size of the embeddings."""
    del student, teacher
    checks.integer_in("dim", dim, 1)
    return Embeddings(dim)


class Temperature(nn.Module):
    """CTKD's temperature, one number that learns: low + span sigmoid(t), t from `start`.

    It climbs the loss that the student descends: the loss turns its gradient around.

    Reference: Li et al., 2022, arXiv 2211.16231 (the global temperature).
    """

    low: float = 1.0
    span: float = 20.0
    start: float = 1.0

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        del students, teachers, train
        raw = self.param("temperature", nn.initializers.constant(self.start), ())
        return {"temperature": jnp.asarray(self.low + self.span * jax.nn.sigmoid(raw))}


def temperature(
    student: tuple[Shape, ...] = (),
    teacher: tuple[Shape, ...] = (),
    *,
    low: float = 1.0,
    span: float = 20.0,
    start: float = 1.0,
):
    """A temperature in (low, low + span)."""
    del student, teacher
    checks.in_range("low", low, 1e-3, 1e3)
    checks.in_range("span", span, 1e-3, 1e3)
    return Temperature(float(low), float(span), float(start))
