"""Feature losses on second-order statistics of a map: how its channels go together.

A map [batch, height, width, channels] counts as a matrix of positions by channels, and the losses
compare products of such matrices, example by example.
"""

import itertools
import math

import jax.numpy as jnp

from qkd_jax.losses.inputs.feature_maps import (
    example_means,
    pooled_alike,
    prepare_feature_lists,
    prepare_features,
    unit,
)
from qkd_jax.losses.inputs.logits import keep
from qkd_jax.losses.inputs.shapes import Array, Arrays, Feature, Mask, Values


def nst(student_features: Arrays, teacher_features: Arrays, *, where: Mask = None) -> Values:
    """Neuron selectivity transfer: maximum mean discrepancy of channels, polynomial kernel.

    With s_i and t_j the maps of single channels, divided by their Euclidean norm, and the kernel
    k(x, y) = (x . y)^2, summed over the maps:

        L = sum_l mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(s_i, t_j)

    Args:
        student_features: tuple of maps [batch, height, width, channels]; the net that learns.
        teacher_features: as many maps, with any channels; no gradient flows into them.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the channels' distributions agree. Common code weights it
        by 50.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4)[None, ..., None], jnp.ones((1, 4, 4, 2))
        >>> print(qk.losses.nst((student,), (teacher,)))
        [1.5]

    Note:
        The paper's d = 2, c = 0. Maps of unlike size are pooled.

    Reference:
        Huang, Wang, 2017, arXiv 1707.01219.
    """
    pairs, mask = prepare_feature_lists(
        student_features, teacher_features, where, alike="size", maps=True
    )
    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for student, teacher in pairs:
        s, t = (unit(_matrix(x), axis=1) for x in (student, teacher))
        value += _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)
    return keep(value, mask)


def fsp(student_features: Arrays, teacher_features: Arrays, *, where: Mask = None) -> Values:
    """Flow of the solution procedure: products of consecutive maps.

    With F and H consecutive maps of one net, the larger pooled to the other's size, and
    G_cd = 1/(height width) sum_hw F_hwc H_hwd, summed over consecutive pairs:

        L = sum_l mean_cd (G_l^student - G_l^teacher)^2

    Args:
        student_features: tuple of at least two maps [batch, height, width, channels]; the net that
            learns.
        teacher_features: as many maps with as many channels, of any size; no gradient flows into
            them.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the products agree. Common code weights it by 50.

    Raises:
        ValueError: for fewer than two maps, or shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
        >>> print(qk.losses.fsp((student, student), (teacher, student)))
        [1. 1.]

    Note:
        The paper sums where this takes the mean over c and d, and pools by the maximum. It uses the
        loss in a stage of its own, before the labels. RepDistiller pairs the stem with the first
        stage too: taps=("stem_relu", "stages"). torchdistill 1.1.5 sums norms of columns that are
        not squared.

    Reference:
        Yim et al., CVPR 2017, "A gift from knowledge distillation".
    """
    pairs, mask = prepare_feature_lists(
        student_features, teacher_features, where, alike="channels", maps=True
    )
    if len(pairs) < 2:
        raise ValueError(
            f"student_features has {len(pairs)} entry; fsp takes products of consecutive maps: "
            "give two or more."
        )

    def flow(first: Array, second: Array) -> Array:
        first, second = (_matrix(x) for x in pooled_alike(first, second))
        return _products(first, second) / first.shape[1]

    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for (s, t), (next_s, next_t) in itertools.pairwise(pairs):
        value += example_means(jnp.square(flow(s, next_s) - flow(t, next_t)))
    return keep(value, mask)


def ickd(student_feature: Feature, teacher_feature: Array, *, where: Mask = None) -> Values:
    """Inter-channel correlation: the Gram matrix of a map's channels, row by row.

    With G_cd = sum_hw F_hwc F_hwd, each row of G divided by its Euclidean norm:

        L = 1/channels sum_cd (G_cd^student - G_cd^teacher)^2

    Args:
        student_feature: map [batch, height, width, channels], adapted; the net that learns.
        teacher_feature: map of as many channels and any size; no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the normalised rows agree.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4)[None], jnp.ones((1, 4, 4))
        >>> print(qk.losses.ickd(student[..., None, :], teacher[..., None, :]))
        [1.]

    Note:
        The paper divides by channels^2 and does not normalise; this follows the authors' code, but
        for its second division by the batch, by which the loss halves when the batch doubles
        (torchdistill 1.1.5 has that too).

    Reference:
        Liu et al., 2022, arXiv 2202.03680.
    """
    student, teacher, mask = prepare_features(
        student_feature, teacher_feature, where, alike="channels", maps=True
    )
    s, t = (unit(_products(_matrix(x), _matrix(x))) for x in (student, teacher))
    return keep(jnp.sum(jnp.square(s - t), axis=(1, 2)) / s.shape[1], mask)


def _matrix(x: Array) -> Array:
    """[batch, height, width, channels] -> [batch, positions, channels]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _products(x: Array, y: Array) -> Array:
    """[batch, positions, c], [batch, positions, d] -> [batch, c, d]."""
    return jnp.einsum("bnc,bnd->bcd", x, y, precision="highest")


def _kernel(x: Array, y: Array) -> Array:
    return example_means(jnp.square(_products(x, y)))
