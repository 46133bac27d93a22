"""The schedule of a config, laid out: stages one after another, every length in steps.

The fields of a stage are the keyword-only arguments of its function in `STAGES`, with the defaults
and the names that are refused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from qkd_jax import checks
from qkd_jax.distillation.learn_table import as_sources
from qkd_jax.distillation.taps import DataShape
from qkd_jax.experiment.config_checks import check_images, check_tables, mapping, with_tree
from qkd_jax.quantize import QuantizedModel


@dataclasses.dataclass(frozen=True)
class Kind:
    """One entry of `STAGES`, a kind of stage.

    Attributes:
        run: fn(run, stage, **fields) changes the variables or the rows of a `Run`. Its keyword-only
            arguments are the fields that a config may give; one without a default must be given,
            and `nets` (or `learn`) says which nets take part.
        check: fn(nets, stage) raises ValueError for wrong values before anything runs.
        options: further fields, which `run` takes as **options.
        makes_images: whether later stages may name it as the source of their `images`; it then has
            a field `examples`.
    """

    run: Callable[..., None]
    check: Callable[[Mapping[str, QuantizedModel], Stage], Any]
    options: Mapping[str, inspect.Parameter] = dataclasses.field(default_factory=dict)
    makes_images: bool = False

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The fields of a stage of this kind, by name."""
        named = inspect.signature(self.run).parameters.values()
        return {p.name: p for p in named if p.kind is p.KEYWORD_ONLY} | dict(self.options)

    @property
    def defaults(self) -> dict[str, Any]:
        """The fields that need not be given."""
        found = self.parameters.items()
        return {name: p.default for name, p in found if p.default is not p.empty}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the schedule.

    Attributes:
        name: its name in `stages`.
        kind: a key of STAGES.
        fields: its other fields, complete.
        index: its place in the schedule.
        first: global step at which it starts. A stage that does not train counts as one step, so
            that every checkpoint has a number of its own.
        steps: its length in global steps.
        nets: the nets that take part, in order.
        starts: {net: position in its schedule of the learning rate} for nets that learn.
        horizons: {net: joint length of that schedule}, over all stages that continue it.
        continued: nets whose optimizer a later stage continues.
        data_start: step of the data order at which it starts: where the stages end that it
            continues.
        data: shapes of the data.
    """

    name: str
    kind: str
    fields: dict[str, Any]
    index: int
    first: int
    steps: int
    nets: tuple[str, ...]
    starts: dict[str, int] = dataclasses.field(default_factory=dict)
    horizons: dict[str, int] = dataclasses.field(default_factory=dict)
    continued: tuple[str, ...] = ()
    data_start: int = 0
    data: DataShape | None = None

    @property
    def trains(self) -> bool:
        """Whether it is a `train` stage."""
        return self.kind == "train"


def lay_out(
    plain: Mapping[str, Any], kinds: Mapping[str, Kind], data: DataShape
) -> tuple[Stage, ...]:
    """Returns the stages of a resolved config in order, checked, with their lengths in steps.

    Args:
        plain: what `settings.resolve` returns.
        kinds: `STAGES`.
        data: shapes of the data; the number of training examples turns epochs into steps.

    Raises:
        ValueError: a stage, kind or field that is not known, or a chain that cannot continue.
    """
    schedule, table = plain["schedule"], plain["stages"]
    if isinstance(schedule, str) or any("," in str(name) for name in schedule):
        given = schedule if isinstance(schedule, str) else ",".join(schedule)
        names = ", ".join(repr(n.strip()) for n in given.split(","))
        raise ValueError(
            f"config.schedule is one string, {given!r}; a tuple on the command line is written "
            f'--config.schedule="({names},)".'
        )
    checks.at_least_one("config.schedule", schedule)
    for index, name in enumerate(schedule):
        if name not in table:
            raise checks.unknown("stage in config.schedule", name, table)
        if name in schedule[:index]:
            raise ValueError(
                f"config.schedule names {name!r} twice; give the second one a name of its own in "
                "config.stages."
            )
    for name in table:  # stages that are not scheduled are checked too: they are one edit away
        _check_fields(name, table[name], kinds)
    stages: list[Stage] = []
    first, epochs = 0, {}
    for index, name in enumerate(schedule):
        fields = dict(table[name])
        kind = fields.pop("kind")
        fields = {**kinds[kind].defaults, **fields}
        done = {s.name: s for s in stages}
        steps, starts, data_start = 1, {}, 0
        makers = {s.name: s.fields["examples"] for s in stages if kinds[s.kind].makes_images}
        source = check_images(name, fields.get("images") or "", makers, schedule)
        shape = dataclasses.replace(data, examples=makers[source]) if source else data
        if kind == "train":
            fields["learn"] = with_tree(f"stages.{name}", fields["learn"], plain["data"])
            _check_chain(name, fields, done, schedule)
            steps, epochs[name] = _steps(name, fields, done, epochs, shape.examples)
            for net in fields["learn"]:
                before = _continues(fields, net)
                starts[net] = done[before].starts[net] + done[before].steps if before else 0
            data_start = _data_start(name, fields, starts)
        nets = nets_of(kind, fields)
        stages.append(
            Stage(
                name,
                kind,
                fields,
                index,
                first,
                steps,
                nets,
                starts,
                data_start=data_start,
                data=shape,
            )
        )
        first += steps
    return _with_horizons(stages)


def _continues(fields: Mapping[str, Any], net: str) -> str:
    return fields["optim"].get(net, {}).get("continues") or ""


def _check_chain(
    name: str, fields: Mapping[str, Any], done: Mapping[str, Stage], schedule: list[str]
) -> None:
    for net in fields["learn"]:
        before = _continues(fields, net)
        where = f"stages.{name}.optim.{net}.continues"
        if not before:
            continue
        if before not in done:
            late = " (it comes later in the schedule)" if before in schedule else ""
            raise ValueError(
                f"{where} is {before!r}{late}; it must be an earlier train stage: "
                f"{', '.join(s.name for s in done.values() if s.trains) or '(none)'}."
                f"{checks.nearest(before, done)}"
            )
        if not done[before].trains or net not in done[before].fields["learn"]:
            raise ValueError(
                f"{where} is {before!r}, but net {net!r} does not learn there, so there is no "
                "optimizer to carry on; name a stage in which it learns, or ''."
            )
        averaged = done[before].fields["optim"].get(net, {})
        if averaged.get("ema") and averaged.get("ema_final", True):
            raise ValueError(
                f"{where} is {before!r}, at whose end the net becomes its average, from which its "
                f"optimizer cannot go on; give stages.{before}.optim.{net}.ema_final=False, so "
                "that the average goes on too and is taken at the end of the last stage."
            )
        if done[before].fields["images"] != fields["images"]:
            raise ValueError(
                f"stages.{name}.images is {fields['images']!r} and that of {before!r}, which it "
                f"continues, {done[before].fields['images']!r}; one schedule runs over one set of "
                f"images. Give both the same, or start a new schedule with {where}=''."
            )
        for other in done.values():
            if other.trains and _continues(other.fields, net) == before:
                raise ValueError(
                    f"{where} is {before!r}, which stage {other.name!r} continues already; two "
                    f"stages cannot share one schedule. Continue {other.name!r} instead, or start "
                    "a new schedule with ''."
                )


def _data_start(name: str, fields: Mapping[str, Any], starts: Mapping[str, int]) -> int:
    """The step of the data order at which a stage starts, the same for all nets that continue."""
    positions = {net: starts[net] for net in starts if _continues(fields, net)}
    if len(set(positions.values())) > 1:
        places = ", ".join(f"{net} at step {start}" for net, start in positions.items())
        raise ValueError(
            f"stages.{name} continues schedules that stand at different places ({places}), so the "
            "order of the data has no one position to continue; let all but one of these nets "
            "start a new schedule with continues=''."
        )
    return next(iter(positions.values()), 0)


def _steps(
    name: str,
    fields: Mapping[str, Any],
    done: Mapping[str, Stage],
    epochs: Mapping[str, tuple[float, int]],
    examples: int,
) -> tuple[int, tuple[float, int]]:
    """Length of a train stage, and (epochs, steps) from the start of its chain to its end.

    Rounding is done on the whole chain, so that 15 + 50 + 35 % of a control's epochs take exactly
    the control's steps.
    """
    checks.integer_in(f"stages.{name}.batch_size", fields["batch_size"], 1)
    checks.integer_in(f"stages.{name}.steps", fields["steps"], 0)
    checks.in_range(f"stages.{name}.epochs", fields["epochs"], 0, 1e9)
    before = next((b for net in fields["learn"] if (b := _continues(fields, net))), "")
    past, start = epochs[before] if before else (0.0, 0)
    if fields["steps"]:
        end = start + fields["steps"]
        return fields["steps"], (end * fields["batch_size"] / examples, end)
    end = round((past + fields["epochs"]) * examples / fields["batch_size"])
    steps = end - start
    if steps < 1:
        raise ValueError(
            f"stages.{name} has epochs={fields['epochs']} and steps=0: no step at all; give it "
            "epochs or steps, or take it out of the schedule."
        )
    return steps, (past + fields["epochs"], end)


def _with_horizons(stages: list[Stage]) -> tuple[Stage, ...]:
    out = []
    for stage in stages:
        horizons, continued = {}, []
        for net in stage.starts:
            last = stage
            while later := next(
                (s for s in stages if s.trains and _continues_in(s, net) == last.name), None
            ):
                last = later
            horizons[net] = last.starts[net] + last.steps
            if last is not stage:
                continued.append(net)
        out.append(dataclasses.replace(stage, horizons=horizons, continued=tuple(continued)))
    return tuple(out)


def _continues_in(stage: Stage, net: str) -> str:
    return _continues(stage.fields, net) if net in stage.fields["learn"] else ""


def nets_of(kind: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Nets that take part: those that learn or teach, else `nets` and `reference`."""
    if kind == "train":
        sources = [
            source
            for table in fields["learn"].values()
            for row in table.values()
            for source in as_sources(row.get("source"))
        ]
        return tuple(dict.fromkeys([*fields["learn"], *sources]))
    return tuple(dict.fromkeys([*fields["nets"], *filter(None, [fields.get("reference")])]))


def _check_fields(name: str, fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    where = f"stages.{name}"
    mapping(where, fields, {"kind": "train"})
    if "kind" not in fields:
        raise ValueError(f"{where}.kind is missing; allowed: {', '.join(kinds)}.")
    if fields["kind"] not in kinds:
        raise checks.unknown(f"kind in {where}", fields["kind"], kinds)
    kind = kinds[fields["kind"]]
    known = kind.parameters
    for key in fields:
        if key != "kind" and key not in known:
            raise checks.unknown(f"field of {where}", key, known)
    for key in known:
        if key not in fields and key not in kind.defaults:
            raise ValueError(f"{where}.{key} is missing; a {fields['kind']!r} stage needs it.")
    if fields["kind"] == "train":
        check_tables(where, fields)
