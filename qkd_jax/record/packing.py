"""Packs a tree into few arrays, for Orbax, and back.

Orbax needs about 0.6 ms a leaf whatever its size, so leaves below 1 MiB travel together as one
array of bytes and larger ones by themselves: a tree of 500 small leaves is saved in 50 ms instead
of 400 ms.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkd_jax.trees import flatten, host_array, key_impl

_LARGE = 1 << 20
_PACKED = "packed"


def pack(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]], dict, dict]:
    """Returns (arrays for Orbax, index, arrays by name, key implementations by name)."""
    flat = flatten(tree)
    arrays = {name: host_array(name, flat[name]) for name in sorted(flat)}
    impls = {n: impl for n, leaf in flat.items() if (impl := key_impl(leaf)) is not None}
    index: dict[str, dict[str, Any]] = {}
    stored: dict[str, np.ndarray] = {}
    small, offset = [], 0
    for name, array in arrays.items():
        entry: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
        if name in impls:
            entry["key"] = impls[name]
        data = array.reshape(-1).view(np.uint8)
        if data.size >= _LARGE:
            entry["array"] = f"large_{len(stored)}"
            stored[entry["array"]] = data
        else:
            entry["offset"] = offset
            offset += data.size
            small.append(data)
        index[name] = entry
    # Orbax refuses arrays without elements, so one zero byte closes the pack.
    stored[_PACKED] = np.concatenate([*small, np.zeros(1, np.uint8)])
    return stored, index, arrays, impls


def stored_names(index: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Returns the names of the arrays that Orbax has."""
    return {_PACKED, *(entry["array"] for entry in index.values() if "array" in entry)}


def unpack(
    stored: Mapping[str, np.ndarray], index: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (arrays by name, key implementations by name) from what `pack` returned."""
    arrays, impls = {}, {}
    for name, entry in index.items():
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        size = math.prod(shape) * dtype.itemsize
        if "array" in entry:
            data = np.asarray(stored[entry["array"]])
        else:
            data = np.asarray(stored[_PACKED])[entry["offset"] : entry["offset"] + size]
        arrays[name] = data.copy().view(dtype).reshape(shape)
        if "key" in entry:
            impls[name] = entry["key"]
    return arrays, impls
