"""Optimizers and schedules: optax transforms over three groups of arrays, numbers as arguments.

The arrays that learn are split by path into three groups: "weights" (kernels, embeddings: with
decay), "plain" (biases, norms' scales: no decay) and "quant" (parameters of quantizers: own
learning rate, no decay); layers that `freeze` names do not learn. Every number (rates, decay,
warm-up, horizon, ...) is a float32 argument of the compiled step; only the names and the number of
milestones are static, so two arms that differ in numbers share one compilation.

Add an optimizer as a function in OPTIMIZERS, a schedule as one in SCHEDULES.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.distillation.terms import in_steps
from qkd_jax.trees import unboxed

Tree = Any
Hyper = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimStructure:
    """The static part of an optimizer: what a compiled step is specialised on."""

    name: str = "sgd"
    schedule: str = "cosine"
    nesterov: bool = True
    milestones: int = 0
    freeze: tuple[str, ...] = ()


def sgd(structure: OptimStructure, hyper: Hyper, decayed: Tree) -> optax.GradientTransformation:
    """SGD with momentum: d = g + decay p; m <- momentum m + d; update = d + momentum m, or m."""
    return optax.chain(
        optax.add_decayed_weights(hyper["weight_decay"], mask=decayed),
        optax.trace(hyper["momentum"], nesterov=structure.nesterov),
    )


def adamw(structure: OptimStructure, hyper: Hyper, decayed: Tree) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101): update = adam(g) + decay p."""
    return optax.chain(
        optax.scale_by_adam(hyper["b1"], hyper["b2"], hyper["eps"]),
        optax.add_decayed_weights(hyper["weight_decay"], mask=decayed),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": sgd, "adamw": adamw}


# Schedules: position and hyper in, a factor of the peak learning rate out.


def _progress(position: jax.Array, hyper: Hyper) -> jax.Array:
    """Fraction of the schedule after warm-up that has passed, in [0, 1]."""
    span = jnp.maximum(hyper["horizon"] - hyper["warmup"], 1.0)
    return jnp.clip((position - hyper["warmup"]) / span, 0.0, 1.0)


def constant(position: jax.Array, hyper: Hyper) -> jax.Array:
    """The peak rate, always."""
    return jnp.ones_like(position)


def cosine(position: jax.Array, hyper: Hyper) -> jax.Array:
    """Half a cosine from 1 to `final` at the horizon: final + (1 - final) (1 + cos(pi t)) / 2."""
    wave = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(position, hyper)))
    return hyper["final"] + (1.0 - hyper["final"]) * wave


def step(position: jax.Array, hyper: Hyper) -> jax.Array:
    """decay_factor ** (number of milestones that have been reached)."""
    reached = jnp.sum((position >= hyper["milestones"]).astype(jnp.float32))
    return hyper["decay_factor"] ** reached


SCHEDULES: dict[str, Callable[[jax.Array, Hyper], jax.Array]] = {
    "constant": constant,
    "cosine": cosine,
    "step": step,
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
    "clip_norm": None,
    "freeze": (),
    "continues": None,
}


# The numbers that an optimizer or a schedule takes beside those that all take.
_USES: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum",),
    "adamw": ("b1", "b2", "eps"),
    "cosine": ("final",),
    "step": ("decay_factor",),
}


def plan_optimizer(
    name: str, fields: Mapping[str, Any], horizon: int
) -> tuple[OptimStructure, dict[str, np.ndarray]]:
    """Checks the fields of `optim.<net>` and splits them into structure and numbers.

    Args:
        name: the net's name, for messages.
        fields: some of OPTIM_FIELDS. `lr` must be there; `quant_lr` defaults to `lr`. `warmup` and
            `milestones` are steps, or below 1 fractions of the horizon. `final` is the cosine's
            last factor. `freeze` lists regular expressions; a layer whose whole path matches one
            keeps its parameters (a BatchNorm still updates its running statistics). Fields that
            the chosen optimizer or schedule does not use are allowed, so that one override on the
            command line can switch it.
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
    given = {**OPTIM_FIELDS, **fields}
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
    for key in ("momentum", "b1", "b2"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, 1.0)
        if given[key] == 1:
            raise ValueError(f"{where}.{key} is 1: an average that forgets nothing; use below 1.")
    for key in ("final", "decay_factor"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, 1.0)
    for key in ("eps", "clip_norm"):
        checks.in_range(f"{where}.{key}", given[key], 0.0, math.inf)
        checks.positive(f"{where}.{key}", given[key])
    checks.in_range(f"{where}.warmup", given["warmup"], 0, horizon)

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
    structure = OptimStructure(
        name=given["name"],
        schedule=given["schedule"],
        nesterov=bool(given["nesterov"]) if given["name"] == "sgd" else False,
        milestones=len(milestones),
        freeze=_patterns(f"{where}.freeze", given["freeze"]),
    )
    return structure, {key: np.asarray(value) for key, value in numbers.items()}


def _patterns(where: str, given: Any) -> tuple[str, ...]:
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
    return tuple(sorted(given))


def schedule_factor(structure: OptimStructure, hyper: Hyper, position: jax.Array) -> jax.Array:
    """Returns the factor of the peak rate at a step (0 is the first), a float32 scalar.

    Warm-up is linear and gives the first step 1 / warmup of the peak, not zero:
    factor = min(1, (position + 1) / warmup) * schedule(position).
    """
    position = jnp.asarray(position, jnp.float32)
    rise = jnp.minimum((position + 1.0) / jnp.maximum(hyper["warmup"], 1.0), 1.0)
    return rise * SCHEDULES[structure.schedule](position, hyper)


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
    structure: OptimStructure, hyper: Hyper, labels: Tree
) -> optax.GradientTransformation:
    decayed = jax.tree.map(lambda label: label == "weights", labels)
    return OPTIMIZERS[structure.name](structure, hyper, decayed)


def init_optimizer(structure: OptimStructure, trainable: Tree) -> dict[str, Any]:
    """Returns an optimizer's initial state: {"position": int32 scalar, "inner": optax state}.

    `position` counts the steps of the schedule; a stage that continues another keeps it.
    """
    # No number of hyper is read by init, so zeros stand in for all of them.
    zeros = dict.fromkeys(("weight_decay", "momentum", "b1", "b2", "eps"), 0.0)
    inner = _transform(structure, zeros, groups(trainable, structure.freeze)).init(trainable)
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
    updates, inner = _transform(structure, hyper, labels).update(grads, state["inner"], trainable)
    factor = schedule_factor(structure, hyper, state["position"])
    rates = {"lr": factor * hyper["lr"], "quant_lr": factor * hyper["quant_lr"]}

    def move(label: str, value: jax.Array, update: jax.Array) -> jax.Array:
        if label == "frozen":
            return value
        rate = rates["quant_lr" if label == "quant" else "lr"]
        return (value - rate * update).astype(value.dtype)

    moved = jax.tree.map(move, labels, trainable, updates)
    new_state = {"position": state["position"] + 1, "inner": inner}
    return moved, new_state, {**rates, "grad_norm": norm}
