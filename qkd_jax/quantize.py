"""Rules, and the quantized model that they make of any linen module.

    student = quantize(model, [Rule("stem", weight=Spec(bits=8)), Rule(".*", weight=Spec(bits=2))])
    variables = student.init(key, images)                 # float
    variables = calibrate(student, variables, batches)    # adds the `quant` collection

A rule's pattern is a regular expression that must match a layer's whole path
("stage1_block0/conv1"); the first rule that matches decides; an operand without a spec stays in
float. A net is float, bit for bit the linen model, until `calibrate` has given it a `quant`
collection.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.interception import Frame, is_ours
from qkd_jax.numerics import Spec
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantizers import QUANTIZERS, check

__all__ = ["QuantizedModel", "Rule", "Spec", "join_quant", "load_float", "quantize", "split_quant"]

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which layers' weight, input and output get which spec.

    Attributes:
      pattern: a regular expression; it must match a layer's whole path.
      weight: spec of the kernel or embedding table; None leaves it in float.
      input: spec of the layer's input (of both operands of an attention product). A layer without
        one whose input is the very tensor that a module with an `output` spec returns reads that.
      output: spec of what the module returns; it may sit on any module, the net included (path "").
      other: spec of the second operand of an attention product; None takes `input`.
    """

    pattern: str
    weight: Spec | None = None
    input: Spec | None = None
    output: Spec | None = None
    other: Spec | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(f"Rule.pattern is {self.pattern!r}; it must be a regular expression.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"Rule.pattern {self.pattern!r} is not a regular expression: {error}."
            ) from None
        for operand in ("weight", "input", "output", "other"):
            spec = getattr(self, operand)
            where = f"Rule({self.pattern!r}).{operand}"
            if spec is None:
                continue
            if not isinstance(spec, Spec):
                raise ValueError(f"{where} is {spec!r}; it must be a Spec or None.")
            if spec.quantizer not in QUANTIZERS:
                raise checks.unknown(f"quantizer of {where}", spec.quantizer, QUANTIZERS)
            observer = OBSERVERS.get(spec.observer or "")
            check(spec, observer_options=getattr(observer, "OPTIONS", ()))
            _check_granularity(where, operand, spec)


def _check_granularity(where: str, operand: str, spec: Spec) -> None:
    if operand == "weight" and spec.granularity in ("token", "example"):
        raise ValueError(
            f"{where} has granularity {spec.granularity!r}, which is for inputs. Use 'tensor', "
            "'channel' or a group size."
        )
    if operand != "weight" and spec.granularity not in ("tensor", "token", "example"):
        raise ValueError(
            f"{where} has granularity {spec.granularity!r}; an {operand} is quantized per tensor, "
            "for a scale that varies along the contraction can't be taken out of an integer "
            "product. Use granularity='tensor', or 'token' or 'example' with dynamic=True."
        )


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A linen module with rules. Build it with `quantize`; use it like the module.

    Variables are those of the module ("params", "batch_stats", ...) plus, once calibrated, "quant",
    which lies under the same paths: `quant/stem/weight_quantizer/scale`.
    """

    model: nn.Module
    rules: tuple[Rule, ...]

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Variables:
        """Initialises float variables, and checks that every rule matches a layer.

        Raises:
          ValueError: a rule matches nothing; the message names the nearest path.
        """
        frame = Frame(self.spec_of)
        with nn.intercept_methods(frame):
            variables = self.model.init(rngs, *args, **kwargs)
        self.check_rules(frame.modules, frame.seen.keys())
        return unfreeze(variables)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        mutable: Any = False,
        axis_name: str | None = None,
        watch: Callable[..., None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Applies the model, its calibrated layers quantized.

        Args:
          variables: as `init` or `calibrate` gave them.
          *args: what the module takes.
          mutable: collections to return, as in linen.
          axis_name: the axis of `pmap` or `shard_map` over which batch normalization reduces.
          watch: called as watch(path, operand, x, x_hat, spec, params) for each quantized operand.
          **kwargs: `rngs` (the stream "rounding" feeds stochastic rounding), `method`,
            `capture_intermediates`, and what the module takes.

        Returns:
          The module's output, or (output, mutated collections) where `mutable` is given.
        """
        frame = Frame(self.spec_of, axis_name=axis_name, watch=watch)
        return self._apply(frame, variables, *args, mutable=mutable, **kwargs)

    def trace_apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        mark_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Applies with every quantizer as one named jaxpr equation: what `graph.trace` reads."""
        frame = Frame(self.spec_of, mode="trace", mark_outputs=mark_outputs)
        return self._apply(frame, variables, *args, **kwargs)

    def _apply(self, frame: Frame, variables, *args, mutable=False, **kwargs):
        with nn.intercept_methods(frame):
            out = self.model.apply(join_quant(variables), *args, mutable=mutable, **kwargs)
        if mutable is False:
            return out
        out, mutated = out
        return out, split_quant(mutated)

    def spec_of(self, path: str, operand: str) -> Spec | None:
        """The spec of an operand ("weight", "input", "other", "output") of the layer at `path`."""
        rule = _first_match(self.rules, path)
        if rule is None:
            return None
        return getattr(rule, operand) or (rule.input if operand == "other" else None)

    def check_rules(self, paths: Iterable[str], layers: Set[str]) -> None:
        """Raises ValueError for a rule that changes nothing.

        Args:
          paths: of all modules.
          layers: those of them that have operands.
        """
        paths = sorted(paths)
        for path in paths:
            taken = [name for name in path.split("/") if is_ours(name)]
            if taken:
                raise ValueError(
                    f"the model names a module {taken[0]!r} (at {path!r}); quantizers keep their "
                    "variables under that name. Rename the module."
                )
        for place, rule in enumerate(self.rules):
            if not any(re.fullmatch(rule.pattern, path) for path in paths):
                shown = ", ".join(repr(p) for p in paths if p)
                preset = " (A preset fits itself to a model: presets.rules(name, model=, images=).)"
                raise ValueError(
                    f"rules[{place}] {rule.pattern!r} matches no layer. A pattern must match a "
                    f"whole path. Paths: {shown}.{checks.nearest(rule.pattern, paths)}"
                    f"{preset if rule.pattern in ('stem|dense1', 'head') else ''}"
                )
            if rule.pattern == ".*":  # the rest, of which there may be none
                continue
            before = self.rules[:place]
            reached = [
                path
                for path in paths
                if re.fullmatch(rule.pattern, path) and _first_match(before, path) is None
            ]
            if not reached:
                raise ValueError(
                    f"rules[{place}] {rule.pattern!r} is never reached: the first rule that "
                    "matches a path decides, and rules before it match all of its paths. Move it "
                    "to the front, or drop it."
                )
            if (rule.weight or rule.input or rule.other) and layers.isdisjoint(reached):
                inside = f"{rule.pattern}/.*"
                fits = any(re.fullmatch(inside, path) for path in layers)
                raise ValueError(
                    f"rules[{place}] {rule.pattern!r} matches "
                    f"{', '.join(map(repr, reached[:3]))}, with no weight and no input to "
                    f"quantize. A pattern must match the path of a layer"
                    f"{f', such as {inside!r}' if fits else ''}: {', '.join(sorted(layers))}."
                )


@functools.lru_cache(maxsize=65536)
def _first_match(rules: tuple[Rule, ...], path: str) -> Rule | None:
    return next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)


def quantize(model: nn.Module, rules: Iterable[Rule] = ()) -> QuantizedModel:
    """Makes a quantized model of any linen module; the module's own code is not touched.

    Args:
      model: an unbound linen module. A `QuantizedModel` is refused.
      rules: the first that matches a layer's path decides; none at all gives the float model.

    Returns:
      The quantized model.

    Raises:
      ValueError: `model` is no linen module, or a rule is no `Rule`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {type(model).__name__}; it must be a flax.linen module"
            + (" (quantize its `.model` anew)." if isinstance(model, QuantizedModel) else ".")
        )
    rules = tuple(rules)
    for place, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise ValueError(f"rules[{place}] is {rule!r}; it must be a Rule.")
    return QuantizedModel(model, rules)


def join_quant(variables: Mapping[str, Any]) -> Variables:
    """Puts the `quant` collection inside `params`, where it travels while the model runs."""
    variables = dict(variables)
    quant = variables.pop("quant", None)
    if quant:
        variables["params"] = _merge(variables.get("params", {}), quant)
    return variables


def split_quant(variables: Mapping[str, Any]) -> Variables:
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


def load_float(variables: Mapping[str, Any], pretrained: Mapping[str, Any]) -> Variables:
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
    out: Variables = {}
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
