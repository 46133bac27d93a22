"""Options of a train stage, for each net, that keep low-bit training stable.

    stages.qat.hygiene.net = dict(freeze=0.04, freeze_end=0.01)

- **Oscillation** (`oscillation`, arXiv 2203.11086): `track` measures how often weights jump between
  two codes; `freeze` pins a weight whose frequency passes a threshold, which goes from `freeze` to
  `freeze_end` along a cosine; `dampen` adds a penalty for weights off the grid, whose strength goes
  from `dampen_start` to `dampen` along a cosine.
- **Clamping** (`clamping`): `max_ratio` keeps what a quantizer learns of its grid's size within a
  factor of its value at the start of the stage. What is not learned (uniform's `scale`) is not
  clamped, and a net that has nothing else is refused.
- **Annealing**: `anneal` takes the parameter that a quantizer names in its `ANNEALED`, such as the
  sigmoid's `temperature`, to a value at the stage's end, by equal ratios.
- **Size budget** for learned bits (`bit_budget`): `size_weight * max(size / size_bytes - 1, 0)` is
  added to the loss.

The state of all this lies beside the optimizer's, so that an interrupted run resumes bit-exactly.
A later stage starts with a new state even if it continues the optimizer: weights that were pinned
are free until they are caught again.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import Spec
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.stored_weights import quantized_weights
from qkd_jax.quantize.variables import parameter_owner
from qkd_jax.quantizers import QUANTIZERS, facts, learns_bits
from qkd_jax.training import bit_budget, clamping, oscillation
from qkd_jax.trees import flatten

Tree = dict[str, Any]

HYGIENE_FIELDS: dict[str, Any] = {
    "track": False,
    "momentum": 0.01,
    "freeze": 0.0,
    "freeze_end": 0.0,
    "dampen": 0.0,
    "dampen_start": 0.0,
    "max_ratio": 0.0,
    "anneal": (),
    "size_bytes": 0.0,
    "size_weight": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Hygiene:
    """The active measures: the static part, on which a step is compiled."""

    track: bool = False
    freeze: bool = False
    dampen: bool = False
    clamp: bool = False
    anneal: tuple[str, ...] = ()
    budget: bool = False

    def anneals(self, spec: Spec, name: str) -> bool:
        """Whether a parameter of this quantizer is annealed."""
        return name in self.anneal and facts(spec.quantizer).annealed == name


def plan_hygiene(
    name: str, fields: Mapping[str, Any], horizon: int
) -> tuple[Hygiene | None, dict[str, Any]]:
    """Splits a net's options into what is compiled and numbers.

    Args:
        name: the net's name, for messages.
        fields: any of `HYGIENE_FIELDS`; what is off may be left out, None or 0. `anneal` is
            {parameter: value at the end} or texts, ("temperature:32",).
        horizon: steps of the stage.

    Returns:
        (structure or None where nothing is on, {name: float32 array}).

    Raises:
        ValueError: An unknown field or a number out of its range.
    """
    where = f"hygiene.{name}"
    for key in fields:
        if key not in HYGIENE_FIELDS:
            raise checks.unknown(f"field of {where}", key, HYGIENE_FIELDS)
    given = {**HYGIENE_FIELDS, **fields}
    numbers: dict[str, float] = {}
    anneal = checks.named_numbers(f"{where}.anneal", given["anneal"], "temperature:32")

    def take(key: str, value: float, **limits: Any) -> None:
        checks.number(f"{where}.{key}", value, **limits)
        numbers[key.replace(".", "_")] = value

    above_0: dict[str, Any] = {"low": 0, "low_allowed": False}
    if given["track"] or given["freeze"]:
        take("momentum", given["momentum"], **above_0, high=1)
    if given["freeze"]:
        take("freeze", given["freeze"], **above_0, high=1)
        take("freeze_end", given["freeze_end"] or given["freeze"], **above_0, high=1)
    elif given["freeze_end"]:
        raise ValueError(f"{where}.freeze_end came without freeze, the threshold at the start.")
    for key in ("dampen", "dampen_start"):
        checks.number(f"{where}.{key}", given[key], low=0)
    if given["dampen"] or given["dampen_start"]:
        numbers |= {key: given[key] for key in ("dampen", "dampen_start")}
    if given["max_ratio"]:
        take("max_ratio", given["max_ratio"], low=1, low_allowed=False)
    for key, value in anneal.items():
        take(f"anneal.{key}", value, **above_0)
    if given["size_bytes"]:
        take("size_bytes", given["size_bytes"], **above_0)
        take("size_weight", given["size_weight"], low=0)
    hygiene = Hygiene(
        track="momentum" in numbers,
        freeze="freeze" in numbers,
        dampen="dampen" in numbers,
        clamp="max_ratio" in numbers,
        anneal=tuple(sorted(anneal)),
        budget="size_bytes" in numbers,
    )
    if hygiene == Hygiene():
        return None, {}
    numbers["horizon"] = float(horizon)
    return hygiene, {key: np.asarray(value, np.float32) for key, value in numbers.items()}


def describe(hygiene: Hygiene, numbers: Mapping[str, Any]) -> str:
    """Returns the options with their numbers as text: "freeze=0.04 to 0.01, momentum=0.01"."""
    texts = {key: f"{float(value):g}" for key, value in numbers.items()}
    parts = []
    if hygiene.freeze:
        parts.append(f"freeze={texts['freeze']} to {texts['freeze_end']}")
    elif hygiene.track:
        parts.append("track")
    if hygiene.track:
        parts.append(f"momentum={texts['momentum']}")
    if hygiene.dampen:
        parts.append(f"dampen={texts['dampen_start']} to {texts['dampen']}")
    if hygiene.clamp:
        parts.append(f"max_ratio={texts['max_ratio']}")
    parts += [f"anneal {name} to {texts[f'anneal_{name}']}" for name in hygiene.anneal]
    if hygiene.budget:
        parts.append(f"size_bytes={texts['size_bytes']} at weight {texts['size_weight']}")
    return ", ".join(parts)


def check(
    hygiene: Hygiene,
    weights: Mapping[str, Spec],
    parameters: Iterable[tuple[Spec, str]],
    *,
    where: str = "hygiene",
) -> None:
    """Refuses options that have nothing to act on, or would act on the wrong thing.

    Args:
        hygiene: static description.
        weights: {path of a layer: spec of its weight} of the weights that have integer codes.
        parameters: all parameters of the net's quantizers: their specs with names such as "step".
        where: for messages.

    Raises:
        ValueError: Nothing is there that an option could act on, or `freeze` or `dampen` meets a
            quantizer that transforms weights before it rounds them.
    """
    if (hygiene.track or hygiene.dampen) and not weights:
        raise ValueError(
            f"{where}: track, freeze and dampen came, but no weight of the net has a quantizer "
            "with integer codes. Calibrate before this stage, or drop them."
        )
    for path, spec in weights.items() if hygiene.freeze or hygiene.dampen else ():
        quantizer = QUANTIZERS[spec.quantizer]
        if hasattr(quantizer, "clip_range") or hasattr(quantizer, "live"):
            raise ValueError(
                f"{where}: freeze and dampen act on weights that are rounded as they are, and "
                f"quantizer {spec.quantizer!r} of layer {path!r} transforms them first. "
                "Use lsq, lsq_plus, tqt, dsq, sigmoid or uniform there, or track alone."
            )
    learned = set(parameters)
    stated = {quantizer: facts(quantizer) for quantizer in QUANTIZERS}
    for name in hygiene.anneal:
        if not any(hygiene.anneals(spec, own) and own == name for spec, own in learned):
            allowed = (f"the {f.annealed} of {q}" for q, f in stated.items() if f.annealed)
            there = ", ".join(sorted({spec.quantizer for spec, _ in learned}))
            raise ValueError(
                f"{where}.anneal.{name}: what can be annealed is {', '.join(allowed)}, and the "
                f"net's quantizers are {there or 'none yet: calibrate first'}."
            )
    if hygiene.clamp and not any(clamping.clamps(spec, name) for spec, name in learned):
        there = ", ".join(sorted({f"{spec.quantizer}'s {name}" for spec, name in learned}))
        allowed = (
            q + (f" (with the option {f.size_option})" if f.size_option else "")
            for q, f in stated.items()
            if f.size
        )
        raise ValueError(
            f"{where}.max_ratio: no quantizer of the net has a learned step; there are "
            f"{there or 'none yet: calibrate first'}. Drop it, or use one of {', '.join(allowed)}."
        )
    if hygiene.budget and not any(map(learns_bits, weights.values())):
        raise ValueError(
            f"{where}.size_bytes: no weight of the net has learned bits. Give its spec "
            "quantizer='lsq', options={'learn_bits': True}."
        )


def init(
    hygiene: Hygiene, net: QuantizedModel, learned: Mapping[str, Any], *, where: str = "hygiene"
) -> Tree:
    """Returns the state at the start of a stage.

    Args:
        hygiene: static description.
        net: the net.
        learned: its {"params", "quant"}.
        where: for messages.

    Returns:
        {"count": int32 scalar, "weights": {path: arrays}, and "clamped" and "annealed", {path of
        a parameter: its array at the start}}.

    Raises:
        ValueError: As `check`; an annealed parameter that is not positive.
    """
    weights = list(quantized_weights(net, learned))
    leaves = flatten(learned.get("quant", {}))
    specs: dict[str, Spec] = {}
    for path in leaves:
        owner = parameter_owner(path)
        spec = None if owner is None else net.spec_of(*owner)
        if spec is not None:
            specs[path] = spec
    parameters = {(spec, _last(path)) for path, spec in specs.items()}
    check(hygiene, {weight.path: weight.spec for weight in weights}, parameters, where=where)
    annealed = {p: leaves[p] for p, spec in specs.items() if hygiene.anneals(spec, _last(p))}
    for path, start in annealed.items():
        if not isinstance(start, jax.core.Tracer) and not np.all(np.asarray(start) > 0):
            raise ValueError(
                f"{where}.anneal.{_last(path)}: {path} starts at {float(np.min(start)):.4g}, and "
                "equal ratios lead from there to no positive value. Anneal one that is positive, "
                "such as a temperature."
            )
    return {
        "count": jnp.zeros((), jnp.int32),
        "weights": {
            weight.path: oscillation.init_weight(learned, weight, freeze=hygiene.freeze)
            for weight in weights
            if hygiene.track
        },
        "clamped": {
            path: leaves[path]
            for path, spec in specs.items()
            if hygiene.clamp and clamping.clamps(spec, _last(path))
        },
        "annealed": annealed,
    }


def penalty(
    hygiene: Hygiene, net: QuantizedModel, hyper: Tree, learned: Tree, state: Tree
) -> jax.Array:
    """Returns what is added to the net's loss, float32 scalar: dampening and the size budget."""
    total = jnp.zeros((), jnp.float32)
    if hygiene.dampen:
        done = _done(hyper, state["count"])
        strength = oscillation.cosine(hyper["dampen_start"], hyper["dampen"], done)
        total = total + strength * oscillation.dampening(net, learned)
    if hygiene.budget:
        excess = bit_budget.excess(net, learned, hyper["size_bytes"])
        total = total + hyper["size_weight"] * excess
    return total


def apply(
    hygiene: Hygiene, net: QuantizedModel, hyper: Tree, learned: Tree, state: Tree
) -> tuple[Tree, Tree, dict[str, jax.Array]]:
    """Runs after an update: quantizers are clamped and annealed, weights tracked and pinned.

    Args:
        hygiene: static description.
        net: the net.
        hyper: numbers of `plan_hygiene`.
        learned: {"params", "quant"} after the optimizer's update.
        state: of `init` or of the step before.

    Returns:
        (learned, state, {"oscillating", "frozen"}: shares of all weights that are tracked).
    """
    done = _done(hyper, state["count"])
    quant = learned.get("quant", {})
    leaves = flatten(quant)
    for path, start in state["annealed"].items():
        value = start * (hyper[f"anneal_{_last(path)}"] / start) ** done
        leaves[path] = value.astype(leaves[path].dtype)
    if hygiene.clamp:
        leaves |= clamping.clamped(leaves, state["clamped"], hyper["max_ratio"])
    if hygiene.budget:
        leaves |= bit_budget.bounded_bits(leaves, net, learned)
    if leaves:
        quant = jax.tree.unflatten(jax.tree.structure(quant), list(leaves.values()))
        learned = {**learned, "quant": quant}
    metrics: dict[str, jax.Array] = {}
    weights: Tree = {}
    if hygiene.track:
        threshold = None
        if hygiene.freeze:
            threshold = oscillation.cosine(hyper["freeze"], hyper["freeze_end"], done)
        swinging, frozen, size = jnp.zeros(()), jnp.zeros(()), 0
        for weight in quantized_weights(net, learned):
            learned, weights[weight.path] = oscillation.update_weight(
                learned,
                weight,
                state["weights"][weight.path],
                momentum=hyper["momentum"],
                threshold=threshold,
            )
            frequency = weights[weight.path]["frequency"]
            swinging += jnp.sum(frequency > oscillation.OSCILLATES)
            size += frequency.size
            if hygiene.freeze:
                frozen += jnp.sum(~jnp.isnan(weights[weight.path]["pinned"]))
        metrics["oscillating"] = swinging / max(size, 1)
        if hygiene.freeze:
            metrics["frozen"] = frozen / max(size, 1)
    return learned, {**state, "count": state["count"] + 1, "weights": weights}, metrics


def _done(hyper: Tree, count: jax.Array) -> jax.Array:
    """Returns the share of the stage that is done, 0 to 1; 1 at its last step."""
    return jnp.clip(count / jnp.maximum(hyper["horizon"] - 1, 1), 0, 1)


def _last(path: str) -> str:
    return path.rpartition("/")[2]
