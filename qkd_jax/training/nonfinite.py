"""Locates what made a step not finite: the first net and layer with such a value.

Runs only after a step has reported `finite == False`, on the state which that step left unchanged,
so it may be slow: nets run eagerly, layer by layer in execution order.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qkd_jax.distillation.forward import forward
from qkd_jax.distillation.terms import term_numbers
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.interceptors import intercepting
from qkd_jax.quantize.operands import ROUNDING
from qkd_jax.training.accumulation import accumulated_gradients
from qkd_jax.training.objective import Batch
from qkd_jax.training.plan import Learner, Plan
from qkd_jax.training.state import TrainState, split, step_key
from qkd_jax.trees import find, join, path_name

Path = tuple[str, ...]


class NonFinite(NamedTuple):
    """The net's name, the layer's path ("" is the whole net), and what is not finite there."""

    net: str
    layer: str
    what: str

    def __str__(self) -> str:
        return f"net {self.net!r}, layer {self.layer or '(the whole net)'!r}: {self.what}"


def locate_nonfinite(
    plan: Plan, state: TrainState, batch: Batch, frozen: Mapping[str, Any]
) -> NonFinite | None:
    """Locates the first net and layer that made a step's result not finite.

    Searched in this order: the batch, each net's forward pass layer by layer (with its variables
    and statistics), each term of the losses with its adaptor, the gradients from the last layer
    back, the variables.

    Args:
        plan: the stage's plan.
        state: as that step returned it (nets unchanged, step counter one further).
        batch: the batch of that step.
        frozen: {slot: variables}, as it was given to the step.

    Returns:
        The net and layer, or None if everything is finite.
    """
    state, batch, frozen = jax.device_get((state, dict(batch), dict(frozen)))
    state = state.replace(step=state.step - 1)
    if _bad(batch["image"]):
        return NonFinite("batch", "image", "input is not finite")
    structure = plan.structure
    # The random numbers are those of the step, so that what happens here is what happened there.
    key = step_key(state.seed, "dropout", state.step)
    rounding_key = step_key(state.seed, ROUNDING, state.step)
    orders: dict[str, list[Path]] = {}
    for index, learner in enumerate(structure.learners):
        name, slot = plan.name_of(learner.slot), learner.slot
        rngs = {
            "dropout": jax.random.fold_in(key, index),
            ROUNDING: jax.random.fold_in(rounding_key, index),
        }
        located, orders[slot] = _run(
            name, learner.net, state.nets[slot], batch["image"], train=True, rngs=rngs
        )
        if located:
            return located
    for slot, net in structure.teachers:
        located, _ = _run(plan.name_of(slot), net, frozen[slot], batch["image"])
        if located:
            return located
    (_, (_, term_states, sums)), (grads, of_adaptors) = jax.jit(
        functools.partial(accumulated_gradients, structure)
    )(state, batch, frozen)
    for learner in structure.learners:
        after = term_states.get(learner.slot, {})
        if located := _bad_term(plan, learner, state, after, sums[learner.slot]):
            return located
    for learner in structure.learners:
        name, slot = plan.name_of(learner.slot), learner.slot
        if located := _bad_gradient(name, grads[slot], orders[slot]):
            return located
    for slot, terms in of_adaptors.items():
        for term, gradient in terms.items():
            if _bad(gradient):
                what = f"gradient of the adaptor of loss {plan.labels[slot][term]!r} is not finite"
                return NonFinite(plan.name_of(slot), "", what)
    for learner in structure.learners:
        if leaf := _bad_leaf(split(state.nets[learner.slot])[0], ()):
            layer = leaf.split("/", 1)[1]
            what = f"variable {leaf} is not finite"
            return NonFinite(plan.name_of(learner.slot), layer, what)
    return None


def _run(
    name: str, net: QuantizedModel, variables: Mapping[str, Any], images: Any, **options: Any
) -> tuple[NonFinite | None, list[Path]]:
    """Runs a net eagerly; returns (the first bad layer, paths in order of execution)."""
    located: list[NonFinite] = []
    order: list[Path] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        path = tuple(context.module.path)
        order.append(path)
        # A child returns before its parent, so the first to be bad is the innermost. Inside scan
        # or remat values are abstract; there the enclosing layer is the one that is named.
        if not located and _bad(output):
            leaf = _bad_leaf(variables, path)
            if leaf is not None:
                what = f"variable {leaf} is not finite"
            elif _bad((args, kwargs)):
                what = "input is not finite"
            else:
                what = "output is not finite"
            located.append(NonFinite(name, "/".join(path), what))
        return output

    with intercepting(watch):
        logits, carried = forward(net, variables, images, **options)
    if not located and _bad(logits):
        located.append(NonFinite(name, "", "logits are not finite"))
    statistics = {"statistic": carried.get("batch_stats", {})}
    for path in order:
        if not located and path and (leaf := _bad_leaf(statistics, path)):
            located.append(NonFinite(name, "/".join(path), f"{leaf} is not finite"))
    return (located[0] if located else None), order


def _bad_term(
    plan: Plan,
    learner: Learner,
    state: TrainState,
    after: Mapping[str, Any],
    sums: Mapping[str, jax.Array],
) -> NonFinite | None:
    """The first term of a net, or its adaptor, that is not finite; `after` has their new states."""
    name = plan.name_of(learner.slot)
    for term in learner.terms:
        label = plan.labels[learner.slot][term.name]
        # The adaptor stands before the loss: its variables, then the statistics of this pass.
        before = state.loss_state.get(learner.slot, {}).get(term.name, {})
        statistics = after.get(term.name, {}).get("batch_stats", {})
        leaf = _bad_leaf({n: before.get(n, {}) for n in ("params", "batch_stats")}, ())
        leaf = leaf or _bad_leaf({"statistic": statistics}, ())
        if leaf is not None:
            what = f"{leaf} of the adaptor of loss {label!r} is not finite"
            return NonFinite(name, "", what)
        numbers = state.hyper[learner.slot]["terms"][term.name]
        is_off = term.can_be_inactive and not term_numbers(term, numbers, state.step)["weight"] > 0
        if _bad(sums[term.name]) and not is_off:
            return NonFinite(name, "", f"loss {label!r} is not finite")
    return None


def _bad_gradient(name: str, grads: Any, order: list[Path]) -> NonFinite | None:
    """The layer where a bad gradient first appears: the last one in the forward order."""
    position = {path: index for index, path in enumerate(order)}
    worst: tuple[int, str, str] | None = None
    largest = (0.0, "", "")
    for keys, leaf in jax.tree_util.tree_leaves_with_path(grads):
        collection, *path = path_name(keys).split("/")
        layer = next(
            (tuple(path[:n]) for n in range(len(path), 0, -1) if tuple(path[:n]) in position), ()
        )
        variable = "/".join([collection, *path])
        if _bad(leaf):
            here = (position.get(layer, -1), "/".join(layer), variable)
            worst = here if worst is None else max(worst, here)
        else:
            size = float(np.max(np.abs(np.asarray(leaf, np.float64)), initial=0.0))
            largest = max(largest, (size, "/".join(layer), variable))
    if worst is not None:
        return NonFinite(name, worst[1], f"gradient of {worst[2]} is not finite")
    # The step sums squares in float32, which overflows before the gradients themselves do.
    if largest[0] > 1e18:
        what = f"gradient of {largest[2]} is {largest[0]:.1e}: its norm overflows"
        return NonFinite(name, largest[1], what)
    return None


def _bad_leaf(variables: Mapping[str, Any], path: Path) -> str | None:
    """Name of a variable of the layer at `path` that is not finite, or None."""
    for name, tree in variables.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(find(tree, "/".join(path), {})):
            if _bad(leaf):
                return join(name, *path, path_name(keys))
    return None


def _bad(value: Any) -> bool:
    return any(
        not bool(np.all(np.isfinite(np.asarray(leaf, np.float64))))
        for leaf in jax.tree.leaves(value)
        if not isinstance(leaf, jax.core.Tracer)
    )
