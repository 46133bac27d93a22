"""A term of a net's loss: its compiled part, and its weight and numbers at a step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a net's loss, hashable; all numbers are arguments of the step.

    Attributes:
        name: canonical, "term0".
        loss: key of LOSSES.
        inputs: the loss's positional arguments.
        sources: slots of the nets that teach.
        traced: hyper-parameters that are arguments of the step.
        static: the others, with their values.
        taps: taps of the net that learns.
        teacher_taps: taps of the source.
        adaptor: QuantizedModel around an adaptor, whose variables are the term's own, or None.
        ramps: (name, shape) of the numbers that change over the stage; "weight" may be one.
        has_schedule: whether the weight has a start, an end, a warm-up or a decay.
        takes_axis_name: whether the loss does.
    """

    name: str
    loss: str
    inputs: tuple[str, ...]
    sources: tuple[str, ...] = ()
    traced: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()
    taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    adaptor: Any = None
    ramps: tuple[tuple[str, str], ...] = ()
    has_schedule: bool = False
    takes_axis_name: bool = False

    @property
    def has_state(self) -> bool:
        """True if it has a state: an adaptor's variables, a memory, or both."""
        return self.adaptor is not None or "memory" in self.inputs

    @property
    def can_be_inactive(self) -> bool:
        """True if the weight is 0 in some steps of the stage."""
        return self.has_schedule or any(name == "weight" for name, _ in self.ramps)


def term_numbers(
    term: Term, numbers: Mapping[str, jax.Array], step: jax.Array
) -> dict[str, jax.Array]:
    """Weight and hyper-parameters of a term at a global step.

    With p the steps of the stage that are done, the weight is multiplied by

        min(1, (p - start + 1) / warmup) * min(1, (end - p) / decay), 0 outside [start, end)

    and a ramp over n steps gives begin + (end - begin) g(t), t = min(1, p / (n - 1)), with g(t) = t
    ("linear"), (1 - cos(pi t)) / 2 ("cosine") or exp(-5 (1 - t)^2) ("gaussian", which starts at
    0.0067; Laine, Aila, 2016, arXiv 1610.02242).
    """
    values = {name: numbers[name] for name in ("weight", *term.traced) if name in numbers}
    if not term.has_schedule and not term.ramps:
        return values
    position = (step - numbers["first"]).astype(jnp.float32)
    for name, shape in term.ramps:
        begin, end, steps = (numbers[f"{name}_{part}"] for part in ("begin", "end", "steps"))
        t = jnp.clip(position / jnp.maximum(steps - 1.0, 1.0), 0.0, 1.0)
        if shape == "cosine":
            t = 0.5 * (1.0 - jnp.cos(jnp.pi * t))
        elif shape == "gaussian":
            t = jnp.exp(-5.0 * jnp.square(1.0 - t))
        values[name] = begin + (end - begin) * t
    if term.has_schedule:
        rise = (position - numbers["start"] + 1.0) / jnp.maximum(numbers["warmup"], 1.0)
        fall = (numbers["end"] - position) / jnp.maximum(numbers["decay"], 1.0)
        values["weight"] = values["weight"] * jnp.clip(rise, 0.0, 1.0) * jnp.clip(fall, 0.0, 1.0)
    return values


def in_steps(value: float, horizon: int) -> float:
    """A length in steps; below 1 it is a fraction of the horizon."""
    return round(value * horizon) if 0 < value < 1 else value


def has_started(term: Term, numbers: Mapping[str, jax.Array], step: jax.Array) -> jax.Array:
    """Returns whether a term has started by a global step; one without a schedule has."""
    if not term.has_schedule:
        return jnp.array(True)
    return step - numbers["first"] >= numbers["start"]


def gradient_if_active(x: Any, weight: jax.Array) -> Any:
    """Returns `x`, whose gradient is exactly 0 where `weight` is 0.

    The weight itself does not do that: 0 times the slope of a loss that overflows is NaN.
    """
    return jax.tree.map(lambda leaf: _gate(leaf, weight > 0), x)


@jax.custom_vjp
def _gate(x: jax.Array, opened: jax.Array) -> jax.Array:
    del opened
    return x


def _gate_forward(x: jax.Array, opened: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, opened


def _gate_backward(opened: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return jnp.where(opened, gradient, 0), None


_gate.defvjp(_gate_forward, _gate_backward)


def loss_inputs(
    features: tuple[jax.Array, ...],
    teacher_features: tuple[jax.Array, ...],
    logits: jax.Array,
    teachers_logits: tuple[jax.Array, ...],
) -> dict[str, Any]:
    """Returns {positional name of a loss: array} of two nets; an adaptor's outputs replace them."""
    values: dict[str, Any] = {"logits": logits, "student_logits": logits}
    if teachers_logits:
        values |= {"teacher_logits": teachers_logits[0], "teachers_logits": teachers_logits}
    if features:
        values |= {"student_feature": features[-1], "student_features": features}
    if teacher_features:
        values |= {"teacher_feature": teacher_features[-1], "teacher_features": teacher_features}
    return values
