"""The training step: one pure function for every way in which nets learn from each other.

`step(state, batch, frozen, *, axis_name=None) -> (state, metrics)`:

1. copies through which nets teach are renewed, where it is time;
2. all nets run forward, the terms of their losses are added (`objective`), and one `value_and_grad`
   gives the gradients of nets and adaptors, in micro-batches where asked for (`accumulation`);
3. under a mapped axis loss, gradients and metrics are summed over devices;
4. each net is updated by its optimizer, then its quantizers and weights are kept in their limits
   (`hygiene`), its average follows (`averages`), then the adaptors of its terms are updated;
5. if anything is not finite, the old nets, optimizers and states of terms are kept.

Nets that only teach are an argument, in evaluation mode. The step knows nothing of devices;
`parallel.compile_step` compiles it for them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.distillation.forward import forward
from qkd_jax.distillation.terms import Term, has_started
from qkd_jax.losses import TABLE
from qkd_jax.metrics import classification
from qkd_jax.quantize import QuantizedModel
from qkd_jax.training import averages, hygiene, optim
from qkd_jax.training.accumulation import accumulated_gradients
from qkd_jax.training.objective import Batch, Metrics
from qkd_jax.training.plan import Learner, Plan, StepStructure
from qkd_jax.training.state import TrainState, join, split

Step = Callable[..., tuple[TrainState, Metrics]]


@functools.lru_cache(maxsize=64)
def make_step(structure: StepStructure) -> Step:
    """Builds the training step of a structure; equal structures give the same function.

    The step's metrics are {slot: {"count", "loss", "top1", <term>: sums over the batch; "lr",
    "quant_lr", "grad_norm", with hygiene "oscillating" and "frozen"}, "finite": bool}. Where the
    loss, a gradient or a statistic is not finite, the state keeps its nets and optimizers (the step
    counter advances), so that `nonfinite.locate_nonfinite` can find the cause in it.

    Args:
        structure: from `plan_step(...).structure`.

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
        # 1. Copies that teach.
        state = refresh_stale(structure, state)

        # 2. Loss and gradients.
        (loss, (updated, terms, metrics)), (grads, adaptor_grads) = accumulated_gradients(
            structure, state, batch, frozen, axis_name=axis_name
        )

        # 3. Sums over devices.
        if axis_name is not None:
            loss, grads, adaptor_grads, metrics = jax.lax.psum(
                (loss, grads, adaptor_grads, metrics), axis_name
            )

        # 4. Updates. Once not finite, always: the loop sees it a step late, in the old nets.
        statistics = [
            own.get("batch_stats") for of_net in terms.values() for own in of_net.values()
        ]
        finite = state.finite & jnp.isfinite(loss) & _finite((updated, statistics))
        nets, opt = {}, {}
        for learner in structure.learners:
            slot = learner.slot
            with jax.named_scope(f"{structure.scope(slot)}/optimizer"):
                new, opt[slot], rates = _update_net(learner, state, grads[slot])
            if "grad_norms" in structure.live:
                rates |= optim.group_norms(learner.optim, grads[slot], split(state.nets[slot])[0])
            nets[slot] = join(new, updated[slot])
            if learner.optim.ema:
                opt[slot]["ema"] = _update_average(learner, state, nets[slot])
            metrics[slot] = {**metrics[slot], **rates}
            # The norm is finite only if every gradient is: one number stands for all of them.
            finite = finite & jnp.isfinite(rates["grad_norm"])
            for term in learner.terms:
                if (gradient := adaptor_grads.get(slot, {}).get(term.name)) is not None:
                    own = terms[slot][term.name]
                    terms[slot][term.name], norm = _update_adaptor(
                        learner, term, state, own, gradient
                    )
                    params = terms[slot][term.name]["params"]
                    finite = finite & jnp.isfinite(norm) & _finite(params)

        # 5. The new state, or the old one.
        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = state.replace(
            step=state.step + 1,
            nets=keep(nets, state.nets),
            opt=keep(opt, state.opt),
            loss_state=keep(terms, state.loss_state),
            finite=finite,
        )
        return new_state, {**metrics, "finite": finite}

    return step


def refresh_stale(structure: StepStructure, state: TrainState) -> TrainState:
    """Renews the copies through which nets teach, at the steps at which that is due.

    After a step that was not finite the copies stay as they are, like the nets.
    """
    copies = {}
    for slot in structure.stale:
        numbers = state.hyper[slot]["stale"]
        position = (state.step - numbers["first"]).astype(jnp.float32)
        due = state.finite & (jnp.mod(position, numbers["every"]) == 0)
        copies[slot] = jax.tree.map(
            lambda new, old, due=due: jnp.where(due, new, old), state.nets[slot], state.stale[slot]
        )
    return state.replace(stale=copies)


def _update_net(
    learner: Learner, state: TrainState, grads: Any
) -> tuple[Any, dict[str, Any], dict[str, jax.Array]]:
    """Updates a net: (what learns, state of the optimizer and of hygiene, rates and shares)."""
    hyper, opt = state.hyper[learner.slot], state.opt[learner.slot]
    learned, _ = split(state.nets[learner.slot])
    new, new_opt, rates = optim.update_optimizer(learner.optim, hyper["optim"], grads, opt, learned)
    if learner.hygiene is None:
        return new, new_opt, rates
    new, new_opt["hygiene"], shares = hygiene.apply(
        learner.hygiene, learner.net, hyper["hygiene"], new, opt["hygiene"]
    )
    return new, new_opt, {**rates, **shares}


def _update_average(
    learner: Learner, state: TrainState, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Updates the average of a net's variables, with what it is after the step."""
    opt = state.opt[learner.slot]
    return averages.update(
        opt["ema"],
        variables,
        state.hyper[learner.slot]["optim"]["ema"],
        warmup=learner.optim.ema == "warmup",
        copied=opt.get("hygiene", {}).get("annealed"),
    )


def _update_adaptor(
    learner: Learner, term: Term, state: TrainState, own: Mapping[str, Any], gradient: Any
) -> tuple[dict[str, Any], jax.Array]:
    """Updates the adaptor of a term: (the term's state, the gradient's norm).

    It learns with the optimizer, the rates and the schedule of the net, and is clipped by itself:
    kernels are decayed like the net's weights, biases, norms and variances are not. `freeze` names
    layers of the net, not its own. Its parts that learn before the term starts are frozen then.
    """
    new, optimizer, rates = optim.update_optimizer(
        learner.optim.of_adaptor(),
        state.hyper[learner.slot]["optim"],
        {"params": gradient},
        {"position": state.opt[learner.slot]["position"], "inner": own["opt"]},
        {"params": own["params"]},
    )
    params = dict(new["params"])
    started = has_started(term, state.hyper[learner.slot]["terms"][term.name], state.step)
    for part in TABLE[term.loss].before_start:
        pair = params[part], own["params"][part]
        params[part] = jax.tree.map(lambda n, o: jnp.where(started, o, n), *pair)
    return {**own, "params": params, "opt": optimizer["inner"]}, rates["grad_norm"]


def _finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def name_metrics(plan: Plan, metrics: Metrics) -> dict[str, dict[str, float]]:
    """Returns a step's metrics as {net: {"loss", "top1", <label>, "lr", ...}}, means as floats.

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
        for name in ("lr", "quant_lr", "oscillating", "frozen"):
            if name in values:
                row[name] = float(values[name])
        for name, value in values.items():
            if name.startswith("grad_norm"):
                row[name] = float(value)
            elif name.startswith("agreement/"):
                row[f"agreement_{plan.name_of(name.partition('/')[2])}"] = float(value) / count
        named[plan.name_of(learner.slot)] = row
    return named


@functools.lru_cache(maxsize=64)
def eval_step(
    net: QuantizedModel,
) -> Callable[[Mapping[str, Any], Batch], tuple[Metrics, jax.Array]]:
    """Compiles the evaluation of a net; equal nets give the same function.

    Returns:
        fn(variables, batch) -> (sums as from `metrics.classification`, logits [batch, classes]);
        rows where the batch's "mask" is False are not counted.
    """

    @jax.jit
    def evaluate(variables: Mapping[str, Any], batch: Batch) -> tuple[Metrics, jax.Array]:
        logits, _ = forward(net, variables, batch["image"])
        mask = None if "mask" not in batch else batch["mask"].astype(bool)
        return classification(logits, batch["label"], where=mask), logits

    return evaluate
