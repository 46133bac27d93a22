"""Who learns from whom: a table in, the description of one compiled step out.

`learn = {net: {label: {"loss", "source", "weight", <hyper-parameters>}}}`. A label names a term of
the net's loss; the loss is its `loss` field or the label itself. `source` is the net whose logits
or features teach, learning itself or frozen (`rows` has all fields). Offline, mutual, self,
multi-teacher, teacher-assistant distillation and the phases of QKD (Kim et al. 2019, arXiv
1911.12491) are such tables.

The table is split into structure, which is hashable and decides what is compiled, and numbers,
which are float32 arguments of the step. Nets and labels get canonical names there ("net0",
"term0"), so a control arm with other names and numbers runs on the same compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.distillation.learn_table import COURSE, plan_terms
from qkd_jax.distillation.taps import DataShape
from qkd_jax.distillation.term_state import Start, check_learned
from qkd_jax.distillation.terms import Term
from qkd_jax.training.hygiene import Hygiene, describe, plan_hygiene
from qkd_jax.training.optim import OptimStructure, plan_optimizer

__all__ = ["Learner", "Plan", "StepStructure", "Term", "cached_key", "plan_step"]


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
    cached: tuple[str, ...] = ()  # slots of teachers whose logits come with the batch
    stale: tuple[str, ...] = ()  # slots of learners that teach through an older copy

    @functools.cached_property
    def optim(self) -> dict[str, OptimStructure]:
        """{slot: static part of the optimizer}."""
        return {learner.slot: learner.optim for learner in self.learners}

    @functools.cached_property
    def modules(self) -> dict[str, Any]:
        """{slot: module} of all nets, learning and frozen."""
        return {n.slot: n.module for n in self.learners} | dict(self.teachers)

    @functools.cached_property
    def taps(self) -> dict[str, tuple[str, ...]]:
        """{slot: taps that some term looks at}; nets without any run as if taps did not exist."""
        found: dict[str, list[str]] = {slot: [] for slot in self.modules}
        for learner in self.learners:
            for term in learner.terms:
                found[learner.slot] += term.taps
                for source in term.sources[:1]:
                    found[source] += term.teacher_taps
        return {slot: tuple(dict.fromkeys(names)) for slot, names in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A stage's step: structure, numbers, and the map from names to canonical slots.

    Attributes:
        structure: Static and hashable; the key under which the compiled step is found.
        hyper: {slot: {"optim": {name: float32 array}, "terms": {term: {name: float32 array}}}},
            and "hygiene" like "optim" where a net has it, and "stale" where its copy teaches.
        slots: {net: slot}, learners first.
        labels: {slot: {term: label}}.
        learners: Names of the nets that learn.
        teachers: Names of the nets that only teach (frozen).
        continues: {net: stage} for nets whose optimizer carries on.
        starts: {slot: {term: what makes the state that the term owns}}.
    """

    structure: StepStructure
    hyper: dict[str, Any]
    slots: dict[str, str]
    labels: dict[str, dict[str, str]]
    learners: tuple[str, ...]
    teachers: tuple[str, ...]
    continues: dict[str, str]
    starts: dict[str, dict[str, Start]] = dataclasses.field(default_factory=dict)

    def net_of(self, slot: str) -> str:
        """Name of the net in a slot."""
        return {s: net for net, s in self.slots.items()}[slot]

    def describe(self) -> list[str]:
        """One line a term, and for hygiene: 'student <- 1 kd(temperature=2) from teacher'."""
        lines = []
        for learner in self.structure.learners:
            for term in learner.terms:
                given = self.hyper[learner.slot]["terms"][term.name]
                named = [f"{name}={_shown(given, name)}" for name in term.traced]
                # A switch that is off says nothing.
                named += [f"{name}={value!r}" for name, value in term.static if value is not False]
                if term.course:
                    named += [f"{name} {float(given[name]):g}" for name in COURSE]
                source = " and ".join(map(self.net_of, term.sources))
                if set(term.sources) & set(self.structure.stale) - {learner.slot}:
                    every = float(self.hyper[self.structure.stale[0]]["stale"]["every"])
                    source += f" as it stood up to {every:g} steps before"
                taps = "+".join(term.teacher_taps)
                lines.append(
                    f"{self.net_of(learner.slot)} <- {_shown(given, 'weight')} "
                    f"{term.loss}({', '.join(named)})"
                    + (f" at {'+'.join(term.taps)}" if term.taps else "")
                    + (f" from {source}" if source else "")
                    + (f" at {taps}" if taps and term.teacher_taps != term.taps else "")
                )
            if learner.hygiene is not None:
                numbers_of_hygiene = self.hyper[learner.slot]["hygiene"]
                lines.append(
                    f"{self.net_of(learner.slot)}: {describe(learner.hygiene, numbers_of_hygiene)}"
                )
        return lines


def _shown(given: Mapping[str, Any], name: str) -> str:
    if name in given:
        return f"{float(given[name]):g}"
    return f"{float(given[f'{name}_begin']):g}..{float(given[f'{name}_end']):g}"


def plan_step(
    modules: Mapping[str, Any],
    learn: Mapping[str, Mapping[str, Mapping[str, Any]]],
    optim: Mapping[str, Mapping[str, Any]],
    *,
    horizon: int | Mapping[str, int],
    hygiene: Mapping[str, Mapping[str, Any]] | None = None,
    steps: int | None = None,
    data: DataShape | None = None,
    first: int = 0,
    cached: Collection[str] = (),
    stale: int = 0,
) -> Plan:
    """Checks the table of a stage and splits it into structure and numbers.

    Args:
        modules: {net: QuantizedModel}; may hold nets that this stage does not use.
        learn: {net: {label: {"loss", "source", "weight", <hyper-parameters of the loss>}}}.
        optim: {net: fields}, one for each net that learns; see `optim.plan_optimizer`.
        horizon: Length of the schedule in steps, for all or by net.
        hygiene: {net: fields} for nets that learn; see `hygiene`.
        steps: Length of the stage in steps, over which hygiene anneals and terms run their course;
            None takes the horizon.
        data: Shapes of the data, which terms need that look at features or keep a memory.
        first: Global step at which the stage starts.
        cached: Frozen nets that are not run: the batch brings their logits, as `cached_key` says.
        stale: Above 0, a net that learns teaches the others through a copy of itself, in evaluation
            mode, which is taken anew every so many steps (Anil et al. 2018, arXiv 1804.03235): at
            the stage's first step and at every `stale`-th behind it, before that step's update.

    Returns:
        The plan of the stage's step.

    Raises:
        ValueError: An unknown net, loss, argument or tap (with the nearest valid one), a loss that
            needs a source and has none, a net that teaches itself, a weight that is negative.
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
    starts: dict[str, dict[str, Start]] = {}
    for net, table in learn.items():
        if net not in optim:
            raise ValueError(f"optim.{net} is missing; net {net!r} learns, so give it an lr.")
        checks.at_least_one(f"learn.{net}", table)
        length = horizon[net] if isinstance(horizon, Mapping) else horizon
        structure, numbers_of_optim = plan_optimizer(net, dict(optim[net]), length)
        clean, numbers_of_hygiene = plan_hygiene(net, (hygiene or {}).get(net, {}), steps or length)
        slot = slots[net]
        terms, values, names, starts[slot] = plan_terms(
            net, table, modules, slots, data=data, first=first, steps=steps or length
        )
        learners.append(Learner(slot, _hashable(net, modules[net]), terms, structure, clean))
        hyper[slot] = {"optim": numbers_of_optim, "terms": values}
        if clean is not None:
            hyper[slot]["hygiene"] = numbers_of_hygiene
        labels[slot] = names
        if optim[net].get("continues"):
            continues[net] = str(optim[net]["continues"])
        else:
            for term in terms:
                check_learned(f"learn.{net}.{names[term.name]}", term, values[term.name])
    teachers = tuple(net for net in slots if net not in learn)
    _check_cached(cached, teachers, slots, learners)
    peers = _stale_peers(stale, learners)
    for slot in peers:
        hyper[slot]["stale"] = {
            "every": np.asarray(stale, np.float32),
            "first": np.asarray(first, np.float32),
        }
    return Plan(
        structure=StepStructure(
            learners=tuple(learners),
            teachers=tuple((slots[net], _hashable(net, modules[net])) for net in teachers),
            cached=tuple(slots[net] for net in teachers if net in cached),
            stale=peers,
        ),
        hyper=hyper,
        slots=slots,
        labels=labels,
        learners=tuple(learn),
        teachers=teachers,
        continues=continues,
        starts=starts,
    )


def cached_key(slot: str) -> str:
    """Where a batch has the logits of the teacher in a slot, float32 [batch, classes]."""
    return f"logits/{slot}"


def _stale_peers(stale: int, learners: Sequence[Learner]) -> tuple[str, ...]:
    """Slots of the nets that learn and teach another one, where `stale` asks for copies of them."""
    checks.integer_in("stale", stale, 0)
    if not stale:
        return ()
    found = {
        source
        for learner in learners
        for term in learner.terms
        for source in term.sources
        if source != learner.slot
    }
    peers = tuple(learner.slot for learner in learners if learner.slot in found)
    if not peers:
        raise ValueError(
            f"stale is {stale}, but no net that learns here teaches another, so there is no copy "
            "to take; let nets learn from one another (learn.<net>.<label>.source) or give stale=0."
        )
    return peers


def _check_cached(
    cached: Collection[str],
    teachers: tuple[str, ...],
    slots: Mapping[str, str],
    learners: Sequence[Learner],
) -> None:
    for net in cached:
        if net not in teachers:
            raise ValueError(
                f"cached has {net!r}, which is not frozen here: its logits change or are not asked "
                f"for. Frozen teachers of this stage: {', '.join(teachers) or '(none)'}."
            )
        for term in (term for learner in learners for term in learner.terms):
            if term.teacher_taps and term.sources[0] == slots[net]:
                raise ValueError(
                    f"cached has {net!r}, but loss {term.loss!r} looks at its features "
                    f"({', '.join(term.teacher_taps)}), and only logits are cached; leave the "
                    "cache away, or the loss."
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
