"""Logits and masks as losses and metrics take them in: checked, and in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from qkd_jax import checks
from qkd_jax.losses.inputs.shapes import Array, Kept, Mask, Matrix


def prepare_logits(name: str, logits: Array, where: Mask) -> tuple[Matrix, Kept]:
    """Checks logits and mask; returns the logits in float32 or wider and the mask as booleans."""
    logits = jnp.asarray(logits)
    checks.rank(name, logits, 2, "[batch, classes]")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if where is None:
        return logits, None
    where = jnp.asarray(where)
    checks.vector("where", where, logits.shape[0], f"one entry per row of {name} {logits.shape}")
    return logits, where != 0


def prepare_pair(
    student_logits: Array, teacher_logits: Array, where: Mask
) -> tuple[Matrix, Matrix, Kept]:
    """Checks both logits; returns them masked, in one dtype, the teacher's without gradient."""
    student, mask = prepare_logits("student_logits", student_logits, where)
    teacher, _ = prepare_logits("teacher_logits", teacher_logits, None)
    checks.same_shape(student_logits=student, teacher_logits=teacher)
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    teacher = jax.lax.stop_gradient(teacher)
    return keep(student.astype(dtype), mask), keep(teacher.astype(dtype), mask), mask


def keep(x: Float[Array, " batch *rest"], mask: Kept) -> Float[Array, " batch *rest"]:
    """Returns `x` with the masked-out rows set to 0.

    Applied to the inputs as well as to the result: a NaN in a row that only the result leaves out
    would still reach the gradient as 0 * NaN.
    """
    if mask is None:
        return x
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, 0.0)


def prepare_labels(labels: Array, logits: Matrix) -> Array:
    """Checks labels; returns them in a type that holds every class.

    An index into a table of 200 rows, or a comparison with 200, overflows in int8.
    """
    labels = jnp.asarray(labels)
    checks.class_labels("labels", labels, logits)
    # Wider ones stay: 2^32 would become class 0. Large uint32 become negative, which no class is.
    return labels if labels.dtype.itemsize > 4 else labels.astype(jnp.int32)


def hits(
    labels: Array, logits: Matrix
) -> tuple[Bool[Array, "batch classes"], Bool[Array, " batch"]]:
    """Returns ([batch, classes] whether a class is the label, [batch] whether there is one).

    A comparison instead of a gather: its gradient is a product, not a scatter, and a label that is
    out of range hits no class instead of wrapping around.
    """
    hit = prepare_labels(labels, logits)[:, None] == jnp.arange(logits.shape[1])[None, :]
    return hit, jnp.any(hit, axis=-1)


def standardized(logits: Matrix) -> Matrix:
    """Returns the z-scores of each row of [batch, classes]: (z - mean) / (std + 1e-7).

    The standard deviation is the unbiased one (divided by classes - 1), as in the code of Sun et
    al., 2024 (arXiv 2403.01427). Classes of logit -inf are forbidden: they stay so, and count in
    neither mean nor deviation.
    """
    allowed = logits != -jnp.inf
    known = jnp.where(allowed, logits, 0)
    classes = jnp.sum(allowed, axis=-1, keepdims=True).astype(logits.dtype)
    mean = jnp.sum(known, axis=-1, keepdims=True) / jnp.maximum(classes, 1)
    centred = jnp.where(allowed, known - mean, 0)
    total = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
    # The root has no gradient at 0: a row of equal logits gets 0, and no gradient, instead of NaN.
    some = total > 0
    std = jnp.sqrt(jnp.where(some, total, 1) / jnp.maximum(classes - 1, 1))
    return jnp.where(allowed, jnp.where(some, centred / (std + 1e-7), 0), -jnp.inf)
