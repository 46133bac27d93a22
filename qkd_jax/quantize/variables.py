"""Trees of variables: entries by path, and what in them is quantized or folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.quantize.interception import OPERANDS, is_ours

__all__ = [
    "join_quant",
    "kept",
    "load_float",
    "quantizer_paths",
    "refuse_folded",
    "refuse_quantized",
    "split_quant",
    "walk",
    "without_folds",
    "without_quantizers",
]

Tree = dict[str, Any]


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


def join_quant(variables: Mapping[str, Any]) -> Tree:
    """Puts the `quant` collection inside `params`, where it travels while the model runs."""
    variables = dict(variables)
    quant = variables.pop("quant", None)
    if quant:
        variables["params"] = _merge(variables.get("params", {}), quant)
    return variables


def split_quant(variables: Mapping[str, Any]) -> Tree:
    """Takes the quantizers' variables out of `params` again."""
    variables = dict(variables)
    if "params" in variables:
        params, quant = _split(unfreeze(variables["params"]))
        variables["params"] = params
        if quant:
            variables["quant"] = quant
    return variables


def _merge(params: Mapping[str, Any], quant: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(params)
    for key, value in quant.items():
        inside = key in params and isinstance(value, Mapping) and isinstance(params[key], Mapping)
        merged[key] = _merge(params[key], value) if inside else value
    return merged


def _split(tree: Mapping[str, Any], ours: Callable[[str], bool] = is_ours):
    params, quant = {}, {}
    for key, value in tree.items():
        if ours(key):
            quant[key] = value
        elif isinstance(value, Mapping):
            kept, taken = _split(value, ours)
            if kept or not taken:
                params[key] = kept
            if taken:
                quant[key] = taken
        else:
            params[key] = value
    return params, quant


def load_float(variables: Mapping[str, Any], pretrained: Mapping[str, Any]) -> Tree:
    """Drops a float checkpoint into a net's variables: same paths, same shapes.

    The result has no `quant` collection: ranges that were measured on other weights do not hold.

    Args:
      variables: what the net's `init` gave.
      pretrained: a tree with "params" and, where the net has it, "batch_stats".

    Returns:
      Float variables with the pretrained values.

    Raises:
      ValueError: a collection, a path or a shape differs; all differing paths are listed.
    """
    if "params" not in pretrained:
        raise ValueError(
            f"pretrained has the keys {sorted(pretrained)}; it must be a variables tree with "
            "'params'."
        )
    out: Tree = {}
    for name, wanted in split_quant(join_quant(variables)).items():
        if name == "quant":
            continue
        if name not in pretrained:
            raise ValueError(
                f"pretrained lacks the collection {name!r} that the net has; it has "
                f"{sorted(pretrained)}."
            )
        out[name] = _loaded(name, wanted, unfreeze(pretrained[name]))
    return out


def _loaded(name: str, wanted: Any, given: Any) -> Any:
    mine = dict(_flat(wanted, name))
    theirs = dict(_flat(given, name))
    problems = [f"missing {p}" for p in mine if p not in theirs]
    problems += [f"unexpected {p}{checks.nearest(p, mine)}" for p in theirs if p not in mine]
    problems += [
        f"{p} has shape {tuple(theirs[p].shape)}, wanted {tuple(mine[p].shape)}"
        for p in mine
        if p in theirs and tuple(theirs[p].shape) != tuple(mine[p].shape)
    ]
    if problems:
        raise ValueError(
            "pretrained does not fit the net: " + "; ".join(problems) + ". Build the net with the "
            "checkpoint's own model, width and number of classes."
        )
    return jax.tree.map(lambda old, new: jax.numpy.asarray(new, old.dtype), wanted, given)


def _flat(tree: Any, prefix: str):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join([prefix, *(str(k.key) for k in path)]), leaf


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
