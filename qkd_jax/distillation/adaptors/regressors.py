"""Adaptors that bring the student's features to the teacher's channels and size, one by one.

Each is a linen module `module(students, teachers, train=False) -> {input of the loss: array}`; the
builders take the features' shapes without the batch.
"""

import math

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
    outputs,
    views,
)
from qkd_jax.losses.inputs.feature_maps import adaptive_avg_pool

Maps = tuple[tuple[int, int, int], ...]
# Above this a valid convolution that shrinks a map would be mostly kernel; the map is pooled.
LARGEST_KERNEL = 5

PARAPHRASER_RATE = 0.1  # of the student's learning rate


def _maps(shapes: tuple[Shape, ...]) -> Maps:
    return tuple(map_shape(shape) for shape in shapes)


class Regressors(nn.Module):
    """FitNet's convolutional regressor for each pair, to the teacher's size and channels.

    3x3 with stride 2 where the student's map is twice the teacher's, a transposed 4x4 with stride 2
    where it is half, else a valid convolution of the difference in size; BatchNorm and ReLU follow,
    as in common code. The paper has neither, and trains regressor and lower layers in a stage of
    their own.

    Deviations: a map that is smaller, or larger by 5 and more, is not regressed to the teacher's
    size (a 1x1 convolution follows a pooling to the smaller one, and the loss pools the teacher's).

    Attributes:
        teachers: maps (height, width, channels) to come to.
        relu: whether a ReLU follows, as it should where the teacher's tap is behind one.

    Reference: Romero et al., 2014, arXiv 1412.6550; the shapes follow the code of arXiv 1910.10699.
    """

    teachers: Maps
    relu: bool = True

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        adapted = []
        for index, (x, wanted) in enumerate(zip(students, self.teachers, strict=True)):
            x = self._resized(as_map(x), wanted, f"regressor{index}")
            x = batch_norm(train, f"regressor{index}_bn")(x)
            adapted.append(nn.relu(x) if self.relu else x)
        return outputs(tuple(adapted), tuple(map(as_map, teachers)))

    def _resized(self, x: jax.Array, wanted: tuple[int, int, int], name: str) -> jax.Array:
        height, width, channels = wanted
        has = x.shape[1:3]
        if has == (2 * height, 2 * width) and height > 1:
            return conv(channels, 3, stride=2, name=name)(x)
        if (2 * has[0], 2 * has[1]) == (height, width):
            return nn.ConvTranspose(channels, (4, 4), strides=(2, 2), use_bias=False, name=name)(x)
        kernel = (1 + has[0] - height, 1 + has[1] - width)
        if not all(1 <= k <= LARGEST_KERNEL for k in kernel):
            x = adaptive_avg_pool(x, min(has[0], height), min(has[1], width))
            kernel = (1, 1)
        return nn.Conv(channels, kernel, padding="VALID", use_bias=False, name=name)(x)


def regressors(student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, relu: bool = True):
    """Regressors with a ReLU."""
    del student
    return Regressors(_maps(teacher), relu=bool(relu))


def linear_regressors(student: tuple[Shape, ...], teacher: tuple[Shape, ...]):
    """Regressors without a ReLU: activation boundaries live before it (arXiv 1811.03233)."""
    del student
    return Regressors(_maps(teacher), relu=False)


class Connectors(nn.Module):
    """A 1x1 convolution for each pair to the teacher's channels, and BatchNorm where asked for.

    Attributes:
        channels: the teacher's.
        norm: whether BatchNorm follows.
    """

    channels: tuple[int, ...]
    norm: bool = True

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        adapted = []
        for index, (x, channels) in enumerate(zip(students, self.channels, strict=True)):
            x = conv(channels, name=f"connector{index}")(as_map(x))
            adapted.append(batch_norm(train, f"connector{index}_bn")(x) if self.norm else x)
        return outputs(tuple(adapted), tuple(map(as_map, teachers)))


def connectors(student: tuple[Shape, ...], teacher: tuple[Shape, ...]):
    """Connectors with BatchNorm: correlations of channels need as many (Liu et al., 2021)."""
    del student
    return Connectors(tuple(m[2] for m in _maps(teacher)))


def projections(student: tuple[Shape, ...], teacher: tuple[Shape, ...]):
    """Nothing where the channels agree, as in the paper (Yim et al., 2017), else 1x1 products."""
    if [m[2] for m in _maps(student)] == [m[2] for m in _maps(teacher)]:
        return views(student, teacher)
    return Connectors(tuple(m[2] for m in _maps(teacher)), norm=False)


class Gaussians(nn.Module):
    """Mean and variance of the teacher's features given the student's, each a Gaussian.

    A mean is 1x1 - ReLU - 1x1 - ReLU - 1x1 of the student's map (all without bias, as wide as the
    teacher's); the variance of a channel is softplus(a) + 1e-5 and starts at `initial`.

    Reference: Ahn et al., 2019, arXiv 1904.05835, section 3.2; the paper has BatchNorm between the
    layers, its later re-implementations, like this, have none.
    """

    channels: tuple[int, ...]
    initial: float = 5.0

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        del train
        start = nn.initializers.constant(math.log(math.expm1(self.initial - 1e-5)))
        means, variances = [], []
        for index, (x, channels) in enumerate(zip(students, self.channels, strict=True)):
            x = as_map(x)
            for layer in range(3):
                x = conv(channels, name=f"mean{index}_{layer}")(nn.relu(x) if layer else x)
            means.append(x)
            raw = self.param(f"variance{index}", start, (channels,))
            variances.append(nn.softplus(raw) + 1e-5)
        return outputs(tuple(means), tuple(map(as_map, teachers)), variances=tuple(variances))


def gaussians(student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, initial: float = 5.0):
    """`initial` is the variance to start from."""
    del student
    checks.in_range("initial", initial, 1e-4, 1e4)
    return Gaussians(tuple(m[2] for m in _maps(teacher)), float(initial))


class MarginConnectors(nn.Module):
    """Connectors (1x1 and BatchNorm) beside the margins of the teacher's pre-activations.

    The margin of a channel is E[x | x < 0] of a Gaussian with the mean and the standard deviation
    that the teacher's BatchNorm gives it; `teacher_margins` computes them when the stage starts.
    Where no BatchNorm leads into a tap it is `margin`, and has to be given.

    Reference: Heo et al., 2019, arXiv 1904.01866.
    """

    channels: tuple[int, ...]
    margin: float | None = None

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        adapted = Connectors(self.channels, name="connectors")(students, teachers, train)
        start = jnp.float32(self.margin or 0.0)
        margins = tuple(
            self.variable("teacher", f"margin{index}", jnp.full, (channels,), start).value
            for index, channels in enumerate(self.channels)
        )
        return {**adapted, "margins": margins, "margin": margins[-1]}


def margin_connectors(
    student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, margin: float | None = None
):
    """`margin` is that of all channels of taps into which no BatchNorm leads, 0 or less."""
    del student
    if margin is not None:
        checks.in_range("margin", margin, -1e6, 0.0)
    return MarginConnectors(
        tuple(m[2] for m in _maps(teacher)), None if margin is None else float(margin)
    )


class _Encoder(nn.Module):
    """Three 3x3 convolutions with LeakyReLU 0.1 to the factor's channels."""

    channels: tuple[int, int, int]
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index, channels in enumerate(self.channels):
            x = conv(channels, 3, bias=not self.norm, name=f"conv{index}")(x)
            x = batch_norm(train, f"bn{index}")(x) if self.norm else x
            x = nn.leaky_relu(x, 0.1)
        return x


class FactorTransfer(nn.Module):
    """The teacher's paraphraser and the student's translator, which give factors of equal size.

    The paraphraser encodes the teacher's map to `rate` times its channels and decodes it again; it
    learns from the reconstruction alone, whose error is `adaptor_loss`, and its factor reaches the
    loss without gradient. It learns until the term's `start` and is frozen from then on, as in the
    paper, which has a stage before for that; other terms of the student may count meanwhile. It has
    no BatchNorm and takes a tenth of the student's learning rate, as a factor of its error:
    RepDistiller trains it at 0.01, and at a student's 0.1 it leaves the finite numbers.

    Reference: Kim, Park, Kwak, 2018, arXiv 1802.04977.
    """

    student: tuple[int, int, int]
    teacher: tuple[int, int, int]
    rate: float = 0.5

    @nn.compact
    def __call__(self, students: Features, teachers: Features, train: bool = False):
        """See `adaptors`."""
        size = min(self.student[0], self.teacher[0]), min(self.student[1], self.teacher[1])
        student = adaptive_avg_pool(as_map(students[-1]), *size)
        teacher = adaptive_avg_pool(as_map(teachers[-1]), *size)
        wide = self.teacher[2]
        factor = max(round(self.rate * wide), 1)
        encode = _Encoder((wide, factor, factor), norm=False, name="paraphraser")
        of_teacher = encode(teacher, train)
        x = of_teacher
        for index, channels in enumerate((factor, wide, wide)):
            # Stride 1: a transposed convolution is one with the kernel turned, which is learned.
            x = nn.leaky_relu(conv(channels, 3, bias=True, name=f"decoder{index}")(x), 0.1)
        error = PARAPHRASER_RATE * jnp.mean(jnp.square(x - teacher), axis=(1, 2, 3))
        own = self.student[2]
        translate = _Encoder((own, factor, factor), norm=True, name="translator")
        return outputs(
            (translate(student, train),),
            (jax.lax.stop_gradient(of_teacher),),
            adaptor_loss=error,
        )


def factors(student: tuple[Shape, ...], teacher: tuple[Shape, ...], *, rate: float = 0.5):
    """`rate` is the factor's channels over the teacher's."""
    checks.in_range("rate", rate, 1e-3, 1.0)
    return FactorTransfer(_maps(student)[-1], _maps(teacher)[-1], float(rate))
