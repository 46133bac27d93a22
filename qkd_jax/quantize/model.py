"""The quantized model: a linen module, and rules for its layers.

    student = quantize(model, [Rule("stem", weight=Spec(bits=8)), Rule(".*", weight=Spec(bits=2))])
    variables = student.init(key, images)                 # float
    variables = calibrate(student, variables, batches)    # adds the `quant` collection

A rule's pattern is a regular expression that must match a layer's whole path
("stage1_block0/conv1"); the first rule that matches decides; an operand without a spec stays in
float. A net is float, bit for bit the linen model, until `calibrate` has given it a `quant`
collection.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import flax.linen as nn
from flax.core import DenyList, unfreeze

from qkd_jax import checks
from qkd_jax.numerics import Spec
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.interceptors import intercepting, naming_interceptors
from qkd_jax.quantize.operands import mark_operand, quantize_operand, watching
from qkd_jax.quantize.rules import Rule, first_match
from qkd_jax.quantize.variables import ATTENDED, join_quant, refuse_own_names, split_quant
from qkd_jax.trees import flatten

Variables = dict[str, Any]
PRESET_ENDS = ("stem|dense1", "head")
"""Patterns of a preset's rules for the first and the last layer, before it is fitted to a model."""


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A linen module with rules. Build it with `quantize`; use it like the module.

    Nets are equal, and share what is compiled for them, where their rules and their models are; a
    model whose fields do not hash (lists, dicts, configs, arrays) equals itself alone.

    Variables are those of the module ("params", "batch_stats", ...) plus, once calibrated, "quant",
    which lies under the same paths: `quant/stem/weight_quantizer/scale`.
    """

    model: nn.Module
    rules: tuple[Rule, ...]

    def __hash__(self) -> int:
        own = self._model_hash()
        return hash((id(self.model) if own is None else own, self.rules))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizedModel) or self.rules != other.rules:
            return False
        if self.model is other.model:
            return True
        # What does not hash may be changed in place, and then equals a model of other numbers.
        hashes = self._model_hash(), other._model_hash()
        return None not in hashes and self.model == other.model

    def _model_hash(self) -> int | None:
        try:
            return hash(self.model)
        except TypeError:
            return None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Variables:
        """Initialises float variables, and checks that every rule matches a layer.

        Raises:
            ValueError: a rule matches nothing; the message names the nearest path.
        """
        frame = Frame(self.spec_of)
        with intercepting(frame):
            kept = naming_interceptors(kwargs.pop("mutable", DenyList("intermediates")))
            variables = self.model.init(rngs, *args, mutable=kept, **kwargs)
        refuse_own_names(flatten(variables.get("params", {})))
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
            watch: called as watch(path, operand, x, x_hat, spec, params) for each quantized
                operand.
            **kwargs: `rngs` (the stream "rounding" feeds stochastic rounding), `method`,
                `capture_intermediates`, and what the module takes.

        Returns:
            The module's output, or (output, mutated collections) where `mutable` is given.
        """
        hook = quantize_operand if watch is None else watching(watch)
        shared = (self, axis_name) if watch is None else None
        frame = Frame(self.spec_of, hook, axis_name=axis_name, shared=shared)
        return self.apply_in(frame, variables, *args, mutable=mutable, **kwargs)

    def trace_apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        mark_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Applies with every quantizer as one named jaxpr equation: what `graph.trace` reads."""
        frame = Frame(self.spec_of, mark_operand, traced=True, mark_outputs=mark_outputs)
        return self.apply_in(frame, variables, *args, **kwargs)

    def apply_in(
        self,
        frame: Frame,
        variables: Mapping[str, Any],
        *args: Any,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Applies the model in a frame, whose hook receives each operand that has a spec."""
        with intercepting(frame, frame.shared):
            kept = naming_interceptors(mutable)
            out, mutated = self.model.apply(join_quant(variables), *args, mutable=kept, **kwargs)
        return out if mutable is False else (out, split_quant(mutated))

    def spec_of(self, path: str, operand: str) -> Spec | None:
        """The spec of an operand ("weight", "input", "other", "output") of the layer at `path`."""
        if path not in self._deciding:
            self._deciding[path] = first_match(self.rules, path)
        rule = self._deciding[path]
        if rule is None:
            return None
        if operand == ATTENDED:
            return rule.output
        return getattr(rule, operand) or (rule.input if operand == "other" else None)

    @functools.cached_property
    def _deciding(self) -> dict[str, Rule | None]:
        """The rules that decide, by path, as far as any was asked for."""
        return {}

    def check_rules(self, paths: Iterable[str], layers: Set[str]) -> None:
        """Raises ValueError for a rule that changes nothing.

        Args:
            paths: of all modules.
            layers: those of them that have operands.
        """
        paths = sorted(paths)
        refuse_own_names(paths)
        decided: dict[int, list[str]] = {}
        for path in paths:
            first = next((i for i, rule in enumerate(self.rules) if rule.matches(path)), -1)
            decided.setdefault(first, []).append(path)
        for index, rule in enumerate(self.rules):
            reached = decided.get(index, [])
            if not reached and not any(rule.matches(path) for path in paths):
                shown = ", ".join(repr(p) for p in paths if p)
                preset = " (A preset fits itself to a model: presets.rules(name, model=, images=).)"
                patterns = [rule.pattern for rule in self.rules]
                unfitted = PRESET_ENDS in itertools.pairwise(patterns)
                raise ValueError(
                    f"rules[{index}] {rule.pattern!r} matches no layer. A pattern must match a "
                    f"whole path. Paths: {shown}.{checks.nearest(rule.pattern, paths)}"
                    f"{preset if unfitted and rule.pattern in PRESET_ENDS else ''}"
                )
            if rule.pattern == ".*":  # the rest, of which there may be none
                continue
            if not reached:
                raise ValueError(
                    f"rules[{index}] {rule.pattern!r} is never reached: the first rule that "
                    "matches a path decides, and rules before it match all of its paths. Move it "
                    "to the front, or drop it."
                )
            if (rule.weight or rule.input or rule.other) and layers.isdisjoint(reached):
                inside = f"{rule.pattern}/.*"
                fits = any(re.fullmatch(inside, path) for path in layers)
                raise ValueError(
                    f"rules[{index}] {rule.pattern!r} matches "
                    f"{', '.join(map(repr, reached[:3]))}, with no weight and no input to "
                    f"quantize. A pattern must match the path of a layer"
                    f"{f', such as {inside!r}' if fits else ''}: {', '.join(sorted(layers))}."
                )


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
            + (" (quantize its `.model`)." if isinstance(model, QuantizedModel) else ".")
        )
    rules = tuple(rules)
    for index, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise ValueError(f"rules[{index}] is {rule!r}; it must be a Rule.")
    return QuantizedModel(model, rules)
