"""Feature losses on pre-activations: on which side of the ReLU a neuron lies, and how far.

Both take taps before the activation, and are sums over a feature's elements, as in the papers:
divide the weight accordingly (common code by 1000).
"""

import math

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import check_tuple, prepare_feature_lists, rows
from qkd_jax.losses.inputs.logits import keep
from qkd_jax.losses.inputs.shapes import Array, Arrays, Mask, Scalar, Values


def ab(
    student_features: Arrays, teacher_features: Arrays, *, margin: Scalar = 1.0, where: Mask = None
) -> Values:
    """Activation boundaries: push the student's neurons to the teacher's side, with a margin.

    With pre-activations s, t of n features and margin m, summed over elements:

        L = sum_l 2^(l - n) sum ((s + m)^2 [t <= 0 and s > -m] + (s - m)^2 [t > 0 and s <= m])

    so that the deepest feature, l = n, has weight 1.

    Args:
        student_features: tuple of pre-activations, adapted; the net that learns.
        teacher_features: as many, with as many channels; no gradient flows into them.
        margin: m, >= 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where all neurons are on the teacher's side beyond the margin,
        which student = teacher is not.

    Raises:
        ValueError: for shapes that do not fit, or a negative margin.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = -jnp.eye(4), jnp.eye(4)
        >>> print(qk.losses.ab((student,), (teacher,), margin=1.0))
        [7. 7. 7. 7.]

    Note:
        A stage of its own comes before the labels. Common code weights it by 3 / 1000. The powers
        of two are those of the authors' code.

    Reference:
        Heo et al., 2018, arXiv 1811.03233.
    """
    checks.number("margin", margin, low=0.0)
    pairs, mask = prepare_feature_lists(student_features, teacher_features, where)
    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for level, (student, teacher) in enumerate(pairs, start=1):
        m = jnp.asarray(margin, student.dtype)
        below = jnp.where((teacher <= 0) & (student > -m), student + m, 0)
        above = jnp.where((teacher > 0) & (student <= m), student - m, 0)
        value += 2.0 ** (level - len(pairs)) * _sums(jnp.square(below) + jnp.square(above))
    return keep(value, mask)


def ofd(
    student_features: Arrays, teacher_features: Arrays, margins: Arrays, *, where: Mask = None
) -> Values:
    """Overhaul of feature distillation: a partial distance to the margin ReLU of the teacher.

    With pre-activations s, t of n features and T = max(t, m), m < 0 a margin per channel, summed
    over elements:

        L = sum_l 2^(l - n) sum ((s - T)^2 unless s <= T <= 0)

    so that the deepest feature, l = n, has weight 1. Where the teacher is inactive, the student
    need only be inactive too.

    Args:
        student_features: tuple of pre-activations, adapted; the net that learns.
        teacher_features: as many, with as many channels; no gradient flows into them.
        margins: tuple of m, [channels] each; no gradient flows into them.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 at equality.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4), -jnp.eye(4)
        >>> print(qk.losses.ofd((student,), (teacher,), (jnp.full(4, -0.5),)))
        [2.25 2.25 2.25 2.25]

    Note:
        Common code weights it by 1 / 1000. One code base runs the teacher's BatchNorm on batch
        statistics here; the teacher of this project is in evaluation mode.

    Reference:
        Heo et al., 2019, arXiv 1904.01866.
    """
    pairs, mask = prepare_feature_lists(student_features, teacher_features, where)
    check_tuple("margins", margins, "one vector [channels] per feature")
    if len(margins) != len(pairs):
        raise ValueError(f"margins has {len(margins)} entries; the features are {len(pairs)}.")
    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for level, ((student, teacher), margin) in enumerate(zip(pairs, margins, strict=True), start=1):
        m = jax.lax.stop_gradient(jnp.asarray(margin))
        checks.vector(f"margins[{level - 1}]", m, student.shape[-1], "one entry per channel")
        m = m.astype(student.dtype).reshape((1,) * (student.ndim - 1) + (-1,))
        target = jnp.maximum(teacher, m)
        gap = jnp.where((student > target) | (target > 0), student - target, 0)
        value += 2.0 ** (level - len(pairs)) * _sums(jnp.square(gap))
    return keep(value, mask)


def ofd_margin(mean: Array, std: Array) -> Array:
    """Expected value of the negative part of a Gaussian: the margin of `ofd`.

        m = E[x | x < 0] = mean - std phi(mean / std) / Phi(-mean / std)

    with phi and Phi the density and the distribution function of the standard Gaussian. Where fewer
    than one in a thousand are negative, m = -3 std.

    Args:
        mean: bias of the BatchNorm that gives the pre-activations, any shape.
        std: size of its scale, >= 0, same shape.

    Returns:
        m, same shape, float32 or wider; 0 or less.

    Raises:
        ValueError: for shapes that differ.

    Reference:
        Heo et al., 2019, arXiv 1904.01866.
    """
    mean, std = jnp.asarray(mean), jnp.abs(jnp.asarray(std))
    checks.same_shape(mean=mean, std=std)
    dtype = jnp.promote_types(jnp.promote_types(mean.dtype, std.dtype), jnp.float32)
    mean, std = mean.astype(dtype), std.astype(dtype)
    ratio = mean / jnp.where(std > 0, std, 1)
    mass = jax.scipy.stats.norm.cdf(-ratio)
    density = jnp.exp(-0.5 * jnp.square(ratio)) / math.sqrt(2 * math.pi)
    usual = mass > 1e-3
    margin = jnp.where(usual, mean - std * density / jnp.where(usual, mass, 1), -3 * std)
    # A channel without spread is constant: its negative part is itself.
    return jnp.where(std > 0, margin, jnp.minimum(mean, 0))


def _sums(x: Array) -> Array:
    return jnp.sum(rows(x), axis=-1)
