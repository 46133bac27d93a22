"""Layer-wise learning rates: a factor for every array, by its layer's depth and by patterns.

`layer_decay` makes rates fall from the head towards the input, by a constant ratio a block (Clark
et al. 2020, arXiv 2003.10555; for ViTs Bao et al. 2021, arXiv 2106.08254): factor =
layer_decay ** (blocks + 1 - depth). `layer_rates` gives factors by name. Both multiply the rate of
the layer's weights, biases and quantizers alike, and with it their decay, which is a share of the
rate.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from qkd_jax import checks
from qkd_jax.trees import flatten, unboxed

Tree = Any
# What stands before the first block: the patches' embedding or first convolution, and what is added
# to tokens.
STEM = ("stem.*", ".*embed.*", "positions", "token.*", "registers")


def parse_rates(where: str, given: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns (patterns, factors) of pairs (pattern, factor) or texts "pattern:factor".

    Raises:
        ValueError: anything else, or a factor that is not a number of at least 0.
    """
    wrong = ValueError(
        f"{where} is {given!r}; give pairs of a regular expression and a factor, such as "
        "(('stem', 0.1), ('block0/.*', 0.5)), or texts, ('stem:0.1',)."
    )
    if isinstance(given, str) or not isinstance(given, tuple | list):
        raise wrong
    patterns, factors = [], []
    for entry in given:
        parts = entry.rpartition(":")[::2] if isinstance(entry, str) else entry
        if not isinstance(parts, tuple | list) or len(parts) != 2 or not isinstance(parts[0], str):
            raise wrong
        try:
            factor = float(parts[1])
        except (TypeError, ValueError):
            raise wrong from None
        checks.number(f"{where} of {parts[0]!r}", factor, low=0)
        patterns.append(parts[0])
        factors.append(factor)
    return tuple(patterns), tuple(factors)


def factors(
    trainable: Tree, hyper: Mapping[str, Any], *, patterns: tuple[str, ...], stem: tuple[str, ...]
) -> Tree:
    """Returns each array's factor of the learning rate, in the structure of `trainable`.

    Args:
        trainable: {"params": ..., "quant": ...}.
        hyper: "layer_rates" [patterns] and "layer_decay", where they are used.
        patterns: the first one that matches an array's path, or that of a layer around it, decides.
        stem: patterns of what has depth 0; () where rates do not depend on the depth.
    """
    depth, last = depths(trainable, stem) if stem else ({}, 0)

    def factor(path: tuple[Any, ...], _: Any) -> Any:
        parts = tuple(str(getattr(p, "key", p)) for p in path)
        value = 1.0
        if stem:
            value = hyper["layer_decay"] ** (last - depth.get(parts[1], last))
        if (index := first_match(patterns, parts)) is not None:
            value = value * hyper["layer_rates"][index]
        return value

    found = jax.tree_util.tree_map_with_path(factor, unboxed(trainable))
    return jax.tree.unflatten(jax.tree.structure(trainable), jax.tree.leaves(found))


def first_match(patterns: Iterable[str], path: tuple[str, ...]) -> int | None:
    """Returns the first pattern that matches the path, or a part of it from its beginning."""
    layers = ["/".join(path[1:end]) for end in range(2, len(path) + 1)]
    for index, pattern in enumerate(patterns):
        if any(re.fullmatch(pattern, layer) for layer in layers):
            return index
    return None


def depths(trainable: Tree, stem: tuple[str, ...]) -> tuple[dict[str, int], int]:
    """Returns ({part of the net: depth}, the depth of the head).

    Parts with numbers in their names ("block3", "stage1_block0") are the blocks, in the order of
    their numbers, from 1 on; those that match `stem` have depth 0; the others, such as the last
    norm and the head, come behind the last block.
    """
    parts = _parts(trainable)
    before = {name for name in parts if any(re.fullmatch(p, name) for p in stem)}
    numbers = {n: tuple(map(int, re.findall(r"\d+", n))) for n in parts if n not in before}
    order = {n: i + 1 for i, n in enumerate(sorted({n for n in numbers.values() if n}))}
    last = len(order) + 1
    found = {name: order.get(n, last) for name, n in numbers.items()}
    return found | dict.fromkeys(before, 0), last


def _parts(trainable: Tree) -> list[str]:
    paths = (path.split("/") for path in flatten(dict(trainable)))
    return list(dict.fromkeys(path[1] for path in paths if path[0] == "params"))


def check(where: str, trainable: Tree, *, patterns: tuple[str, ...], stem: tuple[str, ...]) -> None:
    """Refuses a pattern that matches nothing or never decides, and a net without blocks.

    Raises:
        ValueError: saying which.
    """
    paths = [tuple(path.split("/")) for path in flatten(dict(trainable))]
    layers = dict.fromkeys("/".join(path[1:-1]) or path[-1] for path in paths)
    deciding = {first_match(patterns, path) for path in paths}
    for index, pattern in enumerate(patterns):
        if all(first_match([pattern], path) is None for path in paths):
            raise ValueError(
                f"{where}.layer_rates {pattern!r} matches no layer; a pattern must match a whole "
                f"path: {', '.join(layers)}.{checks.nearest(pattern, layers)}"
            )
        if index not in deciding:
            raise ValueError(
                f"{where}.layer_rates {pattern!r} never decides: patterns before it match all of "
                "its layers, and the first one counts. Put it before them, or drop it."
            )
    if stem and depths(trainable, stem)[1] == 1:
        raise ValueError(
            f"{where}.layer_decay needs blocks with numbers in their names, such as 'block0', and "
            f"the net has {', '.join(_parts(trainable))}. Give factors by name instead, "
            f"layer_rates=(({next(iter(layers))!r}, 0.5),)."
        )
