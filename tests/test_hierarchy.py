"""Class trees against plain climbing, on random trees of every shape."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax.hierarchy import ClassTree

CLOTHES = {"clothes": {"tops": ["shirt", "pullover"], "shoes": {"sneaker": {}}, "bag": None}}


def climb(parents, a, b):
    """The lowest common ancestor by walking up, on the raw parents."""

    def line(node):
        path = [node]
        while parents[path[-1]] is not None:
            path.append(parents[path[-1]])
        return path

    above = set(line(b))
    return next(node for node in line(a) if node in above)


@st.composite
def trees(draw):
    n = draw(st.integers(1, 60))
    reach = draw(st.integers(1, n))  # 1 gives a path, n a bush
    parents = {0: None}
    for child in range(1, n):
        parents[child] = draw(st.integers(max(0, child - reach), child - 1))
    order = draw(st.permutations(range(n)))
    return {f"n{order[c]}": None if p is None else f"n{order[p]}" for c, p in parents.items()}


@settings(max_examples=60, deadline=None)
@given(trees())
def test_every_pair_has_the_ancestor_that_climbing_finds(parents):
    tree = ClassTree.from_parents(parents)
    names = list(parents)
    numbers = tree.index(names)
    found = tree.lca(numbers[:, None], numbers[None, :])
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            assert tree.names[found[i, j]] == climb(parents, a, b)


@settings(max_examples=30, deadline=None)
@given(trees())
def test_depth_height_ancestors_and_leaves(parents):
    tree = ClassTree.from_parents(parents)
    children = {n: [c for c, p in parents.items() if p == n] for n in parents}

    def height(name):
        return 1 + max(map(height, children[name])) if children[name] else 0

    def leaves(name):
        below = [leaf for child in children[name] for leaf in leaves(child)]
        return below if children[name] else [name]

    assert sorted(tree.names[i] for i in tree.leaves) == sorted(
        n for n in parents if not children[n]
    )
    for node, name in enumerate(tree.names):
        path = [tree.names[i] for i in tree.ancestors(node)]
        assert path[0] == name and len(path) == tree.depth[node] + 1
        assert all(parents[a] == b for a, b in itertools.pairwise(path))
        assert parents[path[-1]] is None
        assert tree.height[node] == height(name)
        assert sorted(tree.names[i] for i in tree.leaves_under(node)) == sorted(leaves(name))
        assert tree.size[node] == 1 + sum(tree.size[tree.index(c)] for c in children[name])


def test_numpy_and_jitted_queries_agree():
    rng = np.random.default_rng(0)
    tree = ClassTree.from_parents(
        {i: int(rng.integers(max(0, i - 40), i)) if i else None for i in range(5000)}
    )
    a, b = rng.integers(0, 5000, (2, 20_000))
    wanted = tree.lca(a, b)
    found = jax.jit(tree.lca)(jnp.asarray(a), jnp.asarray(b))
    assert isinstance(wanted, np.ndarray) and isinstance(found, jax.Array)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(wanted, tree.lca(b, a))
    assert int(tree.lca(7, 7)) == 7 and int(tree.lca(0, 4999)) == 0


def test_ways_to_write_the_same_tree():
    nested = ClassTree.from_dict(CLOTHES)
    edges = [
        ("clothes", "tops"),
        ("tops", "shirt"),
        ("tops", "pullover"),
        ("clothes", "shoes"),
        ("shoes", "sneaker"),
        ("clothes", "bag"),
    ]
    lines = ["# parent child", "", *(f"{p} {c}  # is a" for p, c in edges)]
    for other in (
        ClassTree.from_edges(edges),
        ClassTree.from_lines(lines),
        ClassTree.from_parents({c: p for p, c in edges}),
    ):
        assert other.names == nested.names
        np.testing.assert_array_equal(other.parent, nested.parent)
    assert nested.names == ("clothes", "tops", "shirt", "pullover", "shoes", "sneaker", "bag")
    pair = nested.lca(nested.index("shirt"), nested.index(["pullover", "sneaker", "bag"]))
    assert [nested.names[i] for i in pair] == ["tops", "clothes", "clothes"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassTree.from_edges([]), "has no node"),
        (
            lambda: ClassTree.from_edges([("a", "b"), ("c", "b")]),
            "'b' has two parents, 'a' and 'c'",
        ),
        (lambda: ClassTree.from_edges([("a", "b"), ("b", "a")]), "cycle: 'a' -> 'b' -> 'a'"),
        (lambda: ClassTree.from_edges([("r", "x"), ("a", "b"), ("b", "a")]), "cycle: 'a' -> 'b'"),
        (lambda: ClassTree.from_edges([("a", "a")]), "cycle: 'a' -> 'a'"),
        (lambda: ClassTree.from_edges([("a", "b"), ("c", "d")]), r"2 roots \('a', 'c'\)"),
        (lambda: ClassTree.from_lines(["a b", "c"]), "line 2 is 'c'"),
        (lambda: ClassTree.from_dict({"a": {"b": {}}, "c": {}}), "one name at the top"),
        (lambda: ClassTree.from_dict({"a": {"b": ["c"], "c": {}}}), "'c' comes twice"),
        (lambda: ClassTree.from_dict(CLOTHES).index("shrit"), "Did you mean 'shirt'"),
        (lambda: ClassTree.from_dict(CLOTHES).lca(0, 7), "b holds .*7.* no node.*0 to 6"),
        (lambda: ClassTree.from_dict(CLOTHES).lca(jnp.array([-1]), 0), "a holds .*-1"),
        (lambda: ClassTree.from_dict(CLOTHES).lca(0.5, 0), "a holds .*0.5"),
        (lambda: ClassTree.from_dict(CLOTHES).ancestors(9), "node holds .*9"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
