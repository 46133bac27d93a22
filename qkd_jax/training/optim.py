"""Optimizers and schedules: optax transforms over three groups of arrays, numbers as arguments.

The arrays that learn are split by path into three groups: "weights" (kernels, embeddings: with
decay), "plain" (biases, norms' scales: no decay) and "quant" (parameters of quantizers: own
learning rate, no decay); layers that `freeze` names do not learn. Every number (rates, decay,
warm-up, horizon, ...) is a float32 argument of the compiled step; only the names and the number of
milestones are static, so two arms that differ in numbers share one compilation.

Add an optimizer as a function in OPTIMIZERS, a schedule as one in `schedules.SCHEDULES`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.distillation.terms import in_steps
from qkd_jax.training import layer_rates, muon
from qkd_jax.training.schedules import DECAY_SHAPES, SCHEDULES
from qkd_jax.trees import unboxed

Tree = Any
Hyper = dict[str, Any]


class Labels(NamedTuple):
    """What an optimizer knows of the arrays: a tree of them, of their groups, of what is decayed.

    An array that is frozen has its group here, so that stages that freeze other layers continue
    one state; it is not decayed.
    """

    tree: Tree
    groups: Tree
    decayed: Tree


@dataclasses.dataclass(frozen=True)
class OptimStructure:
    """The static part of an optimizer: what a compiled step is specialised on."""

    name: str = "sgd"
    schedule: str = "cosine"
    nesterov: bool = True
    milestones: int = 0
    freeze: tuple[str, ...] = ()
    decay_shape: str = ""
    consistent_rms: bool = False
    adam_layers: tuple[str, ...] = ()
    stacked_layers: tuple[str, ...] = ()
    layer_rates: tuple[str, ...] = ()
    layer_stem: tuple[str, ...] = ()
    ema: str = ""  # "", "plain" or "warmup"

    def of_adaptor(self) -> "OptimStructure":
        """Returns that of an adaptor of a loss term: options that name the net's layers are off."""
        off: dict[str, Any] = dict.fromkeys(
            ("freeze", "adam_layers", "stacked_layers", "layer_rates"), ()
        )
        return dataclasses.replace(self, **off, layer_stem=(), ema="")


def sgd(structure: OptimStructure, hyper: Hyper, labels: Labels) -> optax.GradientTransformation:
    """SGD with momentum: d = g + decay p; m <- momentum m + d; update = d + momentum m, or m."""
    return optax.chain(
        optax.add_decayed_weights(hyper["weight_decay"], mask=labels.decayed),
        optax.trace(hyper["momentum"], nesterov=structure.nesterov),
    )


def adamw(structure: OptimStructure, hyper: Hyper, labels: Labels) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101): update = adam(g) + decay p."""
    return optax.chain(
        optax.scale_by_adam(hyper["b1"], hyper["b2"], hyper["eps"]),
        optax.add_decayed_weights(hyper["weight_decay"], mask=labels.decayed),
    )


def lion(structure: OptimStructure, hyper: Hyper, labels: Labels) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv 2302.06675): update = sign(b1 m + (1 - b1) g) + decay p.

    m <- b2 m + (1 - b2) g. Every entry moves by the whole rate, the size of a quantizer's step too:
    rates are 3 to 10 times smaller than AdamW's, the decay as many times larger; b2 is 0.99.
    """
    return optax.chain(
        optax.scale_by_lion(hyper["b1"], hyper["b2"]),
        optax.add_decayed_weights(hyper["weight_decay"], mask=labels.decayed),
    )


def muon_and_adam(
    structure: OptimStructure, hyper: Hyper, labels: Labels
) -> optax.GradientTransformation:
    """Muon for matrices, Adam for the rest (see `muon`): update = either's + decay p.

    With `rms` 0.2 an update has the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that
    one `lr` serves both; with `rms` 0 it is scaled by sqrt(max(1, out / in)), as its authors do.
    """
    kinds = muon.labels_of(labels.tree, labels.groups, structure.adam_layers)
    matrices = muon.transform(
        hyper,
        kinds,
        nesterov=structure.nesterov,
        consistent_rms=structure.consistent_rms,
        stacked=structure.stacked_layers,
    )
    return optax.chain(
        matrices,
        optax.add_decayed_weights(hyper["weight_decay"], mask=labels.decayed),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adamw": adamw,
    "lion": lion,
    "muon": muon_and_adam,
}


# Every field of `optim.<net>` and its default; None: see plan_optimizer.
OPTIM_FIELDS: dict[str, Any] = {
    "name": "sgd",
    "lr": None,
    "quant_lr": None,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "nesterov": True,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "schedule": "cosine",
    "warmup": 0.0,
    "final": 0.0,
    "milestones": (),
    "decay_factor": 0.1,
    "decay": 0.2,
    "decay_shape": "1-sqrt",
    "clip_norm": None,
    "freeze": (),
    "rms": 0.2,
    "adam_layers": ("head",),
    "stacked_layers": (),
    "layer_decay": 1.0,
    "layer_stem": layer_rates.STEM,
    "layer_rates": (),
    "ema": 0.0,
    "ema_warmup": False,
    "ema_final": True,
    "continues": None,
}


# The numbers that an optimizer or a schedule takes beside those that all take.
_USES: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum",),
    "adamw": ("b1", "b2", "eps"),
    "lion": ("b1", "b2"),
    "muon": ("momentum", "b1", "b2", "eps", "rms"),
    "cosine": ("final",),
    "step": ("decay_factor",),
    "wsd": ("final",),
}


def plan_optimizer(
    name: str, fields: Mapping[str, Any], horizon: int
) -> tuple[OptimStructure, dict[str, np.ndarray]]:
    """Checks the fields of `optim.<net>` and splits them into structure and numbers.

    Args:
        name: the net's name, for messages.
        fields: some of OPTIM_FIELDS. `lr` must be there; `quant_lr` defaults to `lr`. `warmup` and
            `milestones` are steps, or below 1 fractions of the horizon, as `decay` is, the last
            part of schedule "wsd"; `final` is its last factor and the cosine's. `freeze` lists
            regular expressions; a layer whose whole path matches one keeps its parameters (a
            BatchNorm still updates its running statistics). `adam_layers` are those that "muon"
            leaves to Adam, `stacked_layers` those whose arrays hold one matrix a layer (`nn.scan`)
            along their first axis. `layer_decay`, `layer_stem` and `layer_rates`: see that module.
            `ema` above 0 averages the net's variables with that decay (see that module), and with
            `ema_final` the net ends the stage as its average. Fields that the chosen optimizer or
            schedule does not use are allowed, so that one override on the command line can switch
            it.
        horizon: length of the schedule in steps; the joint length where stages continue one.

    Returns:
        (structure, numbers): a hashable description and a flat dict of float32 arrays.

    Raises:
        ValueError: Unknown field or name, a missing `lr`, a number out of range.
    """
    where = f"optim.{name}"
    for key in fields:
        if key not in OPTIM_FIELDS:
            raise checks.unknown(f"field of {where}", key, OPTIM_FIELDS)
    given: Hyper = {**OPTIM_FIELDS, **fields}
    checks.one_of(f"{where}.name", given["name"], OPTIMIZERS)
    checks.one_of(f"{where}.schedule", given["schedule"], SCHEDULES)
    checks.integer_in(f"horizon of {name}", horizon, 1)
    if given["lr"] is None:
        raise ValueError(f"{where}.lr is missing; give the peak learning rate, such as lr=0.05.")
    for key, default in (("quant_lr", given["lr"]), ("clip_norm", math.inf)):
        given[key] = default if given[key] is None else given[key]
    for key in ("lr", "quant_lr", "weight_decay"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, 1e6)
    checks.positive(f"{where}.lr", given["lr"])
    for key in ("momentum", "b1", "b2", "ema"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, 1.0)
        if given[key] == 1:
            raise ValueError(f"{where}.{key} is 1: an average that forgets nothing; use below 1.")
    for key in ("final", "decay_factor"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, 1.0)
    for key in ("eps", "clip_norm"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, math.inf)
        checks.positive(f"{where}.{key}", given[key])
    checks.in_range(f"{where}.warmup", given["warmup"], 0, horizon)
    checks.number(f"{where}.rms", given["rms"], low=0)
    checks.number(f"{where}.layer_decay", given["layer_decay"], low=0, low_allowed=False, high=1)
    patterns, rates = layer_rates.parse_rates(f"{where}.layer_rates", given["layer_rates"])
    by_depth = given["layer_decay"] != 1

    used = ("lr", "quant_lr", "weight_decay", "clip_norm")
    used += _USES.get(given["name"], ()) + _USES.get(given["schedule"], ())
    numbers: dict[str, Any] = {key: np.float32(given[key]) for key in used}
    numbers["horizon"] = np.float32(horizon)
    numbers["warmup"] = np.float32(in_steps(given["warmup"], horizon))
    milestones = tuple(given["milestones"]) if given["schedule"] == "step" else ()
    if given["schedule"] == "step":
        if not milestones:
            raise ValueError(
                f"{where}.milestones is empty; schedule 'step' needs some, such as "
                "milestones=(0.5, 0.75), fractions of the horizon."
            )
        for index, value in enumerate(milestones):
            checks.in_range(f"{where}.milestones[{index}]", value, 0, horizon)
        numbers["milestones"] = np.asarray([in_steps(m, horizon) for m in milestones], np.float32)
    if given["schedule"] == "wsd":
        numbers["decay"] = np.float32(_decay_steps(where, given, horizon))
    if by_depth:
        numbers["layer_decay"] = np.float32(given["layer_decay"])
    if patterns:
        numbers["layer_rates"] = np.asarray(rates, np.float32)
    if given["ema"]:
        numbers["ema"] = np.float32(given["ema"])
    is_muon = given["name"] == "muon"
    stacked = _patterns(f"{where}.stacked_layers", given["stacked_layers"])
    stem = _patterns(f"{where}.layer_stem", given["layer_stem"])
    if by_depth and not stem:
        raise ValueError(
            f"{where}.layer_stem is empty; layer_decay needs what comes before the first block, "
            f"such as layer_stem={layer_rates.STEM!r}."
        )
    structure = OptimStructure(
        name=given["name"],
        schedule=given["schedule"],
        nesterov=bool(given["nesterov"]) and given["name"] in ("sgd", "muon"),
        milestones=len(milestones),
        freeze=_patterns(f"{where}.freeze", given["freeze"]),
        decay_shape=given["decay_shape"] if given["schedule"] == "wsd" else "",
        consistent_rms=is_muon and given["rms"] > 0,
        adam_layers=_patterns(f"{where}.adam_layers", given["adam_layers"]) if is_muon else (),
        stacked_layers=stacked if is_muon else (),
        # The first pattern that matches decides, so their order stays.
        layer_rates=_patterns(f"{where}.layer_rates", patterns, ordered=True),
        layer_stem=stem if by_depth else (),
        ema=("warmup" if given["ema_warmup"] else "plain") if given["ema"] else "",
    )
    return structure, {key: np.asarray(value) for key, value in numbers.items()}


def _decay_steps(where: str, given: Hyper, horizon: int) -> float:
    """Returns the length of the decay of schedule "wsd"; what is between it and warm-up is flat."""
    checks.one_of(f"{where}.decay_shape", given["decay_shape"], DECAY_SHAPES)
    checks.in_range(f"{where}.decay", given["decay"], 0, horizon)
    decay, warmup = (in_steps(given[key], horizon) for key in ("decay", "warmup"))
    if decay + warmup > horizon:
        raise ValueError(
            f"{where}.decay is {given['decay']:g} and warmup {given['warmup']:g}, together "
            f"{decay + warmup:g} steps of a schedule of {horizon}; shorten one of them."
        )
    return decay


def _patterns(where: str, given: Any, *, ordered: bool = False) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(
            f"{where} is {given!r}; give a tuple of regular expressions, such as ('stem', "
            "'stage1_.*')."
        )
    for pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where} {pattern!r} is no regular expression: {error}.") from None
    return tuple(given) if ordered else tuple(sorted(given))


def schedule_factor(structure: OptimStructure, hyper: Hyper, position: jax.Array) -> jax.Array:
    """Returns the factor of the peak rate at a step (0 is the first), a float32 scalar.

    Warm-up is linear and gives the first step 1 / warmup of the peak, not zero:
    factor = min(1, (position + 1) / warmup) * schedule(position).
    """
    position = jnp.asarray(position, jnp.float32)
    rise = jnp.minimum((position + 1.0) / jnp.maximum(hyper["warmup"], 1.0), 1.0)
    options = {"shape": structure.decay_shape} if structure.decay_shape else {}
    return rise * SCHEDULES[structure.schedule](position, hyper, **options)


def group_of(path: tuple[str, ...], ndim: int) -> str:
    """Returns the group of one array by its path, whose first part is its collection.

    An attention bias has two axes, so the last name decides first and the rank only for names that
    linen does not use.
    """
    if path[0] == "quant":
        return "quant"
    if path[-1] in ("kernel", "embedding"):
        return "weights"
    if path[-1] in ("bias", "scale"):
        return "plain"
    return "weights" if ndim >= 2 else "plain"


def groups(trainable: Tree, freeze: tuple[str, ...] = ()) -> Tree:
    """Returns group names in the structure of `trainable` ({"params": ..., "quant": ...})."""

    def name(path: tuple[Any, ...], leaf: Any) -> str:
        parts = tuple(str(getattr(p, "key", p)) for p in path)
        if freeze and frozen_by(freeze, parts):
            return "frozen"
        return group_of(parts, jnp.ndim(leaf))

    named = jax.tree_util.tree_map_with_path(name, unboxed(trainable))
    return jax.tree.unflatten(jax.tree.structure(trainable), jax.tree.leaves(named))


def frozen_by(freeze: tuple[str, ...], path: tuple[str, ...]) -> list[str]:
    """Returns the patterns that match the layer of an array (or of a quantizer), or a parent."""
    layers = ["/".join(path[1:end]) for end in range(2, len(path))]
    return [p for p in freeze if any(re.fullmatch(p, layer) for layer in layers)]


def _transform(
    structure: OptimStructure, hyper: Hyper, trainable: Tree, labels: Tree
) -> optax.GradientTransformation:
    decayed = jax.tree.map(lambda label: label == "weights", labels)
    of_arrays = Labels(trainable, groups(trainable), decayed)
    return OPTIMIZERS[structure.name](structure, hyper, of_arrays)


def init_optimizer(structure: OptimStructure, trainable: Tree) -> dict[str, Any]:
    """Returns an optimizer's initial state: {"position": int32 scalar, "inner": optax state}.

    `position` counts the steps of the schedule; a stage that continues another keeps it.
    """
    # No number of hyper is read by init, so zeros stand in for all of them.
    zeros = dict.fromkeys(("weight_decay", "momentum", "b1", "b2", "eps", "rms"), 0.0)
    labels = groups(trainable, structure.freeze)
    inner = _transform(structure, zeros, trainable, labels).init(trainable)
    return {"position": jnp.zeros((), jnp.int32), "inner": inner}


def update_optimizer(
    structure: OptimStructure,
    hyper: Hyper,
    grads: Tree,
    state: dict[str, Any],
    trainable: Tree,
) -> tuple[Tree, dict[str, Any], dict[str, jax.Array]]:
    """Updates one net.

    Args:
        structure: static description.
        hyper: numbers, as from `plan_optimizer`.
        grads: gradients, a tree like `trainable`.
        state: as from `init_optimizer`.
        trainable: {"params": ..., "quant": ...}.

    Returns:
        (new trainable, new state, {"lr", "quant_lr", "grad_norm"}); the norm is the one before
        clipping, over all of the net's groups.
    """
    labels = groups(trainable, structure.freeze)
    if structure.freeze:
        grads = jax.tree.map(lambda label, g: g * (label != "frozen"), labels, grads)
    norm = optax.tree.norm(grads)
    # clip_norm is inf where clipping is off: then the factor is exactly 1.
    shrink = jnp.minimum(hyper["clip_norm"] / jnp.maximum(norm, 1e-30), 1.0)
    grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
    transform = _transform(structure, hyper, trainable, labels)
    updates, inner = transform.update(grads, state["inner"], trainable)
    factor = schedule_factor(structure, hyper, state["position"])
    rates = {"lr": factor * hyper["lr"], "quant_lr": factor * hyper["quant_lr"]}

    def move(label: str, value: jax.Array, update: jax.Array, *factor: jax.Array) -> jax.Array:
        if label == "frozen":
            return value
        rate = rates["quant_lr" if label == "quant" else "lr"]
        for of_layer in factor:
            rate = rate * of_layer
        return (value - rate * update).astype(value.dtype)

    trees = [labels, trainable, updates]
    if structure.layer_rates or structure.layer_stem:
        by = {"patterns": structure.layer_rates, "stem": structure.layer_stem}
        trees.append(layer_rates.factors(trainable, hyper, **by))
    moved = jax.tree.map(move, *trees)
    new_state = {"position": state["position"] + 1, "inner": inner}
    return moved, new_state, {**rates, "grad_norm": norm}


def group_norms(structure: OptimStructure, grads: Tree, trainable: Tree) -> dict[str, jax.Array]:
    """Returns {"grad_norm_weights", "grad_norm_plain", "grad_norm_quant"}, those that there are."""
    parts: dict[str, list[jax.Array]] = {}
    labels = jax.tree.leaves(groups(trainable, structure.freeze))
    for label, gradient in zip(labels, jax.tree.leaves(grads), strict=True):
        if label != "frozen":
            parts.setdefault(label, []).append(gradient)
    return {f"grad_norm_{label}": optax.tree.norm(leaves) for label, leaves in parts.items()}


def describe_options(structure: OptimStructure, numbers: Mapping[str, Any]) -> str:
    """Returns what an optimizer does beside SGD or AdamW at one rate, as text; "" for nothing.

    Such as "muon, wsd, layer_decay=0.75, ema=0.999 (warm-up)".
    """
    parts = [structure.name] if structure.name in ("muon", "lion") else []
    if structure.schedule == "wsd":
        parts.append(f"wsd with {structure.decay_shape} over {float(numbers['decay']):g} steps")
    if structure.layer_stem:
        parts.append(f"layer_decay={float(numbers['layer_decay']):g}")
    if structure.layer_rates:
        pairs = zip(structure.layer_rates, numbers["layer_rates"].tolist(), strict=True)
        parts.append("rates " + ", ".join(f"{pattern} x{factor:g}" for pattern, factor in pairs))
    if structure.ema:
        warmup = " (warm-up)" if structure.ema == "warmup" else ""
        parts.append(f"ema={float(numbers['ema']):g}{warmup}")
    return ", ".join(parts)
