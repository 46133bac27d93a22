"""Trees of variables: entries by path, and what in them is quantized or folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

__all__ = [
    "at",
    "get",
    "put",
    "quantizer_paths",
    "refuse_folded",
    "refuse_quantized",
    "without_folds",
    "without_quantizers",
]

Tree = dict[str, Any]


def at(collection: str, module: str, *names: str) -> str:
    """Returns "quant/conv/folded/bias"; the root module has no name of its own."""
    return "/".join(part for part in (collection, module, *names) if part)


def get(tree: Mapping[str, Any], path: str) -> Any:
    """Returns the entry of a tree at "a/b/c"."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def put(tree: Mapping[str, Any], path: str, value: Any) -> Tree:
    """Returns a tree with one entry replaced, in its old dtype; the rest is shared."""
    key, _, rest = path.partition("/")
    if rest:
        return {**tree, key: put(tree.get(key, {}), rest, value)}
    return {**tree, key: jnp.asarray(value, tree[key].dtype if key in tree else jnp.float32)}


def quantizer_paths(variables: Mapping[str, Any]) -> list[str]:
    """Lists the quantizers among variables, as "layer/weight_quantizer"."""

    def walk(tree: Mapping[str, Any], path: str) -> list[str]:
        out = []
        for key, value in tree.items():
            inner = f"{path}/{key}" if path else key
            if key.endswith("_quantizer"):
                out.append(inner)
            elif isinstance(value, Mapping) and key != "folded":
                out += walk(value, inner)
        return out

    return walk(variables.get("quant", {}), "")


def refuse_folded(method: str, multipliers: Mapping[str, Any]) -> None:
    """Raises ValueError where a BatchNorm was folded into a quantized layer's multiplier."""
    if multipliers:
        raise ValueError(
            f"layer {min(multipliers)!r} has a BatchNorm folded into its output multiplier. Call "
            f"{method} before `fold_bn`, or fold the float net first and calibrate it then."
        )


def refuse_quantized(method: str, variables: Mapping[str, Any]) -> None:
    """Raises ValueError for calibrated variables: their scales fit the weights as they are."""
    found = quantizer_paths(variables)
    if found:
        raise ValueError(
            f"variables are calibrated ({found[0]!r} and {len(found) - 1} more), and {method} "
            f"changes float weights, so their scales would not fit. Call {method} first, then "
            "`calibrate`."
        )


def without_folds(variables: Mapping[str, Any]) -> Tree:
    """Returns variables whose folded BatchNorms run again: their graph shows where they stood."""

    def shown(tree: Mapping[str, Any]) -> Tree:
        kept: Tree = {}
        for key, value in tree.items():
            if key == "folded":
                value = {k: v for k, v in value.items() if k == "bias"}
            elif isinstance(value, Mapping):
                value = shown(value)
            if not isinstance(value, Mapping) or value:
                kept[key] = value
        return kept

    out = {k: v for k, v in variables.items() if k != "quant"}
    quant = shown(variables.get("quant", {}))
    return {**out, "quant": quant} if quant else out


def without_quantizers(variables: Mapping[str, Any]) -> Tree:
    """Returns the float variables of a calibrated net; what was folded stays folded."""

    def kept(tree: Mapping[str, Any]) -> Tree:
        out = {}
        for key, value in tree.items():
            if key.endswith("_quantizer"):
                continue
            inner = kept(value) if isinstance(value, Mapping) and key != "folded" else value
            if not isinstance(inner, Mapping) or inner:
                out[key] = inner
        return out

    out = {k: v for k, v in variables.items() if k != "quant"}
    quant = kept(variables.get("quant", {}))
    return {**out, "quant": quant} if quant else out
