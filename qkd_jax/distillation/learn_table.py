"""The learn table: its rows as terms of a net's loss, with their numbers and first states.

Fields of a row: `loss` (or the label), `source` (a net, or several; without one the net itself for
losses of self-distillation), `weight`; `taps` and `teacher_taps` (see `taps`) and `adaptor`
(options, see `adaptors`) where the loss looks at features; `start`, `end`, `warmup`, `decay` for
the schedule of the weight over the stage, in steps or below 1 in fractions of it; and the loss's
own hyper-parameters. A number, the weight too, may be a ramp over the stage:
`temperature=dict(begin=8.0, end=2.0, shape="cosine")`.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkd_jax import checks, losses
from qkd_jax.distillation.taps import DataShape
from qkd_jax.distillation.term_state import Start, TermBuilder
from qkd_jax.distillation.terms import Term, in_steps
from qkd_jax.quantize import QuantizedModel

SCHEDULE = ("start", "end", "warmup", "decay")
FIELDS = ("loss", "source", "weight", "taps", "teacher_taps", "adaptor", *SCHEDULE)
STEP_KEYWORDS = ("where", "axis_name")
SHAPES = ("linear", "cosine", "gaussian")


def as_sources(source: Any) -> tuple[str, ...]:
    """Returns the names in a row's `source`: none, one, or several."""
    if not source:
        return ()
    return (source,) if isinstance(source, str) else tuple(source)


def plan_terms(
    learner: str,
    table: Mapping[str, Any],
    nets: Mapping[str, QuantizedModel],
    slots: dict[str, str],
    *,
    data: DataShape | None = None,
    first: int = 0,
    steps: int = 1,
) -> tuple[tuple[Term, ...], dict[str, Any], dict[str, str], dict[str, Start]]:
    """Returns the terms of one net, their numbers, their labels, and what makes their states.

    Args:
        learner: name of the net that learns.
        table: {label: row}.
        nets: {name: net}.
        slots: {name: slot}; frozen sources are added.
        data: shapes of the data; terms with features or memory need it.
        first: global step at which the stage starts.
        steps: its length.

    Returns:
        (terms, {term: numbers}, {term: label}, {term: start(key, {name: variables}) -> state}).

    Raises:
        ValueError: as `plan.plan_step` says.
    """
    # Sorted by loss, so that the order in which a config lists its terms decides nothing.
    rows = sorted((str(row.get("loss") or label), label) for label, row in table.items())
    terms, values, names, starts = [], {}, {}, {}
    for index, (loss, label) in enumerate(rows):
        where, fields = f"learn.{learner}.{label}", dict(table[label])
        if "/" in str(label):  # metrics and checkpoints name what belongs to it by paths
            raise ValueError(
                f"{where}: the label {label!r} has a '/'; write another sign there, such as '_'."
            )
        if loss not in losses.LOSSES:
            raise checks.unknown(f"loss in {where}", loss, losses.LOSSES)
        inputs, arguments = losses.TABLE[loss].inputs, hyper_parameters(loss)
        sources = _sources(where, learner, loss, fields.get("source"), nets)
        for source in sources:
            slots.setdefault(source, f"net{len(slots)}")
        for key in fields:
            if key not in FIELDS and key not in arguments:
                raise checks.unknown(f"argument of {where}", key, (*FIELDS, *arguments))
        traced, static = _arguments(where, arguments, fields)
        plain, numbers_of_term, ramps = _ramps(where, traced, steps)
        schedule = _schedule(where, fields, steps)
        if schedule or ramps:
            numbers_of_term["first"] = first
        builder = TermBuilder(where, learner, loss, fields, sources, nets, data)
        taps, teacher_taps, adaptor = builder.adaptor()
        name = f"term{index}"
        term = Term(
            name=name,
            loss=loss,
            inputs=inputs,
            sources=tuple(slots[source] for source in sources),
            traced=tuple(sorted(set(traced) - {"weight"})),
            static=tuple(sorted(static.items())),
            taps=taps,
            teacher_taps=teacher_taps,
            adaptor=adaptor,
            ramps=ramps,
            has_schedule=bool(schedule),
            takes_axis_name="axis_name" in losses.TABLE[loss].keywords,
        )
        start = builder.start(term)
        for numbers_of_end in plain:
            builder.attempt(term, start, {**numbers_of_end, **static})
        terms.append(term)
        values[name] = {
            key: np.asarray(value, np.float32)
            for key, value in {**numbers_of_term, **schedule}.items()
        }
        names[name] = label
        if start is not None:
            starts[name] = start
    return tuple(terms), values, names, starts


@functools.cache
def hyper_parameters(loss: str) -> dict[str, inspect.Parameter]:
    """Returns the keyword-only arguments of a loss that a row of the table may set."""
    parameters = {n: p for n, p in losses.TABLE[loss].keywords.items() if n not in STEP_KEYWORDS}
    for name in parameters:
        if name in FIELDS:
            raise ValueError(
                f"loss {loss!r} has a hyper-parameter {name!r}, which is a field of every term "
                f"of a loss ({', '.join(FIELDS)}); rename it."
            )
    return parameters


def _sources(
    where: str,
    learner: str,
    loss: str,
    source: Any,
    nets: Mapping[str, QuantizedModel],
) -> tuple[str, ...]:
    row = losses.TABLE[loss]
    sources = as_sources(source) or ((learner,) if row.self_taught else ())
    if row.has_teacher and not sources:
        raise ValueError(
            f"{where}.source is missing; loss {loss!r} compares with another net's logits, so name "
            f"that net: {', '.join(n for n in nets if n != learner) or '(no other net)'}."
        )
    if sources and not row.has_teacher:
        raise ValueError(
            f"{where}.source is {source!r}, but loss {loss!r} compares with no other net; drop the "
            "source."
        )
    if len(sources) > 1 and not row.has_several_teachers:
        several = [name for name, other in losses.TABLE.items() if other.has_several_teachers]
        raise ValueError(
            f"{where}.source names {len(sources)} nets, but loss {loss!r} takes one; give each "
            f"source a term of its own, or use a loss of several: {', '.join(several) or '(none)'}."
        )
    for index, name in enumerate(sources):
        if name not in nets:
            raise checks.unknown(f"net in {where}.source", name, nets)
        if name == learner and not row.self_taught:
            raise ValueError(
                f"{where}.source is the net itself: a net equals its own detached logits, so "
                "nothing would be learned; name another net (init_from gives a copy of this one)."
            )
        if name in sources[:index]:
            raise ValueError(f"{where}.source names {name!r} twice; name each net once.")
    return sources


def _arguments(
    where: str, arguments: Mapping[str, inspect.Parameter], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits weight and hyper-parameters into (numbers or ramps, which are traced; the others).

    Defaults are filled in, so that a table which spells them out shares the step of one that does
    not. A parameter is traced if its default or its annotation is a float.
    """
    traced: dict[str, Any] = {"weight": fields.get("weight", 1.0)}
    static: dict[str, Any] = {}
    for name, parameter in arguments.items():
        empty = parameter.default is inspect.Parameter.empty
        if empty and name not in fields:
            raise ValueError(f"{where}.{name} is missing; the loss has no default for it.")
        value = fields.get(name, parameter.default)
        is_float = isinstance(parameter.default, float) or "float" in str(parameter.annotation)
        if is_float and value is not None:
            traced[name] = value
        else:
            static[name] = tuple(value) if isinstance(value, list) else value
    return traced, static


def _ramps(
    where: str, traced: Mapping[str, Any], steps: int
) -> tuple[list[dict[str, float]], dict[str, float], tuple[tuple[str, str], ...]]:
    """Returns (numbers at begin and end, for checks; those of the step; ramps as (name, shape))."""
    begins, ends, numbers_of_step, ramps = {}, {}, {}, []
    for name, value in traced.items():
        path = f"{where}.{name}"
        if not isinstance(value, Mapping):
            _number(path, value)
            begins[name] = ends[name] = numbers_of_step[name] = float(value)
            continue
        for key in value:
            if key not in ("begin", "end", "shape", "steps"):
                raise checks.unknown(f"field of {path}", key, ("begin", "end", "shape", "steps"))
        for key in ("begin", "end"):
            if key not in value:
                raise ValueError(
                    f"{path}.{key} is missing; a number that changes is a table such as "
                    "dict(begin=8.0, end=2.0, shape='cosine')."
                )
            _number(f"{path}.{key}", value[key])
        shape = value.get("shape", "linear")
        checks.one_of(f"{path}.shape", shape, SHAPES)
        checks.in_range(f"{path}.steps", value.get("steps", 0), 0, steps)
        begins[name], ends[name] = float(value["begin"]), float(value["end"])
        numbers_of_step[f"{name}_begin"], numbers_of_step[f"{name}_end"] = begins[name], ends[name]
        numbers_of_step[f"{name}_steps"] = in_steps(value.get("steps", 0), steps) or steps
        ramps.append((name, shape))
    for numbers_of_end in (begins, ends):
        checks.in_range(f"{where}.weight", numbers_of_end["weight"], 0.0, math.inf)
    plain = [{k: v for k, v in n.items() if k != "weight"} for n in (begins, ends)]
    return plain if ramps else plain[:1], numbers_of_step, tuple(sorted(ramps))


def _schedule(where: str, fields: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Start, end, warm-up and decay of a weight in steps; empty where no length is given."""
    lengths = {name: fields.get(name) or 0 for name in SCHEDULE}
    for name, value in lengths.items():
        checks.in_range(f"{where}.{name}", value, 0, steps)
        if isinstance(value, float) and value == 1:
            raise ValueError(
                f"{where}.{name} is 1.0, which may mean one step or the whole stage; write 1 for "
                "one step, 0.0 to leave it off, or a fraction below 1."
            )
    if not any(lengths.values()):
        return {}
    schedule = {name: float(in_steps(value, steps)) for name, value in lengths.items()}
    schedule["end"] = schedule["end"] or float(steps)
    if schedule["start"] >= schedule["end"]:
        raise ValueError(
            f"{where} starts at step {schedule['start']:g} and ends at {schedule['end']:g}; the "
            "end must come later (numbers below 1 are fractions of the stage)."
        )
    return schedule


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
