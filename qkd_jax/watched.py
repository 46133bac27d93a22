"""What an interceptor leaves inside `params`, beside an operand's quantizer.

Written into the layer's own scope it comes out of `nn.scan`, `nn.vmap` and `nn.remat` as the
layer's parameters do. Its key is the operand's name and a suffix: `conv1/weight_observed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qkd_jax.interception import OPERANDS

__all__ = ["kept", "walk"]

Tree = dict[str, Any]


def kept(params: Mapping[str, Any], suffix: str) -> Tree:
    """Returns the part of `params` whose keys end in the suffix."""
    out: Tree = {}
    for key, value in params.items():
        if key.endswith(suffix):
            out[key] = value
        elif isinstance(value, Mapping) and (inner := kept(value, suffix)):
            out[key] = inner
    return out


def walk(
    tree: Mapping[str, Any], suffix: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, Any]]:
    """Yields (path of the layer, operand, what lies there) out of what `kept` returns."""
    for key, value in tree.items():
        if key.endswith(suffix):
            operand = key.removesuffix(suffix)
            assert operand in OPERANDS
            yield "/".join(path), operand, value
        else:
            yield from walk(value, suffix, (*path, key))
