"""Response losses that treat the labelled class apart from the others: dkd, nkd and tf_kd.

The first two split softmax(z / T) into the probability of the labelled class and the distribution
over the other classes. Everything is done on log-probabilities: the log of the others' total is a
logsumexp over them, never log(1 - p), so confident nets give finite values and gradients.
"""

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.logits import (
    hits,
    keep,
    prepare_logits,
    prepare_pair,
    standardized,
)
from qkd_jax.losses.inputs.shapes import Array, Logits, Mask, Scalar, Values
from qkd_jax.losses.inputs.softened import divergence, log_mean_exp


def dkd(
    student_logits: Logits,
    teacher_logits: Array,
    labels: Array,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
    standardize: bool = False,
    where: Mask = None,
) -> Values:
    """Decoupled distillation: target-class and non-target-class knowledge, weighted apart.

    With p = softmax(z / T), b = (p[y], 1 - p[y]), and q the softmax over the classes other than y:

        L = T^2 (alpha KL(b_teacher || b_student) + beta KL(q_teacher || q_student))

    alpha = 1 and beta = 1 - p_teacher[y] would be `kd`.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        labels: y, [batch], integers in [0, classes).
        alpha: weight of the first term, >= 0.
        beta: weight of the second term, >= 0. The paper's best on CIFAR-100: 8, and 2 or 6 for some
            pairs; 0.5 at T = 1 on ImageNet.
        temperature: T, above 0.
        standardize: take the logits' z-scores first (`lskd`).
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where both distributions are equal. With two classes the second
        term is 0.

    Raises:
        ValueError: for shapes that differ, labels that are not integers, or numbers out of range.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.dkd(jnp.eye(3), jnp.eye(3)[::-1], jnp.arange(3), beta=2.0))
        [0.508 0.    0.508]

    Note:
        A label outside [0, classes) gives NaN. The paper ramps the loss's weight up over the first
        20 epochs; that is the business of the weight.

    Reference:
        Zhao et al., 2022, arXiv 2203.08679, equations 5 to 7.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        checks.number(name, value, low=0.0)
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    hit, known = hits(labels, student)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    t = jnp.asarray(temperature, student.dtype)
    (own_s, other_s), (own_t, other_t) = (_split(z, hit, t) for z in (student, teacher))
    others_count = jnp.asarray(max(student.shape[-1] - 1, 0), student.dtype)
    of_both = jnp.stack([jnp.zeros_like(others_count), jnp.log(others_count)])
    target = divergence(own_t, own_s, t, log_weights=of_both)
    others = divergence(other_t, other_s, t)
    return keep(jnp.where(known, t * t * (alpha * target + beta * others), jnp.nan), mask)


def nkd(
    student_logits: Logits,
    teacher_logits: Array,
    labels: Array,
    *,
    gamma: Scalar = 1.5,
    temperature: Scalar = 1.0,
    where: Mask = None,
) -> Values:
    """Normalized distillation: soft loss on the target, cross-entropy over the normalized others.

    With p = softmax(z) and q the softmax of z / T over the classes other than y:

        L = -p_teacher[y] log p_student[y] - gamma T^2 sum_(k != y) q_teacher[k] log q_student[k]

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        labels: y, [batch], integers in [0, classes).
        gamma: weight of the second term, >= 0: 1.5 with T = 1 on ImageNet; the authors' CIFAR-100
            configs have 3.5 with T = 3.
        temperature: T of the second term, above 0; the first has none.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider. Both terms are cross-entropies: the value at student = teacher is
        not 0, but the second term's gradient is. To be used beside `ce`.

    Raises:
        ValueError: for shapes that differ, labels that are not integers, or numbers out of range.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.nkd(jnp.eye(3), jnp.eye(3)[::-1], jnp.arange(3)))
        [1.157 1.357 1.157]

    Note:
        A label outside [0, classes) gives NaN. With two classes the second term is 0.

    Reference:
        Yang et al., 2023, arXiv 2303.13005, the NKD loss.
    """
    checks.number("gamma", gamma, low=0.0)
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    hit, known = hits(labels, student)
    t = jnp.asarray(temperature, student.dtype)
    own_s, own_t = (
        jnp.sum(jnp.where(hit, jax.nn.log_softmax(z), 0), axis=-1) for z in (student, teacher)
    )
    target = -jnp.exp(own_t) * own_s
    (_, other_s), (_, other_t) = (_split(z, hit, t) for z in (student, teacher))
    log_share = jax.nn.log_softmax(other_t / t)
    share = jnp.exp(log_share)
    entropy = -jnp.sum(share * jnp.where(share > 0, log_share, 0), axis=-1)
    others = divergence(other_t, other_s, t) + entropy
    return keep(jnp.where(known, target + gamma * t * t * others, jnp.nan), mask)


def tf_kd(
    logits: Logits,
    labels: Array,
    *,
    correct: Scalar = 0.99,
    temperature: Scalar = 20.0,
    where: Mask = None,
) -> Values:
    """Teacher-free distillation: a virtual teacher that is right with a given probability.

    With u[y] = correct, u[k] = (1 - correct) / (K - 1) for the other classes, and q the
    virtual teacher's softened distribution, softmax(u / T):

        L = sum_k q[k] (log q[k] - log p_student[k])

    Args:
        logits: [batch, classes], floating; the net that learns.
        labels: y, [batch], integers in [0, classes).
        correct: probability of the labelled class, in [0, 1].
        temperature: T of the virtual teacher alone, above 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider. To be used beside `ce`: the paper weights both to add to 1.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, or numbers out of range.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.tf_kd(jnp.eye(3), jnp.arange(3)))
        [0.109 0.109 0.109]

    Note:
        This is the authors' code (softmax of probabilities over T, the student without T) but for
        its mean over classes too, which makes it `classes` times weaker before a multiplier. At T =
        20 q is nearly uniform. A label outside [0, classes) gives NaN. Their other variant,
        self-training, is `kd` from a trained copy of the net.

    Reference:
        Yuan et al., 2019, arXiv 1909.11723, the Tf-KD_reg loss.
    """
    checks.number("correct", correct, low=0.0, high=1.0)
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    logits, mask = prepare_logits("logits", logits, where)
    logits = keep(logits, mask)
    hit, known = hits(labels, logits)
    correct = jnp.asarray(correct, logits.dtype)
    right = jnp.where(hit, correct, (1 - correct) / max(logits.shape[-1] - 1, 1))
    value = divergence(right / jnp.asarray(temperature, logits.dtype), logits)
    return keep(jnp.where(known, value, jnp.nan), mask)


def _split(logits: Array, hit: Array, t: Array) -> tuple[Array, Array]:
    """Splits logits [batch, classes] into the labelled class against the others, and the others.

    Returns ([batch, 2]: z_y and T log mean_(k != y) exp(z_k / T); the logits with -inf at y).
    """
    own = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    rest = t * log_mean_exp(logits / t, where=~hit)
    return jnp.stack([own, rest], axis=-1), jnp.where(hit, -jnp.inf, logits)
