"""Trees in text files, and one name for every way to say which tree is meant."""

import functools
import os
import pathlib
from collections.abc import Sequence

from qkd_jax import checks
from qkd_jax.hierarchy.named import TREES
from qkd_jax.hierarchy.tree import ClassTree
from qkd_jax.whole_files import check_file


def read(
    path: str | os.PathLike[str],
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    several_parents: str = "error",
    collapse: bool = False,
) -> ClassTree:
    """Reads a tree from a text file, cut down to the classes of a data set.

    Each line of the file is "parent child"; "#" starts a comment, empty lines count for nothing,
    and the order of the lines is free. This is the form of WordNet's is_a files, whose words are
    ids such as n02084071. In a file of classes the first word of each line is a class, the line's
    place its label: ImageNet's LOC_synset_mapping.txt is such a file.

    Args:
        path: the file of edges.
        classes: the file of classes, or the names themselves by label. None takes every leaf, whose
            names must be the labels: "0", "1", ...
        several_parents: what to do about a node above a class that has several parents (WordNet is
            no tree): "error", or "first" to keep the one that the file names first.
        collapse: see `ClassTree.pruned`.

    Raises:
        ValueError: a file that is not there, a line that is not two words, a class without a node,
            a node with two parents, and what `ClassTree.pruned` refuses.
    """
    checks.one_of("several_parents", several_parents, ("error", "first"))
    parents: dict[str, list[str]] = {}
    names: set[str] = set()
    listed = ""
    for place, words in _lines(path, "tree"):
        if len(words) != 2:
            raise ValueError(
                f"{path}, line {place} is {' '.join(words)!r:.80}; it must be two words, parent "
                "and child."
            )
        names.update(words)
        above = parents.setdefault(words[1], [])
        if words[0] not in above:
            above.append(words[0])
    if classes is None:
        leaves = names.difference(*parents.values()) if parents else set()
        classes = [str(label) for label in range(len(leaves))]
        if other := sorted(leaves.difference(classes)):
            raise ValueError(
                f"{path} has the leaf {other[0]!r}, and which label that is, is not said; give a "
                f'file with one class a line ("{path}#classes.txt"), or name the leaves "0", "1", '
                "... by their labels."
            )
    elif isinstance(classes, str | os.PathLike):
        listed = f" (of {os.fspath(classes)})"
        classes = [words[0] for _, words in _lines(classes, "classes")]
    for name in classes:
        if name not in names:
            raise checks.unknown(f"class in {path}{listed}", name, names)
    edges, seen, stack = [], set(), list(reversed(classes))
    while stack:  # only what lies above a class: elsewhere the file need not be a tree
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        above = parents.get(node, [])
        if len(above) > 1 and several_parents == "error":
            raise ValueError(
                f"{path}: node {node!r} has two parents, {above[0]!r} and {above[1]!r}; in a tree "
                'each node has one. Drop one of the two lines, or read with several_parents="first"'
                "."
            )
        edges += [(parent, node) for parent in above[:1]]
        stack.extend(above[:1])
    if not edges:
        raise ValueError(f"{path}{listed} has no line; a tree needs one edge at least.")
    try:
        return ClassTree.from_edges(edges).pruned(classes, collapse=collapse)
    except ValueError as error:
        raise ValueError(f"{path}{listed}: {error}") from error


def _lines(path: str | os.PathLike[str], what: str) -> list[tuple[int, list[str]]]:
    """(number, words) of the lines that say something."""
    place = pathlib.Path(path).expanduser()
    check_file(place)
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the {what} file {str(path)!r} cannot be read: {error}") from error
    split = ((n, line.partition("#")[0].split()) for n, line in enumerate(text.splitlines(), 1))
    return [(number, words) for number, words in split if words]


def find(tree: ClassTree | str | None, classes: int | None = None) -> ClassTree:
    """The tree that is meant, with its number of classes checked.

    Args:
        tree: a `ClassTree`; a key of `TREES`; a file as "tree.txt" or "tree.txt#classes.txt" (see
            `read`); or None for the flat tree, in which all classes are equally far apart.
        classes: how many classes it must have; needed for None.

    Raises:
        ValueError: an unknown name, a tree of another number of classes, or what `read` says.
    """
    if tree is None:
        checks.integer_in("classes", classes, 1)
        assert classes is not None
        return _flat(classes)
    found = _named(tree) if isinstance(tree, str) else tree
    if classes is not None and len(found.classes) != classes:
        raise ValueError(
            f"the tree {tree!r} has {len(found.classes)} leaves, but there are {classes} classes; "
            "each class is one leaf."
        )
    return found


_flat = functools.lru_cache(maxsize=16)(ClassTree.flat)


def _named(name: str) -> ClassTree:
    if name in TREES:
        return TREES[name]()
    path, _, classes = name.partition("#")
    places = [pathlib.Path(part).expanduser() for part in (path, classes) if part]
    if not places or not places[0].is_file():
        raise checks.unknown("tree (there is no such file either)", name, TREES)
    stamp = tuple(place.stat().st_mtime_ns for place in places if place.is_file())
    return _read(path, classes or None, stamp)


@functools.lru_cache(maxsize=16)
def _read(path: str, classes: str | None, stamp: tuple[int, ...]) -> ClassTree:
    """One object for one file as it stands: compiled steps are found by it."""
    del stamp
    return read(path, classes)
