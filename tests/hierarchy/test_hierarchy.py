"""Class trees against plain climbing, on random trees of every shape."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutation import accepted

from qkd_jax import hierarchy
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
    few = tree.lca(a % 256, b % 256)  # numbers of a byte, in a tree of 5,000 nodes
    small = ((a % 256).astype(np.uint8), (b % 256).astype(np.uint8))
    np.testing.assert_array_equal(tree.lca(*small), few)
    np.testing.assert_array_equal(tree.lca(*map(jnp.asarray, small)), few)
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
        (lambda: ClassTree.from_dict({"a": ["b", "b", "c"]}), "'b' comes twice"),
        (lambda: ClassTree.from_dict({"a": {"tops": "shirt"}}), "'tops' has 'shirt' below it"),
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


def test_labels_have_an_order_of_their_own():
    tree = ClassTree.from_dict(CLOTHES)
    assert [tree.names[n] for n in tree.classes] == ["shirt", "pullover", "sneaker", "bag"]
    other = tree.with_classes(["bag", "sneaker", "pullover", "shirt"])
    np.testing.assert_array_equal(
        other.heights, [[0, 2, 2, 2], [2, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    )
    np.testing.assert_allclose(
        other.information, [[0, 2, 2, 2], [2, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    )
    assert other.leaf_counts[other.index("tops")] == 2
    # `shoes` has one child: its sneaker is as far down as the others, or not.
    assert tree.depth[tree.index("sneaker")] == 2
    cut = tree.pruned(["sneaker", "pullover", "shirt"], collapse=True)
    assert set(cut.names) == {"clothes", "tops", "shirt", "pullover", "sneaker"}
    assert cut.depth[cut.index("sneaker")] == 1
    assert set(tree.pruned(["shirt", "pullover"]).names) == {"clothes", "tops", "shirt", "pullover"}
    top = tree.pruned(["shirt", "pullover"], collapse=True)
    assert top.names[0] == "tops" and len(top) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["shirt", "pullover", "sneaker"], "1 leaves are no class .'bag'"),
        (["shirt", "pullover", "sneaker", "bag", "bag"], "'bag' comes twice"),
        (["tops", "sneaker", "bag"], "'tops' is not a leaf: 2 nodes"),
        (["shirt", "bags"], "Did you mean 'bag'"),
    ],
)
def test_wrong_classes(names, message):
    with pytest.raises(ValueError, match=message):
        ClassTree.from_dict(CLOTHES).with_classes(names)


def test_files(tmp_path):
    edges = tmp_path / "is_a.txt"
    edges.write_text(
        "# parent child\nn1 n2\nn1 n3\nn2 n4\nn2 n5\nn3 n6  # a leaf\n"
        "n3 n7\nn7 n8\nn9 n8\n\nn9 n10\n"
    )
    classes = tmp_path / "classes.txt"
    classes.write_text("n6 tench, Tinca tinca\nn4 goldfish\nn5 shark\n")
    tree = hierarchy.find(f"{edges}#{classes}", 3)
    assert [tree.names[n] for n in tree.classes] == ["n6", "n4", "n5"]
    assert set(tree.names) == {"n1", "n2", "n3", "n4", "n5", "n6"}
    assert tree is hierarchy.find(
        f"{edges}#{classes}"
    )  # one object: compiled steps are found by it
    np.testing.assert_array_equal(tree.heights, [[0, 2, 2], [2, 0, 1], [2, 1, 0]])
    with pytest.raises(ValueError, match=r"is_a.txt: node 'n8' has two parents, 'n7' and 'n9'"):
        hierarchy.read(edges, ["n4", "n8"])
    first = hierarchy.read(edges, ["n4", "n8"], several_parents="first")
    assert first.names[first.lca(*first.classes)] == "n1"
    labels = tmp_path / "labels.txt"
    labels.write_text("root 1\nroot x\nx 0\nx 2\n")
    named = hierarchy.find(str(labels), 3)
    assert [named.names[n] for n in named.classes] == ["0", "1", "2"]
    labels.write_text("root 1\nroot 0\n")  # a changed file is read anew
    assert len(hierarchy.find(str(labels), 2).classes) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\nb c d\n", "tree.txt, line 2 is 'b c d'; it must be two words"),
        ("a 0\na b\n", "has the leaf 'b', and which label"),
        ("a 0\nb 1\n", "2 roots"),
        ("a b\nb a\na 0\n", "cycle: 'a' -> 'b' -> 'a'"),
        ("# nothing\n", "has no line"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "tree.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        hierarchy.read(path)


def test_wrong_names(tmp_path):
    path = tmp_path / "tree.txt"
    path.write_text("a dog\na cat\n")
    with pytest.raises(ValueError, match=r"unknown class in .*Did you mean 'dog'"):
        hierarchy.read(path, ["dogs", "cat"])
    with pytest.raises(ValueError, match=r"unknown tree .*Did you mean 'digits'"):
        hierarchy.find("digit")
    with pytest.raises(ValueError, match="2 leaves, but there are 10 classes"):
        hierarchy.find(hierarchy.read(path, ["dog", "cat"]), 10)
    with pytest.raises(ValueError, match=r"classes file .* cannot be read"):
        hierarchy.find(f"{path}#{tmp_path}/no.txt")


def test_damaged_trees_and_classes(tmp_path):
    """Refused with the file's name, or a tree of the classes that the other file lists."""
    path, classes = tmp_path / "tree.txt", tmp_path / "classes.txt"
    path.write_text("root a\nroot b\na n1 # c\na n2\n\nb n3\nb n4\n")
    classes.write_text("n3 x\nn1 y\nn2\nn4\n")
    for tree in accepted(path, lambda: hierarchy.read(path, classes)):
        assert [tree.names[node] for node in tree.classes] == ["n3", "n1", "n2", "n4"]
    for tree in accepted(classes, lambda: hierarchy.read(path, classes)):
        assert {tree.names[node] for node in tree.classes} <= {"n1", "n2", "n3", "n4", "a", "b"}


def test_a_long_cycle_and_many_names_cost_no_more_than_their_file(tmp_path):
    """Each node of a cycle is compared once, and a message holds no more than a page."""
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

    names = [Name(f"c{i}") for i in range(3000)]
    parents = dict(zip(names, [*names[1:], names[0]], strict=True))
    compared.clear()
    with pytest.raises(ValueError, match="the tree has a cycle"):
        ClassTree.from_parents(parents)
    assert len(compared) < 10 * len(names)
    path = tmp_path / "tree.txt"
    path.write_text("".join(f"root {'x' * 200}{i}\n" for i in range(3000)))
    with pytest.raises(ValueError, match="unknown class") as error:
        hierarchy.read(path, ["x" * 10_000])
    assert len(str(error.value)) < 20_000
