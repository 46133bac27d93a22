"""The variables of a quantized net: how the `quant` collection is laid out, read and split.

The `quant` tree mirrors the model's paths. Under a layer or module lie

    <operand>_quantizer/<parameter>            of each operand that has been calibrated
    folded/{multiplier, bias, identity}        what a folded BatchNorm leaves behind
    folded/rotation                            signs of the rotation of the layer's input

and, while a net is observed, the state `<operand>_<kind>` next to the quantizer that it belongs to.
No other file spells these keys.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.trees import entries, find, flatten, insert, join, merged, nested, partition, unboxed

Tree = dict[str, Any]

OPERANDS = ("weight", "input", "other", "output")
"""`other` is the second operand of a contraction of two activations (attention)."""

ATTENDED = "attend_output"
"""Output of a module's `attend`, whose range is not that of its `__call__`: `Rule.output` too."""

FOLDED = "folded"
"""Key of what a folded BatchNorm left at a module."""

ROTATION = "rotation"
"""Key inside FOLDED of the rotation that a layer's input goes through, and its weight has taken."""

OBSERVED, DIAGNOSED = "observed", "diagnosed"
"""Kinds of states: those of `calibrate` and of `diagnose`."""

TABLES = ("kernel", "embedding")
"""Names under which linen's layers keep what is quantized as their weight."""

_NEVER_SAVED = ("cache",)
_OPERANDS = (*OPERANDS, ATTENDED)
_OPERAND_OF = {f"{operand}_quantizer": operand for operand in _OPERANDS}


def quantizer_key(operand: str) -> str:
    """Returns the key under a layer that holds an operand's quantizer: "weight_quantizer"."""
    return f"{operand}_quantizer"


def is_quantizer_key(key: str) -> bool:
    """Whether a key is that of a quantizer."""
    return key in _OPERAND_OF


def _is_folded_key(key: str) -> bool:
    return key == FOLDED


def is_own_key(key: str) -> bool:
    """Whether a key belongs to the `quant` collection, not to the model."""
    return key == FOLDED or key in _OPERAND_OF


def refuse_own_names(paths: Iterable[str]) -> None:
    """Raises ValueError for modules or parameters that have the name of a variable of ours.

    Args:
        paths: of modules and of parameters.
    """
    states = {state_key(operand, kind) for operand in _OPERANDS for kind in (OBSERVED, DIAGNOSED)}
    for path in paths:
        for name in path.split("/"):
            if is_own_key(name) or name in states:
                raise ValueError(
                    f"the model names a module or parameter {name!r} (at {path!r}); quantizers "
                    "keep their variables under that name. Rename it."
                )


def parameter_modules(variables: Mapping[str, Any], names: Iterable[str] = ()) -> set[str]:
    """Returns the paths of the modules that lead to parameters, or that own one named so."""
    leaves = [path.split("/") for path in flatten(variables.get("params", {}))]
    if names:
        wanted = set(names)
        return {join(*path[:i]) for path in leaves for i, name in enumerate(path) if name in wanted}
    return {join(*path[:i]) for path in leaves for i in range(len(path))}


def quantizer_path(layer: str, operand: str, name: str = "") -> str:
    """Returns "quant/<layer>/weight_quantizer/<name>", the path in a net's variables."""
    return join("quant", layer, quantizer_key(operand), name)


def folded_path(module: str, name: str) -> str:
    """Returns "quant/<module>/folded/<name>", the path in a net's variables."""
    return join("quant", module, FOLDED, name)


def quantizers(variables: Mapping[str, Any]) -> Iterator[tuple[str, str, Tree]]:
    """Yields (layer path, operand, parameters) of every calibrated quantizer."""
    for path, key, params in entries(variables.get("quant") or {}, is_quantizer_key):
        yield path, _OPERAND_OF[key], params


def quantizer_params(variables: Mapping[str, Any], layer: str, operand: str) -> Any:
    """Returns the parameters of one quantizer, or None where it is not calibrated."""
    return find(variables, quantizer_path(layer, operand))


def parameter_owner(name: str) -> tuple[str, str] | None:
    """Returns (layer path, operand) that own the leaf "<layer>/<operand>_quantizer/<parameter>"."""
    *layer, key, _ = name.split("/")
    return (join(*layer), _OPERAND_OF[key]) if key in _OPERAND_OF else None


def is_calibrated(variables: Mapping[str, Any]) -> bool:
    """Whether any operand has a calibrated quantizer."""
    return next(quantizers(variables), None) is not None


def folded_entries(variables: Mapping[str, Any]) -> Iterator[tuple[str, Tree]]:
    """Yields (module path, what folding stored there), for layers and for their BatchNorms."""
    for path, _, stored in entries(variables.get("quant") or {}, _is_folded_key):
        yield path, stored


def is_folded(variables: Mapping[str, Any]) -> bool:
    """Whether folding, a shift of a bias or a rotation has stored anything in the variables."""
    return next(folded_entries(variables), None) is not None


def refuse_folded(method: str, multipliers: Mapping[str, Any]) -> None:
    """Raises ValueError where a BatchNorm was folded into a quantized layer's multiplier."""
    if multipliers:
        raise ValueError(
            f"layer {min(multipliers)!r} has a BatchNorm folded into its output multiplier. Call "
            f"{method} before `fold_bn`, or fold the float net first and calibrate it then."
        )


def refuse_quantized(method: str, variables: Mapping[str, Any]) -> None:
    """Raises ValueError for calibrated variables: their scales fit the weights as they are."""
    found = [join(path, quantizer_key(operand)) for path, operand, _ in quantizers(variables)]
    if found:
        raise ValueError(
            f"variables are calibrated ({found[0]!r} and {len(found) - 1} more), and {method} "
            f"changes float weights, so their scales would not fit. Call {method} first, then "
            "`calibrate`."
        )


def _with_quant(variables: Mapping[str, Any], quant: Tree) -> Tree:
    """Returns variables with another `quant` collection, without one where it is empty."""
    floats = {name: tree for name, tree in variables.items() if name != "quant"}
    return {**floats, "quant": quant} if quant else floats


def unfolded(variables: Mapping[str, Any]) -> Tree:
    """Returns variables whose folded BatchNorms run again; moved biases and rotations stay."""
    quant, _ = partition(variables.get("quant") or {}, _is_folded_key)
    for path, stored in folded_entries(variables):
        for name in ("bias", ROTATION):
            if name in stored:
                quant = insert(quant, join(path, FOLDED, name), stored[name])
    return _with_quant(variables, quant)


def without_quantizers(variables: Mapping[str, Any], operands: Any = _OPERANDS) -> Tree:
    """Returns variables without the quantizers of some operands; what was folded stays folded."""
    dropped = {quantizer_key(operand) for operand in operands}
    quant, _ = partition(variables.get("quant") or {}, dropped.__contains__)
    return _with_quant(variables, quant)


def split_multipliers(variables: Mapping[str, Any]) -> tuple[Tree, dict[str, np.ndarray]]:
    """Returns (variables without the multipliers of folded layers, {layer path: multiplier})."""
    quant, multipliers = variables.get("quant") or {}, {}
    for path, stored in folded_entries(variables):
        if "multiplier" in stored:
            multipliers[path] = np.asarray(stored["multiplier"])
            rest = {name: value for name, value in stored.items() if name != "multiplier"}
            quant = insert(quant, join(path, FOLDED), rest)
    return _with_quant(variables, quant), multipliers


def join_quant(variables: Mapping[str, Any]) -> Tree:
    """Puts the `quant` collection inside `params`, where it travels while the model runs."""
    variables = dict(variables)
    quant = variables.pop("quant", None)
    if quant:
        variables["params"] = merged(variables.get("params", {}), quant)
    return variables


def split_quant(variables: Mapping[str, Any]) -> Tree:
    """Takes the `quant` collection out of `params` again."""
    variables = dict(variables)
    if "params" in variables:
        variables["params"], quant = partition(unfreeze(variables["params"]), is_own_key)
        if quant:
            variables["quant"] = quant
    return variables


def state_key(operand: str, kind: str) -> str:
    """Returns the key of an operand's state of some kind, such as "weight_observed"."""
    return f"{operand}_{kind}"


def split_states(params: Mapping[str, Any], kind: str) -> Tree:
    """Returns the part of `params` that holds the operands' states of a kind."""
    keys = {state_key(operand, kind) for operand in _OPERANDS}
    return partition(params, keys.__contains__)[1]


def states(tree: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str, Any]]:
    """Yields (layer path, operand, state) out of what `split_states` returned."""
    operand_of = {state_key(operand, kind): operand for operand in _OPERANDS}
    for path, key, state in entries(tree, operand_of.__contains__):
        yield path, operand_of[key], state


def load_float(
    variables: Mapping[str, Any], pretrained: Mapping[str, Any], *, fresh: str = ""
) -> Tree:
    """Drops a float checkpoint into a net's variables: same paths, same shapes.

    The result has no `quant` collection: ranges that were measured on other weights do not hold.

    Args:
        variables: what the net's `init` gave.
        pretrained: a tree with "params" and, where the net has it, "batch_stats". Its parameters,
            and the net's, may lie in boxes (`nn.Partitioned`) or not. A "cache" may be missing.
        fresh: regular expression of whole paths of layers that keep the values of `variables`, such
            as "head" for a checkpoint without one, or with another number of classes.

    Returns:
        Float variables with the pretrained values, in the containers and boxes of `variables`.

    Raises:
        ValueError: a collection, a path or a shape differs; all differing paths are listed. A
            `fresh` that matches no layer.
    """
    if fresh:
        own = flatten(split_quant(join_quant(variables)))
        own = {path: leaf for path, leaf in own.items() if not path.startswith("quant/")}
        kept = without_layers(own, fresh)
        if len(kept) == len(own):
            layers = sorted({path.split("/")[1] for path in own})
            raise ValueError(
                f"fresh is {fresh!r} and matches no layer; there are {', '.join(layers)}. It must "
                "match a whole path, such as 'head'."
            )
        given = without_layers(flatten(unfreeze(unboxed(dict(pretrained)))), fresh)
        return nested({**own, **flatten(load_float(nested(kept), nested(given)))})
    if "params" not in pretrained:
        raise ValueError(
            f"pretrained has the keys {sorted(pretrained)}; it must be a variables tree with "
            "'params'."
        )
    out: Tree = {}
    for name, wanted in split_quant(join_quant(variables)).items():
        if name == "quant":
            continue
        if name in pretrained:
            out[name] = _loaded(name, wanted, pretrained[name])
        elif name in _NEVER_SAVED:
            out[name] = wanted
        else:
            raise ValueError(
                f"pretrained lacks the collection {name!r} that the net has; it has "
                f"{sorted(pretrained)}."
            )
    return out


def without_layers(flat: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """Leaves out the arrays {"<collection>/<layer>/<name>": array} of layers that match wholly."""

    def matches(path: str) -> bool:
        return bool(re.fullmatch(pattern, "/".join(path.split("/")[1:-1])))

    return {path: leaf for path, leaf in flat.items() if not matches(path)}


def _loaded(name: str, wanted: Any, given: Any) -> Any:
    """Returns one collection of `given` in the dtypes of `wanted`, which it must fit."""
    mine, theirs = ({name: unfreeze(unboxed(tree))} for tree in (wanted, given))
    mine, theirs = flatten(mine), flatten(theirs)
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
            "checkpoint's own model, width and number of classes; fresh='head' leaves out a head "
            "that is not there, or is of other classes."
        )
    leaves, treedef = jax.tree.flatten(wanted)
    names = zip(mine, leaves, strict=True)
    return treedef.unflatten(jax.numpy.asarray(theirs[p], old.dtype) for p, old in names)
