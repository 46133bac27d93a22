"""The training state, how to build it from variables, and the named random streams.

A net's variables are {"params", "batch_stats", "quant"} (the last once it is calibrated); `params`
and `quant` learn, the rest is carried by the forward pass. The state holds the nets that learn in a
stage under canonical slots ("net0", ...); nets that only teach travel beside it, as `frozen`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.distillation.term_state import check_learned
from qkd_jax.quantize.variables import folded_entries
from qkd_jax.training import hygiene, optim
from qkd_jax.training.plan import Plan
from qkd_jax.trees import flatten

__all__ = [
    "LEARNED",
    "TrainState",
    "frozen_variables",
    "init_opt",
    "init_owned",
    "jit_once",
    "join",
    "net_variables",
    "optimizer_states",
    "owned_states",
    "split",
    "stale_variables",
    "start_state",
    "step_key",
    "stream_key",
]

Variables = dict[str, Any]
LEARNED = ("params", "quant")


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and writes, arrays only.

    Attributes:
        step: int32 scalar, counts over the whole experiment and is never reset.
        seed: uint32 scalar, root of the random streams.
        nets: {slot: variables} of the nets that learn.
        opt: {slot: {"position", "inner"}}; `position` is the place in the net's schedule.
        hyper: {slot: numbers}, float32; nothing in it forces a new compilation.
        loss_state: {slot: {term: what it owns}}: the variables of an adaptor between two nets'
            features ("params", "batch_stats", "teacher": constants of the source), the state of
            their optimizer ("opt"), a memory ("memory"); empty where no term owns anything.
        stale: {slot: variables} of the copies through which nets teach while they learn; empty
            where they teach as they stand.
        finite: False from the first step on whose loss, gradient or statistic is not finite: from
            there the nets stand still, so that the cause is still in them when somebody looks.
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
    """Puts back together what `split` took apart."""
    return {**learned, **carried}


def stream_key(seed: jax.Array | int, name: str) -> jax.Array:
    """Key of a named random stream: fold_in(key(seed), crc32(name))."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def step_key(seed: jax.Array | int, name: str, step: jax.Array | int) -> jax.Array:
    """Key of a named stream at a step; nothing random is carried, so a resumed run is exact."""
    return jax.random.fold_in(stream_key(seed, name), step)


def _copy(tree: Any) -> Any:
    # The step donates its state; without a copy the caller's arrays would be deleted with it.
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _pick(plan: Plan, variables: Mapping[str, Any], nets: tuple[str, ...]) -> dict[str, Any]:
    for net in nets:
        if net not in variables:
            raise checks.unknown("net (its variables are missing)", net, variables)
    return {plan.slots[net]: variables[net] for net in nets}


def start_state(
    plan: Plan,
    variables: Mapping[str, Variables],
    *,
    step: int = 0,
    seed: int = 0,
    opt: Mapping[str, Any] | None = None,
    owned: Mapping[str, Mapping[str, Any]] | None = None,
    labels: np.ndarray | jax.Array | None = None,
    stale: Mapping[str, Variables] | None = None,
) -> TrainState:
    """State at the start of a stage.

    Args:
        plan: From `plan_step`.
        variables: {net: variables}; nets that do not learn in this stage may be among them.
        step: Global step at which the stage starts.
        seed: Root seed of the random streams.
        opt: {net: optimizer state} for nets that continue an earlier stage's optimizer; every
            other net starts a new one.
        owned: {net: {label: what a term owns}} for terms that go on; every other starts anew.
        labels: [examples] integers, the labels of the training set in the order of the batches'
            "index". Memories draw examples by class; without labels they learn them batch by batch.
        stale: {net: variables} of copies that go on to teach; every other is of the net as it is.

    Returns:
        A state that shares no buffer with the arguments (the step donates it).

    Raises:
        ValueError: Variables are missing, are folded, an optimizer state of another kind, or
            labels of another number than that of the training examples.
    """
    nets = _pick(plan, variables, plan.learners)
    states: dict[str, Any] = {}
    for net in plan.learners:
        slot = plan.slots[net]
        learned, _ = split(nets[slot])
        _refuse_folded(net, learned)
        states[slot] = fresh = init_opt(plan, net, learned)
        if opt is not None and net in opt:
            wanted = {key: fresh[key] for key in opt[net] if key in fresh}
            states[slot] = {**fresh, **_continued(net, opt[net], wanted)}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        seed=jnp.asarray(np.uint32(seed)),
        nets=_copy(nets),
        opt=_copy(states),
        hyper=_copy(plan.hyper),
        loss_state=_copy(_loss_state(plan, variables, seed, owned or {}, labels)),
        stale=_copy(
            {
                slot: (stale or {}).get(plan.net_of(slot), nets[slot])
                for slot in plan.structure.stale
            }
        ),
        finite=jnp.asarray(True),
    )


def init_owned(
    plan: Plan,
    net: str,
    term: str,
    key: jax.Array,
    teacher: Mapping[str, Any] | None,
    labels: jax.Array | None = None,
) -> dict[str, Any]:
    """What a term owns when it starts, of its source's variables and the training set's labels."""
    slot = plan.slots[net]
    (learner,) = (n for n in plan.structure.learners if n.slot == slot)
    state = plan.starts[slot][term](key, teacher, labels)
    if state.get("params"):
        state["opt"] = optim.init_optimizer(learner.optim, {"params": state["params"]})["inner"]
    return state


def jit_once(function: Any) -> Any:
    """Compiles what runs once: on CPU, optimizing random number generators costs seconds."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def _loss_state(
    plan: Plan,
    variables: Mapping[str, Variables],
    seed: int,
    owned: Mapping[str, Mapping[str, Any]],
    labels: np.ndarray | jax.Array | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for learner in plan.structure.learners:
        net = plan.net_of(learner.slot)
        for term in learner.terms:
            if not term.owns:
                continue
            label = plan.labels[learner.slot][term.name]
            state = owned.get(net, {}).get(label)
            if state is None:
                numbers = plan.hyper[learner.slot]["terms"][term.name]
                check_learned(f"learn.{net}.{label}", term, numbers)
                source = variables[plan.net_of(term.sources[0])] if term.sources else None
                begin = functools.partial(init_owned, plan, net, term.name)
                key = stream_key(seed, f"loss/{net}/{label}")
                state = jit_once(begin)(
                    key, source, None if labels is None else jnp.asarray(labels)
                )
            found.setdefault(learner.slot, {})[term.name] = state
    return found


def init_opt(plan: Plan, net: str, learned: Mapping[str, Any]) -> dict[str, Any]:
    """State of a net's optimizer that starts, and of its hygiene where it has any."""
    (learner,) = (n for n in plan.structure.learners if n.slot == plan.slots[net])
    _check_freeze(net, learner.optim.freeze, learned)
    state = optim.init_optimizer(learner.optim, learned)
    if learner.hygiene is not None:
        where = f"hygiene.{net}"
        state["hygiene"] = hygiene.init(learner.hygiene, learner.module, learned, where=where)
    return state


def _check_freeze(net: str, freeze: tuple[str, ...], learned: Mapping[str, Any]) -> None:
    """Refuses a pattern that freezes nothing."""
    names = [tuple(name.split("/")) for name in flatten(dict(learned))]
    used = {pattern for path in names for pattern in optim.frozen_by(freeze, path)}
    for pattern in freeze:
        if pattern not in used:
            layers = dict.fromkeys("/".join(path[1:-1]) for path in names if path[0] == "params")
            raise ValueError(
                f"optim.{net}.freeze {pattern!r} matches no layer; a pattern must match a whole "
                f"path: {', '.join(layers)}.{checks.nearest(pattern, layers)}"
            )


def _continued(net: str, state: Any, fresh: Any) -> Any:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (state, fresh)]
    if jax.tree.structure(state) != jax.tree.structure(fresh) or shapes[0] != shapes[1]:
        raise ValueError(
            f"optim.{net}.continues: the optimizer state that is carried on belongs to another "
            "optimizer or to other variables; give both stages the same optimizer name, and "
            "calibrate before the first of them."
        )
    return state


def _refuse_folded(net: str, learned: Mapping[str, Any]) -> None:
    for path, _ in folded_entries(learned):
        raise ValueError(
            f"net {net!r} has a folded BatchNorm at {path or '/'!r} and cannot learn; train "
            "the variables from before fold_bn."
        )


def owned_states(plan: Plan, state: TrainState) -> dict[str, dict[str, Any]]:
    """{net: {label: what a term owns}} out of a state, for a stage that goes on."""
    return {
        plan.net_of(slot): {plan.labels[slot][term]: tree for term, tree in terms.items()}
        for slot, terms in state.loss_state.items()
    }


def stale_variables(plan: Plan, state: TrainState) -> dict[str, Variables]:
    """{net: variables of the copy through which it teaches} out of a state."""
    return {plan.net_of(slot): variables for slot, variables in state.stale.items()}


def frozen_variables(plan: Plan, variables: Mapping[str, Variables]) -> dict[str, Variables]:
    """{slot: variables} of the nets that only teach, the step's `frozen` argument."""
    return _pick(plan, variables, plan.teachers)


def net_variables(plan: Plan, state: TrainState) -> dict[str, Variables]:
    """{net: variables} of the nets that learn, out of a state."""
    return {net: state.nets[plan.slots[net]] for net in plan.learners}


def optimizer_states(plan: Plan, state: TrainState) -> dict[str, Any]:
    """{net: optimizer state} out of a state, for a stage that continues it."""
    return {net: state.opt[plan.slots[net]] for net in plan.learners}
