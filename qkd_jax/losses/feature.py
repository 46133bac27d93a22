"""Feature losses that compare adapted features, or maps derived from them, element by element.

A learned module between tap and loss is its adaptor (`distillation/adaptors`); the losses are
functions of the adapted features. Values are means over a feature's elements, so they do not grow
with its size.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import (
    adaptive_avg_pool,
    check_tuple,
    example_means,
    prepare_feature_lists,
    prepare_features,
    rows,
    safe_norm,
    unit,
)
from qkd_jax.losses.inputs.logits import keep
from qkd_jax.losses.inputs.shapes import Array, Arrays, Feature, Mask, Values


def fitnet(student_feature: Feature, teacher_feature: Array, *, where: Mask = None) -> Values:
    """Hint-based distillation: mean squared error of a hidden feature.

        L = mean (f_student - f_teacher)^2

    Args:
        student_feature: map or vector, adapted; the net that learns.
        teacher_feature: as many channels; no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 at equality. Common code weights it by 100.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
        >>> print(qk.losses.fitnet(student, teacher))
        [1. 1.]

    Note:
        The paper has half the squared norm: a sum over elements.

    Reference:
        Romero et al., 2014, arXiv 1412.6550.
    """
    student, teacher, mask = prepare_features(student_feature, teacher_feature, where)
    return keep(example_means(jnp.square(student - teacher)), mask)


def simkd(student_feature: Feature, teacher_feature: Array, *, where: Mask = None) -> Values:
    """Distillation for a student that borrows the teacher's classifier: mean squared error.

        L = mean (f_student - f_teacher)^2

    of the teacher's last map and the student's, projected. It is the only loss: there is no
    cross-entropy, and the student predicts by the teacher's classifier on its own pooled,
    projected map (`models/borrowed.py`), at evaluation and export too.

    Args:
        student_feature: map or vector, adapted; the net that learns.
        teacher_feature: as many channels; no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 at equality.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
        >>> print(qk.losses.simkd(student, teacher))
        [1. 1.]

    Reference:
        Chen et al., 2022, arXiv 2203.14001.
    """
    return fitnet(student_feature, teacher_feature, where=where)


def at(
    student_features: Arrays,
    teacher_features: Arrays,
    *,
    mode: str = "code",
    power: int = 2,
    where: Mask = None,
) -> Values:
    """Attention transfer: where in a map a net is active.

    With A = mean_c |F_c|^power, flattened and divided by its Euclidean norm, summed over the maps:

        code:   L = sum_l mean_hw (A_l^student - A_l^teacher)^2
        paper:  L = sum_l |A_l^student - A_l^teacher|_2

    Args:
        student_features: tuple of maps [batch, height, width, channels]; the net that learns.
        teacher_features: as many maps, with any channels; no gradient flows into them.
        mode: "code" (the authors' code) or "paper" (their equation 2, whose factor beta / 2 is the
            weight's business).
        power: p, at least 1.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the attention maps agree. Common code weights mode "code"
        by 1000.

    Raises:
        ValueError: for shapes that do not fit, an unknown mode, or a power below 1.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(4)[None, ..., None], jnp.ones((1, 4, 4, 2))
        >>> print(qk.losses.at((student,), (teacher,)))
        [0.062]

    Note:
        Some code takes F^p without the absolute value, which is wrong for odd p. Maps of unlike
        size are pooled before the attention is taken, as in common code.

    Reference:
        Zagoruyko, Komodakis, 2016, arXiv 1612.03928.
    """
    checks.one_of("mode", mode, ("code", "paper"))
    checks.integer_in("power", power, 1)
    pairs, mask = prepare_feature_lists(
        student_features, teacher_features, where, alike="size", maps=True
    )

    def attention(x: Array) -> Array:
        return unit(rows(jnp.mean(jnp.abs(x) ** power, axis=-1)))

    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for student, teacher in pairs:
        gap = attention(student) - attention(teacher)
        value += jnp.mean(jnp.square(gap), axis=-1) if mode == "code" else safe_norm(gap)
    return keep(value, mask)


def vid(
    student_features: Arrays, teacher_features: Arrays, variances: Arrays, *, where: Mask = None
) -> Values:
    """Variational information distillation: likelihood of the teacher's features, Gaussians.

    With one learned variance v_lc per channel, summed over the features:

        L = 1/2 sum_l mean ((f_l^student - f_l^teacher)^2 / v_l + log v_l)

    Args:
        student_features: tuple of maps or vectors, adapted: predicted means; the net that learns.
        teacher_features: as many, with as many channels; no gradient flows into them.
        variances: tuple of v, [channels] each, above 0; the gradient flows into them.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; may be negative, the constant log(2 pi) / 2 is left out.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
        >>> print(qk.losses.vid((student,), (teacher,), (jnp.full(3, 5.0),)))
        [0.905 0.905]

    Note:
        In one well-known code base the a are not registered as parameters and never learned. The
        loss looks at all stages, as common code does, each at weight 1; the paper picks the pairs.

    Reference:
        Ahn et al., 2019, arXiv 1904.05835.
    """
    pairs, mask = prepare_feature_lists(student_features, teacher_features, where)
    check_tuple("variances", variances, "one vector [channels] per feature")
    if len(variances) != len(pairs):
        raise ValueError(f"variances has {len(variances)} entries; the features are {len(pairs)}.")
    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for i, ((student, teacher), variance) in enumerate(zip(pairs, variances, strict=True)):
        v = jnp.asarray(variance)
        checks.vector(f"variances[{i}]", v, student.shape[-1], "one entry per channel")
        v = v.astype(student.dtype).reshape((1,) * (student.ndim - 1) + (-1,))
        value += 0.5 * example_means(jnp.square(student - teacher) / v + jnp.log(v))
    return keep(value, mask)


def ft(student_feature: Feature, teacher_feature: Array, *, where: Mask = None) -> Values:
    """Factor transfer: mean absolute difference of factors of unit length.

        L = mean | f_student / |f_student|_2 - f_teacher / |f_teacher|_2 |

    with the norm over all elements of an example.

    Args:
        student_feature: the translator's factors, map or vector; the net that learns.
        teacher_feature: the paraphraser's factors, as many channels; no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the factors agree up to a positive multiple.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.ft(jnp.eye(4), jnp.ones((4, 4))))
        [0.5 0.5 0.5 0.5]

    Note:
        The paper's p = 1. One well-known code base compares squared factors averaged over channels
        instead, which is attention transfer on factors.

    Reference:
        Kim, Park, Kwak, 2018, arXiv 1802.04977.
    """
    student, teacher, mask = prepare_features(student_feature, teacher_feature, where)
    student, teacher = (unit(rows(x)) for x in (student, teacher))
    return keep(jnp.mean(jnp.abs(student - teacher), axis=-1), mask)


def reviewkd(student_features: Arrays, teacher_features: Arrays, *, where: Mask = None) -> Values:
    """Knowledge review: the hierarchical context loss, a mean squared error over a pyramid.

    With levels j = 0 (the map itself), 1, 2, 3 (pooled to 4x4, 2x2, 1x1, where the map is higher
    than that) of weight w_j = 2^-j, renumbered without gaps, summed over the maps:

        L = sum_l (sum_j w_j mean (pool_j F_l^student - pool_j F_l^teacher)^2) / sum_j w_j

    Args:
        student_features: tuple of maps [batch, height, width, channels], adapted; the net that
            learns.
        teacher_features: as many maps with as many channels, before their activation; no gradient
            flows into them.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 at equality.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
        >>> print(qk.losses.reviewkd((student,), (teacher,)))
        [1. 1.]

    Note:
        The authors ramp the weight up over the first 20 epochs.

    Reference:
        Chen et al., 2021, arXiv 2104.09044.
    """
    pairs, mask = prepare_feature_lists(student_features, teacher_features, where, maps=True)
    value = jnp.zeros(pairs[0][0].shape[0], pairs[0][0].dtype)
    for student, teacher in pairs:
        sizes = [size for size in (4, 2, 1) if size < student.shape[1]]
        levels = [student - teacher]
        # Pooling is linear: the pooled maps' difference is the pooled difference.
        levels += [adaptive_avg_pool(levels[0], size, size) for size in sizes]
        weights = [0.5**j for j in range(len(levels))]
        terms = [w * example_means(jnp.square(x)) for w, x in zip(weights, levels, strict=True)]
        value += sum(terms[1:], terms[0]) / sum(weights)
    return keep(value, mask)


def semckd(
    student_features: Sequence[Arrays] | Array,
    teacher_features: Arrays,
    attention: Array,
    *,
    where: Mask = None,
) -> Values:
    """Semantic calibration: every student layer learns from all teacher layers, by attention.

    With f_ij the map of student layer i, adapted to teacher layer j, and attention weights a_ij
    of each example, which add to 1 over j:

        L = 1/n sum_ij a_ij mean (f_ij^student - f_j^teacher)^2

    Args:
        student_features: tuple, one entry per student layer, of tuples with one feature per teacher
            layer, adapted; the net that learns.
        teacher_features: tuple of m features; no gradient flows into them.
        attention: a, [batch, n, m]; the gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 at equality.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
        >>> print(qk.losses.semckd(((student,),), (teacher,), jnp.ones((2, 1, 1))))
        [1. 1.]

    Reference:
        Chen et al., 2020, arXiv 2012.03236.
    """
    check_tuple("student_features", student_features, "tuples, one per student layer")
    check_tuple("teacher_features", teacher_features, "features, shallow to deep")
    rows, mask, batch = [], None, 0
    for i, row in enumerate(student_features):
        check_tuple(f"student_features[{i}]", row, "features, one per teacher layer")
        if len(row) != len(teacher_features):
            raise ValueError(
                f"student_features[{i}] has {len(row)} entries; it needs one for each of the "
                f"{len(teacher_features)} teacher_features."
            )
        errors = []
        for j, (student, teacher) in enumerate(zip(row, teacher_features, strict=True)):
            names = (f"student_features[{i}][{j}]", f"teacher_features[{j}]")
            student, teacher, mask = prepare_features(student, teacher, where, names=names)
            batch = student.shape[0]
            errors.append(example_means(jnp.square(student - teacher)))
        rows.append(jnp.stack(errors, axis=-1))
    attention = jnp.asarray(attention)
    wanted = (batch, len(student_features), len(teacher_features))
    if tuple(attention.shape) != wanted:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; it must be {wanted}: [batch, student "
            "layers, teacher layers]."
        )
    errors = jnp.stack(rows, axis=1)
    weighted = keep(attention.astype(errors.dtype), mask) * errors
    return keep(jnp.sum(weighted, axis=(1, 2)) / len(student_features), mask)
