"""The training step: one pure function for every way in which nets learn from each other.

`step(state, batch, frozen, *, axis_name=None) -> (state, metrics)`. All nets that learn run forward
once, their losses are added and one `value_and_grad` gives all gradients: what a net teaches is
detached, so no net's gradient sees another net's loss. Nets that only teach are an argument, in
evaluation mode. Nothing here knows of devices; `parallel.compile_step` compiles the step for them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qkd_jax.distillation.forward import forward, forward_taps
from qkd_jax.distillation.terms import Term, has_started, loss_inputs, term_numbers, unless_resting
from qkd_jax.losses import TABLE
from qkd_jax.metrics import classification
from qkd_jax.quantize.interception import ROUNDING
from qkd_jax.training import hygiene, optim
from qkd_jax.training.plan import Learner, Plan, StepStructure, cached_key
from qkd_jax.training.state import TrainState, join, split, step_key

__all__ = [
    "Batch",
    "Metrics",
    "Step",
    "adaptor_params",
    "eval_step",
    "make_step",
    "name_metrics",
    "refresh_stale",
    "total_loss",
]

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]
Step = Callable[..., tuple[TrainState, Metrics]]


def _masked_sum(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.sum(values if mask is None else jnp.where(mask, values, 0.0))


class _Seen(NamedTuple):
    """What the terms of a step look at: of every net, by slot, and of the batch.

    `stale` has (logits, features) of the copies through which nets teach while they learn.
    """

    logits: dict[str, jax.Array]
    features: dict[str, dict[str, jax.Array]]
    stale: dict[str, tuple[jax.Array, dict[str, jax.Array]]]
    batch: Batch
    mask: jax.Array | None
    axis_name: str | None

    def taught(self, learner: Learner, source: str) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(logits, features) that a source shows a learner, detached; to itself no copy of it."""
        found = self.logits[source], self.features.get(source, {})
        if source in self.stale and source != learner.slot:
            found = self.stale[source]
        return jax.lax.stop_gradient(found)


def _term_values(
    learner: Learner,
    term: Term,
    seen: _Seen,
    params: Any,
    state: TrainState,
    numbers: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, jax.Array | None, dict[str, Any]]:
    """One term: (values [batch] without its weight, the adaptor's own or None, what it owns).

    All are 0 where the mask is False. What comes from a source is detached before the adaptor, so
    that an adaptor of the teacher's features learns and the teacher does not.
    """
    own = state.loss_state.get(learner.slot, {}).get(term.name, {})
    updated = dict(own)
    taught = [seen.taught(learner, source) for source in term.sources]
    features = tuple(seen.features[learner.slot][tap] for tap in term.taps)
    teacher_features = tuple(taught[0][1][tap] for tap in term.teacher_taps)
    given = loss_inputs(
        features,
        teacher_features,
        seen.logits[learner.slot],
        tuple(logits for logits, _ in taught),
    )
    given |= {"labels": seen.batch["label"], "index": seen.batch.get("index"), "key": key}
    given["memory"] = own.get("memory")
    if term.adaptor is not None:
        carried = {name: own[name] for name in ("batch_stats", "teacher") if name in own}
        outputs, moved = term.adaptor.apply(
            {"params": params, **carried},
            features,
            teacher_features,
            train=True,
            mutable=["batch_stats"],
            axis_name=seen.axis_name,
        )
        given |= outputs
        updated |= moved
    if "index" in term.inputs and given["index"] is None:
        raise ValueError(
            f"loss {term.loss!r} keeps a memory by example, so the batch must have "
            "'index', [batch] integers below the number of training examples."
        )
    if term.rests:
        held = ("labels", "index", "memory", "key")
        for name in (n for n in term.inputs if n not in held):
            given[name] = unless_resting(given[name], numbers["weight"])
    arguments: dict[str, Any] = {name: numbers[name] for name in term.traced}
    if seen.mask is not None:
        arguments["where"] = seen.mask
    if term.spread:
        arguments["axis_name"] = seen.axis_name
    with jax.named_scope(f"loss_{term.loss}"):
        values = TABLE[term.loss].function(
            *(given[name] for name in term.inputs), **arguments, **dict(term.static)
        )
    if "memory" in term.inputs:
        values, updated["memory"] = values
    return values, given.get("adaptor_loss"), updated


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
) -> tuple[jax.Array, tuple[dict[str, Any], dict[str, Any], Metrics]]:
    """Sum over nets of sum over terms of weight * mean over the whole batch.

    Under a mapped axis the value is this device's share: its sum over the global count, so that
    adding gradients over devices gives the gradient of the global mean.

    Args:
        structure: What is compiled.
        learned: {slot: {"params", "quant"}}, the differentiated argument.
        carried: {slot: other collections}.
        state: For numbers, step and seed.
        batch: "image" [batch, ...], "label" int32 [batch], optionally "mask" bool [batch], and for
            teachers that are not run their logits under `plan.cached_key`.
        frozen: {slot: variables} of the nets that only teach.
        adaptors: {slot: {term: parameters of its adaptor}}, differentiated too; None takes those
            of the state.
        axis_name: The mapped axis, or None.

    Returns:
        (loss, ({slot: carried after the pass}, {slot: {term: what it owns after the pass}}, {slot:
        sums of metrics on this device})).
    """
    images, labels = batch["image"], batch["label"]
    mask = None if "mask" not in batch else batch["mask"].astype(bool)
    # Weights are rounded alike on all devices, so the key of rounding does not know of them.
    rounding_key = step_key(state.seed, ROUNDING, state.step)
    key = step_key(state.seed, "dropout", state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    adaptors = adaptor_params(state) if adaptors is None else adaptors
    logits: dict[str, jax.Array] = {}
    features: dict[str, dict[str, jax.Array]] = {}
    updated: dict[str, Any] = {}
    for index, learner in enumerate(structure.learners):
        slot = learner.slot
        logits[slot], updated[slot], features[slot] = forward_taps(
            learner.module,
            join(learned[slot], carried[slot]),
            images,
            taps=structure.taps[slot],
            train=True,
            rngs={
                "dropout": jax.random.fold_in(key, index),
                ROUNDING: jax.random.fold_in(rounding_key, index),
            },
            axis_name=axis_name,
        )
    for slot, module in structure.teachers:
        if slot in structure.cached:
            logits[slot] = batch[cached_key(slot)]
            continue
        logits[slot], _, features[slot] = forward_taps(
            module, frozen[slot], images, taps=structure.taps[slot], axis_name=axis_name
        )

    stale: dict[str, tuple[jax.Array, dict[str, jax.Array]]] = {}
    for slot in structure.stale:
        shown, _, at_taps = forward_taps(
            structure.modules[slot],
            state.stale[slot],
            images,
            taps=structure.taps[slot],
            axis_name=axis_name,
        )
        stale[slot] = shown, at_taps

    count = _masked_sum(jnp.ones(labels.shape, jnp.float32), mask)
    everywhere = count if axis_name is None else jax.lax.psum(count, axis_name)
    loss = jnp.zeros((), jnp.float32)
    sums: Metrics = {}
    owned: dict[str, Any] = {}
    seen = _Seen(logits, features, stale, batch, mask, axis_name)
    # One key for all devices: a loss that draws examples draws them for the whole batch.
    loss_key = step_key(state.seed, "loss", state.step)
    for index, learner in enumerate(structure.learners):
        own = logits[learner.slot]
        right = (jnp.argmax(own, axis=-1) == labels).astype(jnp.float32)
        values = {"count": count, "top1": _masked_sum(right, mask), "loss": jnp.zeros(())}
        for place, term in enumerate(learner.terms):
            hyper = state.hyper[learner.slot]["terms"][term.name]
            numbers = term_numbers(term, hyper, state.step)
            of_examples, of_adaptor, moved = _term_values(
                learner,
                term,
                seen,
                adaptors.get(learner.slot, {}).get(term.name, {}),
                state,
                numbers,
                jax.random.fold_in(jax.random.fold_in(loss_key, index), place),
            )
            value = jnp.sum(of_examples)
            values[term.name] = value
            weighted = numbers["weight"] * value
            if term.rests:  # 0 times an overflow is no 0
                weighted = jnp.where(numbers["weight"] > 0, weighted, 0.0)
            values["loss"] = values["loss"] + weighted
            if of_adaptor is not None:  # what trains it alone has no weight, and ends at the start
                own_loss = _masked_sum(of_adaptor, mask)
                started = has_started(term, hyper, state.step)
                values["loss"] = values["loss"] + jnp.where(started, 0.0, own_loss)
            if moved:
                owned.setdefault(learner.slot, {})[term.name] = moved
        if learner.hygiene is not None:
            # Shared out over devices by their examples, so that their sum has it once.
            values["loss"] = values["loss"] + count * hygiene.penalty(
                learner.hygiene,
                learner.module,
                state.hyper[learner.slot]["hygiene"],
                learned[learner.slot],
                state.opt[learner.slot]["hygiene"],
            )
        loss = loss + values["loss"] / jnp.maximum(everywhere, 1.0)
        sums[learner.slot] = values
    return loss, (updated, owned, sums)


def adaptor_params(state: TrainState) -> dict[str, dict[str, Any]]:
    """{slot: {term: parameters of its adaptor}} of the terms whose adaptors learn."""
    return {
        slot: {term: own["params"] for term, own in terms.items() if own.get("params")}
        for slot, terms in state.loss_state.items()
    }


def refresh_stale(structure: StepStructure, state: TrainState) -> TrainState:
    """Takes new copies of the nets that teach through one, where this step is one to do so.

    After a step that was not finite the copies stand still, like the nets.
    """
    copies = {}
    for slot in structure.stale:
        numbers = state.hyper[slot]["stale"]
        place = (state.step - numbers["first"]).astype(jnp.float32)
        due = state.finite & (jnp.mod(place, numbers["every"]) == 0)
        copies[slot] = jax.tree.map(
            lambda new, old, due=due: jnp.where(due, new, old), state.nets[slot], state.stale[slot]
        )
    return state.replace(stale=copies)


def _finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


@functools.lru_cache(maxsize=64)
def make_step(structure: StepStructure) -> Step:
    """Builds the training step of a structure; equal structures give the same function.

    The step's metrics are {slot: {"count", "loss", "top1", <term>: sums over the batch; "lr",
    "quant_lr", "grad_norm", with hygiene "oscillating" and "frozen"}, "finite": bool}. Where the
    loss, a gradient or a statistic is not finite, the state keeps its nets and optimizers (the step
    counter goes on), so that `nonfinite.locate_nonfinite` can find the cause in it.

    Args:
        structure: From `plan_step(...).structure`.

    Returns:
        step(state, batch, frozen, *, axis_name=None) -> (state, metrics).
    """

    def step(
        state: TrainState,
        batch: Batch,
        frozen: Mapping[str, Any],
        *,
        axis_name: str | None = None,
    ) -> tuple[TrainState, Metrics]:
        state = refresh_stale(structure, state)
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
            )

        differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        adaptors = adaptor_params(state)
        (loss, (updated, owned, metrics)), (grads, adaptor_grads) = differentiate(learned, adaptors)
        if axis_name is not None:
            loss, grads, adaptor_grads, metrics = jax.lax.psum(
                (loss, grads, adaptor_grads, metrics), axis_name
            )
        nets, opt = {}, {}
        # Once bad, always bad: the loop learns of it a step late and must find the old nets.
        statistics = [own.get("batch_stats") for terms in owned.values() for own in terms.values()]
        finite = state.finite & jnp.isfinite(loss) & _finite((updated, statistics))
        for learner in structure.learners:
            slot = learner.slot
            moved, opt[slot], rates = optim.update_optimizer(
                learner.optim,
                state.hyper[slot]["optim"],
                grads[slot],
                state.opt[slot],
                learned[slot],
            )
            if learner.hygiene is not None:
                moved, opt[slot]["hygiene"], shares = hygiene.apply(
                    learner.hygiene,
                    learner.module,
                    state.hyper[slot]["hygiene"],
                    moved,
                    state.opt[slot]["hygiene"],
                )
                rates = {**rates, **shares}
            nets[slot] = join(moved, updated[slot])
            metrics[slot] = {**metrics[slot], **rates}
            # The norm is finite only if every gradient is: one number stands for all of them.
            finite = finite & jnp.isfinite(rates["grad_norm"])
            for term in learner.terms:
                if (gradient := adaptor_grads.get(slot, {}).get(term.name)) is not None:
                    own = owned[slot][term.name]
                    norm = _move_adaptor(learner, term, state, own, gradient)
                    finite = finite & jnp.isfinite(norm) & _finite(own["params"])

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = state.replace(
            step=state.step + 1,
            nets=keep(nets, state.nets),
            opt=keep(opt, state.opt),
            loss_state=keep(owned, state.loss_state),
            finite=finite,
        )
        return new_state, {**metrics, "finite": finite}

    return step


def _move_adaptor(
    learner: Learner, term: Term, state: TrainState, own: dict[str, Any], gradient: Any
) -> jax.Array:
    """Updates an adaptor's parameters and optimizer in place; returns its gradient's norm.

    It learns with the optimizer, the rates and the schedule of the net, and is clipped by itself:
    kernels are decayed like the net's weights, biases, norms and variances are not. `freeze` names
    layers of the net, not its own. Its parts that learn before the term starts stand still then.
    """
    moved, new, rates = optim.update_optimizer(
        dataclasses.replace(learner.optim, freeze=()),
        state.hyper[learner.slot]["optim"],
        {"params": gradient},
        {"position": state.opt[learner.slot]["position"], "inner": own["opt"]},
        {"params": own["params"]},
    )
    params = dict(moved["params"])
    started = has_started(term, state.hyper[learner.slot]["terms"][term.name], state.step)
    for part in TABLE[term.loss].before_start:
        pair = params[part], own["params"][part]
        params[part] = jax.tree.map(lambda n, o: jnp.where(started, o, n), *pair)
    own["params"], own["opt"] = params, new["inner"]
    return rates["grad_norm"]


def name_metrics(plan: Plan, metrics: Metrics) -> dict[str, dict[str, float]]:
    """Turns one step's metrics into {net: {"loss", "top1", <label>, "lr", ...}}, means as floats.

    `top1` is a fraction in [0, 1]. Reads the arrays, so it waits for the step that made them.
    """
    fetched = jax.device_get(metrics)
    named: dict[str, dict[str, float]] = {}
    for learner in plan.structure.learners:
        values = fetched[learner.slot]
        count = max(float(values["count"]), 1.0)
        row = {"loss": float(values["loss"]) / count, "top1": float(values["top1"]) / count}
        for term, label in plan.labels[learner.slot].items():
            # A label may be called "loss" or "lr"; the step's own names come first.
            key = label if label not in values else f"{label}_term"
            row[key] = float(values[term]) / count
        for name in ("lr", "quant_lr", "grad_norm", "oscillating", "frozen"):
            if name in values:
                row[name] = float(values[name])
        named[plan.net_of(learner.slot)] = row
    return named


@functools.lru_cache(maxsize=64)
def eval_step(module: Any) -> Callable[[Mapping[str, Any], Batch], tuple[Metrics, jax.Array]]:
    """Compiled evaluation of a net; equal modules give the same function.

    Args:
        module: QuantizedModel.

    Returns:
        fn(variables, batch) -> (sums as from `metrics.classification`, logits [batch, classes]);
        rows where the batch's "mask" is False count nowhere.
    """

    @jax.jit
    def evaluate(variables: Mapping[str, Any], batch: Batch) -> tuple[Metrics, jax.Array]:
        logits, _ = forward(module, variables, batch["image"])
        mask = None if "mask" not in batch else batch["mask"].astype(bool)
        return classification(logits, batch["label"], where=mask), logits

    return evaluate
