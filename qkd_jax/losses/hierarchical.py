"""Losses over a class tree: a mistake costs more the farther it is from the truth.

`tree` says which: a key of `hierarchy.TREES`, a file ("tree.txt#classes.txt"), a `ClassTree`, or
None for the flat tree. In a run, a term that does not name one gets the data set's. It decides what
is compiled; the other hyper-parameters are numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.hierarchy import ClassTree, find
from qkd_jax.losses.inputs.logits import keep, prepare_labels, prepare_logits
from qkd_jax.losses.inputs.shapes import Array, Logits, Mask, Scalar, Values


def hxe(
    logits: Logits,
    labels: Array,
    *,
    tree: ClassTree | str | None = None,
    alpha: Scalar = 0.1,
    normalize: bool = False,
    where: Mask = None,
) -> Values:
    """Hierarchical cross-entropy: the label's probability, factored along its path to the root.

    With P(v) the probability of all classes below a node v, and v running over the path from the
    label's leaf up to the child of the root:

        L = -sum_v exp(-alpha depth(v)) log(P(v) / P(parent(v)))

    The factors' product is P(label), so alpha = 0 is the cross-entropy; the larger alpha, the less
    the fine choices low in the tree weigh against the coarse ones above.

    Args:
        logits: [batch, classes], floating.
        labels: [batch], integers in [0, classes).
        tree: the class tree, see above; with the flat one this is exp(-alpha) times `ce`.
        alpha: 0 or more, per edge; the authors use 0.1 to 0.9.
        normalize: divide by the sum of exp(-alpha depth) over all nodes, as the authors' code does.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider, at least 0.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, a negative alpha, a tree of
            another number of classes.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> logits, labels = jnp.eye(10)[:3], jnp.arange(3)
        >>> print(qk.losses.hxe(logits, labels, tree="fashion_mnist"))
        [1.152 1.232 1.152]

    Note:
        The paper writes exp(-alpha h) with the height h; its code, and this, take the depth, which
        is what makes alpha prefer the coarse. The authors' code leaves out factors that underflow
        to 0, so that the worst mistakes cost nothing; here P is summed as logsumexp and none is
        left out. It also takes one edge too few for leaves right below the root.

    Reference:
        Bertinetto et al., 2020, arXiv 1912.09393, equations 2 to 4.
    """
    checks.number("alpha", alpha, low=0.0)
    logits, mask = prepare_logits("logits", logits, where)
    labels = prepare_labels(labels, logits)
    tree = find(tree, logits.shape[1])
    path, above, depth = (jnp.asarray(table)[labels] for table in _paths(tree))
    sums = _log_sums(tree, keep(logits, mask))
    take = functools.partial(jnp.take_along_axis, sums, axis=1)
    factors = take(above) - take(path)
    rate = jnp.asarray(alpha, logits.dtype)
    weight = jnp.where(depth > 0, jnp.exp(-rate * depth), 0.0)
    if normalize:
        weight = weight / jnp.sum(jnp.exp(-rate * tree.depth))
    return _kept(jnp.sum(weight * factors, axis=-1), labels, logits, mask)


def tree_soft_labels(
    logits: Logits,
    labels: Array,
    *,
    tree: ClassTree | str | None = None,
    beta: Scalar = 10.0,
    where: Mask = None,
) -> Values:
    """Cross-entropy with labels that the tree softens: near classes get some of the probability.

        L = -sum_k y_k log p_k,    y_k proportional to exp(-beta d(k, label) / d_max)

    with d the height of the lowest common ancestor and d_max its largest value.

    Args:
        logits: [batch, classes], floating.
        labels: [batch], integers in [0, classes).
        tree: the class tree, see above; with the flat one this is label smoothing.
        beta: 0 or more; the authors use 4 to 30. 0 is the uniform label, infinity the hard one.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider; its least value is the entropy of y.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, a negative beta, a tree of
            another number of classes.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> logits, labels = jnp.eye(10)[:3], jnp.arange(3)
        >>> print(qk.losses.tree_soft_labels(logits, labels, tree="fashion_mnist"))
        [1.549 1.464 1.549]

    Reference:
        Bertinetto et al., 2020, arXiv 1912.09393, equations 5 and 6.
    """
    checks.number("beta", beta, low=0.0)
    logits, mask = prepare_logits("logits", logits, where)
    labels = prepare_labels(labels, logits)
    heights = find(tree, logits.shape[1]).heights
    near = jnp.asarray(-heights / max(heights.max(), 1), logits.dtype)[labels]
    target = jax.nn.softmax(jnp.asarray(beta, logits.dtype) * near)
    log_p = jax.nn.log_softmax(keep(logits, mask))
    return _kept(-jnp.sum(target * log_p, axis=-1), labels, logits, mask)


def lca_alignment(
    logits: Logits,
    labels: Array,
    *,
    tree: ClassTree | str | None = None,
    power: Scalar = 25.0,
    ce_weight: Scalar = 0.03,
    where: Mask = None,
) -> Values:
    """LCA alignment: all classes are pulled up, each by how little is lost at its common ancestor.

        L = ce_weight (-log p_label) - mean_k (1 - M[k, label]) log p_k

    with M = D^power scaled to [0, 1] column by column, and D[k, label] the information in bits
    between the label and its lowest common ancestor with k. A high power leaves M near 1 only for
    the farthest classes, so that 1 - M is near 1 for the related ones.

    Args:
        logits: [batch, classes], floating.
        labels: [batch], integers in [0, classes).
        tree: the class tree, see above.
        power: above 0; the authors' 25.
        ce_weight: 0 or more; the authors' 0.03.
        where: [batch] mask; examples where it is 0 or False give 0 and no gradient.

    Returns:
        [batch], float32 or wider.

    Raises:
        ValueError: for wrong shapes, labels that are not integers, numbers out of range, a tree of
            another number of classes.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> logits, labels = jnp.eye(10)[:3], jnp.arange(3)
        >>> print(qk.losses.lca_alignment(logits, labels, tree="fashion_mnist"))
        [1.42  1.418 1.42 ]

    Reference:
        Shi et al., 2024, arXiv 2407.16067, section on soft labels from the class taxonomy.
    """
    checks.number("power", power, low=0.0, low_allowed=False)
    checks.number("ce_weight", ce_weight, low=0.0)
    logits, mask = prepare_logits("logits", logits, where)
    labels = prepare_labels(labels, logits)
    bits = find(tree, logits.shape[1]).information
    # Scaling does not see a common factor: without it 10 bits to the 25th leave float32's range
    # of exact sums. The least value of a column is the label's own 0.
    scaled = jnp.asarray(bits / max(bits.max(), 1.0), logits.dtype)
    far = jnp.power(scaled, jnp.asarray(power, logits.dtype))
    far = far / jnp.maximum(jnp.max(far, axis=0, keepdims=True), jnp.finfo(logits.dtype).tiny)
    log_p = jax.nn.log_softmax(keep(logits, mask))
    own = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    pulled = -jnp.mean((1 - far.T[labels]) * log_p, axis=-1)
    return _kept(jnp.asarray(ce_weight, logits.dtype) * own + pulled, labels, logits, mask)


def _kept(loss: Array, labels: Array, logits: Array, mask: Mask) -> Array:
    """The loss where the mask keeps it; NaN for a label that is no class, as `ce` has it."""
    known = (labels >= 0) & (labels < logits.shape[1])
    return keep(jnp.where(known, loss, jnp.nan), mask)


@functools.lru_cache(maxsize=16)
def _paths(tree: ClassTree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nodes, their parents, their depths) from each label's leaf up, the root left out.

    All [classes, height of the tree]; padded with the root, whose depth is 0.
    """
    steps = [tree.classes]
    for _ in range(int(tree.height[0])):
        steps.append(tree.parent[steps[-1]])
    path = np.stack(steps[:-1] or [tree.classes], axis=1)
    return path, tree.parent[path], tree.depth[path]


@functools.lru_cache(maxsize=16)
def _families(tree: ClassTree) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(nodes, their children, which of these are there) of each height, the lowest first."""
    order = np.argsort(tree.parent[1:], kind="stable") + 1
    first = np.searchsorted(tree.parent[order], np.arange(len(tree) + 1))
    families = []
    for height in range(1, int(tree.height[0]) + 1):
        nodes = np.flatnonzero(tree.height == height).astype(np.int32)
        counts = first[nodes + 1] - first[nodes]
        place = np.arange(counts.max())
        there = place < counts[:, None]
        children = order[np.where(there, first[nodes][:, None] + place, 0)].astype(np.int32)
        families.append((nodes, children, there))
    return families


# Compiled as one even where the loss runs eagerly: it is a dozen gathers and scatters.
@functools.partial(jax.jit, static_argnums=0)
def _log_sums(tree: ClassTree, logits: Array) -> Array:
    """[batch, nodes]: log of the sum of exp(logits) over the classes below each node."""
    sums = jnp.zeros((logits.shape[0], len(tree)), logits.dtype).at[:, tree.classes].set(logits)
    for nodes, children, there in _families(tree):
        values = jax.nn.logsumexp(
            sums[:, children], axis=-1, b=jnp.asarray(there[None], logits.dtype)
        )
        sums = sums.at[:, nodes].set(values)
    return sums
