"""Losses of a net with further classifiers on its hidden features, which training alone needs.

The classifiers are adaptors (`distillation/adaptors/heads.py`): they learn beside the net, are no
part of it, and are left behind where it is evaluated and deployed.
"""

import jax
import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.losses.inputs.feature_maps import check_tuple, prepare_features
from qkd_jax.losses.inputs.logits import hits, keep, prepare_logits, prepare_pair
from qkd_jax.losses.inputs.shapes import Array, Arrays, Logits, Mask, Matrix, Scalar, Values
from qkd_jax.losses.inputs.softened import divergence


def byot(
    heads_logits: Arrays,
    student_features: Arrays,
    teacher_logits: Array,
    teacher_feature: Array,
    labels: Array,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 3.0,
    hint: Scalar = 1.28e-4,
    where: Mask = None,
) -> Values:
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

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, teacher = jnp.eye(3), jnp.eye(3)[::-1]
        >>> print(qk.losses.byot((student,), (student,), teacher, teacher, jnp.arange(3)))
        [0.532 0.496 0.532]

    Note:
        Another net may stand in for the deepest classifier: its logits and feature then teach all
        heads. Common code takes (1 - alpha) of the deepest's cross-entropy too, and the hint as
        1e-6 times a sum over a batch of 128: 1.28e-4 here.

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
        soft = t * t * divergence(target, z, t)
        apart = jnp.sum(jnp.square(own - deep), axis=tuple(range(1, own.ndim)))
        values.append((1 - a) * _cross_entropy(z, labels) + a * soft + h * apart)
    return keep(sum(values[1:], values[0]), mask)


def one(
    logits: Logits,
    heads_logits: Arrays,
    gate: Array,
    labels: Array,
    *,
    temperature: Scalar = 3.0,
    distil: Scalar = 1.0,
    where: Mask = None,
) -> Values:
    """On-the-fly native ensemble: branches of a net learn from what a gate makes of all of them.

    With z_0 the net's own logits, z_1 ... z_n those of further branches on the same trunk, gate
    weights g_0 ... g_n and z_e = sum_i g_i z_i:

        L = sum_{i >= 1} CE(z_i, y) + CE(z_e, y)
            + distil T^2 sum_{i >= 0} KL(softmax(z_e / T) || softmax(z_i / T))

    The divergences send no gradient into z_e: the gate learns from the labels. The cross-entropy of
    the net's own logits is a term of its own (`ce`).

    Args:
        logits: z_0, [batch, classes], floating; the net that learns.
        heads_logits: tuple of n arrays [batch, classes]; they learn, and so do the layers below
            them.
        gate: g, [batch, n + 1], weights that add to 1; they learn.
        labels: y, [batch], integers in [0, classes).
        temperature: T, above 0.
        distil: weight of the divergences, at least 0.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider.

    Raises:
        ValueError: for shapes that do not fit, no branches, or numbers out of range.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> student, branch = jnp.eye(3), jnp.eye(3)[::-1]
        >>> print(qk.losses.one(student, (branch,), jnp.full((3, 2), 0.5), jnp.arange(3)))
        [2.685 1.103 2.685]

    Note:
        The authors' code lets `distil` rise as exp(-5 (1 - t)^2) over its first 80 epochs.

    Reference:
        Lan, Zhu, Gong, 2018, arXiv 1806.04606.
    """
    check_tuple("heads_logits", heads_logits, "logits, one array per branch")
    checks.number("temperature", temperature, low=0.0, low_allowed=False)
    checks.number("distil", distil, low=0.0)
    own, mask = prepare_logits("logits", logits, where)
    branches = [own]
    for i, z in enumerate(heads_logits):
        branches.append(prepare_logits(f"heads_logits[{i}]", z, None)[0])
        checks.same_shape(**{"logits": own, f"heads_logits[{i}]": branches[-1]})
    weights, _ = prepare_logits("gate", gate, None)
    if weights.shape != (len(own), len(branches)):
        raise ValueError(
            f"gate has shape {tuple(weights.shape)}; it must be {(len(own), len(branches))}: for "
            "each example a weight of the net itself and one of each branch."
        )
    z = keep(jnp.stack(branches, axis=1), mask)
    ensemble = jnp.sum(keep(weights, mask)[:, :, None] * z, axis=1)
    hard = [_cross_entropy(x, labels) for x in (*jnp.unstack(z, axis=1)[1:], ensemble)]
    t = jnp.asarray(temperature, z.dtype)
    target = jax.lax.stop_gradient(ensemble)[:, None]
    soft = t * t * jnp.sum(divergence(target, z, t), axis=1)
    return keep(sum(hard[1:], hard[0]) + jnp.asarray(distil, z.dtype) * soft, mask)


def _cross_entropy(logits: Matrix, labels: Array) -> Values:
    """-log softmax(z)[y], [batch]; NaN for a label outside [0, classes)."""
    hit, known = hits(labels, logits)
    value = -jnp.sum(jnp.where(hit, jax.nn.log_softmax(logits), 0.0), axis=-1)
    return jnp.where(known, value, jnp.nan)
