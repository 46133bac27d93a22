"""Response losses on a batch of predictions as a matrix: its rows, its columns, its products.

What relates examples needs the whole batch: under a mapped axis `axis_name` counts those of all
devices, and 4 devices give what 1 gives on the global batch.
"""

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import gather_batch, inner, safe_norm, total
from qkd_jax.losses.inputs.logits import keep, prepare_pair, standardized
from qkd_jax.losses.inputs.shapes import Array, Logits, Mask, Scalar, Values
from qkd_jax.losses.inputs.softened import divergence

# Temperatures of `mlkd` beside its base.
MORE_TEMPERATURES = (2.0, 3.0, 5.0, 6.0)


def dist(
    student_logits: Logits,
    teacher_logits: Array,
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Distillation from a stronger teacher: correlations within examples and within classes.

    With P = softmax(z / T), [batch, classes], and r Pearson's correlation coefficient:

        L_i = T^2 (beta (1 - r(P_i^student, P_i^teacher))
                   + gamma 1/classes sum_k (1 - r(P_k^student, P_k^teacher)))

    rows P_i over the classes, columns P_k over the batch.

    Args:
        student_logits: z, [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        beta: weight of the relations between classes, >= 0.
        gamma: weight of the relations within a class, >= 0.
        temperature: T, above 0; 4 on CIFAR-100.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no column and give 0.

    Returns:
        [batch], float32 or wider; 0 where all correlations are 1. The authors weight beta and gamma
        by 2. A batch of 1 has no columns: the second term is 0.

    Raises:
        ValueError: for shapes that differ, or numbers out of range.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.dist(jnp.eye(3), jnp.eye(3)[::-1]))
        [2.5 1.  2.5]

    Note:
        As in the authors' code 1e-8 is added to the product of the norms. "DIST+" of torchdistill
        1.1.5 adds a correlation where it should subtract it from 1: there a perfect student costs
        most.

    Reference:
        Huang et al., 2022, arXiv 2205.10536.
    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        checks.number(name, value, low=0.0)
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    t = jnp.asarray(temperature, student.dtype)
    p_s, p_t = (jax.nn.softmax(z / t) for z in (student, teacher))
    kept = jnp.ones(student.shape[0], bool) if mask is None else mask
    count = jnp.maximum(total(jnp.sum(kept), axis_name), 1).astype(student.dtype)
    eps = 1e-8

    rows_s, rows_t = (p - jnp.mean(p, axis=-1, keepdims=True) for p in (p_s, p_t))
    sizes = safe_norm(rows_s) * safe_norm(rows_t)
    of_rows = 1 - jnp.sum(rows_s * rows_t, axis=-1) / (sizes + eps)

    def centred(p: Array) -> Array:
        p = jnp.where(kept[:, None], p, 0)
        mean = total(jnp.sum(p, axis=0, keepdims=True), axis_name) / count
        return jnp.where(kept[:, None], p - mean, 0)

    def column_sums(x: Array) -> Array:
        return total(jnp.sum(x, axis=0), axis_name)

    columns_s, columns_t = centred(p_s), centred(p_t)
    squares = [column_sums(jnp.square(c)) for c in (columns_s, columns_t)]
    some = (squares[0] > 0) & (squares[1] > 0)
    # Two roots, not the root of the product: that would underflow for rare classes.
    lengths = [jnp.sqrt(jnp.where(some, s, 1)) for s in squares]
    covariance = column_sums(columns_s * columns_t)
    correlation = jnp.where(some, covariance / (lengths[0] * lengths[1] + eps), 0)
    of_columns = jnp.where(count > 1, jnp.mean(1 - correlation), 0)
    value = jnp.asarray(beta) * of_rows + jnp.asarray(gamma) * of_columns
    return keep(t * t * value, mask)


def mlkd(
    student_logits: Logits,
    teacher_logits: Array,
    *,
    temperature: Scalar = 4.0,
    standardize: bool = False,
    compat: bool = False,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Multi-level logit distillation: predictions of examples, of the batch, and of classes.

    Summed over T in (temperature, 2, 3, 5, 6), with P = softmax(z / T):

        L_i = a_i T^2 KL(P_i^teacher || P_i^student)
            + a_i sum_j ((P P')_ij^student - (P P')_ij^teacher)^2
            + 1/classes sum_k b_k sum_l ((P' P)_kl^student - (P' P)_kl^teacher)^2

    a_i marks the half of the examples of which the teacher is least certain (its largest
    probability, at temperature 1, is at most the batch's median), b_k the classes of which the
    batch's predictions hold least (their total at most the median class's).

    Args:
        student_logits: z, [batch, classes], floating; the net that learns.
        teacher_logits: [batch, classes], floating; no gradient flows into it.
        temperature: the base temperature, above 0.
        standardize: take the logits' z-scores in the first term (`lskd`).
        compat: as the authors' code computes it: a and b are replaced by their means.
        axis_name: mapped axis over whose devices the batch is distributed.
        where: [batch] mask; examples where it is 0 or False are in no product and give 0.

    Returns:
        [batch], float32 or wider; 0 where all predictions agree.

    Raises:
        ValueError: for shapes that differ, or temperature <= 0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.mlkd(jnp.eye(3), jnp.eye(3)[::-1]))
        [1.737 0.    1.737]

    Note:
        The authors' code multiplies terms that are reduced already with the masks, so that these
        rescale and select nothing; `compat` does the same. It adds the first two terms of a second,
        strongly augmented view, which is another call on those logits.

    Reference:
        Jin, Wang, Lin, CVPR 2023, "Multi-level logit distillation", and the authors' code.
    """
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    student, teacher, mask = prepare_pair(student_logits, teacher_logits, where)
    batch = gather_batch(student, teacher, mask, axis_name)
    kept, classes = batch.all_kept[:, None], student.shape[1]
    certain = jax.nn.softmax(teacher)
    everywhere = jnp.where(kept, jax.nn.softmax(batch.all_teacher), 0)
    surest = jnp.where(batch.all_kept, jnp.max(everywhere, axis=-1), jnp.nan)
    typical = jnp.nanmedian(surest) if len(surest) else jnp.nan  # of an empty batch
    unsure = (jnp.max(certain, axis=-1) <= typical).astype(student.dtype)
    mass = jnp.sum(everywhere, axis=0)
    rare = (mass <= jnp.median(mass)).astype(student.dtype)
    if compat:
        part = total(jnp.sum(jnp.where(batch.kept, unsure, 0)), axis_name) / batch.count
        unsure, rare = jnp.broadcast_to(part, unsure.shape), jnp.full_like(rare, jnp.mean(rare))

    soft_s, soft_t = student, teacher
    if standardize:
        soft_s, soft_t = standardized(student), standardized(teacher)
    value = jnp.zeros(student.shape[0], student.dtype)
    for temperature_ in (temperature, *MORE_TEMPERATURES):
        t = jnp.asarray(temperature_, student.dtype)
        value += unsure * t * t * divergence(soft_t, soft_s, t)
        all_s, all_t = (
            jnp.where(kept, jax.nn.softmax(z / t), 0)
            for z in (batch.all_student, batch.all_teacher)
        )
        p_s, p_t = (jax.nn.softmax(z / t) for z in (student, teacher))
        value += unsure * jnp.sum(jnp.square(inner(p_s, all_s) - inner(p_t, all_t)), axis=-1)
        of_classes = jnp.square(inner(all_s.T, all_s.T) - inner(all_t.T, all_t.T))
        value += jnp.sum(rare[:, None] * of_classes) / classes
    return keep(value, mask)
