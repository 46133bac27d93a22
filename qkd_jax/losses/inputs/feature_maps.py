"""Features as losses take them in: checked, widened, pooled to one size, gathered over devices.

A feature is a vector [batch, channels] or a map [batch, height, width, channels].
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from qkd_jax import checks
from qkd_jax.losses.inputs.logits import keep
from qkd_jax.losses.inputs.shapes import Array, Arrays, Kept, Mask, Values

Prepared = Float[Array, "batch ..."]


def adaptive_avg_pool(x: Array, height: int, width: int) -> Array:
    """Averages a map over windows that cover it evenly, so that it gets a given size.

    Output row i is the mean of the input rows floor(i H / height) to ceil((i + 1) H / height) - 1,
    and likewise for columns; where the sizes do not divide, neighbouring windows overlap (7 rows
    become 4 by windows of two each, with one row shared). As PyTorch's `adaptive_avg_pool2d`.

    Args:
        x: [batch, H, W, channels], floating.
        height: of the result, at least 1.
        width: of the result, at least 1.

    Returns:
        [batch, height, width, channels], dtype of `x`.

    Raises:
        ValueError: for an array that is not a map, or a size below 1.
    """
    checks.rank("x", x, 4, "[batch, height, width, channels]")
    checks.integer_in("height", height, 1)
    checks.integer_in("width", width, 1)
    return adaptive_mean(adaptive_mean(x, 1, height), 2, width)


def adaptive_mean(x: Array, axis: int, size: int) -> Array:
    """Averages one axis over the windows of `adaptive_avg_pool`, so that it gets a given size."""
    given = x.shape[axis]
    if given == size:
        return x
    if given % size == 0:
        shape = (*x.shape[:axis], size, given // size, *x.shape[axis + 1 :])
        return jnp.mean(x.reshape(shape), axis=axis + 1)
    i, row = np.arange(size), np.arange(given)
    start, stop = i * given // size, -(-(i + 1) * given // size)
    inside = (row >= start[:, None]) & (row < stop[:, None])
    share = jnp.asarray(inside / (stop - start)[:, None], x.dtype)
    return jnp.moveaxis(jnp.tensordot(x, share, axes=(axis, 1), precision="highest"), -1, axis)


def pooled_alike(*maps: Array) -> tuple[Array, ...]:
    """Pools maps to the smallest height and the smallest width among them; vectors pass."""
    if any(x.ndim != 4 for x in maps):
        return maps
    height, width = (min(x.shape[axis] for x in maps) for axis in (1, 2))
    return tuple(adaptive_avg_pool(x, height, width) for x in maps)


def _prepared(name: str, x: Array) -> Float[Array, "batch ..."]:
    x = jnp.asarray(x)
    if x.ndim not in (2, 4):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be a vector [batch, channels] or a map "
            "[batch, height, width, channels]."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}; features are floating numbers.")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def prepare_features(
    student: Array,
    teacher: Array,
    where: Mask,
    *,
    names: tuple[str, str] = ("student_feature", "teacher_feature"),
    alike: str = "elements",
    maps: bool = False,
    detach: bool = True,
) -> tuple[Prepared, Prepared, Kept]:
    """Checks two features; returns them masked and in one dtype, and the mask as booleans.

    Args:
        student: vector or map.
        teacher: vector or map of as many examples.
        where: [batch] mask or None.
        names: what messages call the two.
        alike: what the comparison needs. "elements": as many channels and one size, to which the
            larger map is pooled. "size": one size alone. "channels": as many channels alone.
            "examples": nothing but the same examples.
        maps: refuse vectors.
        detach: no gradient flows into `teacher`.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    student, teacher = _prepared(names[0], student), _prepared(names[1], teacher)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{names[0]} has shape {tuple(student.shape)} and {names[1]} {tuple(teacher.shape)}; "
            "they must hold the same examples."
        )
    mask = None
    if where is not None:
        where = jnp.asarray(where)
        checks.vector("where", where, student.shape[0], f"one entry per row of {names[0]}")
        mask = where != 0
    for name, x in zip(names, (student, teacher), strict=True):
        if maps:
            checks.rank(name, x, 4, "[batch, height, width, channels]")
    channels = alike in ("elements", "channels")
    if (channels and student.shape[-1] != teacher.shape[-1]) or (
        alike != "examples" and student.ndim != teacher.ndim
    ):
        wanted = "as many channels, vectors or maps alike" if channels else "vectors or maps alike"
        raise ValueError(
            f"{names[0]} has shape {tuple(student.shape)} and {names[1]} {tuple(teacher.shape)}; "
            f"the loss compares {wanted}: adapt the student's first."
        )
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    teacher = jax.lax.stop_gradient(teacher) if detach else teacher
    student, teacher = keep(student.astype(dtype), mask), keep(teacher.astype(dtype), mask)
    if alike in ("elements", "size"):
        student, teacher = pooled_alike(student, teacher)
    return student, teacher, mask


def prepare_feature_lists(
    students: Arrays, teachers: Arrays, where: Mask, *, alike: str = "elements", maps: bool = False
) -> tuple[list[tuple[Prepared, Prepared]], Kept]:
    """Checks two tuples of features, pair by pair as `prepare_features` does.

    Raises:
        ValueError: for single arrays, no features, or tuples of unlike length.
    """
    for name, given in (("student_features", students), ("teacher_features", teachers)):
        check_tuple(name, given, "features, shallow to deep")
    if len(students) != len(teachers):
        raise ValueError(
            f"student_features has {len(students)} entries and teacher_features {len(teachers)}; "
            "they are paired one to one."
        )
    pairs, mask = [], None
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        names = (f"student_features[{i}]", f"teacher_features[{i}]")
        student, teacher, mask = prepare_features(
            student, teacher, where, names=names, alike=alike, maps=maps
        )
        if pairs and student.shape[0] != pairs[0][0].shape[0]:
            raise ValueError(
                f"{names[0]} has {student.shape[0]} examples, student_features[0] "
                f"{pairs[0][0].shape[0]}; all taps see one batch."
            )
        pairs.append((student, teacher))
    return pairs, mask


def check_tuple(name: str, given: Any, meaning: str) -> None:
    """Raises ValueError for a single array where a tuple is wanted, and for an empty tuple."""
    if hasattr(given, "shape"):
        raise ValueError(
            f"{name} is one array of shape {tuple(given.shape)}; it must be a tuple of {meaning}: "
            "(array,) for one."
        )
    checks.at_least_one(name, given)


def example_means(x: Prepared) -> Values:
    """Mean over all axes but the first."""
    return jnp.mean(rows(x), axis=-1)


def gathered(x: Array, axis_name: str | None) -> Array:
    """Returns the examples of all devices in the order of the global batch; `x` without an axis.

    The transpose sums over devices: where each device's loss is the sum over its own examples, the
    gradients are those of the sum over the global batch.
    """
    if axis_name is None:
        return x
    return jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def total(x: Array, axis_name: str | None) -> Array:
    """Returns the sum over devices; `x` without an axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


class GatheredBatch(NamedTuple):
    """The examples of this device and those of the global batch, features flattened."""

    student: Float[Array, "batch n"]
    teacher: Float[Array, "batch m"]
    all_student: Float[Array, "all n"]
    all_teacher: Float[Array, "all m"]
    kept: Bool[Array, " batch"]
    all_kept: Bool[Array, " all"]
    count: Float[Array, ""]  # number of kept examples in the global batch, at least 1
    position: Int[Array, " batch"]  # of this device's examples in the global batch

    def pairs(self) -> Bool[Array, "batch all"]:
        """Returns the pairs of which both examples are kept."""
        return self.kept[:, None] & self.all_kept[None, :]

    def itself(self) -> Bool[Array, "batch all"]:
        """Returns the pairs of an example with itself."""
        return self.position[:, None] == jnp.arange(self.all_kept.shape[0])[None, :]


def gather_batch(
    student: Prepared, teacher: Prepared, mask: Kept, axis_name: str | None
) -> GatheredBatch:
    """Flattens prepared features to vectors and gathers those of all devices."""
    batch = student.shape[0]
    student, teacher = rows(student), rows(teacher)
    kept = jnp.ones(batch, bool) if mask is None else mask
    all_kept = gathered(kept, axis_name)
    offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch
    return GatheredBatch(
        student=student,
        teacher=teacher,
        all_student=gathered(student, axis_name),
        all_teacher=gathered(teacher, axis_name),
        kept=kept,
        all_kept=all_kept,
        count=jnp.maximum(jnp.sum(all_kept), 1).astype(student.dtype),
        position=jnp.arange(batch, dtype=jnp.int32) + offset,
    )


def rows(x: Array) -> Float[Array, "batch numbers"]:
    """Returns [batch, ...] as [batch, numbers]; an empty batch too, for which -1 says nothing."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def inner(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Products of rows, a b^T, in full precision."""
    return jnp.matmul(a, b.T, precision="highest")


def safe_norm(x: Array, axis: int = -1, *, keepdims: bool = False) -> Array:
    """Euclidean norm with gradient 0, not NaN, at 0."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)


def unit(x: Array, axis: int = -1, *, eps: float = 1e-12) -> Array:
    """Unit vectors x / max(|x|, eps) along an axis; 0 stays 0, with a finite gradient."""
    return x / jnp.maximum(safe_norm(x, axis, keepdims=True), eps)
