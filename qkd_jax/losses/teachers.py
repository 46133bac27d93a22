"""Response losses with several teachers at once: their logits arrive as a tuple.

Several terms with one teacher each do the same as `kd_sum`, each with its own temperature.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import check_tuple
from qkd_jax.losses.inputs.logits import hits, keep, prepare_logits, prepare_pair
from qkd_jax.losses.inputs.shapes import Array, Arrays, Kept, Logits, Mask, Matrix, Scalar, Values
from qkd_jax.losses.inputs.softened import (
    divergence,
    log_mean_exp,
    relative_log_probabilities,
)


def kd_mean(
    student_logits: Logits,
    teachers_logits: Arrays,
    *,
    temperature: Scalar = 4.0,
    where: Mask = None,
) -> Values:
    """Distillation from an ensemble: the teachers' mean distribution.

    With p_m = softmax(z_m / T) of n teachers and q = 1/n sum_m p_m:

        L = T^2 sum_k q[k] (log q[k] - log p_student[k])

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teachers_logits: tuple of n arrays [batch, classes]; no gradient flows into them.
        temperature: T, above 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 where the student has the ensemble's distribution.

    Raises:
        ValueError: for shapes that differ, no teachers, or temperature <= 0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teachers = jnp.eye(3), (jnp.eye(3)[::-1], 2 * jnp.eye(3))
        >>> print(qk.losses.kd_mean(student, teachers))
        [0.03  0.031 0.03 ]

    Reference:
        Hinton, Vinyals, Dean, 2015, arXiv 1503.02531, distilling an ensemble.
    """
    student, teachers, mask = _prepare(student_logits, teachers_logits, where)
    t = _temperature(temperature, student)
    of_each = relative_log_probabilities(teachers / t)
    log_mean = log_mean_exp(jnp.moveaxis(of_each, 0, -1))
    return keep(t * t * divergence(t * log_mean, student, t), mask)


def kd_sum(
    student_logits: Logits,
    teachers_logits: Arrays,
    *,
    temperature: Scalar = 4.0,
    where: Mask = None,
) -> Values:
    """Distillation from several teachers: the sum of the divergences from each.

        L = T^2 sum_m KL(softmax(z_m / T) || softmax(z_student / T))

    Its gradient is n times that of `kd_mean`, n the number of teachers.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teachers_logits: tuple of n arrays [batch, classes]; no gradient flows into them.
        temperature: T, above 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 only where all teachers agree with the student.

    Raises:
        ValueError: for shapes that differ, no teachers, or temperature <= 0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teachers = jnp.eye(3), (jnp.eye(3)[::-1], 2 * jnp.eye(3))
        >>> print(qk.losses.kd_sum(student, teachers))
        [0.468 0.123 0.468]

    Reference:
        The code of Beyer et al., 2021, arXiv 2106.05237, with several teachers.
    """
    student, teachers, mask = _prepare(student_logits, teachers_logits, where)
    return keep(jnp.sum(_divergences(student, teachers, temperature), axis=0), mask)


def ca_mkd(
    student_logits: Logits,
    teachers_logits: Arrays,
    labels: Array,
    *,
    temperature: Scalar = 4.0,
    where: Mask = None,
) -> Values:
    """Confidence-aware distillation: each example's teachers, weighted by who knows its label.

    With c_m the cross-entropy of teacher m with the label, at temperature 1, and n teachers:

        w_m = (1 - softmax_m(c)) / (n - 1),    L = T^2 sum_m w_m KL(p_m || p_student)

    p being softmax(z / T). The weights of an example add to 1; the more a teacher errs, the less it
    counts.

    Args:
        student_logits: [batch, classes], floating; the net that learns.
        teachers_logits: tuple of n >= 2 arrays [batch, classes]; no gradient flows into them.
        labels: [batch], integers in [0, classes).
        temperature: T, above 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; 0 only where all teachers agree with the student.

    Raises:
        ValueError: for shapes that differ, fewer than two teachers, or temperature <= 0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teachers = jnp.eye(3), (jnp.eye(3)[::-1], 2 * jnp.eye(3))
        >>> print(qk.losses.ca_mkd(student, teachers, jnp.arange(3)))
        [0.17  0.071 0.17 ]

    Note:
        The paper writes cross-entropy where this has the divergence, which has the same gradient.
        Its second loss, features weighted by how well the teacher's classifier does on the
        student's, is not part of this. A label outside [0, classes) gives NaN.

    Reference:
        Zhang, Chen, Wang, 2021, arXiv 2201.00007.
    """
    student, teachers, mask = _prepare(student_logits, teachers_logits, where)
    if len(teachers) < 2:
        raise ValueError("teachers_logits has 1 entry; ca_mkd weighs two or more teachers.")
    hit, known = hits(labels, student)
    errors = -jnp.sum(jnp.where(hit[None], jax.nn.log_softmax(teachers), 0.0), axis=-1)
    weights = (1 - jax.nn.softmax(errors, axis=0)) / (len(teachers) - 1)
    value = jnp.sum(weights * _divergences(student, teachers, temperature), axis=0)
    return keep(jnp.where(known, value, jnp.nan), mask)


def _prepare(
    student_logits: Array, teachers_logits: Arrays, where: Mask
) -> tuple[Matrix, Float[Array, "teachers batch classes"], Kept]:
    """Returns the student's logits, the teachers' stacked, and the mask."""
    check_tuple("teachers_logits", teachers_logits, "logits, one array per teacher")
    prepare_logits("student_logits", student_logits, where)
    teachers, mask = [], None
    for i, logits in enumerate(teachers_logits):
        try:
            student, teacher, mask = prepare_pair(student_logits, logits, where)
        except ValueError as error:
            raise ValueError(f"teachers_logits[{i}]: {error}") from error
        teachers.append(teacher)
    dtype = jnp.result_type(student, *teachers)
    return student.astype(dtype), jnp.stack([t.astype(dtype) for t in teachers]), mask


def _temperature(temperature: Scalar, logits: Array) -> Array:
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    return jnp.asarray(temperature, logits.dtype)


def _divergences(student: Array, teachers: Array, temperature: Scalar) -> Array:
    """T^2 KL(p_m || p_student), [n, batch]."""
    t = _temperature(temperature, student)
    return t * t * jax.vmap(lambda teacher: divergence(teacher, student, t))(teachers)
