"""What keeps low-bit training healthy besides descent: options of a train stage, for each net.

    stages.qat.hygiene.net = dict(freeze=0.04, freeze_end=0.01)

- **Oscillation** (Nagel, Fournarakis, Bondarenko, Blankevoort, 2022, arXiv 2203.11086). Under a
  straight-through gradient a weight whose best value lies between two codes jumps between them. A
  change of code against the direction of the last one is an oscillation (equation 4),
  f = m o + (1 - m) f its frequency (equation 5). `track` measures; `freeze` pins a weight whose f
  passes a threshold to the rounded average of its codes (algorithm 1), the threshold going from
  `freeze` to `freeze_end` along a cosine; `dampen` adds L = sum (clip(w) - w_hat)^2, w_hat without
  gradient (equation 6), with a strength that rises from `dampen_start` to `dampen` along a cosine.
- **Step clamp**: `max_ratio` keeps what a quantizer learns of its grid's size within a factor of
  what it was when the stage began (`training/clamping.py`). What nothing learns (uniform's `scale`)
  is not clamped, and a net that has nothing else is refused.
- **Annealing**: `anneal` takes the sigmoid's `temperature` or DSQ's `alpha` to a value at the
  stage's end, by equal ratios.
- **Size budget** for learned bits: `size_weight * max(size / size_bytes - 1, 0)` is added to the
  loss, size being that of all weights whose bits are learned (Uhlich et al., 2019, arXiv
  1905.11452, with a hinge in place of their squared one). Their bits are kept between the fewest
  and the most there can be, so that none goes on falling while others are still too many.

The state of all this lies beside the optimizer's, so that a run that is killed resumes exactly. It
is a stage's own: a later stage starts it anew, also one that continues the optimizer, so weights
that were pinned are free again there until they are caught again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import Spec
from qkd_jax.quantize.stored_weights import Weight, quantized_weights, rounded, with_weight
from qkd_jax.quantize.variables import parameter_owner, quantizer_key, quantizer_params
from qkd_jax.quantizers import QUANTIZERS, facts, fewest_bits, learns_bits, used_bits
from qkd_jax.training import clamping
from qkd_jax.trees import flatten, get, join

__all__ = [
    "HYGIENE_FIELDS",
    "Hygiene",
    "apply",
    "check",
    "describe",
    "init",
    "oscillating",
    "penalty",
    "plan_hygiene",
]

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
# A weight counts as oscillating from this frequency on, as in the paper's table 1.
OSCILLATES = 0.005


@dataclasses.dataclass(frozen=True)
class Hygiene:
    """What is switched on: the static part, on which a step is compiled."""

    track: bool = False
    freeze: bool = False
    dampen: bool = False
    clamp: bool = False
    anneal: tuple[str, ...] = ()
    budget: bool = False


def plan_hygiene(
    net: str, fields: Mapping[str, Any], horizon: int
) -> tuple[Hygiene | None, dict[str, Any]]:
    """Splits a net's options into what is compiled and numbers.

    Args:
        net: For messages.
        fields: Any of `HYGIENE_FIELDS`; what is off may be left out, None or 0. `anneal` is
            {parameter: value at the end} or texts, ("temperature:32",).
        horizon: Steps of the stage.

    Returns:
        (structure or None where nothing is on, {name: float32 array}).

    Raises:
        ValueError: An unknown field or a number out of its range.
    """
    where = f"hygiene.{net}"
    for key in fields:
        if key not in HYGIENE_FIELDS:
            raise checks.unknown(f"field of {where}", key, HYGIENE_FIELDS)
    given = {**HYGIENE_FIELDS, **fields}
    numbers: dict[str, float] = {}
    anneal = checks.named_numbers(f"{where}.anneal", given["anneal"], "temperature:32")
    if given["track"] or given["freeze"]:
        checks.number(f"{where}.momentum", given["momentum"], low=0, low_allowed=False, high=1)
        numbers["momentum"] = given["momentum"]
    if given["freeze"]:
        end = given["freeze_end"] or given["freeze"]
        for key, value in (("freeze", given["freeze"]), ("freeze_end", end)):
            checks.number(f"{where}.{key}", value, low=0, low_allowed=False, high=1)
            numbers[key] = value
    elif given["freeze_end"]:
        raise ValueError(f"{where}.freeze_end came without freeze, the threshold at the start.")
    for key in ("dampen", "dampen_start"):
        checks.number(f"{where}.{key}", given[key], low=0)
    if given["dampen"] or given["dampen_start"]:
        numbers |= {key: given[key] for key in ("dampen", "dampen_start")}
    if given["max_ratio"]:
        checks.number(f"{where}.max_ratio", given["max_ratio"], low=1, low_allowed=False)
        numbers["max_ratio"] = given["max_ratio"]
    for key, value in anneal.items():
        checks.number(f"{where}.anneal.{key}", value, low=0, low_allowed=False)
        numbers[f"anneal_{key}"] = value
    if given["size_bytes"]:
        checks.number(f"{where}.size_bytes", given["size_bytes"], low=0, low_allowed=False)
        checks.number(f"{where}.size_weight", given["size_weight"], low=0)
        numbers |= {key: given[key] for key in ("size_bytes", "size_weight")}
    hygiene = Hygiene(
        track=bool(given["track"] or given["freeze"]),
        freeze=bool(given["freeze"]),
        dampen=bool(given["dampen"] or given["dampen_start"]),
        clamp=bool(given["max_ratio"]),
        anneal=tuple(sorted(anneal)),
        budget=bool(given["size_bytes"]),
    )
    if hygiene == Hygiene():
        return None, {}
    numbers["horizon"] = float(horizon)
    return hygiene, {key: np.asarray(value, np.float32) for key, value in numbers.items()}


def describe(hygiene: Hygiene, numbers: Mapping[str, Any]) -> str:
    """What is switched on, with its numbers, for people: "freeze=0.04 to 0.01, momentum=0.01"."""
    shown = {key: f"{float(value):g}" for key, value in numbers.items()}
    words = []
    if hygiene.freeze:
        words.append(f"freeze={shown['freeze']} to {shown['freeze_end']}")
    elif hygiene.track:
        words.append("track")
    if hygiene.track:
        words.append(f"momentum={shown['momentum']}")
    if hygiene.dampen:
        words.append(f"dampen={shown['dampen_start']} to {shown['dampen']}")
    if hygiene.clamp:
        words.append(f"max_ratio={shown['max_ratio']}")
    words += [f"anneal {name} to {shown[f'anneal_{name}']}" for name in hygiene.anneal]
    if hygiene.budget:
        words.append(f"size_bytes={shown['size_bytes']} at weight {shown['size_weight']}")
    return ", ".join(words)


def check(
    hygiene: Hygiene,
    weights: Mapping[str, Spec],
    parameters: Iterable[tuple[Spec, str]],
    *,
    where: str = "hygiene",
) -> None:
    """Refuses options that would find nothing to act on, or act on the wrong thing.

    Args:
        hygiene: Static description.
        weights: {path of a layer: spec of its weight} of the weights that have integer codes.
        parameters: Everything that the net's quantizers own: their specs with names such as "step".
        where: For messages.

    Raises:
        ValueError: Nothing is there that an option could act on, or `freeze` or `dampen` meets a
            quantizer that bends weights before it rounds them.
    """
    if (hygiene.track or hygiene.dampen) and not weights:
        raise ValueError(
            f"{where}: track, freeze and dampen came, but no weight of the net has a quantizer "
            "with integer codes. Calibrate before this stage, or drop them."
        )
    if hygiene.freeze or hygiene.dampen:
        for path, spec in weights.items():
            _refuse_bent(where, path, spec)
    owned = set(parameters)
    for name in hygiene.anneal:
        if not any(_anneals(hygiene, spec, own) and own == name for spec, own in owned):
            there = ", ".join(sorted({spec.quantizer for spec, _ in owned}))
            allowed = ((facts(quantizer).annealed, quantizer) for quantizer in QUANTIZERS)
            raise ValueError(
                f"{where}.anneal.{name}: what can be annealed is "
                f"{', '.join(f'the {n} of {q}' for n, q in allowed if n)}, and the net's "
                f"quantizers are {there or 'none yet: calibrate first'}."
            )
    if hygiene.clamp and not any(clamping.clamps(spec, name) for spec, name in owned):
        has = ", ".join(sorted({f"{spec.quantizer}'s {name}" for spec, name in owned}))
        sizes = {name: facts(name) for name in QUANTIZERS if facts(name).size}
        needs = {
            q: f" (with the option {f.size_option})" for q, f in sizes.items() if f.size_option
        }
        raise ValueError(
            f"{where}.max_ratio: no quantizer of the net has a learned step; there are "
            f"{has or 'none yet: calibrate first'}. Drop it, or use one of "
            f"{', '.join(name + needs.get(name, '') for name in sizes)}."
        )
    if hygiene.budget and not any(map(learns_bits, weights.values())):
        raise ValueError(
            f"{where}.size_bytes: no weight of the net has learned bits. Give its spec "
            "quantizer='lsq', options={'learn_bits': True}."
        )


def init(
    hygiene: Hygiene, module: Any, learned: Mapping[str, Any], *, where: str = "hygiene"
) -> Tree:
    """State at the start of a stage.

    Args:
        hygiene: Static description.
        module: QuantizedModel.
        learned: {"params", "quant"} of the net.
        where: For messages.

    Returns:
        {"count": int32 scalar, "weights": {path: arrays}, and "clamped" and "annealed", {path of
        a parameter: its array at the start}}.

    Raises:
        ValueError: As `check`.
    """
    weights = list(quantized_weights(module, learned))
    names = flatten(learned.get("quant", {}))
    owners = {name: spec for name in names if (spec := _owner(module, name)) is not None}
    specs = {weight.path: weight.spec for weight in weights}
    owned = {(spec, _last(name)) for name, spec in owners.items()}
    check(hygiene, specs, owned, where=where)
    state: Tree = {"count": jnp.zeros((), jnp.int32), "weights": {}}
    if hygiene.track:
        for weight in weights:
            codes = rounded(learned, weight).codes.astype(jnp.float32)
            state["weights"][weight.path] = {
                "codes": codes.astype(jnp.int32),
                "direction": jnp.zeros(codes.shape, jnp.int8),
                "frequency": jnp.zeros(codes.shape, jnp.float32),
            }
            if hygiene.freeze:
                state["weights"][weight.path] |= {
                    "mean": codes,
                    "pinned": jnp.full(codes.shape, jnp.nan, jnp.float32),
                }
    state["clamped"] = {
        name: names[name]
        for name, spec in owners.items()
        if hygiene.clamp and clamping.clamps(spec, _last(name))
    }
    state["annealed"] = {
        name: names[name] for name, spec in owners.items() if _anneals(hygiene, spec, _last(name))
    }
    for name, leaf in state["annealed"].items():
        if not isinstance(leaf, jax.core.Tracer):
            _refuse_sign(f"{where}.anneal.{_last(name)}", name, leaf)
    return state


def _anneals(hygiene: Hygiene, spec: Spec, name: str) -> bool:
    return name in hygiene.anneal and facts(spec.quantizer).annealed == name


def _owner(module: Any, name: str) -> Spec | None:
    """The spec of the quantizer that owns a leaf of "quant", found by its name, or None."""
    owner = parameter_owner(name)
    return None if owner is None else module.spec_of(*owner)


def _refuse_sign(where: str, name: str, start: jax.Array) -> None:
    if not np.all(np.asarray(start) > 0):
        raise ValueError(
            f"{where}: {name} starts at {float(np.min(start)):.4g}, and equal ratios lead from "
            "there to no positive value. Anneal one that is positive, such as a temperature."
        )


def _refuse_bent(where: str, path: str, spec: Spec) -> None:
    quantizer = QUANTIZERS[spec.quantizer]
    if hasattr(quantizer, "clip_range") or hasattr(quantizer, "live"):
        raise ValueError(
            f"{where}: freeze and dampen act on weights that are rounded as they are, and "
            f"quantizer {spec.quantizer!r} of layer {path!r} transforms them first. "
            "Use lsq, lsq_plus, tqt, dsq, sigmoid or uniform there, or track alone."
        )


def _cosine(start: jax.Array, end: jax.Array, done: jax.Array) -> jax.Array:
    return end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * done))


def _done(hyper: Tree, count: jax.Array) -> jax.Array:
    """How much of the stage is over, 0 to 1; 1 at its last step."""
    return jnp.clip(count / jnp.maximum(hyper["horizon"] - 1, 1), 0, 1)


def penalty(hygiene: Hygiene, module: Any, hyper: Tree, learned: Tree, state: Tree) -> jax.Array:
    """What is added to the net's loss, float32 scalar: dampening and the size budget."""
    total = jnp.zeros((), jnp.float32)
    if hygiene.dampen:
        strength = _cosine(hyper["dampen_start"], hyper["dampen"], _done(hyper, state["count"]))
        squares = jnp.zeros((), jnp.float32)
        for weight in quantized_weights(module, learned):
            grid = rounded(learned, weight)
            values = _own(learned, weight).reshape(grid.values.shape)
            squares += jnp.sum(jnp.square(jnp.clip(values, grid.low, grid.high) - grid.on_grid))
        total = total + strength * squares
    if hygiene.budget:
        size = sum(_bytes(learned, weight) for weight in _with_learned_bits(module, learned))
        over = jnp.maximum(size / hyper["size_bytes"] - 1, 0)
        total = total + hyper["size_weight"] * over
    return total


def _own(learned: Tree, weight: Weight) -> jax.Array:
    return get(learned, weight.array)


def _with_learned_bits(module: Any, learned: Mapping[str, Any]) -> Iterator[Weight]:
    for weight in quantized_weights(module, learned):
        if learns_bits(weight.spec):
            yield weight


def _bounded_bits(module: Any, learned: Tree) -> Tree:
    """{name in "quant": function} that takes learned bits back into their range."""
    return {
        join(weight.path, quantizer_key("weight"), "bits"): functools.partial(
            jnp.clip, min=fewest_bits(weight.spec), max=weight.spec.bits
        )
        for weight in _with_learned_bits(module, learned)
    }


def _bytes(learned: Tree, weight: Weight) -> jax.Array:
    """Bytes of the codes at the bits in use, with a gradient to the bits."""
    bits = used_bits(quantizer_params(learned, weight.path, "weight"), weight.spec)
    return jnp.sum(bits) * (_own(learned, weight).size / max(bits.size, 1)) / 8


def apply(
    hygiene: Hygiene, module: Any, hyper: Tree, learned: Tree, state: Tree
) -> tuple[Tree, Tree, dict[str, jax.Array]]:
    """What follows an update: quantizers are clamped and annealed, weights watched and pinned.

    Args:
        hygiene: Static description.
        module: QuantizedModel.
        hyper: Numbers of `plan_hygiene`.
        learned: {"params", "quant"} after the optimizer's update.
        state: Of `init` or of the step before.

    Returns:
        (learned, state, {"oscillating", "frozen"}: shares of all weights that are tracked).
    """
    done = _done(hyper, state["count"])
    moved = {
        name: functools.partial(_annealed, hyper[f"anneal_{_last(name)}"], done, start)
        for name, start in state["annealed"].items()
    }
    quant = _map_leaves(learned.get("quant", {}), moved)
    if hygiene.clamp:
        starts, ratio = state["clamped"], hyper["max_ratio"]
        quant = _map_leaves(quant, clamping.bounds(starts, ratio))
        quant = _map_leaves(quant, clamping.bounded_ends(flatten(quant), starts, ratio))
    learned = {**learned, "quant": quant} if quant else learned
    if hygiene.budget:
        learned = {**learned, "quant": _map_leaves(quant, _bounded_bits(module, learned))}
    metrics: dict[str, jax.Array] = {}
    weights: Tree = {}
    if hygiene.track:
        swinging, frozen, size = jnp.zeros(()), jnp.zeros(()), 0
        for weight in quantized_weights(module, learned):
            learned, found = _watch(hygiene, hyper, done, learned, weight, state["weights"])
            weights[weight.path] = found
            swinging += jnp.sum(found["frequency"] > OSCILLATES)
            size += found["frequency"].size
            if hygiene.freeze:
                frozen += jnp.sum(~jnp.isnan(found["pinned"]))
        metrics["oscillating"] = swinging / max(size, 1)
        if hygiene.freeze:
            metrics["frozen"] = frozen / max(size, 1)
    return learned, {**state, "count": state["count"] + 1, "weights": weights}, metrics


def _watch(hygiene, hyper, done, learned, weight, states) -> tuple[Tree, Tree]:
    """One step of the paper's algorithm 1 for one weight."""
    state, momentum = states[weight.path], hyper["momentum"]
    grid = rounded(learned, weight)
    codes = grid.codes.astype(jnp.float32)
    if hygiene.freeze:
        codes = jnp.where(jnp.isnan(state["pinned"]), codes, state["pinned"])
    moved = jnp.sign(codes.astype(jnp.int32) - state["codes"]).astype(jnp.int8)
    swung = (moved != 0) & (moved == -state["direction"])
    frequency = momentum * swung + (1 - momentum) * state["frequency"]
    new = {
        "codes": codes.astype(jnp.int32),
        "direction": jnp.where(moved != 0, moved, state["direction"]),
        "frequency": frequency,
    }
    if hygiene.freeze:
        mean = momentum * codes + (1 - momentum) * state["mean"]
        threshold = _cosine(hyper["freeze"], hyper["freeze_end"], done)
        caught = jnp.isnan(state["pinned"]) & (frequency > threshold)
        pinned = jnp.where(caught, jnp.round(mean), state["pinned"])
        new |= {"mean": mean, "pinned": pinned}
        # Going to the average is not one more oscillation.
        new["codes"] = jnp.where(caught, pinned, codes).astype(jnp.int32)
        # Codes are pinned, not values: the step goes on learning, and the weight follows it.
        values = jnp.where(jnp.isnan(pinned), grid.values, pinned * grid.scale)
        learned = with_weight(learned, weight, values)
    return learned, new


def _annealed(end: jax.Array, done: jax.Array, start: jax.Array, value: jax.Array) -> jax.Array:
    return (start * (end / start) ** done).astype(value.dtype)


def oscillating(state: Tree) -> dict[str, float]:
    """{path of a layer: share of its weights that oscillate} out of a state that tracks."""
    return {
        path: float(np.mean(np.asarray(found["frequency"]) > OSCILLATES))
        for path, found in state.get("weights", {}).items()
    }


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _map_leaves(tree: Mapping[str, Any], functions: Mapping[str, Any]) -> Tree:
    """Applies {name: function} to the leaves of these names."""
    leaves = [functions[n](x) if n in functions else x for n, x in flatten(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
