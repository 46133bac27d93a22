"""Settings: a config with every name checked, its nets built, every length in steps.

A config is a `ConfigDict` or a plain dict. `resolve` turns it into a plain dict that JSON holds
(that is `config.json`); `build_settings` checks it, builds its nets and lays out its schedule.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import checks, weights
from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.distillation.taps import DataShape, features_of
from qkd_jax.experiment.config_checks import (
    check_augment,
    check_frame,
    check_micro_batches,
    check_origins,
    check_rules_of_mesh,
    check_tree,
    mapping,
    tree_of,
)
from qkd_jax.experiment.schedule import Kind, Stage, lay_out
from qkd_jax.models import MODELS, BorrowedClassifier, create
from qkd_jax.quantize import QuantizedModel, Rule, presets, quantize, targets
from qkd_jax.record.folder import config_fields
from qkd_jax.training.optim import plan_optimizer
from qkd_jax.training.rematerialisation import has_blocks
from qkd_jax.training.state import check_patterns, split

# Everything a config may say outside of `nets`, `stages` and `schedule`, with its default.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "target": "",
    "data": {
        "name": "digits",
        "dir": "",
        "train_examples": 0,
        "augment": (),
        "tree": "",
        "image_size": 0,
        "decoder": "pillow",
        "workers": 0,
    },
    "eval_batch_size": 500,
    "log": {
        "every_steps": 10,
        "eval_every_steps": 0,
        "quant_every_steps": 0,
        "codes_every_steps": 0,
        "live": (),
    },
    "track": {"trackers": (), "project": "qkd_jax"},
    "checkpoint": {"every_seconds": 30.0, "every_steps": 0},
    "parallel": {"mode": "jit", "devices": 0, "model": 1, "rules": ()},
}
STRUCTURE = ("nets", "stages", "schedule")
# Beyond it a float64 skips integers; nothing that a config counts comes near.
LARGEST = 2**53
NET_FIELDS = ("model", "rules", "init_from", "head_from", "reduce_range", "fresh")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A checked config: the plain dict, the quantized models, the stages in order.

    `image` is the (height, width, channels) of an image of the data set.
    """

    config: dict[str, Any]
    nets: dict[str, QuantizedModel]
    stages: tuple[Stage, ...]
    image: tuple[int, ...]

    def __getitem__(self, key: str) -> Any:
        return self.config[key]

    @property
    def tree(self) -> str:
        """The class tree, as `hierarchy.find` takes it; "" where there is none."""
        return tree_of(self.config["data"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(1, height, width, channels): one image of the data set as a batch of one."""
        return (1, *self.image)

    @property
    def total_steps(self) -> int:
        """Global steps of the whole schedule."""
        return sum(stage.steps for stage in self.stages)

    def student_steps(self, net: str, step: int | None = None) -> int:
        """Steps that a net has learned since it was last calibrated (or made) up to a global step.

        A fair comparison of methods holds it equal; None counts the whole schedule. Calibrating its
        inputs later than its weights does not reset the count.
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
        """Texts about equal nets that learn for unequal steps, and options that do nothing."""
        equals: dict[QuantizedModel, dict[str, int]] = {}
        for name, net in self.nets.items():
            if steps := self.student_steps(name):
                equals.setdefault(net, {})[name] = steps
        unequal = [
            "WARNING: these nets have the same model and rules but learn for different numbers of "
            f"steps, so their rows do not compare methods alone: "
            f"{', '.join(f'{name} {steps:,}' for name, steps in lengths.items())}"
            for lengths in equals.values()
            if len(set(lengths.values())) > 1
        ]
        return unequal + self._without_blocks() + self._unmatched()

    def _without_blocks(self) -> list[str]:
        """A text for each train stage whose `remat` finds nothing in a net to run again."""
        images = jax.ShapeDtypeStruct(self.image_shape, np.float32)
        found = []
        for stage in self.stages:
            if stage.trains and stage.fields["remat"] != "none":
                for name in stage.fields["learn"]:
                    if not has_blocks(self.nets[name], images):
                        found.append(
                            f"WARNING: stages.{stage.name}.remat is {stage.fields['remat']!r}, but "
                            f"net {name!r} has no blocks (modules of its model's own), so that all "
                            "is kept for its backward pass. accumulate saves memory there too."
                        )
        return found

    def _unmatched(self) -> list[str]:
        """A text for each optimizer with a pattern that fits no layer, before hours have passed."""
        found = []
        for stage in self.stages:
            for net, fields in stage.fields["optim"].items() if stage.trains else ():
                # Not set is written otherwise in a config, and says nothing of layers.
                named = {k: v for k, v in fields.items() if k not in ("quant_lr", "clip_norm")}
                structure, _ = plan_optimizer(net, named, stage.horizons[net])
                learned, _ = split(shapes(self.nets[net], self.image_shape))
                try:
                    check_patterns(net, structure, learned)
                except ValueError as error:
                    found.append(
                        f"WARNING: stages.{stage.name} will end the run, unless calibration adds "
                        f"quantizers that fit: {error}"
                    )
        return found


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
        fields = config_fields(plain)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the config holds something that is not plain data ({error}); use numbers, text, "
            "booleans, tuples and dicts."
        ) from None
    except RecursionError:
        raise ValueError("the config is nested too deep to be read.") from None
    for field, value in fields.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"config.{field} is {value}; numbers must lie within +-{LARGEST:,}.")
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


def build_settings(
    plain: dict[str, Any], kinds: Mapping[str, Kind], *, data: DataShape, classes: int
) -> Settings:
    """Checks a config and lays out its schedule.

    Args:
        plain: of `resolve`.
        kinds: `STAGES`.
        data: shapes of the data; the number of training examples turns epochs into steps.
        classes: number of classes of the data set.

    Returns:
        The settings.

    Raises:
        ValueError: naming the field, what is allowed, and the nearest valid name.
    """
    check_frame(plain)
    check_tree(plain["data"], classes)
    nets = {
        name: build_net(name, fields, plain["nets"], data, classes, plain["target"])
        for name, fields in plain["nets"].items()
    }
    check_origins(plain["nets"])
    if plain["parallel"]["rules"]:
        of_nets = {name: shapes(net, (1, *data.image)) for name, net in nets.items()}
        check_rules_of_mesh(plain["parallel"], of_nets)
    stages = lay_out(plain, kinds, data)
    for stage in stages:
        if stage.trains:
            check_augment(stage.name, stage.fields, plain["data"]["augment"])
            check_micro_batches(stage.name, stage.fields, plain["parallel"])
        for net in stage.nets:
            if net not in nets:
                raise checks.unknown(f"net in stages.{stage.name}", net, nets)
    # A ConfigDict sorts its keys; people want the nets in the order in which they take part.
    order = dict.fromkeys([*(net for stage in stages for net in stage.nets), *nets])
    return Settings(plain, {net: nets[net] for net in order}, stages, data.image)


@functools.lru_cache(maxsize=64)
def shapes(net: QuantizedModel, image_shape: tuple[int, ...]) -> Any:
    """Shapes of a net's float variables for images [1, height, width, channels].

    Raises:
        ValueError: a rule matches no layer.
    """
    images = jax.ShapeDtypeStruct(image_shape, np.float32)
    return jax.eval_shape(net.init, jax.random.key(0), images)


@functools.lru_cache(maxsize=64)
def _fitted(
    preset: str, reduce_range: bool, net: QuantizedModel, image_shape: tuple[int, ...]
) -> tuple[Rule, ...]:
    """The rules of a preset for a net's model; the model is traced once, not for every config."""
    return presets.rules(
        preset,
        reduce_range=reduce_range,
        model=net.model,
        images=jax.ShapeDtypeStruct(image_shape, np.float32),
        **mode_arguments(net, train=False),
    )


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
            sown = features_of(
                build_net(lender, nets[lender], nets, data, classes), data.image
            ).sown
            model = BorrowedClassifier(
                model, classes, features=sown["pooled"].shape[-1], dtype=model.dtype
            )
        rules = fields.get("rules", "float")
        reduce_range = bool(fields.get("reduce_range", False))
        if isinstance(rules, str):
            rules = _fitted(rules, reduce_range, quantize(model), (1, *data.image))
        else:
            rules = presets.rules(rules, reduce_range=reduce_range)
        if target:
            rules = targets.fit(rules, target)
            targets.check(rules, target)
        return quantize(model, rules)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
