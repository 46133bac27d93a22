"""The training step: one pure function for every way in which nets learn from each other.

`step(state, batch, frozen, *, axis_name=None) -> (state, metrics)`. All nets that learn run forward
once, their losses are added and one `value_and_grad` gives all gradients: each loss detaches its
teacher, so no net's gradient sees another net's loss. Nets that only teach are an argument, in
evaluation mode. Nothing here knows of devices; `parallel.compile_step` compiles the step for them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.interception import ROUNDING
from qkd_jax.losses import LOSSES
from qkd_jax.metrics import classification
from qkd_jax.training import hygiene, optim
from qkd_jax.training.plan import Plan, StepStructure, Term
from qkd_jax.training.state import TrainState, join, split, step_key

__all__ = [
    "Batch",
    "Metrics",
    "Step",
    "eval_step",
    "forward",
    "make_step",
    "name_metrics",
    "total_loss",
]

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]
Step = Callable[..., tuple[TrainState, Metrics]]


# Other names for the mode: a model with one of them would run in its default mode throughout.
FOREIGN_MODES = ("training", "is_training", "is_train", "inference", "testing")


@functools.lru_cache(maxsize=256)
def _mode_argument(model_class: type) -> str | None:
    """Name of the argument by which a model is told that it trains, or None."""
    names = inspect.signature(model_class.__call__).parameters
    known = next((n for n in ("train", "deterministic") if n in names), None)
    foreign = next((n for n in FOREIGN_MODES if n in names), None)
    if known is None and foreign is not None:
        raise ValueError(
            f"{model_class.__name__}.__call__ takes {foreign!r}, which nothing sets here; rename "
            "it to `train` (True while training) or `deterministic` (False while training)."
        )
    return known


def mode_arguments(module: Any, train: bool) -> dict[str, bool]:
    """Keyword arguments that put a model into training or evaluation mode.

    A model may take `train`, linen's `deterministic`, or neither.

    Raises:
        ValueError: it takes another name for the mode, such as `training`.
    """
    name = _mode_argument(type(module.model))
    return {} if name is None else {name: train if name == "train" else not train}


def forward(
    module: Any,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Runs one net.

    Args:
        module: QuantizedModel.
        variables: Its variables.
        images: [batch, height, width, channels] float32.
        train: Training mode: batch statistics are used and updated.
        rngs: Keys of the random streams: the model's own (dropout), and stochastic rounding's.
        axis_name: The mapped axis under pmap, else None.

    Returns:
        (logits [batch, classes] float32, carried collections after the pass, such as batch_stats).
    """
    _, carried = split(variables)
    arguments: dict[str, Any] = mode_arguments(module, train)
    if axis_name is not None:
        arguments["axis_name"] = axis_name
    if rngs is not None:
        arguments["rngs"] = dict(rngs)
    if not (train and carried):
        return module.apply(variables, images, **arguments), carried
    logits, updated = module.apply(variables, images, mutable=list(carried), **arguments)
    return logits, {**carried, **updated}


def _masked_sum(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.sum(values if mask is None else jnp.where(mask, values, 0.0))


def _term_values(
    term: Term,
    own: jax.Array,
    logits: Mapping[str, jax.Array],
    labels: jax.Array,
    numbers: Mapping[str, jax.Array],
    mask: jax.Array | None,
) -> jax.Array:
    """Values of one term, [batch], without its weight; 0 where the mask is False."""
    inputs = []
    for name in term.inputs:
        if name == "labels":
            inputs.append(labels)
        elif name == "teacher_logits":
            inputs.append(jax.lax.stop_gradient(logits[str(term.source)]))
        else:
            inputs.append(own)
    arguments: dict[str, Any] = {name: numbers[name] for name in term.traced}
    if mask is not None:
        arguments["where"] = mask
    with jax.named_scope(f"loss_{term.loss}"):
        return LOSSES[term.loss](*inputs, **arguments, **dict(term.static))


def total_loss(
    structure: StepStructure,
    learned: Mapping[str, Any],
    carried: Mapping[str, Any],
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Any],
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
    """Sum over nets of sum over terms of weight * mean over the whole batch.

    Under a mapped axis the value is this device's share: its sum over the global count, so that
    adding gradients over devices gives the gradient of the global mean.

    Args:
        structure: What is compiled.
        learned: {slot: {"params", "quant"}}, the differentiated argument.
        carried: {slot: other collections}.
        state: For numbers, step and seed.
        batch: "image" [batch, ...], "label" int32 [batch], optionally "mask" bool [batch].
        frozen: {slot: variables} of the nets that only teach.
        axis_name: The mapped axis, or None.

    Returns:
        (loss, ({slot: carried after the pass}, {slot: sums of metrics on this device})).
    """
    images, labels = batch["image"], batch["label"]
    mask = None if "mask" not in batch else batch["mask"].astype(bool)
    # Weights are rounded alike on all devices, so the key of rounding does not know of them.
    rounding_key = step_key(state.seed, ROUNDING, state.step)
    key = step_key(state.seed, "dropout", state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    logits: dict[str, jax.Array] = {}
    updated: dict[str, Any] = {}
    for index, learner in enumerate(structure.learners):
        slot = learner.slot
        logits[slot], updated[slot] = forward(
            learner.module,
            join(learned[slot], carried[slot]),
            images,
            train=True,
            rngs={
                "dropout": jax.random.fold_in(key, index),
                ROUNDING: jax.random.fold_in(rounding_key, index),
            },
            axis_name=axis_name,
        )
    for slot, module in structure.teachers:
        logits[slot], _ = forward(module, frozen[slot], images, axis_name=axis_name)

    count = _masked_sum(jnp.ones(labels.shape, jnp.float32), mask)
    everywhere = count if axis_name is None else jax.lax.psum(count, axis_name)
    loss = jnp.zeros((), jnp.float32)
    sums: Metrics = {}
    for learner in structure.learners:
        own = logits[learner.slot]
        right = (jnp.argmax(own, axis=-1) == labels).astype(jnp.float32)
        values = {"count": count, "top1": _masked_sum(right, mask), "loss": jnp.zeros(())}
        for term in learner.terms:
            numbers = state.hyper[learner.slot]["terms"][term.name]
            value = jnp.sum(_term_values(term, own, logits, labels, numbers, mask))
            values[term.name] = value
            values["loss"] = values["loss"] + numbers["weight"] * value
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
    return loss, (updated, sums)


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
        parts = {slot: split(variables) for slot, variables in state.nets.items()}
        learned = {slot: part[0] for slot, part in parts.items()}
        carried = {slot: part[1] for slot, part in parts.items()}

        def objective(learned: dict[str, Any]) -> tuple[jax.Array, Any]:
            return total_loss(
                structure, learned, carried, state, batch, frozen, axis_name=axis_name
            )

        (loss, (updated, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(learned)
        if axis_name is not None:
            loss, grads, metrics = jax.lax.psum((loss, grads, metrics), axis_name)
        nets, opt = {}, {}
        # Once bad, always bad: the loop learns of it a step late and must find the old nets.
        finite = state.finite & jnp.isfinite(loss) & _finite(updated)
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

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = state.replace(
            step=state.step + 1,
            nets=keep(nets, state.nets),
            opt=keep(opt, state.opt),
            finite=finite,
        )
        return new_state, {**metrics, "finite": finite}

    return step


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
