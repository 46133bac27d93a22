"""Who learns from whom: a table in, the description of one compiled step out.

`learn = {net: {label: {"loss", "source", "weight", <hyper-parameters>}}}`. A label names a term of
the net's loss; the loss is its `loss` field or the label itself. `source` is the net whose logits
teach, learning itself or frozen. Offline, mutual, multi-teacher, teacher-assistant distillation and
the phases of QKD (Kim et al. 2019, arXiv 1911.12491) are such tables.

The table is split into structure, which is hashable and decides what is compiled, and numbers,
which are float32 arguments of the step. Nets and labels get canonical names there ("net0",
"term0"), so a control arm with other names and numbers runs on the same compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.losses import LOSSES
from qkd_jax.training.hygiene import Hygiene, describe, plan_hygiene
from qkd_jax.training.optim import OptimStructure, plan_optimizer

__all__ = ["Learner", "Plan", "StepStructure", "Term", "plan_step"]

# Positional names of a loss, and whose logits (or labels) they mean.
STUDENT_INPUTS = ("logits", "student_logits")
SOURCE_INPUTS = ("teacher_logits",)
INPUTS = (*STUDENT_INPUTS, *SOURCE_INPUTS, "labels")
FIELDS = ("loss", "source", "weight")


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a net's loss: canonical name, loss, positional inputs, the source's slot.

    `traced` names the hyper-parameters that are arguments of the step; `static` holds the others.
    """

    name: str
    loss: str
    inputs: tuple[str, ...]
    source: str | None
    traced: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Learner:
    """One net that learns: slot, module, terms of its loss, optimizer, and hygiene if any."""

    slot: str
    module: Any
    terms: tuple[Term, ...]
    optim: OptimStructure
    hygiene: Hygiene | None = None


@dataclasses.dataclass(frozen=True)
class StepStructure:
    """Everything a compiled step is specialised on; hashable, and equal for equal steps."""

    learners: tuple[Learner, ...]
    teachers: tuple[tuple[str, Any], ...] = ()

    @functools.cached_property
    def optim(self) -> dict[str, OptimStructure]:
        """{slot: static part of the optimizer}."""
        return {learner.slot: learner.optim for learner in self.learners}

    @functools.cached_property
    def modules(self) -> dict[str, Any]:
        """{slot: module} of all nets, learning and frozen."""
        return {n.slot: n.module for n in self.learners} | dict(self.teachers)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A stage's step: structure, numbers, and the map from names to canonical slots.

    Attributes:
        structure: Static and hashable; the key under which the compiled step is found.
        hyper: {slot: {"optim": {name: float32 array}, "terms": {term: {name: float32 array}}}},
            and "hygiene" like "optim" where a net has it.
        slots: {net: slot}, learners first.
        labels: {slot: {term: label}}.
        learners: Names of the nets that learn.
        teachers: Names of the nets that only teach (frozen).
        continues: {net: stage} for nets whose optimizer carries on.
    """

    structure: StepStructure
    hyper: dict[str, Any]
    slots: dict[str, str]
    labels: dict[str, dict[str, str]]
    learners: tuple[str, ...]
    teachers: tuple[str, ...]
    continues: dict[str, str]

    def net_of(self, slot: str) -> str:
        """Name of the net in a slot."""
        return {s: net for net, s in self.slots.items()}[slot]

    def describe(self) -> list[str]:
        """One line a term, and for hygiene: 'student <- 1 kd(temperature=2) from teacher'."""
        lines = []
        for learner in self.structure.learners:
            for term in learner.terms:
                given = self.hyper[learner.slot]["terms"][term.name]
                named = [f"{name}={float(given[name]):g}" for name in term.traced]
                # A switch that is off says nothing.
                named += [f"{name}={value!r}" for name, value in term.static if value is not False]
                source = f" from {self.net_of(term.source)}" if term.source else ""
                lines.append(
                    f"{self.net_of(learner.slot)} <- {float(given['weight']):g} "
                    f"{term.loss}({', '.join(named)}){source}"
                )
            if learner.hygiene is not None:
                numbers_of_hygiene = self.hyper[learner.slot]["hygiene"]
                lines.append(
                    f"{self.net_of(learner.slot)}: {describe(learner.hygiene, numbers_of_hygiene)}"
                )
        return lines


def plan_step(
    modules: Mapping[str, Any],
    learn: Mapping[str, Mapping[str, Mapping[str, Any]]],
    optim: Mapping[str, Mapping[str, Any]],
    *,
    horizon: int | Mapping[str, int],
    hygiene: Mapping[str, Mapping[str, Any]] | None = None,
    steps: int | None = None,
) -> Plan:
    """Checks the table of a stage and splits it into structure and numbers.

    Args:
        modules: {net: QuantizedModel}; may hold nets that this stage does not use.
        learn: {net: {label: {"loss", "source", "weight", <hyper-parameters of the loss>}}}.
        optim: {net: fields}, one for each net that learns; see `optim.plan_optimizer`.
        horizon: Length of the schedule in steps, for all or by net.
        hygiene: {net: fields} for nets that learn; see `hygiene`.
        steps: Length of the stage in steps, over which hygiene anneals; None takes the horizon.

    Returns:
        The plan of the stage's step.

    Raises:
        ValueError: An unknown net, loss or argument (with the nearest valid one), a loss that needs
            a source and has none, a net that teaches itself, a weight that is negative.
    """
    checks.at_least_one("learn", learn)
    for net in learn:
        if net not in modules:
            raise checks.unknown("net in learn", net, modules)
    for net in optim:
        if net not in learn:
            raise checks.unknown("net in optim (it does not learn in this stage)", net, learn)
    for net in hygiene or {}:
        if net not in learn:
            raise checks.unknown("net in hygiene (it does not learn in this stage)", net, learn)
    slots = {net: f"net{i}" for i, net in enumerate(learn)}
    learners: list[Learner] = []
    hyper: dict[str, Any] = {}
    labels: dict[str, dict[str, str]] = {}
    continues: dict[str, str] = {}
    for net, table in learn.items():
        if net not in optim:
            raise ValueError(f"optim.{net} is missing; net {net!r} learns, so give it an lr.")
        checks.at_least_one(f"learn.{net}", table)
        length = horizon[net] if isinstance(horizon, Mapping) else horizon
        structure, numbers_of_optim = plan_optimizer(net, dict(optim[net]), length)
        clean, numbers_of_hygiene = plan_hygiene(net, (hygiene or {}).get(net, {}), steps or length)
        terms, values, names = _plan_terms(net, table, modules, slots)
        slot = slots[net]
        learners.append(Learner(slot, _hashable(net, modules[net]), terms, structure, clean))
        hyper[slot] = {"optim": numbers_of_optim, "terms": values}
        if clean is not None:
            hyper[slot]["hygiene"] = numbers_of_hygiene
        labels[slot] = names
        if optim[net].get("continues"):
            continues[net] = str(optim[net]["continues"])
    teachers = tuple(net for net in slots if net not in learn)
    return Plan(
        structure=StepStructure(
            learners=tuple(learners),
            teachers=tuple((slots[net], _hashable(net, modules[net])) for net in teachers),
        ),
        hyper=hyper,
        slots=slots,
        labels=labels,
        learners=tuple(learn),
        teachers=teachers,
        continues=continues,
    )


def _hashable(net: str, module: Any) -> Any:
    try:
        hash(module)
    except TypeError as error:
        raise ValueError(
            f"the model of net {net!r} is not hashable ({error}); compiled steps are found by it, "
            "so make its fields tuples instead of lists, and frozen instead of dicts."
        ) from error
    return module


def _plan_terms(
    net: str, table: Mapping[str, Any], modules: Mapping[str, Any], slots: dict[str, str]
) -> tuple[tuple[Term, ...], dict[str, Any], dict[str, str]]:
    """Terms of one net, their numbers and their labels; adds slots for frozen sources."""
    # Sorted by loss, so that the order in which a config lists its terms decides nothing.
    rows = sorted((str(row.get("loss") or label), label) for label, row in table.items())
    terms, values, names = [], {}, {}
    for index, (loss, label) in enumerate(rows):
        where, row = f"learn.{net}.{label}", dict(table[label])
        if loss not in LOSSES:
            raise checks.unknown(f"loss in {where}", loss, LOSSES)
        inputs, arguments = _signature(loss)
        source = _source(where, net, loss, inputs, row.get("source"), modules)
        if source is not None:
            slots.setdefault(source, f"net{len(slots)}")
        weight = row.get("weight", 1.0)
        _number(f"{where}.weight", weight)
        checks.in_range(f"{where}.weight", weight, 0.0, math.inf)
        given = {key: value for key, value in row.items() if key not in FIELDS}
        for key in given:
            if key not in arguments:
                raise checks.unknown(f"argument of {where}", key, (*FIELDS, *arguments))
        traced, static = _arguments(where, arguments, given)
        _try_loss(where, LOSSES[loss], inputs, {**traced, **static})
        name = f"term{index}"
        terms.append(
            Term(
                name=name,
                loss=loss,
                inputs=inputs,
                source=None if source is None else slots[source],
                traced=tuple(sorted(traced)),
                static=tuple(sorted(static.items())),
            )
        )
        values[name] = {
            key: np.asarray(value, np.float32)
            for key, value in {"weight": weight, **traced}.items()
        }
        names[name] = label
    return tuple(terms), values, names


def _source(
    where: str,
    net: str,
    loss: str,
    inputs: tuple[str, ...],
    source: str | None,
    modules: Mapping[str, Any],
) -> str | None:
    needs = any(name in SOURCE_INPUTS for name in inputs)
    if needs and not source:
        raise ValueError(
            f"{where}.source is missing; loss {loss!r} compares with another net's logits, so name "
            f"that net: {', '.join(n for n in modules if n != net) or '(no other net)'}."
        )
    if not needs and source:
        raise ValueError(
            f"{where}.source is {source!r}, but loss {loss!r} uses labels alone; drop the source."
        )
    if source and source not in modules:
        raise checks.unknown(f"net in {where}.source", source, modules)
    if source == net:
        raise ValueError(
            f"{where}.source is the net itself: a net equals its own detached logits, so nothing "
            "would be learned; name another net (init_from gives a copy of this one)."
        )
    return source or None


@functools.cache
def _signature(loss: str) -> tuple[tuple[str, ...], dict[str, inspect.Parameter]]:
    """Positional names and keyword-only hyper-parameters of a loss."""
    inputs, arguments = [], {}
    for name, parameter in inspect.signature(LOSSES[loss]).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if name not in ("where", "axis_name"):
                arguments[name] = parameter
        else:
            inputs.append(name)
            if name not in INPUTS:
                raise ValueError(
                    f"loss {loss!r} takes {name!r}, which the step cannot give; its positional "
                    f"arguments may be {', '.join(INPUTS)}."
                )
    return tuple(inputs), arguments


def _arguments(
    where: str, arguments: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Splits a loss's hyper-parameters into (floats, which are traced; all others, static).

    Defaults are filled in, so that a table which spells them out shares the step of one that does
    not. A parameter is traced if its default or its annotation is a float.
    """
    traced: dict[str, float] = {}
    static: dict[str, Any] = {}
    for name, parameter in arguments.items():
        empty = parameter.default is inspect.Parameter.empty
        if empty and name not in given:
            raise ValueError(f"{where}.{name} is missing; the loss has no default for it.")
        value = given.get(name, parameter.default)
        is_float = isinstance(parameter.default, float) or "float" in str(parameter.annotation)
        if is_float and value is not None:
            _number(f"{where}.{name}", value)
            traced[name] = float(value)
        else:
            static[name] = tuple(value) if isinstance(value, list) else value
    return traced, static


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")


def _try_loss(
    where: str, loss: Callable[..., Any], inputs: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    """Runs the loss on shapes alone with the plain values: its own checks see Python numbers."""
    logits = jax.ShapeDtypeStruct((2, 4), np.float32)
    given = [jax.ShapeDtypeStruct((2,), np.int32) if n == "labels" else logits for n in inputs]
    try:
        jax.eval_shape(functools.partial(loss, **arguments), *given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
