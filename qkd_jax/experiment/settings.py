"""Reading a config: every name checked against what exists, every length in steps.

A config is a `ConfigDict` or a plain dict. `resolve` turns it into a plain dict that JSON holds
(that is `config.json`), `read` checks it and lays out the schedule as `Stage`s. The fields of a
stage are the keyword arguments of its function in `STAGES`, so a new kind of stage checks itself.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import checks, presets, weights
from qkd_jax.deploy import targets
from qkd_jax.experiment.values import (
    check_augment,
    check_frame,
    check_images,
    check_origins,
    check_tables,
    mapping,
    tree_of,
    with_tree,
)
from qkd_jax.models import MODELS, BorrowedClassifier, create
from qkd_jax.quantize import QuantizedModel, quantize
from qkd_jax.training.rows import as_sources
from qkd_jax.training.taps import DataShape, features_of

__all__ = ["Settings", "Stage", "build_net", "read", "resolve", "shapes"]

# Everything a config may say outside of `nets`, `stages` and `schedule`, with its default.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "target": "",
    "data": {"name": "digits", "dir": "", "train_examples": 0, "augment": (), "tree": ""},
    "eval_batch_size": 500,
    "log": {"every_steps": 10, "eval_every_steps": 0, "quant_every_steps": 0},
    "checkpoint": {"every_seconds": 30.0, "every_steps": 0},
    "parallel": {"mode": "jit", "devices": 0},
}
STRUCTURE = ("nets", "stages", "schedule")
MAKE_IMAGES = ("synthesize", "dafl", "cmi")  # kinds of stages, with `examples`
NET_FIELDS = ("model", "rules", "init_from", "head_from", "reduce_range", "fresh")


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
        keeps: nets whose optimizer a later stage continues.
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
    keeps: tuple[str, ...] = ()
    data_start: int = 0
    data: DataShape | None = None

    @property
    def trains(self) -> bool:
        """Whether it is a `train` stage."""
        return self.kind == "train"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked config: the plain dict, the quantized models, the stages in order."""

    config: dict[str, Any]
    nets: dict[str, QuantizedModel]
    stages: tuple[Stage, ...]

    def __getitem__(self, key: str) -> Any:
        return self.config[key]

    @property
    def tree(self) -> str:
        """The class tree, as `hierarchy.find` takes it; "" where there is none."""
        return tree_of(self.config["data"])

    @property
    def total_steps(self) -> int:
        """Global steps of the whole schedule."""
        return sum(stage.steps for stage in self.stages)

    def student_steps(self, net: str, step: int | None = None) -> int:
        """Steps that a net has learned since it was last calibrated (or made) up to a global step.

        What a fair comparison of methods holds equal; None counts the whole schedule. Calibrating
        its inputs later than its weights does not start the count anew.
        """
        count, end = 0, self.total_steps if step is None else step
        for stage in self.stages:
            if stage.first >= end:
                break
            if stage.kind == "calibrate" and net in stage.nets:
                operands = stage.fields.get("operands") or ("weight",)
                count = 0 if "weight" in operands else count
            elif net in stage.starts:
                count += min(stage.steps, end - stage.first)
        return count

    def warnings(self) -> list[str]:
        """What a reader of the results must know: equal nets that learn for unequal steps."""
        equals: dict[QuantizedModel, dict[str, int]] = {}
        for name, net in self.nets.items():
            if steps := self.student_steps(name):
                equals.setdefault(net, {})[name] = steps
        return [
            "WARNING: these nets have the same model and rules but learn for different numbers of "
            f"steps, so their rows do not compare methods alone: "
            f"{', '.join(f'{name} {steps:,}' for name, steps in found.items())}"
            for found in equals.values()
            if len(set(found.values())) > 1
        ]


def resolve(config: Any) -> dict[str, Any]:
    """Returns a config as a plain dict with defaults filled in; equal configs give equal dicts.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config is {type(config).__name__}; it must be a ConfigDict or a dict, such as "
            "get_config() returns."
        )
    try:
        plain = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the config holds something that is not plain data ({error}); use numbers, text, "
            "booleans, tuples and dicts."
        ) from None
    for key in plain:
        if key not in DEFAULTS and key not in STRUCTURE:
            raise checks.unknown("field config", key, [*DEFAULTS, *STRUCTURE])
    for key in STRUCTURE:
        if key not in plain:
            raise ValueError(f"config.{key} is missing; see configs/qkd.py for its form.")
    for key, default in DEFAULTS.items():
        plain[key] = _filled(f"config.{key}", plain.get(key), default)
    return plain


def _filled(where: str, given: Any, default: Any) -> Any:
    if not isinstance(default, Mapping):
        return default if given is None else given
    given = mapping(where, {} if given is None else given, default)
    for key in given:
        if key not in default:
            raise checks.unknown(f"field {where}", key, default)
    return {**json.loads(json.dumps(default)), **given}


def read(
    config: Any, kinds: Mapping[str, Callable[..., Any]], *, data: DataShape, classes: int
) -> Settings:
    """Checks a config and lays out its schedule.

    Args:
        config: a `ConfigDict` or dict.
        kinds: STAGES.
        data: shapes of the data; the number of training examples turns epochs into steps.
        classes: number of classes of the data set.

    Returns:
        The settings.

    Raises:
        ValueError: naming the field, what is allowed, and the nearest valid name.
    """
    plain = resolve(config)
    check_frame(plain)
    nets = {
        name: build_net(name, fields, plain["nets"], data, classes, plain["target"])
        for name, fields in plain["nets"].items()
    }
    check_origins(plain["nets"])
    stages = _schedule(plain, kinds, data)
    for stage in stages:
        if stage.trains:
            check_augment(stage.name, stage.fields, plain["data"]["augment"])
        for net in stage.nets:
            if net not in nets:
                raise checks.unknown(f"net in stages.{stage.name}", net, nets)
    # A ConfigDict sorts its keys; people want the nets in the order in which they take part.
    order = dict.fromkeys([*(net for stage in stages for net in stage.nets), *nets])
    return Settings(plain, {net: nets[net] for net in order}, stages)


@functools.lru_cache(maxsize=64)
def shapes(net: QuantizedModel, image_shape: tuple[int, ...]) -> Any:
    """Shapes of a net's float variables for images [1, height, width, channels].

    Raises:
        ValueError: a rule matches no layer.
    """
    images = jax.ShapeDtypeStruct(image_shape, np.float32)
    return jax.eval_shape(net.init, jax.random.key(0), images)


def build_net(
    name: str,
    fields: Mapping[str, Any],
    nets: Mapping[str, Any],
    data: DataShape,
    classes: int,
    target: str = "",
) -> QuantizedModel:
    """Builds the quantized model of one entry of `nets`.

    Fields other than NET_FIELDS go to the model; a 0 leaves the model's own default. With
    `head_from` the model ends in a projector and the classifier of that net
    (`models.BorrowedClassifier`). With a `target`, 8-bit weights get the range that it needs.

    Raises:
        ValueError: an unknown model, argument of the model, preset or net to start from; rules that
            the target cannot run.
    """
    where = f"nets.{name}"
    mapping(where, fields, {"model": "resnet8", "rules": "w4a4"})
    checks.integer_in(f"{where}.width", fields.get("width", 0), 0)
    if "model" not in fields:
        raise ValueError(f"{where}.model is missing; allowed: {', '.join(sorted(MODELS))}.")
    arguments = {k: v for k, v in fields.items() if k not in NET_FIELDS and v != 0}
    source = fields.get("init_from", "")
    if source and not weights.is_source(source) and source not in nets:
        raise checks.unknown(f"net in {where}.init_from", source, nets)
    if fields.get("fresh") and not source:
        raise ValueError(
            f"{where}.fresh is {fields['fresh']!r}, but init_from is '', so every layer is fresh; "
            "name a net or a file to start from, or drop it."
        )
    try:
        model = create(fields["model"], classes, **arguments)
        if lender := fields.get("head_from", ""):
            if lender not in nets or nets[lender].get("head_from"):
                own = [n for n, other in nets.items() if not other.get("head_from")]
                raise checks.unknown("net with a head of its own in head_from", lender, own)
            taught = features_of(build_net(lender, nets[lender], nets, data, classes), data.image)
            model = BorrowedClassifier(
                model, classes, features=taught.sown["pooled"].shape[-1], dtype=model.dtype
            )
        rules = presets.rules(
            fields.get("rules", "float"),
            reduce_range=bool(fields.get("reduce_range", False)),
            model=model,
            images=jax.ShapeDtypeStruct((1, *data.image), np.float32),
        )
        if target:
            rules = targets.fit(rules, target)
            targets.check(rules, target)
        return quantize(model, rules)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _schedule(
    plain: Mapping[str, Any], kinds: Mapping[str, Callable[..., Any]], data: DataShape
) -> tuple[Stage, ...]:
    schedule, table = plain["schedule"], plain["stages"]
    if isinstance(schedule, str) or any("," in str(name) for name in schedule):
        given = schedule if isinstance(schedule, str) else ",".join(schedule)
        names = ", ".join(repr(n.strip()) for n in given.split(","))
        raise ValueError(
            f"config.schedule is one string, {given!r}; a tuple on the command line is written "
            f'--config.schedule="({names},)".'
        )
    checks.at_least_one("config.schedule", schedule)
    for place, name in enumerate(schedule):
        if name not in table:
            raise checks.unknown("stage in config.schedule", name, table)
        if name in schedule[:place]:
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
        fields = {**_stage_fields(kinds[kind])[1], **fields}
        done = {s.name: s for s in stages}
        steps, starts, data_start = 1, {}, 0
        made = {s.name: s.fields["examples"] for s in stages if s.kind in MAKE_IMAGES}
        source = check_images(name, fields.get("images") or "", made, schedule)
        shape = dataclasses.replace(data, examples=made[source]) if source else data
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
        if done[before].fields["images"] != fields["images"]:
            raise ValueError(
                f"stages.{name}.images is {fields['images']!r} and that of {before!r}, which it "
                f"continues, {done[before].fields['images']!r}; one schedule runs over one set of "
                f"images. Give both the same, or start anew with {where}=''."
            )
        for other in done.values():
            if other.trains and _continues(other.fields, net) == before:
                raise ValueError(
                    f"{where} is {before!r}, which stage {other.name!r} continues already; two "
                    f"stages cannot share one schedule. Continue {other.name!r} instead, or start "
                    "anew with ''."
                )


def _data_start(name: str, fields: Mapping[str, Any], starts: Mapping[str, int]) -> int:
    """Where a stage goes on in the order of the data: one place for all nets that continue."""
    going_on = {net: starts[net] for net in starts if _continues(fields, net)}
    if len(set(going_on.values())) > 1:
        places = ", ".join(f"{net} at step {start}" for net, start in going_on.items())
        raise ValueError(
            f"stages.{name} continues schedules that stand at different places ({places}), so the "
            "order of the data has no one place to go on from; let all but one of these nets start "
            "anew with continues=''."
        )
    return next(iter(going_on.values()), 0)


def _steps(
    name: str,
    fields: Mapping[str, Any],
    done: Mapping[str, Stage],
    epochs: Mapping[str, tuple[float, int]],
    examples: int,
) -> tuple[int, tuple[float, int]]:
    """Length of a train stage, and (epochs, steps) to its end since its chain began.

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
        horizons, keeps = {}, []
        for net in stage.starts:
            last = stage
            while later := next(
                (s for s in stages if s.trains and _continues_in(s, net) == last.name), None
            ):
                last = later
            horizons[net] = last.starts[net] + last.steps
            if last is not stage:
                keeps.append(net)
        out.append(dataclasses.replace(stage, horizons=horizons, keeps=tuple(keeps)))
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


def _stage_fields(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """(all fields, defaults) of a kind of stage: the keyword arguments of its function."""
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return [p.name for p in parameters], defaults


def _check_fields(
    name: str, fields: Mapping[str, Any], kinds: Mapping[str, Callable[..., Any]]
) -> None:
    where = f"stages.{name}"
    mapping(where, fields, {"kind": "train"})
    if "kind" not in fields:
        raise ValueError(f"{where}.kind is missing; allowed: {', '.join(kinds)}.")
    if fields["kind"] not in kinds:
        raise checks.unknown(f"kind in {where}", fields["kind"], kinds)
    known, defaults = _stage_fields(kinds[fields["kind"]])
    for key in fields:
        if key != "kind" and key not in known:
            raise checks.unknown(f"field of {where}", key, known)
    for key in known:
        if key not in fields and key not in defaults:
            raise ValueError(f"{where}.{key} is missing; a {fields['kind']!r} stage needs it.")
    if fields["kind"] == "train":
        check_tables(where, fields)
