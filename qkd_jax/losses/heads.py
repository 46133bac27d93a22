"""Losses of a net with further classifiers on its hidden features, which training alone needs.

The classifiers are adaptors (`training/adaptors/heads.py`): they learn beside the net, are no part
of it, and are left behind where it is evaluated and deployed.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qkd_jax import checks
from qkd_jax.numerics.features import check_tuple, prepare_features
from qkd_jax.numerics.logits import divergence, keep, prepare_pair

__all__ = ["byot"]


def byot(
    heads_logits: Sequence[jax.Array],
    student_features: Sequence[jax.Array],
    teacher_logits: jax.Array,
    teacher_feature: jax.Array,
    labels: jax.Array,
    *,
    alpha: ArrayLike = 0.1,
    temperature: ArrayLike = 3.0,
    hint: ArrayLike = 1.28e-4,
    where: jax.Array | None = None,
) -> jax.Array:
    """Self-distillation: shallow classifiers learn from the deepest one of their own net.

    With z_i and F_i the logits and features of n shallow classifiers, z and F the deepest's:

        L = sum_i (1 - alpha) CE(z_i, y) + alpha T^2 KL(softmax(z / T) || softmax(z_i / T))
            + hint |F_i - F|^2

    The deepest classifier learns from the labels alone, by a term of its own (`ce`).

    Args:
      heads_logits: tuple of n arrays [batch, classes], shallow to deep; they learn, and so do the
        layers below them.
      student_features: tuple of n vectors or maps, adapted: what the shallow classifiers see.
      teacher_logits: [batch, classes], the deepest classifier's; no gradient flows into them.
      teacher_feature: what the deepest classifier sees; no gradient flows into it.
      labels: y, [batch], integers in [0, classes).
      alpha: share of the soft labels, in [0, 1].
      temperature: T, above 0.
      hint: weight of the features' squared distance, a sum over their elements, at least 0.
      where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
      [batch], float32 or wider.

    Raises:
      ValueError: for shapes that differ, no classifiers, or numbers out of range.

    Adaptor:
      A bottleneck for each tap, whose output, with as many channels as the deepest feature has, is
      the classifier's feature, and a dense layer on top.

    Note:
      Another net may stand in for the deepest classifier: its logits and feature then teach all
      heads. Common code takes (1 - alpha) of the deepest's cross-entropy too, and the hint as 1e-6
      times a sum over a batch of 128: 1.28e-4 here.

    Reference:
      Zhang, Song, Gao, Chen, Bao, Ma, 2019, arXiv 1905.08094.
    """
    check_tuple("heads_logits", heads_logits, "logits, one array per classifier")
    check_tuple("student_features", student_features, "features, one array per classifier")
    if len(heads_logits) != len(student_features):
        raise ValueError(
            f"heads_logits has {len(heads_logits)} entries and student_features "
            f"{len(student_features)}; each classifier has one feature."
        )
    checks.number("alpha", alpha, low=0.0, high=1.0)
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    checks.number("hint", hint, low=0.0)
    values, mask = [], None
    for i, (logits, feature) in enumerate(zip(heads_logits, student_features, strict=True)):
        try:
            z, target, mask = prepare_pair(logits, teacher_logits, where)
            own, deep, _ = prepare_features(feature, teacher_feature, where)
        except ValueError as error:
            raise ValueError(f"heads_logits[{i}], student_features[{i}]: {error}") from error
        a, t, h = (jnp.asarray(number, z.dtype) for number in (alpha, temperature, hint))
        soft = t * t * divergence(target / t, z / t)
        apart = jnp.sum(jnp.square(own - deep), axis=tuple(range(1, own.ndim)))
        values.append((1 - a) * _cross_entropy(z, labels) + a * soft + h * apart)
    return keep(sum(values[1:], values[0]), mask)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(z)[y], [batch]; NaN for a label outside [0, classes)."""
    labels = jnp.asarray(labels)
    checks.class_labels("labels", labels, logits)
    hit = labels.astype(jnp.int32)[:, None] == jnp.arange(logits.shape[1])[None, :]
    value = -jnp.sum(jnp.where(hit, jax.nn.log_softmax(logits), 0.0), axis=-1)
    return jnp.where(jnp.any(hit, axis=-1), value, jnp.nan)
