"""The tree itself: nodes, labels, and lowest common ancestors in constant time.

Nodes are numbered 0 to n-1 in the order in which a depth-first walk meets them, the root first, so
a node and its descendants are the numbers node .. node + size[node] - 1. The lowest common ancestor
of a < b that are not on one branch is the parent of the shallowest node among a+1 .. b: a range
minimum, which a sparse table answers in two look-ups (Bender and Farach-Colton, 2000, "The LCA
problem revisited"; the walk is their Euler tour without its returns, half as long).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks

Name = Hashable


@dataclasses.dataclass(frozen=True, eq=False)
class ClassTree:
    """A rooted tree of classes; its leaves are the classes themselves.

    Build it with `from_edges`, `from_parents`, `from_dict`, `from_lines` or `flat`. Trees compare
    and hash by identity.

    Attributes:
        names: the nodes' names, in the order of a depth-first walk, the root first.
        parent: [nodes] int32, number of the parent; the root is its own.
        depth: [nodes] int32, edges up to the root.
        height: [nodes] int32, edges down to the farthest leaf; 0 for a leaf.
        size: [nodes] int32, nodes below and including each.
        leaves: [leaves] int32, numbers of the leaves, in the order of the walk.
        classes: [leaves] int32, the leaf of each label; the leaves in the order of the walk unless
            `with_classes` has said otherwise.
    """

    names: tuple[Name, ...]
    parent: np.ndarray
    depth: np.ndarray
    height: np.ndarray
    size: np.ndarray
    leaves: np.ndarray
    classes: np.ndarray

    @classmethod
    def flat(cls, classes: int) -> ClassTree:
        """A root with the leaves "0", "1", ...: no class is nearer to another than a third."""
        checks.integer_in("classes", classes, 1)
        return cls.from_dict({"class": [str(label) for label in range(classes)]})

    @classmethod
    def from_edges(cls, edges: Iterable[tuple[Name, Name]]) -> ClassTree:
        """A tree from (parent, child) pairs in any order; children keep the order given.

        Raises:
            ValueError: no edge, a node with two parents, a cycle, or several roots.
        """
        parents: dict[Name, Name | None] = {}
        for parent, child in edges:
            if parents.setdefault(child, parent) != parent:
                raise ValueError(
                    f"node {child!r} has two parents, {parents[child]!r} and {parent!r}; in a tree "
                    "each node has one. Drop one of the two edges."
                )
        return cls.from_parents(parents)

    @classmethod
    def from_parents(cls, parents: Mapping[Any, Any]) -> ClassTree:
        """A tree from {child: parent}; the root is missing among the keys, or its parent is None.

        Raises:
            ValueError: nothing given, a cycle, or several roots.
        """
        children: dict[Name, list[Name]] = {}
        for child, parent in parents.items():
            children.setdefault(child, [])
            if parent is not None:
                children.setdefault(parent, []).append(child)
        if not children:
            raise ValueError("the tree has no node; give at least one.")
        roots = [node for node in children if parents.get(node) is None]
        if len(roots) > 1:
            shown = ", ".join(repr(root) for root in roots[:5])
            raise ValueError(
                f"the tree has {len(roots)} roots ({shown}{', ...' if len(roots) > 5 else ''}); "
                "it must have one. Put a common parent above them."
            )
        walk: list[Name] = []
        stack = list(roots)
        while stack:
            node = stack.pop()
            walk.append(node)
            stack.extend(reversed(children[node]))
        if len(walk) < len(children):
            raise ValueError(
                f"the tree has a cycle: {_cycle(parents, set(children).difference(walk))}; no node "
                "may be its own ancestor."
            )
        number = {node: i for i, node in enumerate(walk)}
        return cls._of(tuple(walk), [number[parents[n]] if i else 0 for i, n in enumerate(walk)])

    @classmethod
    def from_dict(cls, nested: Mapping[Any, Any]) -> ClassTree:
        """A tree from nested dicts; lists of names, empty dicts and None end a branch.

        Raises:
            ValueError: not one name at the top, a name that comes twice, or a branch that is text.
        """
        if not isinstance(nested, Mapping) or len(nested) != 1:
            raise ValueError(
                "a nested dict has one name at the top, the root: {'root': {'a': [...], ...}}; "
                f"got {list(nested)!r:.100}."
            )
        parents: dict[Name, Name | None] = {}
        stack: list[tuple[Name, Name | None, Any]] = [(n, None, b) for n, b in nested.items()]
        while stack:
            name, parent, below = stack.pop()
            if name in parents:
                raise ValueError(
                    f"the name {name!r} comes twice, under {parents[name]!r} and {parent!r}; a "
                    "node's name must be its own."
                )
            parents[name] = parent
            if isinstance(below, Mapping):
                inner = list(below.items())
            elif below is None or isinstance(below, list | tuple):
                inner = [(n, None) for n in below or ()]
            else:
                raise ValueError(
                    f"{name!r} has {below!r} below it; give a dict, a list of names or None."
                )
            stack.extend((n, name, b) for n, b in reversed(inner))
        return cls.from_parents(parents)

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> ClassTree:
        """A tree from lines "parent child" (WordNet's `is_a` files); "#" starts a comment.

        Raises:
            ValueError: a line without two words (named by its number), or what `from_edges` says.
        """
        edges = []
        for place, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2:
                raise ValueError(
                    f"line {place} is {line.strip()!r:.80}; it must be two words, parent and child."
                )
            edges.append((words[0], words[1]))
        return cls.from_edges(edges)

    @classmethod
    def _of(cls, names: tuple[Name, ...], above: list[int]) -> ClassTree:
        parent = np.asarray(above, np.int32)
        depth, height = np.zeros_like(parent), np.zeros_like(parent)
        size = np.ones_like(parent)
        for node in range(1, len(parent)):  # a parent's number is below its children's
            depth[node] = depth[parent[node]] + 1
        for node in range(len(parent) - 1, 0, -1):
            size[parent[node]] += size[node]
            height[parent[node]] = max(height[parent[node]], height[node] + 1)
        leaves = np.flatnonzero(size == 1).astype(np.int32)
        return cls(names, parent, depth, height, size, leaves, classes=leaves)

    def with_classes(self, names: Sequence[Name]) -> ClassTree:
        """This tree with the leaf `names[i]` as label i.

        Raises:
            ValueError: a name that is no leaf or comes twice, or a leaf that is no class.
        """
        nodes = np.asarray(self.index(list(names)), np.int32)
        for name, node in zip(names, nodes, strict=True):
            if self.size[node] > 1:
                raise ValueError(
                    f"class {name!r} is not a leaf: {self.size[node] - 1} nodes lie below it. Hang "
                    "a leaf of its own under it, or take the nodes below away."
                )
        values, counts = np.unique(nodes, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"class {self.names[values[counts > 1][0]]!r} comes twice; each label has a leaf "
                "of its own."
            )
        if missing := np.setdiff1d(self.leaves, nodes).tolist():
            shown = ", ".join(repr(self.names[node]) for node in missing[:3])
            raise ValueError(
                f"{len(missing)} leaves are no class ({shown}{', ...' if len(missing) > 3 else ''})"
                "; `pruned(classes)` cuts them off."
            )
        return dataclasses.replace(self, classes=nodes)

    def pruned(self, names: Sequence[Name], *, collapse: bool = False) -> ClassTree:
        """The part of the tree above some of its leaves, which become the labels in that order.

        Args:
            names: the classes that stay, leaves of this tree.
            collapse: also take out nodes with one child, whose parent the child gets: heights then
                count choices and not names.

        Raises:
            ValueError: as `with_classes`, for what stays.
        """
        kept = np.zeros(len(self), np.int32)  # how many kept nodes a node has as children
        above: dict[int, int | None] = {}
        for node in self.index(list(names)):
            path = self.ancestors(node).tolist()
            for child, parent in zip(path, [*path[1:], None], strict=True):
                if child in above:
                    break
                above[child] = parent
                if parent is not None:
                    kept[parent] += 1
        single = set(np.flatnonzero(kept == 1).tolist()) if collapse else set()
        parents: dict[Name, Name | None] = {}
        for node in sorted(set(above) - single):
            parent = above[node]
            while parent in single:
                parent = above[parent]
            parents[self.names[node]] = None if parent is None else self.names[parent]
        return type(self).from_parents(parents).with_classes(names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ClassTree({len(self)} nodes, {len(self.leaves)} leaves, height {self.height[0]})"

    @functools.cached_property
    def leaf_counts(self) -> np.ndarray:
        """[nodes] int32, leaves at or below each node."""
        first = np.arange(len(self))
        below = np.searchsorted(self.leaves, first + self.size) - np.searchsorted(
            self.leaves, first
        )
        return below.astype(np.int32)

    @functools.cached_property
    def heights(self) -> np.ndarray:
        """[classes, classes] int32: height of the lowest common ancestor of two labels.

        The distance of Bertinetto et al. 2020 (arXiv 1912.09393): 0 on the diagonal alone.
        """
        return self.height[self.lca(self.classes[:, None], self.classes[None, :])]

    @functools.cached_property
    def information(self) -> np.ndarray:
        """[classes, classes] float64: information lost at the lowest common ancestor, in bits.

        With I(v) = -log2(leaves(v) / classes), a class c and its common ancestor a with another:
        I(c) - I(a) = log2 leaves(a). The distance of Shi et al. 2024 (arXiv 2407.16067).
        """
        above = self.lca(self.classes[:, None], self.classes[None, :])
        return np.log2(self.leaf_counts[above])

    def index(self, names: Any) -> Any:
        """The number of a name, or an int32 array of the numbers of a list of names.

        Raises:
            ValueError: an unknown name, with the nearest known one.
        """
        if isinstance(names, list):
            return np.asarray([self.index(name) for name in names], np.int32)
        if names not in self._numbers:
            raise checks.unknown("node", str(names), [str(name) for name in self.names])
        return self._numbers[names]

    def ancestors(self, node: int) -> np.ndarray:
        """The nodes from `node` itself up to the root, [depth + 1] int32."""
        node = self._checked("node", node).item()
        path = [node]
        while node:
            node = int(self.parent[node])
            path.append(node)
        return np.asarray(path, np.int32)

    def leaves_under(self, node: int) -> np.ndarray:
        """The leaves below a node (itself, for a leaf), in the order of the walk, int32."""
        node = self._checked("node", node).item()
        first, after = np.searchsorted(self.leaves, [node, node + self.size[node]])
        return self.leaves[first:after]

    def lca(self, a: Any, b: Any) -> Any:
        """Lowest common ancestors of pairs of nodes; a node is an ancestor of itself.

        Two look-ups a pair; the table of n log2(n) numbers is built at the first call.

        Args:
            a: node numbers, any shape. With a JAX array (traced or not) on either side the result
                is one, else a NumPy array.
            b: node numbers, of a shape that broadcasts with `a`.

        Returns:
            int32 node numbers.

        Raises:
            ValueError: a number that is no node (traced numbers are not checked).
        """
        if isinstance(a, jax.Array) or isinstance(b, jax.Array):
            for name, given in (("a", a), ("b", b)):
                if not isinstance(given, jax.core.Tracer):
                    self._checked(name, given)
            return _query(jnp, jnp.asarray(self._table), jnp.asarray(a), jnp.asarray(b))
        return _query(np, self._table, self._checked("a", a), self._checked("b", b))

    def _checked(self, name: str, nodes: Any) -> np.ndarray:
        nodes = np.asarray(nodes)
        if nodes.dtype.kind not in "iu" or (
            nodes.size and not (nodes.min() >= 0 and nodes.max() < len(self))
        ):
            bad = (
                nodes if nodes.dtype.kind not in "iu" else nodes[(nodes < 0) | (nodes >= len(self))]
            )
            raise ValueError(
                f"{name} holds {np.reshape(bad, -1)[0]!r}, which is no node; nodes are integers "
                f"from 0 to {len(self) - 1}. `tree.index(name)` gives a name's."
            )
        return nodes

    @functools.cached_property
    def _numbers(self) -> dict[Name, int]:
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """[levels, nodes] int32: entry (k, i) is the least parent of the nodes i .. i + 2^k - 1.

        The parent of the shallowest node of a range has the least number among their parents: it
        was met before all of them.
        """
        rows, width = [self.parent], 1
        while 2 * width <= len(self):
            last = rows[-1]
            row = last.copy()
            np.minimum(last[:-width], last[width:], out=row[:-width])
            rows.append(row)
            width *= 2
        return np.stack(rows)


def _query(xp: Any, table: Any, a: Any, b: Any) -> Any:
    a, b = a.astype(xp.int32), b.astype(xp.int32)  # a small type would overflow below
    first, last = xp.minimum(a, b), xp.maximum(a, b)
    # The range first+1 .. last is covered by two blocks of 2^level nodes.
    length = xp.maximum(last - first, 1)
    # frexp is exact in float64 and, for less than 2^24 nodes, in float32.
    level = xp.frexp(length.astype(xp.float32 if xp is jnp else xp.float64))[1] - 1
    start = xp.minimum(first + 1, table.shape[1] - 1)
    found = xp.minimum(table[level, start], table[level, last + 1 - (1 << level)])
    return xp.where(first == last, first, found).astype(xp.int32)


def _cycle(parents: Mapping[Name, Name | None], inside: set[Name]) -> str:
    """Shows a cycle among nodes that no root reaches."""
    node: Any = min(inside, key=str)
    seen: dict[Any, int] = {}  # a node and its place
    while node not in seen:
        seen[node] = len(seen)
        node = parents[node]
    loop = [*list(seen)[seen[node] :], node]
    shown = [repr(n) for n in (loop if len(loop) <= 6 else [*loop[:5], loop[-1]])]
    if len(loop) > 6:
        shown.insert(5, "...")
    return " -> ".join(shown)
