"""Losses over a class tree against float64 NumPy that walks a dict of parents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.hierarchy import TREES, ClassTree
from qkd_jax.losses import ce, hxe, lca_alignment, tree_soft_labels

# Uneven: a leaf right below the root, an inner node with one child, leaves at depths 1 to 4.
PARENTS = {
    "root": None,
    "lone": "root",
    "left": "root",
    "a": "left",
    "b": "left",
    "only": "left",
    "c": "only",
    "right": "root",
    "d": "right",
    "deep": "right",
    "deeper": "deep",
    "e": "deeper",
    "f": "deeper",
}
NAMES = ["e", "lone", "b", "c", "f", "a", "d"]  # labels in an order of their own
TREE = ClassTree.from_parents(PARENTS).with_classes(NAMES)
BATCH, CLASSES = 5, len(NAMES)
LABELS = np.array([0, 1, 3, 6, 4], np.int32)
CASES = [
    (hxe, {"alpha": 0.4}),
    (hxe, {"alpha": 0.4, "normalize": True}),
    (tree_soft_labels, {"beta": 5.0}),
    (lca_alignment, {"power": 3.0, "ce_weight": 0.2}),
    (lca_alignment, {}),
]


def logits(seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal((BATCH, CLASSES))


def line(name):
    """A node and all above it."""
    return [name, *(line(PARENTS[name]) if PARENTS[name] else ())]


def leaves(node):
    return [n for n in NAMES if node in line(n)]


def height(node):
    return max(line(leaf).index(node) for leaf in leaves(node))


def ancestor(a, b):
    return next(n for n in line(a) if n in line(b))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def restated(loss, z, label, **numbers):
    """One example, straight from the formula."""
    p, own = softmax(np.float64(z)), NAMES[label]
    below = lambda node: sum(p[NAMES.index(n)] for n in leaves(node))
    if loss is hxe:
        depth = lambda node: len(line(node)) - 1
        weight = lambda node: np.exp(-numbers["alpha"] * depth(node))
        total = sum(map(weight, PARENTS)) if numbers.get("normalize") else 1.0
        path = [n for n in line(own) if PARENTS[n]]
        return sum(-weight(n) * np.log(below(n) / below(PARENTS[n])) for n in path) / total
    if loss is tree_soft_labels:
        d = np.array([height(ancestor(own, n)) for n in NAMES])
        y = softmax(-numbers["beta"] * d / height("root"))
        return -np.sum(y * np.log(p))
    power, weight = numbers.get("power", 25.0), numbers.get("ce_weight", 0.03)
    bits = np.array([[np.log2(len(leaves(ancestor(a, b)))) for a in NAMES] for b in NAMES])
    m = bits**power
    m = (m - m.min(0)) / (m.max(0) - m.min(0))
    return -weight * np.log(p[label]) - np.mean((1 - m[:, label]) * np.log(p))


@pytest.mark.parametrize(("loss", "numbers"), CASES)
def test_value_and_gradient_against_the_formula(loss, numbers):
    z = logits()
    wanted = [restated(loss, row, label, **numbers) for row, label in zip(z, LABELS, strict=True)]
    given = np.float32(z)
    np.testing.assert_allclose(loss(given, LABELS, tree=TREE, **numbers), wanted, rtol=1e-5)
    grads = jax.grad(lambda x: jnp.sum(loss(x, LABELS, tree=TREE, **numbers)))(given)
    h = 1e-5
    for row, column in np.ndindex(z.shape):
        ends = []
        for sign in (1, -1):
            moved = np.float64(given[row])
            moved[column] += sign * h
            ends.append(restated(loss, moved, LABELS[row], **numbers))
        slope = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(grads[row, column], slope, rtol=1e-4, atol=1e-6)


def test_limits():
    z = np.float32(logits(1))
    hard = ce(z, LABELS)
    np.testing.assert_allclose(hxe(z, LABELS, tree=TREE, alpha=0.0), hard, rtol=2e-6)
    np.testing.assert_allclose(hxe(z, LABELS, tree=TREE, alpha=1e-5), hard, rtol=1e-4)
    np.testing.assert_allclose(hxe(z, LABELS, alpha=0.7), np.exp(-0.7) * hard, rtol=2e-6)
    np.testing.assert_allclose(tree_soft_labels(z, LABELS, tree=TREE, beta=500.0), hard, rtol=2e-6)
    uniform = -jnp.mean(jax.nn.log_softmax(z), axis=1)
    np.testing.assert_allclose(tree_soft_labels(z, LABELS, tree=TREE, beta=0.0), uniform, rtol=1e-6)


def test_label_right_below_the_root_has_its_one_edge():
    # The authors' code starts a path one edge late, which leaves nothing of such a label.
    z = np.float32(logits(2))[:1]
    one = np.array([NAMES.index("lone")], np.int32)
    np.testing.assert_allclose(hxe(z, one, tree=TREE, alpha=0.0), ce(z, one), rtol=2e-6)


@pytest.mark.parametrize(("loss", "numbers"), CASES)
@pytest.mark.parametrize("wrong", [False, True])
def test_extreme_logits_are_finite_and_mistakes_cost(loss, numbers, wrong):
    z = np.full((CLASSES, CLASSES), -1e4, np.float32)
    labels = np.arange(CLASSES, dtype=np.int32)
    z[labels, np.roll(labels, 1) if wrong else labels] = 1e4
    value, grads = jax.value_and_grad(lambda x: jnp.sum(loss(x, labels, tree=TREE, **numbers)))(z)
    assert np.isfinite(value) and np.isfinite(grads).all()
    if wrong:  # p(label) underflows to 0: leaving that factor out would make the worst mistake free
        right = np.where(np.eye(CLASSES, dtype=bool), 1e4, -1e4).astype(np.float32)
        apart = loss(z, labels, tree=TREE, **numbers) - loss(right, labels, tree=TREE, **numbers)
        far = np.array([NAMES[w] for w in np.roll(labels, 1)])
        root = np.array([ancestor(NAMES[y], w) == "root" for y, w in zip(labels, far, strict=True)])
        assert root.any() and (np.asarray(apart)[root] > 1e2).all()


def test_jitted_with_traced_numbers_and_masked():
    z, where = np.float32(logits(3)), np.array([True, False, True, True, False])
    for loss, numbers in CASES:
        traced = {k: jnp.float32(v) for k, v in numbers.items() if k != "normalize"}
        rest = {k: v for k, v in numbers.items() if k == "normalize"}
        found = jax.jit(
            lambda x, t, f=loss, r=rest: f(x, LABELS, tree=TREE, where=where, **t, **r)
        )(z, traced)
        wanted = np.where(where, loss(z, LABELS, tree=TREE, **numbers), 0)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_a_tree_by_name_costs_less_for_the_nearer_mistake():
    tree = TREES["cifar100"]()
    maple, oak, rocket = (
        [tree.names[n] for n in tree.classes].index(n) for n in ("maple_tree", "oak_tree", "rocket")
    )
    z = np.zeros((2, 100), np.float32)
    z[0, oak] = z[1, rocket] = 8.0
    labels = np.array([maple, maple], np.int32)
    for loss, numbers in ((hxe, {"alpha": 0.5}), (tree_soft_labels, {}), (lca_alignment, {})):
        near, far = loss(z, labels, tree="cifar100", **numbers)
        assert near < far


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: hxe(z, LABELS, tree="cifar100"), "'cifar100' has 100 leaves.*7 classes"),
        (lambda z: hxe(z, LABELS, tree="cifar1000"), "unknown tree.*Did you mean 'cifar100'"),
        (lambda z: hxe(z, LABELS, tree=TREE, alpha=-1.0), r"alpha is -1.*\[0"),
        (lambda z: tree_soft_labels(z, LABELS, tree=TREE, beta=-1.0), "beta is -1"),
        (lambda z: lca_alignment(z, LABELS, tree=TREE, power=0.0), "power is 0"),
        (lambda z: lca_alignment(z, LABELS, tree=TREE, ce_weight=-1.0), "ce_weight is -1"),
        (lambda z: hxe(z, np.float32(LABELS), tree=TREE), "labels has dtype float32"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.float32(logits()))
