"""The objective of a training step: all nets run forward, then the terms of their losses are added.

A loss is weighted sums over examples. What a net teaches is detached, so no net's gradient sees
another net's loss, and one `value_and_grad` of `total_loss` gives all gradients.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qkd_jax.distillation.forward import forward_taps
from qkd_jax.distillation.terms import (
    Term,
    gradient_if_active,
    has_started,
    loss_inputs,
    term_numbers,
)
from qkd_jax.losses import TABLE
from qkd_jax.quantize.operands import ROUNDING
from qkd_jax.training import hygiene
from qkd_jax.training.plan import Learner, StepStructure, cached_key
from qkd_jax.training.rematerialisation import rematerialised
from qkd_jax.training.state import TrainState, join, split, step_key

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]
Features = dict[str, jax.Array]


class _Outputs(NamedTuple):
    """Inputs of the terms of a step: the outputs of all nets, by slot, and the batch.

    `stale` has (logits, features) of the copies through which nets teach while they learn.
    """

    logits: dict[str, jax.Array]
    features: dict[str, Features]
    stale: dict[str, tuple[jax.Array, Features]]
    batch: Batch
    mask: jax.Array | None
    axis_name: str | None

    def taught(self, learner: Learner, source: str) -> tuple[jax.Array, Features]:
        """Returns a source's (logits, features), detached; a net teaches itself without a copy."""
        outputs = self.logits[source], self.features.get(source, {})
        if source in self.stale and source != learner.slot:
            outputs = self.stale[source]
        return jax.lax.stop_gradient(outputs)


def gradients(
    structure: StepStructure,
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Any],
    *,
    axis_name: str | None = None,
    whole: jax.Array | None = None,
    part: jax.Array | None = None,
) -> tuple[tuple[jax.Array, Any], tuple[dict[str, Any], dict[str, Any]]]:
    """Returns (what `total_loss` returns, ({slot: gradient}, {slot: {term: its adaptor's}}))."""
    parts = {slot: split(variables) for slot, variables in state.nets.items()}
    learned = {slot: part[0] for slot, part in parts.items()}
    carried = {slot: part[1] for slot, part in parts.items()}

    def objective(learned: dict[str, Any], adaptors: dict[str, Any]) -> tuple[jax.Array, Any]:
        return total_loss(
            structure,
            learned,
            carried,
            state,
            batch,
            frozen,
            adaptors=adaptors,
            axis_name=axis_name,
            whole=whole,
            part=part,
        )

    differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    return differentiate(learned, adaptor_params(state))


def total_loss(
    structure: StepStructure,
    learned: Mapping[str, Any],
    carried: Mapping[str, Any],
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Any],
    *,
    adaptors: Mapping[str, Mapping[str, Any]] | None = None,
    axis_name: str | None = None,
    whole: jax.Array | None = None,
    part: jax.Array | None = None,
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, Any], Metrics]]:
    """Sum over nets of sum over terms of weight * mean over the whole batch.

    Under a mapped axis the value is this device's share: its sum over the global count, so that
    adding gradients over devices gives the gradient of the global mean.

    Args:
        structure: what is compiled.
        learned: {slot: {"params", "quant"}}, the differentiated argument.
        carried: {slot: other collections}.
        state: for numbers, step and seed.
        batch: "image" [batch, ...], "label" int32 [batch], optionally "mask" bool [batch], and for
            teachers that are not run their logits under `plan.cached_key`.
        frozen: {slot: variables} of the nets that only teach.
        adaptors: {slot: {term: parameters of its adaptor}}, differentiated too; None takes those
            of the state.
        axis_name: the mapped axis, or None.
        whole: number of examples of the batch, over all devices, of which `batch` is a micro-batch;
            None if it is the whole.
        part: number of that micro-batch. Masks of dropout are its own; weights are rounded alike
            in all.

    Returns:
        (loss, ({slot: carried after the pass}, {slot: {term: its state after the pass}}, {slot:
        sums of metrics on this device})).
    """
    outputs, updated = _forward(structure, learned, carried, state, batch, frozen, axis_name, part)
    labels, mask = batch["label"], outputs.mask
    adaptors = adaptor_params(state) if adaptors is None else adaptors
    count = example_count(batch)
    global_count = count if axis_name is None else jax.lax.psum(count, axis_name)
    global_count = global_count if whole is None else whole
    loss = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    term_states: dict[str, Any] = {}
    # One key for all devices: a loss that draws examples draws them for the whole batch.
    loss_key = step_key(state.seed, "loss", state.step)
    for index, learner in enumerate(structure.learners):
        slot, hyper = learner.slot, state.hyper[learner.slot]
        correct = (jnp.argmax(outputs.logits[slot], axis=-1) == labels).astype(jnp.float32)
        sums = {"count": count, "top1": _masked_sum(correct, mask), "loss": jnp.zeros(())}
        for position, term in enumerate(learner.terms):
            numbers = term_numbers(term, hyper["terms"][term.name], state.step)
            label = structure.scope(f"{slot}/{term.name}", term.loss)
            with jax.named_scope(f"{structure.scope(slot)}/loss/{label}"):
                per_example, adaptor_loss, term_state = _term_values(
                    learner,
                    term,
                    outputs,
                    adaptors.get(slot, {}).get(term.name, {}),
                    state,
                    numbers,
                    jax.random.fold_in(jax.random.fold_in(loss_key, index), position),
                )
            value = jnp.sum(per_example)
            sums[term.name] = value
            weighted = numbers["weight"] * value
            if term.can_be_inactive:  # 0 times an overflow is not 0
                weighted = jnp.where(numbers["weight"] > 0, weighted, 0.0)
            sums["loss"] = sums["loss"] + weighted
            if adaptor_loss is not None:  # trains the adaptor alone, unweighted, until the start
                adaptor_sum = _masked_sum(adaptor_loss, mask)
                started = has_started(term, hyper["terms"][term.name], state.step)
                sums["loss"] = sums["loss"] + jnp.where(started, 0.0, adaptor_sum)
            if term_state:
                term_states.setdefault(slot, {})[term.name] = term_state
        if "agreement" in structure.live:
            sums |= _agreement(learner, outputs)
        if learner.hygiene is not None:
            # Shared out over devices and parts by their examples, so that their sum has it once.
            sums["loss"] = sums["loss"] + count * hygiene.penalty(
                learner.hygiene,
                learner.net,
                hyper["hygiene"],
                learned[slot],
                state.opt[slot]["hygiene"],
            )
        loss = loss + sums["loss"] / jnp.maximum(global_count, 1.0)
        metrics[slot] = sums
    return loss, (updated, term_states, metrics)


def _agreement(learner: Learner, outputs: _Outputs) -> dict[str, jax.Array]:
    """{"agreement/<slot>": sum over examples of "says the same class"} of a net's teachers."""
    own = jnp.argmax(outputs.logits[learner.slot], axis=-1)
    teachers = dict.fromkeys(source for term in learner.terms for source in term.sources)
    found = {}
    for source in teachers:
        if source != learner.slot:
            same = own == jnp.argmax(outputs.taught(learner, source)[0], axis=-1)
            found[f"agreement/{source}"] = _masked_sum(same.astype(jnp.float32), outputs.mask)
    return found


def _forward(
    structure: StepStructure,
    learned: Mapping[str, Any],
    carried: Mapping[str, Any],
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Any],
    axis_name: str | None,
    part: jax.Array | None,
) -> tuple[_Outputs, dict[str, Any]]:
    """Runs every net once; returns (outputs, {slot: carried collections of learners})."""
    images, taps = batch["image"], structure.taps
    mask = None if "mask" not in batch else batch["mask"].astype(bool)
    # Weights are rounded alike on all devices, so their key does not depend on the device.
    rounding_key = step_key(state.seed, ROUNDING, state.step)
    key = step_key(state.seed, "dropout", state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    if part is not None:
        key = jax.random.fold_in(key, part)
    outputs = _Outputs({}, {}, {}, batch, mask, axis_name)
    updated: dict[str, Any] = {}
    for index, learner in enumerate(structure.learners):
        slot = learner.slot
        run = functools.partial(
            forward_taps, learner.net, taps=taps[slot], train=True, axis_name=axis_name
        )
        rngs = {
            "dropout": jax.random.fold_in(key, index),
            ROUNDING: jax.random.fold_in(rounding_key, index),
        }
        with jax.named_scope(structure.scope(slot)):
            outputs.logits[slot], updated[slot], outputs.features[slot] = rematerialised(
                structure.remat,
                lambda variables, images, rngs, run=run: run(variables, images, rngs=rngs),
            )(join(learned[slot], carried[slot]), images, rngs)
    for slot, net in structure.teachers:
        if slot in structure.cached:
            outputs.logits[slot] = batch[cached_key(slot)]
            continue
        with jax.named_scope(structure.scope(slot)):
            outputs.logits[slot], _, outputs.features[slot] = forward_taps(
                net, frozen[slot], images, taps=taps[slot], axis_name=axis_name
            )
    for slot in structure.stale:
        net, copy = structure.nets[slot], state.stale[slot]
        with jax.named_scope(f"{structure.scope(slot)}_stale"):
            logits, _, features = forward_taps(
                net, copy, images, taps=taps[slot], axis_name=axis_name
            )
        outputs.stale[slot] = logits, features
    return outputs, updated


def _term_values(
    learner: Learner,
    term: Term,
    outputs: _Outputs,
    params: Any,
    state: TrainState,
    numbers: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, jax.Array | None, dict[str, Any]]:
    """Evaluates one term: (values [batch], the adaptor's own loss [batch] or None, its state).

    Values are unweighted, and 0 where the mask is False. A source's outputs are detached before the
    adaptor, so that an adaptor of the teacher's features learns and the teacher does not.
    """
    term_state = dict(state.loss_state.get(learner.slot, {}).get(term.name, {}))
    memory = term_state.get("memory")
    taught = [outputs.taught(learner, source) for source in term.sources]
    features = tuple(outputs.features[learner.slot][tap] for tap in term.taps)
    teacher_features = tuple(taught[0][1][tap] for tap in term.teacher_taps)
    inputs = loss_inputs(
        features,
        teacher_features,
        outputs.logits[learner.slot],
        tuple(logits for logits, _ in taught),
    )
    inputs |= {"labels": outputs.batch["label"], "index": outputs.batch.get("index")}
    inputs |= {"key": key, "memory": memory}
    if term.adaptor is not None:
        fixed = {
            name: term_state[name] for name in ("batch_stats", "teacher") if name in term_state
        }
        adapted, statistics = term.adaptor.apply(
            {"params": params, **fixed},
            features,
            teacher_features,
            train=True,
            mutable=["batch_stats"],
            axis_name=outputs.axis_name,
        )
        inputs |= adapted
        term_state |= statistics
    if "index" in term.inputs and inputs["index"] is None:
        raise ValueError(
            f"loss {term.loss!r} keeps a memory by example, so the batch must have "
            "'index', [batch] integers below the number of training examples."
        )
    if term.can_be_inactive:
        without_gradient = ("labels", "index", "memory", "key")
        for name in (n for n in term.inputs if n not in without_gradient):
            inputs[name] = gradient_if_active(inputs[name], numbers["weight"])
    arguments: dict[str, Any] = {name: numbers[name] for name in term.traced}
    if outputs.mask is not None:
        arguments["where"] = outputs.mask
    if term.takes_axis_name:
        arguments["axis_name"] = outputs.axis_name
    with jax.named_scope(f"loss_{term.loss}"):
        values = TABLE[term.loss].function(
            *(inputs[name] for name in term.inputs), **arguments, **dict(term.static)
        )
    if "memory" in term.inputs:
        values, term_state["memory"] = values
    return values, inputs.get("adaptor_loss"), term_state


def adaptor_params(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns {slot: {term: parameters of its adaptor}} of the terms whose adaptors learn."""
    return {
        slot: {term: own["params"] for term, own in terms.items() if own.get("params")}
        for slot, terms in state.loss_state.items()
    }


def example_count(batch: Batch) -> jax.Array:
    """Returns the number of examples of a batch that its mask does not leave out, float32."""
    mask = None if "mask" not in batch else batch["mask"].astype(bool)
    return _masked_sum(jnp.ones(batch["label"].shape, jnp.float32), mask)


def _masked_sum(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.sum(values if mask is None else jnp.where(mask, values, 0.0))
