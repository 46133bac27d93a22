"""Response losses: what compares logits with labels or with another net's logits.

Each function takes arrays of shape [batch, classes] and returns one value per example. Softmax
and sums are computed in float32 or wider, whatever the dtype of the logits, from log-probabilities,
so that logits of +-1e4 or probabilities that underflow give finite values and gradients.
"""

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.gradients import reverse_gradient
from qkd_jax.losses.inputs.logits import (
    hits,
    keep,
    prepare_logits,
    prepare_pair,
    standardized,
)
from qkd_jax.losses.inputs.shapes import Array, Logits, Mask, Scalar, Values
from qkd_jax.losses.inputs.softened import divergence


def ce(
    logits: Logits, labels: Array, *, label_smoothing: Scalar = 0.0, where: Mask = None
) -> Values:
    """Cross-entropy with integer labels, optionally smoothed.

    With p = softmax(z), a = label_smoothing and K classes:

        L = -(1 - a) log p[y] - (a / K) sum_k log p[k]

    Args:
        logits: z, [batch, classes], floating.
        labels: y, [batch], integers in [0, classes).
        label_smoothing: a, unitless, in [0, 1]; a Python number or a scalar array.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, or smoothing outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.ce(jnp.eye(3), jnp.arange(3), label_smoothing=0.1))
        [0.618 0.618 0.618]

    Note:
        The range of the labels cannot be checked while tracing. A label outside [0, classes) gives
        NaN for its example rather than a plausible number, unless `where` leaves it out. A logit of
        -inf (a forbidden class) needs `label_smoothing` to be the Python number 0.

    Reference:
        Szegedy et al., 2015, arXiv 1512.00567, section 7 (label smoothing).
    """
    logits, mask = prepare_logits("logits", logits, where)
    hit, known = hits(labels, logits)
    checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)

    log_p = jax.nn.log_softmax(keep(logits, mask))
    loss = -jnp.sum(jnp.where(hit, log_p, 0.0), axis=-1)
    # The Python number 0 skips the second term, which would turn a logit of -inf into NaN.
    if not (isinstance(label_smoothing, int | float) and label_smoothing == 0):
        smoothing = jnp.asarray(label_smoothing, logits.dtype)
        loss = (1 - smoothing) * loss - smoothing * jnp.mean(log_p, axis=-1)
    loss = jnp.where(known, loss, jnp.nan)
    return keep(loss, mask)


def kd(
    student_logits: Logits,
    teacher_logits: Array,
    *,
    temperature: Scalar = 4.0,
    standardize: bool = False,
    where: Mask = None,
) -> Values:
    """Knowledge distillation: the KL divergence of softened class distributions.

    With p = softmax(z / T) of either net:

        L = T^2 sum_k p_teacher[k] (log p_teacher[k] - log p_student[k])

    whose gradient for the student's logits is T (p_student - p_teacher). The factor T^2 keeps the
    gradient's size about independent of T, so a weight found at one temperature serves at another.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        temperature: T, unitless, above 0; a Python number or a scalar array.
        standardize: take the logits' z-scores first (`lskd`).
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where both distributions are equal.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes], or a temperature not above
            0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.kd(jnp.eye(3), jnp.eye(3)[::-1], temperature=2.0))
        [0.356 0.    0.356]

    Note:
        The paper minimises the cross-entropy of the softened distributions; the KL divergence
        differs from it by the teacher's entropy, which has no gradient here, and is 0 at equality.
        Some published code averages over classes too and is `classes` times weaker; this does not.

    Reference:
        Hinton, Vinyals, Dean, 2015, arXiv 1503.02531, section 2.
    """
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    t = jnp.asarray(temperature, student.dtype)
    return keep(t * t * divergence(teacher, student, t), mask)


def lskd(
    student_logits: Logits, teacher_logits: Array, *, temperature: Scalar = 2.0, where: Mask = None
) -> Values:
    """Distillation of standardized logits: `kd` on z-scores.

    With Z(z) = (z - mean_k z) / (std_k z + 1e-7), the standard deviation over classes unbiased:

        L = T^2 KL(softmax(Z(z_teacher) / T) || softmax(Z(z_student) / T))

    The student has to match the order and the shape of the teacher's logits, not their size. `kd`
    and `dkd` take `standardize=True` for the same.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        temperature: T, the paper's base temperature, above 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the z-scores are equal. The authors weight it by 9,
        beside 0.1 times the cross-entropy.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes], or a temperature not above
            0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.lskd(jnp.eye(3), jnp.eye(3)[::-1], temperature=2.0))
        [1.09 0.   1.09]

    Reference:
        Sun et al., 2024, arXiv 2403.01427, algorithm 1.
    """
    return kd(
        student_logits, teacher_logits, temperature=temperature, standardize=True, where=where
    )


def hard_target(student_logits: Logits, teacher_logits: Array, *, where: Mask = None) -> Values:
    """Hard-prediction transfer: cross-entropy with the class that the teacher predicts.

        L = -log p_student[argmax z_teacher]

    What is left of distillation when the teacher's soft labels are taken away: beside `kd` it shows
    what they carry. Of equal logits the first class counts.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes].

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.hard_target(jnp.eye(3), jnp.eye(3)[::-1]))
        [1.551 0.551 1.551]

    Reference:
        The limit T -> 0 of Hinton, Vinyals, Dean, 2015 (arXiv 1503.02531); "hard-label
        distillation" in Touvron et al., 2020 (arXiv 2012.12877), equation 3.
    """
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    return ce(student, jnp.argmax(teacher, axis=-1), where=mask)


def logit_regression(
    student_logits: Logits, teacher_logits: Array, *, where: Mask = None
) -> Values:
    """Regression on logits: half the squared distance, summed over the classes.

        L = 1/2 sum_k (z_student[k] - z_teacher[k])^2

    whose gradient for the student's logits is z_student - z_teacher.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the logits are equal.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes].

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.logit_regression(jnp.eye(3), jnp.eye(3)[::-1]))
        [1. 0. 1.]

    Note:
        This is the paper's half-sum, not a mean over classes: multiply the weight by 2 / classes to
        get what code built on a mean squared error has. For logits of zero mean, `kd` tends to this
        value / classes as the temperature grows. The paper normalises the teacher's logits over the
        training set; this function takes them as they come.

    Reference:
        Ba, Caruana, 2014, arXiv 1312.6184, the L2 loss on logits.
    """
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    return keep(0.5 * jnp.sum(jnp.square(student - teacher), axis=-1), mask)


def dml(student_logits: Logits, teacher_logits: Array, *, where: Mask = None) -> Values:
    """The mimicry term of deep mutual learning: KL divergence from a peer, temperature 1.

        L = sum_k p_peer[k] (log p_peer[k] - log p_student[k])

    Each net of a cohort takes its own turn as the student. With n nets, give a net one such loss
    per peer, weighted 1 / (n - 1), beside its cross-entropy.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; the peer's, no gradient flows into it.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where both distributions are equal.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes].

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.dml(jnp.eye(3), jnp.eye(3)[::-1]))
        [0.364 0.    0.364]

    Note:
        The paper updates the nets in turn, each on its peers' fresh predictions. The training step
        here updates all of them at once on predictions of the same parameters.

    Reference:
        Zhang, Xiang, Hospedales, Lu, 2017, arXiv 1706.00384: the mimicry loss of two nets, and its
        mean over the peers in a larger cohort.
    """
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    return keep(divergence(teacher, student), mask)


def ctkd(
    student_logits: Logits,
    teacher_logits: Array,
    temperature: Scalar,
    *,
    reversal: Scalar = 1.0,
    where: Mask = None,
) -> Values:
    """Curriculum temperature: `kd` with a temperature that is learned against the student.

        L = T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))

    The student descends this loss and T climbs it: the gradient for T is multiplied by -reversal.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        temperature: T, above 0: a scalar array for all, or [batch], one for each example.
        reversal: how strongly T climbs, >= 0. The curriculum lets it grow from 0 to 1 over the
            first epochs, as half a cosine.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where both distributions are equal.

    Raises:
        ValueError: for shapes that do not fit, or a negative reversal.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.ctkd(jnp.eye(3), jnp.eye(3)[::-1], jnp.array(4.0)))
        [0.346 0.    0.346]

    Note:
        The authors' code has T = 1 + 20 sigmoid(a) of one learned number a, or of what a small net
        makes of both logits; which of them is the business of the caller.

    Reference:
        Li et al., 2022, arXiv 2211.16231.
    """
    checks.number("reversal", reversal, low=0.0)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    temperature = jnp.asarray(temperature)
    if temperature.shape not in ((), student.shape[:1]):
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}; it must be () or "
            f"({student.shape[0]},), one per example."
        )
    t = reverse_gradient(jnp.broadcast_to(temperature, student.shape[:1]), reversal)
    t = t.astype(student.dtype)
    if mask is not None:
        t = jnp.where(mask, t, 1)
    return keep(t * t * divergence(teacher, student, t[:, None]), mask)


def sqakd(
    student_logits: Logits, teacher_logits: Array, *, temperature: Scalar = 4.0, where: Mask = None
) -> Values:
    """Self-supervised quantization-aware distillation: `kd` and nothing else.

        L = T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))

    for a quantized student and its full-precision teacher: no labels, no cross-entropy beside it.

    Args:
        student_logits: [batch, classes], floating; the quantized net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        temperature: T, above 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where both distributions are equal.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes], or a temperature not above
            0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.sqakd(jnp.eye(3), jnp.eye(3)[::-1]))
        [0.346 0.    0.346]

    Reference:
        Zhao, Zhao, 2024, arXiv 2403.11106; their code quantizes by EWGS.
    """
    return kd(student_logits, teacher_logits, temperature=temperature, where=where)


def apprentice(
    student_logits: Logits,
    teacher_logits: Array,
    labels: Array,
    *,
    beta: Scalar = 0.5,
    gamma: Scalar = 0.5,
    where: Mask = None,
) -> Values:
    """Apprentice: a low-precision student's cross-entropies with labels and with the teacher.

        L = -beta log p_student[y] - gamma sum_k p_teacher[k] log p_student[k]

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        labels: y, [batch], integers in [0, classes).
        beta: weight of the labels, >= 0.
        gamma: weight of the teacher, >= 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; no minimum of 0.

    Raises:
        ValueError: for shapes that differ, labels that are not integers, or negative weights.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.apprentice(jnp.eye(3), jnp.eye(3)[::-1], jnp.arange(3)))
        [0.945 0.763 0.945]

    Note:
        The paper's third term, the teacher's own cross-entropy, is `ce` in the teacher's table. Its
        schemes are stages: A trains both nets at once, B has a trained, frozen teacher, C continues
        B from a trained full-precision student at a low learning rate. A label outside [0, classes)
        gives NaN.

    Reference:
        Mishra, Marr, 2017, arXiv 1711.05852.
    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        checks.number(name, value, low=0.0)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    hard = ce(student, labels, where=mask)
    share = jax.nn.softmax(teacher)
    soft = -jnp.sum(share * jnp.where(share > 0, jax.nn.log_softmax(student), 0.0), axis=-1)
    return keep(jnp.asarray(beta) * hard + jnp.asarray(gamma) * soft, mask)
