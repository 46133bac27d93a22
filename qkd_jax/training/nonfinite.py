"""Finds where a step went bad: the first net and layer with a value that is not finite.

Runs only after a step has reported `finite == False`, on the state which that step left unchanged,
so it may be slow: nets run eagerly, layer by layer in execution order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from qkd_jax.distillation.forward import forward
from qkd_jax.distillation.terms import term_numbers
from qkd_jax.quantize.interception import ROUNDING
from qkd_jax.training.plan import Plan
from qkd_jax.training.state import TrainState, split, step_key
from qkd_jax.training.step import Batch, adaptor_params, total_loss
from qkd_jax.trees import find

__all__ = ["NonFinite", "locate_nonfinite"]


class NonFinite(NamedTuple):
    """Where: the net, the layer's path ("" is the whole net), and what is not finite there."""

    net: str
    layer: str
    what: str

    def __str__(self) -> str:
        return f"net {self.net!r}, layer {self.layer or '(the whole net)'!r}: {self.what}"


def _bad(value: Any) -> bool:
    return any(
        not bool(np.all(np.isfinite(np.asarray(leaf, np.float64))))
        for leaf in jax.tree.leaves(value)
        if not isinstance(leaf, jax.core.Tracer)
    )


def _bad_leaf(variables: Mapping[str, Any], path: tuple[str, ...]) -> str | None:
    """Name of a variable of the layer at `path` that is not finite, or None."""
    for name, tree in variables.items():
        found = find(tree, "/".join(path), {})
        for keys, leaf in jax.tree_util.tree_leaves_with_path(found):
            if _bad(leaf):
                return "/".join([name, *path, *(str(key.key) for key in keys)])
    return None


def _run(
    net: str, module: Any, variables: Mapping[str, Any], images: Any, **options: Any
) -> tuple[NonFinite | None, list[tuple[str, ...]]]:
    """Runs a net eagerly; returns (the first bad layer, paths in order of execution)."""
    first: list[NonFinite] = []
    order: list[tuple[str, ...]] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        path = tuple(context.module.path)
        order.append(path)
        # A child returns before its parent, so the first to be bad is the innermost. Inside scan
        # or remat values are abstract; there the enclosing layer is the one that is named.
        if not first and _bad(output):
            leaf = _bad_leaf(variables, path)
            if leaf is not None:
                what = f"variable {leaf} is not finite"
            elif _bad((args, kwargs)):
                what = "input is not finite"
            else:
                what = "output is not finite"
            first.append(NonFinite(net, "/".join(path), what))
        return output

    with nn.intercept_methods(watch):
        logits, carried = forward(module, variables, images, **options)
    if not first and _bad(logits):
        first.append(NonFinite(net, "", "logits are not finite"))
    if not first:
        for path in order:
            leaf = _bad_leaf({"statistic": carried.get("batch_stats", {})}, path) if path else None
            if leaf is not None:
                first.append(NonFinite(net, "/".join(path), f"{leaf} is not finite"))
                break
    return (first[0] if first else None), order


def locate_nonfinite(
    plan: Plan, state: TrainState, batch: Batch, frozen: Mapping[str, Any]
) -> NonFinite | None:
    """Finds the first net and layer that made a step's result not finite.

    Args:
        plan: The stage's plan.
        state: As the bad step returned it (nets unchanged, step counter one further).
        batch: The batch of that step.
        frozen: {slot: variables}, as it was given to the step.

    Returns:
        The place, or None if everything is finite. Looked at in this order: the batch, each net's
        forward pass layer by layer (with its variables and statistics), each term of the losses
        with its adaptor, the gradients from the last layer back.
    """
    state, batch, frozen = jax.device_get((state, dict(batch), dict(frozen)))
    state = state.replace(step=state.step - 1)
    if _bad(batch["image"]):
        return NonFinite("batch", "image", "input is not finite")
    structure = plan.structure
    key = step_key(state.seed, "dropout", state.step)
    rounding_key = step_key(state.seed, ROUNDING, state.step)
    orders: dict[str, list[tuple[str, ...]]] = {}
    for index, learner in enumerate(structure.learners):
        net, slot = plan.net_of(learner.slot), learner.slot
        # As the step rounds and drops, so that what is found is what happened.
        rngs = {
            "dropout": jax.random.fold_in(key, index),
            ROUNDING: jax.random.fold_in(rounding_key, index),
        }
        found, orders[slot] = _run(
            net, learner.module, state.nets[slot], batch["image"], train=True, rngs=rngs
        )
        if found:
            return found
    for slot, module in structure.teachers:
        found, _ = _run(plan.net_of(slot), module, frozen[slot], batch["image"])
        if found:
            return found
    parts = {slot: split(variables) for slot, variables in state.nets.items()}
    learned = {slot: part[0] for slot, part in parts.items()}
    carried = {slot: part[1] for slot, part in parts.items()}

    def objective(learned: dict[str, Any], adaptors: dict[str, Any]) -> tuple[jax.Array, Any]:
        loss, (_, owned, sums) = total_loss(
            structure, learned, carried, state, batch, frozen, adaptors=adaptors
        )
        return loss, (sums, owned)

    differentiate = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, (sums, owned)), (grads, of_adaptors) = differentiate(learned, adaptor_params(state))
    for learner in structure.learners:
        net = plan.net_of(learner.slot)
        for term in learner.terms:
            label = plan.labels[learner.slot][term.name]
            # The adaptor stands before the loss: its variables, then the statistics of this pass.
            before, after = (
                terms.get(learner.slot, {}).get(term.name, {})
                for terms in (state.loss_state, owned)
            )
            leaf = _bad_leaf({n: before.get(n, {}) for n in ("params", "batch_stats")}, ())
            leaf = leaf or _bad_leaf({"statistic": after.get("batch_stats", {})}, ())
            if leaf is not None:
                what = f"{leaf} of the adaptor of loss {label!r} is not finite"
                return NonFinite(net, "", what)
            given = state.hyper[learner.slot]["terms"][term.name]
            resting = term.rests and not term_numbers(term, given, state.step)["weight"] > 0
            if _bad(sums[learner.slot][term.name]) and not resting:
                return NonFinite(net, "", f"loss {label!r} is not finite")
    for learner in structure.learners:
        found = _bad_gradient(plan.net_of(learner.slot), grads[learner.slot], orders[learner.slot])
        if found:
            return found
    for slot, terms in of_adaptors.items():
        for term, gradient in terms.items():
            if _bad(gradient):
                what = f"gradient of the adaptor of loss {plan.labels[slot][term]!r} is not finite"
                return NonFinite(plan.net_of(slot), "", what)
    for learner in structure.learners:
        net = plan.net_of(learner.slot)
        leaf = _bad_leaf(learned[learner.slot], ())
        if leaf is not None:
            return NonFinite(net, leaf.split("/", 1)[1], f"variable {leaf} is not finite")
    return None


def _bad_gradient(net: str, grads: Any, order: list[tuple[str, ...]]) -> NonFinite | None:
    """The layer where a bad gradient first appears: the last one in the forward order."""
    place = {path: index for index, path in enumerate(order)}
    worst: tuple[int, str, str] | None = None
    largest = (0.0, "", "")
    for keys, leaf in jax.tree_util.tree_leaves_with_path(grads):
        collection, *path = (str(key.key) for key in keys)
        layer = next(
            (tuple(path[:n]) for n in range(len(path), 0, -1) if tuple(path[:n]) in place), ()
        )
        name = "/".join([collection, *path])
        here = (place.get(layer, -1), "/".join(layer), name)
        if _bad(leaf):
            worst = here if worst is None else max(worst, here)
        else:
            size = float(np.max(np.abs(np.asarray(leaf, np.float64)), initial=0.0))
            largest = max(largest, (size, "/".join(layer), name))
    if worst is not None:
        return NonFinite(net, worst[1], f"gradient of {worst[2]} is not finite")
    # The step sums squares in float32, which overflows before the gradients themselves do.
    if largest[0] > 1e18:
        return NonFinite(
            net, largest[1], f"gradient of {largest[2]} is {largest[0]:.1e}: its norm overflows"
        )
    return None
