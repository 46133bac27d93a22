"""Contrastive losses: tell the teacher's view of the same example from views of other examples.

`crd` draws its negatives from memory banks of all training examples, `crd_in_batch` from the batch.
Both work in log space, so the temperature of 0.07 overflows nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import (
    gather_batch,
    gathered,
    inner,
    prepare_features,
    total,
    unit,
)
from qkd_jax.losses.inputs.logits import keep
from qkd_jax.losses.inputs.shapes import Array, Feature, Mask, Scalar, Values

NAMES = ("student_embedding", "teacher_embedding")


def crd_memory(
    num_examples: int, dim: int, *, key: jax.Array, labels: Mask = None
) -> dict[str, Array]:
    """The first memory of `crd`: random banks, as the authors start them.

    Args:
        num_examples: N, size of the training set; ids are in [0, N).
        dim: size of the embeddings.
        key: random key.
        labels: [N] integers, the class of every id. Without them a class is known from the first
            time on that its example is seen; until then the example is a negative for all.

    Returns:
        {"student", "teacher": [N, dim] float32, uniform in +-1/sqrt(dim / 3); "label": [N] int32,
        -1 where unknown; "log_z": [2] float32, the logs of the normalisers of both directions,
        valid once "started", a bool, is true}.

    Raises:
        ValueError: for sizes below 1 or labels of another shape.
    """
    checks.integer_in("num_examples", num_examples, 1)
    checks.integer_in("dim", dim, 1)
    bound = 1 / math.sqrt(dim / 3)
    banks = jax.random.uniform(key, (2, num_examples, dim), jnp.float32, -bound, bound)
    if labels is None:
        labels = jnp.full(num_examples, -1, jnp.int32)
    labels = jnp.asarray(labels).astype(jnp.int32)
    checks.vector("labels", labels, num_examples, "one class per example")
    return {
        "student": banks[0],
        "teacher": banks[1],
        "label": labels,
        "log_z": jnp.zeros(2, jnp.float32),
        "started": jnp.array(False),
    }


def crd(
    student_embedding: Feature,
    teacher_embedding: Array,
    labels: Array,
    index: Array,
    memory: dict[str, Any],
    key: jax.Array,
    *,
    negatives: int = 16384,
    mode: str = "exact",
    temperature: Scalar = 0.07,
    momentum: Scalar = 0.5,
    axis_name: str | None = None,
    where: Mask = None,
) -> tuple[Values, dict[str, Array]]:
    """Contrastive representation distillation with memory banks: noise-contrastive estimation.

    With unit embeddings e, banks M of N unit embeddings, s(e, m) = exp(e . m / T) / Z, K negatives
    n_k of other classes, c = K / N and eps = 1e-7:

        L = -log(s(e, M_i) / (s(e, M_i) + c + eps)) - sum_k log(c / (s(e, M_(n_k)) + c + eps))

    added over both directions: the student's e against the teacher's bank, and the teacher's e
    against the student's. i is the example itself (mode "exact") or any of its class ("relax"). Z
    is N times the mean of exp(e . m / T) over the first batch, and fixed from then on. Afterwards
    the banks take in the batch: M_i becomes the unit vector of momentum M_i + (1 - momentum) e.

    Args:
        student_embedding: [batch, dim]; brought to unit length here.
        teacher_embedding: [batch, dim]; the gradient flows into both embeddings.
        labels: [batch], integers.
        index: [batch], integers in [0, N): the examples' ids in the banks.
        memory: from `crd_memory`, or of the step before; no gradient flows into it.
        key: random key of the step; an example's draws depend on it and on `index` alone.
        negatives: K, at least 1, drawn with replacement.
        mode: "exact" or "relax".
        temperature: T, above 0.
        momentum: of the banks, in [0, 1].
        axis_name: mapped axis over whose devices the batch is distributed; all devices then hold
            and return the same memory.
        where: [batch] mask; examples where it is 0 or False give 0 and leave the banks alone.

    Returns:
        ([batch] values, float32 or wider; the new memory). The authors weight it by 0.8. An id
        outside [0, N), which cannot be checked while tracing, gives NaN for its example, unless
        `where` leaves it out, and neither the banks nor the other examples' values change by it.

    Raises:
        ValueError: for shapes that do not fit, or numbers out of range.

    Example:
        >>> import jax, jax.numpy as jnp, qkd_jax as qk
        >>> memory = qk.losses.crd_memory(50, 4, key=jax.random.key(0))
        >>> batch = jnp.eye(4), jnp.eye(4), jnp.arange(4), jnp.arange(4)
        >>> values, memory = qk.losses.crd(*batch, memory, jax.random.key(1), negatives=8)
        >>> values.shape
        (4,)

    Note:
        The authors draw negatives without replacement where a class has few; the estimator assumes
        independent draws. An id that comes twice in a batch leaves one of its embeddings.

    Reference:
        Tian, Krishnan, Isola, 2019, arXiv 1910.10699, and the authors' code.
    """
    checks.integer_in("negatives", negatives, 1)
    checks.one_of("mode", mode, ("exact", "relax"))
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    checks.number("momentum", momentum, low=0.0, high=1.0)
    student, teacher, mask = prepare_features(
        student_embedding, teacher_embedding, where, names=NAMES, detach=False
    )
    labels, index = _integers("labels", labels, student), _integers("index", index, student)
    memory = jax.lax.stop_gradient(memory)
    size, dim = memory["student"].shape
    if student.shape != (student.shape[0], dim):
        raise ValueError(
            f"student_embedding has shape {tuple(student.shape)}; the banks hold vectors of {dim}."
        )
    batch = gather_batch(student, teacher, mask, axis_name)
    student, teacher = unit(batch.student), unit(batch.teacher)
    inside = (index >= 0) & (index < size)
    batch = batch._replace(
        kept=batch.kept & inside, all_kept=batch.all_kept & gathered(inside, axis_name)
    )
    # Rows out of range are dropped by the scatters below; the mask sends its rows there.
    everywhere = gathered(jnp.where(batch.kept, index, size), axis_name)
    known = memory["label"].at[everywhere].set(gathered(labels, axis_name), mode="drop")

    index = jnp.where(batch.kept, index, 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    order, classes = _by_class(known)
    drawn = jax.vmap(lambda k, y: _draw_others(k, y, order, classes, negatives))(keys, labels)
    positive = index
    if mode == "relax":
        positive = jax.vmap(lambda k, y: _draw_same(k, y, order, classes))(keys, labels)
    chosen = jnp.concatenate([positive[:, None], drawn], axis=1)

    t = jnp.asarray(temperature, student.dtype)
    value = jnp.zeros(student.shape[0], student.dtype)
    log_z = []
    for i, (own, bank) in enumerate(((student, "teacher"), (teacher, "student"))):
        scores = _products(own, memory[bank].astype(own.dtype), chosen) / t
        first = _log_mean_exp(scores, batch.kept, axis_name) + math.log(size)
        z = jnp.where(memory["started"], memory["log_z"][i].astype(own.dtype), first)
        z = jax.lax.stop_gradient(z)
        value += _noise_contrast(scores - z, size)
        log_z.append(z)

    m = jnp.asarray(momentum, student.dtype)
    updated = {"label": known}
    for name, own in (("student", student), ("teacher", teacher)):
        old = memory[name].astype(own.dtype)[jnp.minimum(everywhere, size - 1)]
        new = unit(m * old + (1 - m) * gathered(jax.lax.stop_gradient(own), axis_name))
        updated[name] = memory[name].at[everywhere].set(new.astype(memory[name].dtype), mode="drop")
    updated["log_z"] = jnp.stack(log_z).astype(jnp.float32)
    updated["started"] = memory["started"] | jnp.any(batch.all_kept)
    return keep(jnp.where(inside, value, jnp.nan), mask), updated


def crd_in_batch(
    student_embedding: Feature,
    teacher_embedding: Array,
    labels: Array,
    *,
    temperature: Scalar = 0.07,
    axis_name: str | None = None,
    where: Mask = None,
) -> Values:
    """Contrastive distillation without banks: the batch's other classes are the negatives.

    With unit embeddings s and t, temperature T, and N_i = {i} and all j of another class than i:

        L_i = -log(exp(s_i . t_i / T) / sum_(j in N_i) exp(s_i . t_j / T))
              -log(exp(t_i . s_i / T) / sum_(j in N_i) exp(t_i . s_j / T))

    For sets too large for banks, such as ImageNet; wants a large batch.

    Args:
        student_embedding: [batch, dim]; brought to unit length here.
        teacher_embedding: [batch, dim]; the gradient flows into both embeddings.
        labels: [batch], integers.
        temperature: T, above 0.
        axis_name: mapped axis over whose devices the batch is distributed: negatives come from all.
        where: [batch] mask; examples where it is 0 or False are no negatives and give 0.

    Returns:
        [batch], float32 or wider; 0 for a batch of 1.

    Raises:
        ValueError: for shapes that do not fit, or temperature <= 0.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> print(qk.losses.crd_in_batch(jnp.eye(4), jnp.eye(4)[::-1], jnp.arange(4)))
        [28.571 28.571 28.571 28.571]

    Note:
        This is InfoNCE (van den Oord et al., 2018, arXiv 1807.03748) in both directions, not the
        noise-contrastive estimate of `crd`; negatives are of other classes, as there.

    Reference:
        After Tian, Krishnan, Isola, 2019, arXiv 1910.10699.
    """
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    student, teacher, mask = prepare_features(
        student_embedding, teacher_embedding, where, names=NAMES, detach=False
    )
    labels = _integers("labels", labels, student)
    batch = gather_batch(student, teacher, mask, axis_name)
    t = jnp.asarray(temperature, student.dtype)
    itself = batch.itself()
    other = labels[:, None] != gathered(labels, axis_name)[None, :]
    among = batch.pairs() & (other | itself)
    # Rows that the mask hides have no candidates at all: give them themselves.
    among = among | (itself & ~batch.kept[:, None])
    value = jnp.zeros(student.shape[0], student.dtype)
    for own, everyone in ((batch.student, batch.all_teacher), (batch.teacher, batch.all_student)):
        scores = inner(unit(own), unit(everyone)) / t
        hit = jnp.sum(jnp.where(itself, scores, 0), axis=-1)
        value += jax.nn.logsumexp(scores, axis=-1, where=among) - hit
    return keep(value, mask)


def _products(own: Array, bank: Array, chosen: Array) -> Array:
    """own_b . bank[chosen_bk], [batch, k].

    One product with the whole bank is cheaper than the gathering of [batch, k, dim] vectors, unless
    the bank is far larger than k.
    """
    if bank.shape[0] <= 4 * chosen.shape[1]:
        return jnp.take_along_axis(inner(own, bank), chosen, axis=1)
    return jnp.einsum("bd,bkd->bk", own, bank[chosen], precision="highest")


def _integers(name: str, x: Array, features: Array) -> Array:
    x = jnp.asarray(x)
    if x.dtype.kind not in "iu" or x.shape != (features.shape[0],):
        raise ValueError(
            f"{name} has dtype {x.dtype} and shape {tuple(x.shape)}; it must hold integers of "
            f"shape ({features.shape[0]},), one per example."
        )
    # In 64 bits 2^32 would become 0, a plausible id.
    held = x if x.dtype.itemsize < 8 else jnp.where(abs(x) < 2**31, x, -1)
    return held.astype(jnp.int32)


def _log_mean_exp(scores: Array, kept: Array, axis_name: str | None) -> Array:
    """Log of the mean of exp(scores) [batch, k] over the kept rows of all devices."""
    scores = jax.lax.stop_gradient(scores)
    top = jnp.max(jnp.where(kept[:, None], scores, -jnp.inf), initial=-jnp.inf)
    top = top if axis_name is None else jax.lax.pmax(top, axis_name)
    top = jnp.where(jnp.isfinite(top), top, 0)
    sums = total(jnp.sum(jnp.where(kept[:, None], jnp.exp(scores - top), 0)), axis_name)
    count = total(jnp.sum(kept), axis_name) * scores.shape[1]
    return top + jnp.log(sums / jnp.maximum(count, 1))


def _noise_contrast(log_scores: Array, num_examples: int) -> Array:
    """The loss of log s, [batch, 1 + negatives] with the positive first."""
    noise = (log_scores.shape[1] - 1) / num_examples
    log_noise, log_other = math.log(noise), math.log(noise + 1e-7)
    positive = jax.nn.softplus(log_other - log_scores[:, 0])
    # log((s + c + eps) / c) = log(1 + s / (c + eps)) + log((c + eps) / c)
    negative = jax.nn.softplus(log_scores[:, 1:] - log_other) + (log_other - log_noise)
    return positive + jnp.sum(negative, axis=1)


def _by_class(labels: Array) -> tuple[Array, Array]:
    """Returns the ids in the order of their classes, and the classes in that order."""
    order = jnp.argsort(labels)
    return order.astype(jnp.int32), labels[order]


def _span(label: Scalar, classes: Array) -> tuple[Array, Array]:
    """Returns where the examples of a class begin and end in the order of classes."""
    first = jnp.searchsorted(classes, label, side="left").astype(jnp.int32)
    return first, jnp.searchsorted(classes, label, side="right").astype(jnp.int32)


def _draw_others(key: jax.Array, label: Scalar, order: Array, classes: Array, count: int) -> Array:
    """Ids of other classes, uniform, with replacement; of all if there is no other class."""
    first, last = _span(label, classes)
    same = last - first
    others = order.shape[0] - same
    same = jnp.where(others > 0, same, 0)
    draws = jax.random.randint(key, (count,), 0, order.shape[0] - same, jnp.int32)
    return order[jnp.where(draws < first, draws, draws + same)]


def _draw_same(key: jax.Array, label: Scalar, order: Array, classes: Array) -> Array:
    """An id of the class, uniform."""
    first, last = _span(label, classes)
    key = jax.random.fold_in(key, 1)
    last = jnp.maximum(last, first + 1)
    return order[jax.random.randint(key, (), first, last, jnp.int32)]
