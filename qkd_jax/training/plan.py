"""Splits a stage's `learn` table into the structure of its compiled step and the step's numbers.

`learn = {net: {label: {"loss", "source", "weight", <hyper-parameters>}}}`. A label names a term of
the net's loss; the loss is its `loss` field or the label itself. `source` is the net whose logits
or features teach, learning itself or frozen (`learn_table` has all fields). Offline, mutual, self,
multi-teacher, teacher-assistant distillation and the phases of QKD (Kim et al. 2019, arXiv
1911.12491) are such tables.

The structure is hashable and decides what is compiled; the numbers are float32 arguments of the
step. Nets and labels get canonical names there ("net0", "term0"), so a control arm with other names
and numbers runs on the same compiled step.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.distillation.learn_table import SCHEDULE, as_sources, plan_terms
from qkd_jax.distillation.taps import DataShape
from qkd_jax.distillation.term_state import Start, check_learned
from qkd_jax.distillation.terms import Term
from qkd_jax.quantize import QuantizedModel
from qkd_jax.training.hygiene import Hygiene, describe, plan_hygiene
from qkd_jax.training.optim import OptimStructure, describe_options, plan_optimizer
from qkd_jax.training.precision import computing_in
from qkd_jax.training.rematerialisation import REMAT

# What a step can measure beside its losses: the gradients' norms by group, and how often a net and
# those that teach it agree on the class.
LIVE = ("grad_norms", "agreement")


@dataclasses.dataclass(frozen=True)
class Learner:
    """One net that learns: slot, net, terms of its loss, optimizer, and hygiene if any."""

    slot: str
    net: QuantizedModel
    terms: tuple[Term, ...]
    optim: OptimStructure
    hygiene: Hygiene | None = None


@dataclasses.dataclass(frozen=True)
class StepStructure:
    """Everything that a compiled step is specialised on; hashable, and equal for equal steps.

    Attributes:
        learners: the nets that learn.
        teachers: (slot, net) of those that only teach.
        cached: slots of teachers whose logits come with the batch.
        stale: slots of learners that teach through an older copy.
        accumulate: micro-batches in which a batch is processed.
        remat: what nets that learn keep for the backward pass, of `rematerialisation.REMAT`.
        live: what is measured beside the losses, of `LIVE`.
        names: ((slot or "slot/term", name), ...) of the scopes in a profile; () where nobody looks:
            steps of other names are other programs.
    """

    learners: tuple[Learner, ...]
    teachers: tuple[tuple[str, QuantizedModel], ...] = ()
    cached: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    accumulate: int = 1
    remat: str = "none"
    live: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    def scope(self, key: str, otherwise: str = "") -> str:
        """Returns the name of a slot, or of a "slot/term", in profiles."""
        return dict(self.names).get(key, otherwise or key)

    @functools.cached_property
    def nets(self) -> dict[str, QuantizedModel]:
        """{slot: net} of all nets, learning and frozen."""
        return {learner.slot: learner.net for learner in self.learners} | dict(self.teachers)

    @functools.cached_property
    def taps(self) -> dict[str, tuple[str, ...]]:
        """{slot: taps that some term reads}; a net without any runs as if taps did not exist."""
        taps: dict[str, list[str]] = {slot: [] for slot in self.nets}
        for learner in self.learners:
            for term in learner.terms:
                taps[learner.slot] += term.taps
                for source in term.sources[:1]:
                    taps[source] += term.teacher_taps
        return {slot: tuple(dict.fromkeys(names)) for slot, names in taps.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A stage's step: structure, numbers, and the map from names to canonical slots.

    Attributes:
        structure: static and hashable; the key under which the compiled step is kept.
        hyper: {slot: {"optim": {name: float32 array}, "terms": {term: {name: float32 array}}}},
            and "hygiene" like "optim" where a net has it, and "stale" where its copy teaches.
        slots: {name of a net: slot}, learners first.
        labels: {slot: {term: label}}.
        learners: names of the nets that learn.
        teachers: names of the nets that only teach (frozen).
        continues: {name: stage} of nets that continue that stage's optimizer.
        starts: {slot: {term: function that makes the term's initial state}}.
        compute: the precision of activations, "" for the models' own.
    """

    structure: StepStructure
    hyper: dict[str, Any]
    slots: dict[str, str]
    labels: dict[str, dict[str, str]]
    learners: tuple[str, ...]
    teachers: tuple[str, ...]
    continues: dict[str, str]
    starts: dict[str, dict[str, Start]] = dataclasses.field(default_factory=dict)
    compute: str = ""

    def name_of(self, slot: str) -> str:
        """Returns the name of the net in a slot."""
        return {s: name for name, s in self.slots.items()}[slot]

    def learner(self, name: str) -> Learner:
        """Returns the net of that name, which learns."""
        return next(n for n in self.structure.learners if n.slot == self.slots[name])

    def describe(self) -> list[str]:
        """Returns a line for each term, each hygiene, options of optimizers and of the step.

        Such as 'student <- 1 kd(temperature=2) from teacher'.
        """
        lines = []
        if self.structure.accumulate > 1:
            lines.append(f"each batch in {self.structure.accumulate} micro-batches")
        if self.compute:
            lines.append(f"activations are {self.compute}")
        if self.structure.remat != "none":
            lines.append(f"backward passes keep {self.structure.remat} and compute the rest again")
        for learner in self.structure.learners:
            name = self.name_of(learner.slot)
            for term in learner.terms:
                numbers = self.hyper[learner.slot]["terms"][term.name]
                arguments = [f"{key}={_number_text(numbers, key)}" for key in term.traced]
                # A switch that is off is left out.
                arguments += [f"{k}={value!r}" for k, value in term.static if value is not False]
                if term.has_schedule:
                    arguments += [f"{key} {float(numbers[key]):g}" for key in SCHEDULE]
                source = " and ".join(map(self.name_of, term.sources))
                if set(term.sources) & set(self.structure.stale) - {learner.slot}:
                    every = float(self.hyper[self.structure.stale[0]]["stale"]["every"])
                    source += f" as it stood up to {every:g} steps before"
                taps = "+".join(term.teacher_taps)
                lines.append(
                    f"{name} <- {_number_text(numbers, 'weight')} "
                    f"{term.loss}({', '.join(arguments)})"
                    + (f" at {'+'.join(term.taps)}" if term.taps else "")
                    + (f" from {source}" if source else "")
                    + (f" at {taps}" if taps and term.teacher_taps != term.taps else "")
                )
            if learner.hygiene is not None:
                numbers = self.hyper[learner.slot]["hygiene"]
                lines.append(f"{name}: {describe(learner.hygiene, numbers)}")
            if options := describe_options(learner.optim, self.hyper[learner.slot]["optim"]):
                lines.append(f"{name}: {options}")
        return lines


def with_live(plan: Plan, live: Collection[str]) -> Plan:
    """Returns the plan of a step that also measures what is named of `LIVE`."""
    chosen = tuple(name for name in LIVE if name in live)
    return dataclasses.replace(plan, structure=dataclasses.replace(plan.structure, live=chosen))


def with_names(plan: Plan) -> Plan:
    """Returns the plan of a step whose scopes have the names of nets and terms, for a profile."""
    names = {slot: name for name, slot in plan.slots.items()}
    for slot, labels in plan.labels.items():
        names |= {f"{slot}/{term}": label for term, label in labels.items()}
    structure = dataclasses.replace(plan.structure, names=tuple(names.items()))
    return dataclasses.replace(plan, structure=structure)


def _number_text(numbers: Mapping[str, Any], key: str) -> str:
    if key in numbers:
        return f"{float(numbers[key]):g}"
    return f"{float(numbers[f'{key}_begin']):g}..{float(numbers[f'{key}_end']):g}"


def plan_step(
    nets: Mapping[str, QuantizedModel],
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
    accumulate: int = 1,
    remat: str = "none",
    compute: str = "",
) -> Plan:
    """Checks the table of a stage and splits it into structure and numbers.

    Args:
        nets: {name: net}; may hold nets that this stage does not use.
        learn: {name: {label: {"loss", "source", "weight", <hyper-parameters of the loss>}}}.
        optim: {name: fields}, one for each net that learns; see `optim.plan_optimizer`.
        horizon: length of the schedule in steps, for all or by net.
        hygiene: {name: fields} for nets that learn; see `hygiene`.
        steps: length of the stage in steps, over which hygiene anneals and weights of terms follow
            their schedules; None takes the horizon.
        data: shapes of the data, needed by terms that read features or keep a memory.
        first: global step at which the stage starts.
        cached: frozen nets that are not run: the batch has their logits under `cached_key`.
        stale: above 0, a net that learns teaches the others through a copy of itself, in evaluation
            mode, which is replaced every so many steps (Anil et al. 2018, arXiv 1804.03235): at
            the stage's first step and at every `stale`-th behind it, before that step's update.
        accumulate: micro-batches in which a batch is processed, for one update (`accumulation`).
        remat: what nets that learn keep for the backward pass (`rematerialisation`).
        compute: the precision of activations, "bfloat16" or that of the models (`precision`).

    Returns:
        The plan of the stage's step.

    Raises:
        ValueError: An unknown net, loss, argument or tap (with the nearest valid one), a loss that
            needs a source and has none, a net that teaches itself, a weight that is negative, a
            loss that relates examples together with `accumulate`.
    """
    checks.at_least_one("learn", learn)
    nets = {**nets, **{n: computing_in(compute, n, nets[n]) for n in _used(nets, learn)}}
    hygiene = hygiene or {}
    for what, table, known in (
        ("net in learn", learn, nets),
        ("net in optim (it does not learn in this stage)", optim, learn),
        ("net in hygiene (it does not learn in this stage)", hygiene, learn),
    ):
        for name in table:
            if name not in known:
                raise checks.unknown(what, name, known)
    slots = {name: f"net{i}" for i, name in enumerate(learn)}
    learners: list[Learner] = []
    hyper: dict[str, Any] = {}
    labels: dict[str, dict[str, str]] = {}
    continues: dict[str, str] = {}
    starts: dict[str, dict[str, Start]] = {}
    for name, table in learn.items():
        if name not in optim:
            raise ValueError(f"optim.{name} is missing; net {name!r} learns, so give it an lr.")
        checks.at_least_one(f"learn.{name}", table)
        slot, length = slots[name], horizon[name] if isinstance(horizon, Mapping) else horizon
        optimizer, optimizer_numbers = plan_optimizer(name, dict(optim[name]), length)
        net_hygiene, numbers = plan_hygiene(name, hygiene.get(name, {}), steps or length)
        terms, term_numbers, labels[slot], starts[slot] = plan_terms(
            name, table, nets, slots, data=data, first=first, steps=steps or length
        )
        learners.append(Learner(slot, nets[name], terms, optimizer, net_hygiene))
        hyper[slot] = {"optim": optimizer_numbers, "terms": term_numbers}
        if net_hygiene is not None:
            hyper[slot]["hygiene"] = numbers
        if optim[name].get("continues"):
            continues[name] = str(optim[name]["continues"])
        else:
            for term in terms:
                where = f"learn.{name}.{labels[slot][term.name]}"
                check_learned(where, term, term_numbers[term.name])
    teachers = tuple(name for name in slots if name not in learn)
    _check_cached(cached, teachers, slots, learners)
    copied = _stale_slots(stale, learners)
    _check_accumulate(accumulate, learners, labels, slots)
    checks.one_of("remat", remat, REMAT)
    for slot in copied:
        numbers = {"every": stale, "first": first}
        hyper[slot]["stale"] = {key: np.asarray(n, np.float32) for key, n in numbers.items()}
    return Plan(
        structure=StepStructure(
            learners=tuple(learners),
            teachers=tuple((slots[name], nets[name]) for name in teachers),
            cached=tuple(slots[name] for name in teachers if name in cached),
            stale=copied,
            accumulate=accumulate,
            remat=remat,
        ),
        hyper=hyper,
        slots=slots,
        labels=labels,
        learners=tuple(learn),
        teachers=teachers,
        continues=continues,
        starts=starts,
        compute=compute,
    )


def cached_key(slot: str) -> str:
    """Returns the batch's key of a cached teacher's logits, float32 [batch, classes]."""
    return f"logits/{slot}"


def _used(nets: Collection[str], learn: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Names of the nets that learn or teach, as far as they are known."""
    rows = (row for table in learn.values() for row in table.values())
    sources = (source for row in rows for source in as_sources(row.get("source")))
    return [name for name in dict.fromkeys((*learn, *sources)) if name in nets]


def _stale_slots(stale: int, learners: Sequence[Learner]) -> tuple[str, ...]:
    """Slots of the nets that learn and teach another one, if `stale` asks for copies of them."""
    checks.integer_in("stale", stale, 0)
    if not stale:
        return ()
    sources = {
        source
        for learner in learners
        for term in learner.terms
        for source in term.sources
        if source != learner.slot
    }
    slots = tuple(learner.slot for learner in learners if learner.slot in sources)
    if not slots:
        raise ValueError(
            f"stale is {stale}, but no net that learns here teaches another, so there is no copy "
            "to take; let nets learn from one another (learn.<net>.<label>.source) or give stale=0."
        )
    return slots


def _check_accumulate(
    accumulate: int,
    learners: Sequence[Learner],
    labels: Mapping[str, Mapping[str, str]],
    slots: Mapping[str, str],
) -> None:
    """Refuses losses that would see the examples of a micro-batch in place of the batch's."""
    checks.integer_in("accumulate", accumulate, 1)
    if accumulate == 1:
        return
    names = {slot: name for name, slot in slots.items()}
    for learner in learners:
        for term in learner.terms:
            if term.takes_axis_name or "memory" in term.inputs:
                raise ValueError(
                    f"accumulate is {accumulate}, but learn.{names[learner.slot]}."
                    f"{labels[learner.slot][term.name]} (loss {term.loss!r}) relates the examples "
                    "of a batch, of which a micro-batch has a part. Give accumulate=1 and save "
                    "memory by remat or more devices, or take a loss of single examples."
                )


def _check_cached(
    cached: Collection[str],
    teachers: tuple[str, ...],
    slots: Mapping[str, str],
    learners: Sequence[Learner],
) -> None:
    for name in cached:
        if name not in teachers:
            raise ValueError(
                f"cached has {name!r}, which is not frozen here: its logits change or are not "
                f"needed. Frozen teachers of this stage: {', '.join(teachers) or '(none)'}."
            )
        for term in (term for learner in learners for term in learner.terms):
            if term.teacher_taps and term.sources[0] == slots[name]:
                raise ValueError(
                    f"cached has {name!r}, but loss {term.loss!r} looks at its features "
                    f"({', '.join(term.teacher_taps)}), and only logits are cached; leave the "
                    "cache away, or the loss."
                )
