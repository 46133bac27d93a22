"""Metrics as sums and counts.

A metric of a batch is a dict of float32 scalar sums with their `"count"`. Sums of batches, of
devices and of padded last batches add up to the sums of the whole split; the division happens once,
in `finish`. A mean of per-batch means would weight a short last batch too much.

    sums = metrics.classification(logits, labels, where=mask)       # inside jit
    total = metrics.add(total, jax.device_get(sums))                # once a batch, on the host
    metrics.finish(total)     # {"count": 1497.0, "top1": 0.967, "top5": 0.998, "loss": 0.113}

Float32 counts are exact up to 2^24 = 16,777,216 examples a batch; `add` keeps whatever it is
given, and after `jax.device_get` converts to Python floats, which are exact far beyond.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.hierarchy import ClassTree, find
from qkd_jax.losses.inputs.logits import prepare_labels, prepare_logits


def classification(
    logits: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Sums of top-1 and top-5 hits and of the cross-entropy over a batch.

    An example is a top-k hit when fewer than k classes come before its label. A class comes before
    another when its logit is larger, or equal with a lower index: ties are broken as argmax breaks
    them, so a net with constant logits scores the share of class 0 and not 100 %.

    Args:
        logits: [batch, classes], floating.
        labels: [batch], integers in [0, classes).
        where: [batch] mask; examples where it is 0 or False count nowhere.
        axis_name: name of a mapped axis (pmap, shard_map) to sum over as well.

    Returns:
        float32 scalars: `count` of examples, hits `top1` and `top5` (with fewer than 5 classes, of
        all classes), and `loss`, the sum of -log softmax(logits)[label] in nats.

    Raises:
        ValueError: for wrong shapes or labels that are not integers.

    Note:
        An example with a NaN among its logits is wrong for top-1 and top-5 and makes `loss` NaN. So
        does a label outside [0, classes), which cannot be checked while tracing.
    """
    logits, mask = prepare_logits("logits", logits, where)
    batch, classes = logits.shape

    own = prepare_labels(labels, logits)[:, None]
    index = jnp.arange(classes)[None, :]
    hit = own == index
    mine = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1, keepdims=True)
    before = (logits > mine) | ((logits == mine) & (index < own))
    place = jnp.sum(before, axis=-1)
    known = jnp.any(hit, axis=-1)
    right = known & ~jnp.any(jnp.isnan(logits), axis=-1)
    loss = -jnp.sum(jnp.where(hit, jax.nn.log_softmax(logits), 0.0), axis=-1)
    sums = {
        "count": _total(jnp.ones(batch, bool), mask),
        "top1": _total(right & (place < 1), mask),
        "top5": _total(right & (place < min(5, classes)), mask),
        "loss": _total(jnp.where(known, loss, jnp.nan), mask),
    }
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def agreement(
    logits: jax.Array,
    other_logits: jax.Array,
    *,
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Counts the examples on which two nets predict the same class.

    The prediction is the argmax; the lowest index wins a tie. NaN among either net's logits means
    that the two do not agree.

    Args:
        logits: [batch, classes], floating.
        other_logits: [batch, classes], floating.
        where: [batch] mask; examples where it is 0 or False count nowhere.
        axis_name: name of a mapped axis (pmap, shard_map) to sum over as well.

    Returns:
        float32 scalars: `count` of examples and `agree`, how many of them agree.

    Raises:
        ValueError: for shapes that differ or are not [batch, classes].
    """
    logits, mask = prepare_logits("logits", logits, where)
    other, _ = prepare_logits("other_logits", other_logits, None)
    checks.same_shape(logits=logits, other_logits=other)
    ordered = ~jnp.any(jnp.isnan(logits) | jnp.isnan(other), axis=-1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(other, axis=-1)
    sums = {
        "count": _total(jnp.ones(same.shape, bool), mask),
        "agree": _total(ordered & same, mask),
    }
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def hierarchical(
    logits: jax.Array,
    labels: jax.Array,
    *,
    tree: ClassTree | str,
    ks: Sequence[int] = (1, 5),
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Sums of how bad the mistakes over a batch are, by a class tree.

    With d(a, b) the height of the lowest common ancestor of two classes (0 for a = b, 1 for
    siblings right above the leaves), D(a, b) = log2 of the number of its leaves, and c_1, c_2, ...
    the classes by falling logit, ties to the lower index:

        severity           d(c_1, label), over the mistakes c_1 != label
        lca_distance       D(c_1, label), over the mistakes; bits
        hier_dist<k>       mean over j <= k of d(c_j, label)
        best<k>            least of the d(c_j, label), j <= k
        hier_precision<k>  sum over j <= k of 1 - d(c_j, label) / d_max, over the same sum for the
                           k nearest classes
        elca               sum over c of softmax(logits)[c] D(c, label); bits

    Args:
        logits: [batch, classes], floating.
        labels: [batch], integers in [0, classes).
        tree: a `ClassTree`, a key of `hierarchy.TREES`, or a file; see `hierarchy.find`.
        ks: the k's; those above the number of classes count all classes.
        where: [batch] mask; examples where it is 0 or False count nowhere.
        axis_name: name of a mapped axis (pmap, shard_map) to sum over as well.

    Returns:
        float32 scalars: `count` of examples, `mistakes` among them, and the sums above.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, a k below 1, a tree of another
            number of classes.

    Note:
        An example with a NaN among its logits, or a label outside [0, classes), is a mistake and
        makes the sums NaN. Classes are leaves, so D, which the paper writes I(label) - I(ancestor),
        is the same in both directions.

    Reference:
        Bertinetto et al., 2020, arXiv 1912.09393 (d, severity); Deng et al., 2010, and Frome et
        al., 2013 (precision); Shi et al., 2024, arXiv 2407.16067 (D, ELCA).
    """
    logits, mask = prepare_logits("logits", logits, where)
    labels = prepare_labels(labels, logits)
    batch, classes = logits.shape
    for k in ks:
        checks.integer_in("k in ks", k, 1)
    tree = find(tree, classes)
    heights = jnp.asarray(tree.heights, jnp.float32)
    bits = jnp.asarray(tree.information, jnp.float32)[labels]

    known = (labels >= 0) & (labels < classes)
    ordered = known & ~jnp.any(jnp.isnan(logits), axis=-1)
    # top_k puts -0 below 0; for everyone else they are a tie.
    _, best = jax.lax.top_k(jnp.where(logits == 0, 0, logits), min(max(ks, default=1), classes))
    d = jnp.where(ordered[:, None], heights[labels[:, None], best], jnp.nan)
    wrong = (best[:, 0] != labels) | ~ordered
    of_first = jnp.take_along_axis(bits, best[:, :1], axis=1)[:, 0]
    elca = jnp.where(known, jnp.sum(jax.nn.softmax(logits) * bits, axis=-1), jnp.nan)
    sums = {
        "count": _total(jnp.ones(batch, bool), mask),
        "mistakes": _total(wrong, mask),
        "severity": _total(jnp.where(wrong, d[:, 0], 0), mask),
        "lca_distance": _total(jnp.where(wrong, jnp.where(ordered, of_first, jnp.nan), 0), mask),
        "elca": _total(elca, mask),
    }
    largest = max(int(tree.heights.max()), 1)
    # The k nearest classes of each label: what a net that knew the tree would answer.
    nearest = jnp.asarray(np.sort(1 - tree.heights / largest, axis=1)[:, ::-1], jnp.float32)
    for k in dict.fromkeys(ks):
        first = d[:, : min(k, classes)]
        ideal = jnp.sum(nearest[:, : min(k, classes)], axis=1)[labels]
        sums[f"hier_dist{k}"] = _total(jnp.mean(first, axis=1), mask)
        sums[f"best{k}"] = _total(jnp.min(first, axis=1), mask)
        sums[f"hier_precision{k}"] = _total(jnp.sum(1 - first / largest, axis=1) / ideal, mask)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def finish_hierarchical(sums: Mapping[str, Any]) -> dict[str, float | None]:
    """Divides the sums of `hierarchical`, each by what it was summed over.

    Args:
        sums: sums of `hierarchical`, of the whole split.

    Returns:
        {"severity", "lca_distance"}: means over the mistakes, None where there is none; all others
        but `count` and `mistakes`: means over the examples.

    Raises:
        ValueError: if there is no count, or it is 0.
    """
    values: dict[str, float | None] = dict(finish(sums))
    mistakes = values["mistakes"] = float(sums["mistakes"])
    for name in ("severity", "lca_distance"):
        values[name] = float(sums[name]) / mistakes if mistakes else None
    return values


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two dicts of sums key by key; an empty one is a neutral start.

    NumPy scalars become Python floats, so that a long evaluation adds up in double precision.

    Raises:
        ValueError: if the keys differ.
    """
    if a and b and set(a) != set(b):
        raise ValueError(
            f"a has the sums {sorted(a)} and b has {sorted(b)}; add sums of one kind of metric."
        )
    return {k: _number(a[k]) + _number(b[k]) for k in a} if a and b else {**a, **b}


def finish(sums: Mapping[str, Any]) -> dict[str, float]:
    """Divides every sum by the count.

    Args:
        sums: a dict with `"count"` and any further sums, arrays or numbers.

    Returns:
        Python floats: the means under their names, and `count` itself.

    Raises:
        ValueError: if there is no count, or it is 0: a mean over no example is undefined.
    """
    if "count" not in sums:
        raise ValueError(f"sums has the keys {sorted(sums)}; 'count' must be among them.")
    values = {k: float(v) for k, v in sums.items()}
    count = values["count"]
    if count == 0:
        raise ValueError("sums has count 0; evaluate at least one example that `where` keeps.")
    return {k: v if k == "count" else v / count for k, v in values.items()}


def _total(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Sums the values that the mask keeps, as a float32 scalar."""
    if mask is not None:
        values = jnp.where(mask, values, jnp.zeros((), values.dtype))
    return jnp.sum(values.astype(jnp.float32))


def _number(value: Any) -> Any:
    """Returns arrays of JAX unchanged (they may be traced) and everything else as a float."""
    return value if isinstance(value, jax.Array) else float(value)
