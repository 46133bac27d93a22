"""Lowest common ancestors: `ClassTree.lca` beside networkx, on one tree and the same questions.

    python benchmarks/lca.py [--leaves=22000] [--queries=1000000]

networkx is no dependency of this project: `pip install networkx`; without it our own times are
printed alone. Its answer to many questions at once is `tree_all_pairs_lowest_common_ancestor(graph,
pairs=...)` (Tarjan's off-line algorithm). First both are compared on random trees of many shapes;
any difference ends the program with code 1. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib import metadata
from typing import Any

import arms  # noqa: F401  (finds the project)
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.hierarchy import ClassTree


def random_tree(rng: np.random.Generator, nodes: int, reach: int) -> dict[int, int | None]:
    """{child: parent}; a node's parent is one of the `reach` before it, so 1 gives a path."""
    parents: dict[int, int | None] = {0: None}
    for child in range(1, nodes):
        parents[child] = int(rng.integers(max(0, child - reach), child))
    return parents


def wide_tree(rng: np.random.Generator, leaves: int) -> dict[int, int | None]:
    """A tree like WordNet's: splitting leaves into 2 to 8 until there are `leaves` of them."""
    parents: dict[int, int | None] = {0: None}
    ends = [0]
    while len(ends) < leaves:
        place = int(rng.integers(len(ends)))
        node, ends[place] = ends[place], ends[-1]
        ends.pop()
        for _ in range(int(rng.integers(2, 9))):
            parents[len(parents)] = node
            ends.append(len(parents) - 1)
    return parents


def by_networkx(nx: Any, parents: dict[int, int | None], pairs: np.ndarray) -> dict[Any, int]:
    """{(a, b): ancestor} of the distinct pairs."""
    graph = nx.DiGraph((p, c) for c, p in parents.items() if p is not None)
    graph.add_nodes_from(parents)
    return dict(nx.tree_all_pairs_lowest_common_ancestor(graph, pairs=map(tuple, pairs.tolist())))


def same(nx: Any, parents: dict[int, int | None], tree: ClassTree, pairs: np.ndarray) -> int:
    """How many answers differ."""
    names = np.asarray(tree.names)
    number = np.argsort(names)
    ours = names[tree.lca(*number[pairs].T)]
    theirs = by_networkx(nx, parents, pairs)
    # networkx gives each unordered pair once, in the order in which it met it first.
    return sum(
        theirs.get((a, b), theirs.get((b, a))) != answer
        for (a, b), answer in zip(pairs.tolist(), ours.tolist(), strict=True)
    )


def main() -> int:
    """Prints the comparison; returns 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, default=22_000)
    parser.add_argument("--queries", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    try:
        import networkx as nx  # pyrefly: ignore[missing-import]  # optional peer
    except ImportError:
        nx = None
        print("networkx is not installed (pip install networkx): no comparison.")
    packages = ("jax", "numpy") + (("networkx",) if nx else ())
    print(
        json.dumps(
            {
                "cpus": os.cpu_count(),
                "platform": platform.platform(),
                **{package: metadata.version(package) for package in packages},
            }
        )
    )
    rng = np.random.default_rng(0)
    if nx:
        compared = different = 0
        for seed in range(40):
            nodes = int(rng.integers(1, 300))
            parents = random_tree(rng, nodes, (1, 3, 20, 300)[seed % 4])
            pairs = rng.integers(0, nodes, (500, 2))
            different += same(nx, parents, ClassTree.from_parents(parents), pairs)
            compared += len(pairs)
        print(json.dumps({"random trees": 40, "pairs": compared, "different": different}))
        if different:
            return 1

    parents = wide_tree(rng, options.leaves)
    begin = time.perf_counter()
    tree = ClassTree.from_parents(parents)
    built = time.perf_counter() - begin
    leaves = tree.leaves
    a, b = leaves[rng.integers(0, len(leaves), (2, options.queries))]
    begin = time.perf_counter()
    tree.lca(leaves[:1], leaves[:1])  # makes the table
    table = time.perf_counter() - begin
    print(
        json.dumps(
            {"nodes": len(tree), "leaves": len(leaves), "height": int(tree.height[0])}
            | {"tree_s": round(built, 3), "table_s": round(table, 4)}
        )
    )
    jitted = jax.jit(tree.lca)
    on_device = jnp.asarray(a), jnp.asarray(b)
    jax.block_until_ready(jitted(*on_device))
    seconds: dict[str, list[float]] = {"numpy": [], "jnp": []}
    for _ in range(options.rounds):
        begin = time.perf_counter()
        tree.lca(a, b)
        seconds["numpy"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        jax.block_until_ready(jitted(*on_device))
        seconds["jnp"].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    shown = {f"{name}_s": round(median, 4) for name, median in medians.items()}
    print(json.dumps({"queries": options.queries, **shown}))
    if not nx:
        return 0
    names = np.asarray(tree.names)
    pairs = names[np.stack([a, b], axis=1)]
    begin = time.perf_counter()
    theirs = by_networkx(nx, parents, pairs)
    whole = time.perf_counter() - begin  # once: it takes long
    ours = names[tree.lca(a, b)].tolist()
    different = sum(
        theirs.get((x, y), theirs.get((y, x))) != answer
        for (x, y), answer in zip(pairs.tolist(), ours, strict=True)
    )
    costs = {
        "numpy": medians["numpy"],
        "numpy_with_table": medians["numpy"] + table,
        "numpy_with_tree_and_table": medians["numpy"] + table + built,
        "jnp": medians["jnp"],
    }
    ratios = {f"{name}_speedup": round(whole / cost, 1) for name, cost in costs.items()}
    print(json.dumps({"networkx_s": round(whole, 2), "different": different, **ratios}))
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
