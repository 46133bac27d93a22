"""The training state, how to build it from variables, and the named random streams.

A net's variables are {"params", "batch_stats", "quant"} (the last once it is calibrated); `params`
and `quant` learn, the rest is carried by the forward pass. The state holds the nets that learn in a
stage under canonical slots ("net0", ...); nets that only teach travel beside it, as `frozen`.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.distillation.term_state import check_learned
from qkd_jax.quantize.variables import folded_entries
from qkd_jax.training import averages, hygiene, layer_rates, optim
from qkd_jax.training.plan import Plan
from qkd_jax.trees import flatten

Variables = dict[str, Any]
LEARNED = ("params", "quant")


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and writes, arrays only.

    Attributes:
        step: int32 scalar, counts over the whole experiment and is never reset.
        seed: uint32 scalar, root of the random streams.
        nets: {slot: variables} of the nets that learn.
        opt: {slot: {"position", "inner"}}; `position` is the place in the net's schedule. With
            "hygiene" and "ema", the average of the net's variables, where they are on.
        hyper: {slot: numbers}, float32; nothing in it forces a new compilation.
        loss_state: {slot: {term: state}} of the terms that have one: the variables of an adaptor
            between two nets' features ("params", "batch_stats", "teacher": constants of the
            source), the state of their optimizer ("opt"), a memory ("memory").
        stale: {slot: variables} of the copies through which nets teach while they learn; empty
            if they teach with their current variables.
        finite: false from the first step on whose loss, gradient or statistic is not finite. The
            nets are not updated any more, so that the cause can still be located in them.
    """

    step: jax.Array
    seed: jax.Array
    nets: dict[str, Variables]
    opt: dict[str, Any]
    hyper: dict[str, Any]
    loss_state: dict[str, Any] = flax.struct.field(default_factory=dict)
    stale: dict[str, Variables] = flax.struct.field(default_factory=dict)
    finite: jax.Array | bool = True


def split(variables: Mapping[str, Any]) -> tuple[Variables, Variables]:
    """Splits a net's variables into (what learns, what the forward pass carries)."""
    learned = {name: tree for name, tree in variables.items() if name in LEARNED}
    carried = {name: tree for name, tree in variables.items() if name not in LEARNED}
    return learned, carried


def join(learned: Mapping[str, Any], carried: Mapping[str, Any]) -> Variables:
    """Returns variables from the two parts that `split` returns."""
    return {**learned, **carried}


def stream_key(seed: jax.Array | int, name: str) -> jax.Array:
    """Returns the key of a named random stream: fold_in(key(seed), crc32(name))."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def step_key(seed: jax.Array | int, name: str, step: jax.Array | int) -> jax.Array:
    """Returns the key of a named stream at a step; no key is carried, so resuming is exact."""
    return jax.random.fold_in(stream_key(seed, name), step)


def start_state(
    plan: Plan,
    variables: Mapping[str, Variables],
    *,
    step: int = 0,
    seed: int = 0,
    opt: Mapping[str, Any] | None = None,
    term_states: Mapping[str, Mapping[str, Any]] | None = None,
    labels: np.ndarray | jax.Array | None = None,
    stale: Mapping[str, Variables] | None = None,
) -> TrainState:
    """Builds the state at the start of a stage.

    Args:
        plan: from `plan_step`.
        variables: {name: variables}; nets that do not learn in this stage may be among them.
        step: global step at which the stage starts.
        seed: root seed of the random streams.
        opt: {name: optimizer state} of nets that continue an earlier stage's optimizer; every
            other net gets a new one.
        term_states: {name: {label: state}} of terms that continue; every other is initialised.
        labels: [examples] integers, the labels of the training set in the order of the batches'
            "index". Memories draw examples by class; without labels they learn them batch by batch.
        stale: {name: variables} of the copies through which nets teach; every other is copied from
            `variables`.

    Returns:
        A state that shares no buffer with the arguments (the step donates it).

    Raises:
        ValueError: Variables are missing, are folded, an optimizer state of another kind, or
            labels of another number than that of the training examples.
    """
    nets = _by_slot(plan, variables, plan.learners)
    optimizers: dict[str, Any] = {}
    for name in plan.learners:
        slot = plan.slots[name]
        learned, _ = split(nets[slot])
        for path, _ in folded_entries(learned):
            raise ValueError(
                f"net {name!r} has a folded BatchNorm or a rotation at {path or '/'!r} and cannot "
                "learn; train the variables from before fold_bn or rotate_inputs."
            )
        optimizers[slot] = initial = init_opt(plan, name, nets[slot])
        if opt is not None and name in opt:
            wanted = {key: initial[key] for key in opt[name] if key in initial}
            optimizers[slot] = {**initial, **_continued(name, opt[name], wanted)}
    copies = {s: (stale or {}).get(plan.name_of(s), nets[s]) for s in plan.structure.stale}
    trees = {
        "nets": nets,
        "opt": optimizers,
        "hyper": plan.hyper,
        "loss_state": _loss_state(plan, variables, seed, term_states or {}, labels),
        "stale": copies,
    }
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        seed=jnp.asarray(np.uint32(seed)),
        finite=jnp.asarray(True),
        # The step donates its state; without copies the caller's arrays would be deleted with it.
        **jax.tree.map(lambda x: jnp.array(x, copy=True), trees),
    )


def init_term_state(
    plan: Plan,
    name: str,
    term: str,
    key: jax.Array,
    teacher: Mapping[str, Any] | None,
    labels: jax.Array | None = None,
) -> dict[str, Any]:
    """Returns the initial state of a term.

    Args:
        plan: from `plan_step`.
        name: the net that learns.
        term: the term's canonical name.
        key: of its random numbers.
        teacher: variables of its source, if it has one.
        labels: [examples], as for `start_state`.
    """
    state = plan.starts[plan.slots[name]][term](key, teacher, labels)
    if state.get("params"):
        of_adaptor = {"params": state["params"]}
        structure = plan.learner(name).optim.of_adaptor()
        state["opt"] = optim.init_optimizer(structure, of_adaptor)["inner"]
    return state


def jit_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles what runs once: on CPU, optimizing random number generators costs seconds."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def _loss_state(
    plan: Plan,
    variables: Mapping[str, Variables],
    seed: int,
    continued: Mapping[str, Mapping[str, Any]],
    labels: np.ndarray | jax.Array | None,
) -> dict[str, Any]:
    states: dict[str, Any] = {}
    for learner in plan.structure.learners:
        name = plan.name_of(learner.slot)
        for term in learner.terms:
            if not term.has_state:
                continue
            label = plan.labels[learner.slot][term.name]
            state = continued.get(name, {}).get(label)
            if state is None:
                numbers = plan.hyper[learner.slot]["terms"][term.name]
                check_learned(f"learn.{name}.{label}", term, numbers)
                source = variables[plan.name_of(term.sources[0])] if term.sources else None
                state = jit_once(functools.partial(init_term_state, plan, name, term.name))(
                    stream_key(seed, f"loss/{name}/{label}"),
                    source,
                    None if labels is None else jnp.asarray(labels),
                )
            states.setdefault(learner.slot, {})[term.name] = state
    return states


def init_opt(plan: Plan, name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the initial state of a net's optimizer, and of its hygiene and average if any."""
    learner = plan.learner(name)
    learned, _ = split(variables)
    check_patterns(name, learner.optim, learned)
    state = optim.init_optimizer(learner.optim, learned)
    if learner.hygiene is not None:
        where = f"hygiene.{name}"
        state["hygiene"] = hygiene.init(learner.hygiene, learner.net, learned, where=where)
    if learner.optim.ema:
        state["ema"] = averages.init(variables)
    return state


def check_patterns(name: str, structure: optim.OptimStructure, learned: Mapping[str, Any]) -> None:
    """Refuses patterns of an optimizer that match nothing.

    Args:
        name: the net's name, for messages.
        structure: of its optimizer.
        learned: {"params": ..., "quant": ...}, arrays or shapes.

    Raises:
        ValueError: a pattern matches no layer, or rates by depth have no blocks.
    """
    paths = [tuple(path.split("/")) for path in flatten(dict(learned))]
    for field in ("freeze", "adam_layers", "stacked_layers"):
        patterns = getattr(structure, field)
        used = {pattern for path in paths for pattern in optim.frozen_by(patterns, path)}
        for pattern in patterns:
            if pattern not in used:
                layers = dict.fromkeys(
                    "/".join(path[1:-1]) for path in paths if path[0] == "params"
                )
                raise ValueError(
                    f"optim.{name}.{field} {pattern!r} matches no layer; a pattern must match a "
                    f"whole path: {', '.join(layers)}.{checks.nearest(pattern, layers)}"
                )
    patterns, stem = structure.layer_rates, structure.layer_stem
    layer_rates.check(f"optim.{name}", learned, patterns=patterns, stem=stem)


def _continued(name: str, state: Any, initial: Any) -> Any:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (state, initial)]
    if jax.tree.structure(state) != jax.tree.structure(initial) or shapes[0] != shapes[1]:
        raise ValueError(
            f"optim.{name}.continues: the optimizer state that is carried on belongs to another "
            "optimizer or to other variables; give both stages the same optimizer name, and "
            "calibrate before the first of them."
        )
    return state


def _by_slot(plan: Plan, variables: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    for name in names:
        if name not in variables:
            raise checks.unknown("net (its variables are missing)", name, variables)
    return {plan.slots[name]: variables[name] for name in names}


def frozen_variables(plan: Plan, variables: Mapping[str, Variables]) -> dict[str, Variables]:
    """Returns {slot: variables} of the nets that only teach, the step's `frozen` argument."""
    return _by_slot(plan, variables, plan.teachers)


def term_states(plan: Plan, state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns {name: {label: state}} of the terms that have a state."""
    return {
        plan.name_of(slot): {plan.labels[slot][term]: tree for term, tree in terms.items()}
        for slot, terms in state.loss_state.items()
    }


def stale_variables(plan: Plan, state: TrainState) -> dict[str, Variables]:
    """Returns {name: variables of the copy through which it teaches}."""
    return {plan.name_of(slot): variables for slot, variables in state.stale.items()}


def net_variables(plan: Plan, state: TrainState) -> dict[str, Variables]:
    """Returns {name: variables} of the nets that learn."""
    return {name: state.nets[plan.slots[name]] for name in plan.learners}


def average_variables(plan: Plan, state: TrainState) -> dict[str, Variables]:
    """Returns {name: average of its variables} of the nets that have one, in their dtypes."""
    found = {}
    for name in plan.learners:
        if (own := state.opt[plan.slots[name]].get("ema")) is not None:
            found[name] = averages.averaged(own, state.nets[plan.slots[name]])
    return found


def optimizer_states(plan: Plan, state: TrainState) -> dict[str, Any]:
    """Returns {name: optimizer state} of the nets that learn."""
    return {name: state.opt[plan.slots[name]] for name in plan.learners}
