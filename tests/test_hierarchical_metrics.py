"""Metrics over a class tree against plain loops that climb and sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import metrics
from qkd_jax.hierarchy import TREES, ClassTree

KS = (1, 3, 5)


def tree_of(seed, classes):
    """A random tree with `classes` leaves in a random order of labels, and its parents."""
    rng = np.random.default_rng(seed)
    parents, open_nodes = {"n0": None}, ["n0"]
    while len(open_nodes) < classes:
        node = open_nodes.pop(rng.integers(len(open_nodes)))
        for _ in range(rng.integers(1, 4)):
            name = f"n{len(parents)}"
            parents[name] = node
            open_nodes.append(name)
    names = [open_nodes[i] for i in rng.permutation(len(open_nodes))]
    return ClassTree.from_parents(parents).with_classes(names), parents, names


def restated(parents, names, logits, labels):
    def line(node):
        return [node, *(line(parents[node]) if parents[node] else ())]

    lines = {n: line(n) for n in names}
    below = {node: [n for n in names if node in lines[n]] for node in parents}
    height = {node: max(lines[n].index(node) for n in below[node]) for node in parents}
    shared = lambda a, b: next(n for n in lines[names[a]] if n in lines[names[b]])
    d = lambda a, b: height[shared(a, b)]
    bits = lambda a, b: np.log2(len(below[shared(a, b)]))
    everyone = range(len(names))
    largest = max(d(a, b) for a in everyone for b in everyone)
    out = {f"{n}{k}": 0.0 for k in KS for n in ("hier_dist", "best", "hier_precision")}
    out |= dict(count=0.0, mistakes=0.0, severity=0.0, lca_distance=0.0, elca=0.0)
    for z, y in zip(np.float64(logits), labels, strict=True):
        order = sorted(everyone, key=lambda c: (-z[c], c))
        p = np.exp(z - z.max())
        p /= p.sum()
        out["count"] += 1
        out["elca"] += sum(p[c] * bits(c, y) for c in everyone)
        if order[0] != y:
            out["mistakes"] += 1
            out["severity"] += d(order[0], y)
            out["lca_distance"] += bits(order[0], y)
        for k in KS:
            first = order[:k]
            out[f"hier_dist{k}"] += np.mean([d(c, y) for c in first])
            out[f"best{k}"] += min(d(c, y) for c in first)
            ideal = sorted((1 - d(c, y) / largest for c in everyone), reverse=True)[:k]
            out[f"hier_precision{k}"] += sum(1 - d(c, y) / largest for c in first) / sum(ideal)
    return out


@pytest.mark.parametrize(("seed", "classes"), [(0, 4), (1, 9), (2, 17)])
def test_against_climbing(seed, classes):
    tree, parents, names = tree_of(seed, classes)
    rng = np.random.default_rng(seed)
    logits = np.round(2 * rng.standard_normal((40, len(names)))).astype(np.float32)  # with ties
    labels = rng.integers(0, len(names), 40).astype(np.int32)
    found = metrics.hierarchical(logits, labels, tree=tree, ks=KS)
    wanted = restated(parents, names, logits, labels)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    done = metrics.finish_hierarchical(found)
    np.testing.assert_allclose(done["severity"], wanted["severity"] / wanted["mistakes"], 1e-6)
    np.testing.assert_allclose(done["elca"], wanted["elca"] / 40, 1e-5)
    # Halves with a mask add up to the whole: nothing is a mean of means.
    half = np.arange(40) < 13
    jitted = jax.jit(
        lambda where: metrics.hierarchical(logits, labels, tree=tree, ks=KS, where=where)
    )
    summed = metrics.add(jax.device_get(jitted(half)), jax.device_get(jitted(~half)))
    for name, value in wanted.items():
        np.testing.assert_allclose(summed[name], value, rtol=1e-5, err_msg=name)


def test_a_net_that_is_always_right_has_no_severity():
    labels = np.arange(10, dtype=np.int32)
    logits = 50 * np.eye(10, dtype=np.float32)
    done = metrics.finish_hierarchical(metrics.hierarchical(logits, labels, tree="digits"))
    assert done["severity"] is None and done["lca_distance"] is None
    assert done["mistakes"] == done["hier_dist1"] == done["best5"] == 0
    assert done["hier_precision1"] == 1 and done["count"] == 10
    np.testing.assert_allclose(done["elca"], 0, atol=1e-6)


def test_not_a_number_is_seen():
    logits = 50 * np.eye(10, dtype=np.float32)
    logits[3, 3] = np.nan
    sums = metrics.hierarchical(logits, np.arange(10), tree="digits")
    assert sums["mistakes"] == 1 and np.isnan(sums["severity"]) and np.isnan(sums["hier_dist5"])


def test_labels_in_small_types_count_as_they_are():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 300)).astype(np.float32)
    tree, *_ = tree_of(3, 300)
    logits = np.pad(logits, ((0, 0), (0, len(tree.leaves) - 300)))
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        labels = rng.integers(0, min(300, np.iinfo(dtype).max + 1), 64)
        want = metrics.hierarchical(logits, labels.astype(np.int32), tree=tree)
        found = metrics.hierarchical(logits, labels.astype(dtype), tree=tree)
        assert {k: float(v) for k, v in found.items()} == {k: float(v) for k, v in want.items()}
        want = metrics.classification(logits, labels.astype(np.int32))
        assert metrics.classification(logits, labels.astype(dtype)) == want


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_label_that_is_no_class_is_seen(wrong):
    labels = np.arange(10, dtype=np.int32)
    labels[4] = wrong
    where = np.ones(10)
    logits = 50 * np.eye(10, dtype=np.float32)
    sums = metrics.hierarchical(logits, labels, tree="digits", where=where)
    assert sums["mistakes"] == 1
    for name in sums.keys() - {"count", "mistakes"}:
        assert np.isnan(sums[name]), name
    where[4] = 0
    assert metrics.hierarchical(logits, labels, tree="digits", where=where)["mistakes"] == 0


def test_distances_of_shipped_trees():
    fashion = TREES["fashion_mnist"]()
    names = [fashion.names[n] for n in fashion.classes]
    d = {(a, b): fashion.heights[names.index(a), names.index(b)] for a in names for b in names}
    assert d["Shirt", "T-shirt/top"] == 1 < d["Shirt", "Coat"] < d["Shirt", "Sneaker"] == 4
    cifar = TREES["cifar100"]()
    assert (np.sort(cifar.heights, axis=1) == [0] + 4 * [1] + 95 * [2]).all()
    np.testing.assert_allclose(np.unique(cifar.information), np.log2([1, 5, 100]))
    assert [cifar.names[n] for n in cifar.classes[:3]] == ["apple", "aquarium_fish", "baby"]


def test_errors():
    logits = jnp.zeros((2, 10))
    with pytest.raises(ValueError, match="100 leaves"):
        metrics.hierarchical(logits, np.zeros(2, np.int32), tree="cifar100")
    with pytest.raises(ValueError, match="k in ks is 0"):
        metrics.hierarchical(logits, np.zeros(2, np.int32), tree="digits", ks=(0,))
    with pytest.raises(ValueError, match="count 0"):
        metrics.finish_hierarchical({"count": 0, "mistakes": 0})
