"""The `train` stage: nets learn from labels and from one another; it resumes at any step."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qkd_jax import data
from qkd_jax.experiment import live_values
from qkd_jax.experiment.head_rows import evaluate_heads
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.stages.teacher_cache import cached_nets, prepare
from qkd_jax.record.progress import Progress
from qkd_jax.training import averages
from qkd_jax.training.clamping import collapsed
from qkd_jax.training.feed import feed
from qkd_jax.training.loop import Hooks, Window, run_steps
from qkd_jax.training.oscillation import oscillating
from qkd_jax.training.plan import Plan, plan_step, with_live, with_names
from qkd_jax.training.profiling import is_within, keep_names_apart, no_trace, tracer
from qkd_jax.training.state import (
    TrainState,
    average_variables,
    frozen_variables,
    init_opt,
    init_term_state,
    net_variables,
    optimizer_states,
    stale_variables,
    start_state,
    term_states,
)
from qkd_jax.trees import flatten, unflatten_like

# Prefixes, beside a net's optimizer state in a checkpoint: the state of its loss terms, and the
# stale copy through which it teaches.
OWNED, STALE = "owned/", "stale/"
EMA = "ema"


def plan_stage(nets: Mapping[str, Any], stage: Stage) -> Plan:
    """Plans the step of a `train` stage; the config's "not set" (0, -1, "") becomes a default."""
    optim = {}
    for net, fields in stage.fields["optim"].items():
        fields = dict(fields)
        if fields.get("quant_lr", 0.0) is not None and fields.get("quant_lr", 0.0) < 0:
            fields["quant_lr"] = None
        if not fields.get("clip_norm"):
            fields["clip_norm"] = None
        optim[net] = fields
    try:
        return plan_step(
            nets,
            stage.fields["learn"],
            optim,
            horizon=stage.horizons,
            hygiene=stage.fields["hygiene"] or None,
            steps=stage.steps,
            data=stage.data,
            first=stage.first,
            cached=cached_nets(stage),
            stale=stage.fields["stale"],
            accumulate=stage.fields["accumulate"],
            remat=stage.fields["remat"],
            compute=stage.fields["compute"],
        )
    except ValueError as error:
        raise ValueError(f"stages.{stage.name}: {error}") from error


def train(
    run: Run,
    stage: Stage,
    *,
    learn: Mapping[str, Any],
    optim: Mapping[str, Any],
    epochs: float = 0.0,
    steps: int = 0,
    batch_size: int = 128,
    augment: Sequence[str] = (),
    views: int = 0,
    hygiene: Mapping[str, Any] | None = None,
    cache: Mapping[str, Any] | None = None,
    images: str = "",
    stale: int = 0,
    accumulate: int = 1,
    remat: str = "none",
    compute: str = "",
) -> None:
    """Trains the nets of `learn`; resumes where the stage was interrupted.

    All arms of an experiment see the same batches: the order of the data follows the step in the
    chain of stages that continue one another, so QKD's phases see the batches of its controls.
    `augment` replaces the data's own augmentations, which are drawn at every step or, with `views`,
    once for that many views of each image that take turns by epoch (1: the images as they are).
    With `cache` the frozen teachers are not run: see `teacher_cache`. `images` names a stage that
    makes images, which with their labels replace the training split. With `stale` nets that learn
    teach one another through copies that are that many steps old at most. Where `optim` averages a
    net (`ema`), evaluations show both, and the net ends the stage as its average (`ema_final`).
    `accumulate` processes each batch in that many micro-batches for one update, and `remat` says
    what its backward pass computes again to save memory. With `compute` activations are bfloat16.
    """
    # `stage` holds these in the form that the plan reads.
    del learn, optim, epochs, steps, hygiene, cache, stale, accumulate, remat, compute
    augment = augment or run.settings["data"]["augment"]
    stage, done = live_values.with_tracking(run, stage), run.stage_step
    plan = with_live(plan_stage(run.nets, stage), run.settings["log"]["live"])
    if is_within(run.profile, stage, done):
        keep_names_apart()
        plan = with_names(plan)
    compiled = run.steps.get(plan)
    dataset = run.training_set(images)
    state = start_state(
        plan,
        run.variables,
        step=run.step,
        seed=run.settings["seed"],
        term_states=_owned(run, stage, plan),  # before the optimizers leave the run
        opt=_optimizers(run, stage, plan),
        labels=dataset.train_labels,
        stale=_stale(run, stage, plan),
    )
    start = stage.data_start
    made = data.train_batches(
        dataset,
        batch_size=batch_size,
        seed=run.settings["seed"],
        augment=augment,
        views=views,
        known=prepare(run, stage, plan, augment),
        rows=compiled.rows(batch_size),
    ).iter(
        start + done,
        start + stage.steps,
        workers=run.settings["data"]["workers"],
        # A streamed set's images are normalised on the devices.
        pixels=dataset.is_streamed and compiled.mode == "jit",
    )
    batches = feed(made, compiled, affine=dataset.affine)
    with Progress(stage.name, stage.steps, batch_size, start=done, enabled=run.verbose) as progress:
        try:
            state = run_steps(
                compiled,
                plan,
                state,
                frozen_variables(plan, run.variables),
                batches,
                _hooks(run, stage, plan),
                progress,
                done=done,
                steps=stage.steps,
                window=run.window,
            )
        finally:
            if close := getattr(made, "close", None):
                close()  # worker processes end with their stage
            run.add_times(stage.name, progress.summary())
    state = _with_averages(stage, plan, state)
    _take(run, stage, plan, state, stage.steps, Window())
    if not run.follows:
        run.heads |= evaluate_heads(run, plan, state)
    # The optimizer and what terms own travel on only if a later stage continues them.
    kept = {net: _without(STALE, run.optimizers[stage.name][net]) for net in stage.continued}
    del run.optimizers[stage.name]
    if kept:
        run.optimizers[stage.name] = kept


def _optimizers(run: Run, stage: Stage, plan: Plan) -> dict[str, Any]:
    """Optimizer states to start from: the stage's own if interrupted, else the continued one's."""
    found = {}
    for net in plan.learners:
        if run.stage_step:
            flat = run.optimizers[stage.name][net]
        elif net in plan.continues:
            # Taken out: nobody else can continue it, and the checkpoint need not carry it on.
            flat = run.optimizers[plan.continues[net]].pop(net)
        else:
            continue
        variables = run.variables[net]
        fresh = jax.eval_shape(lambda tree, net=net: init_opt(plan, net, tree), variables)
        flat = _without(STALE, _without(OWNED, flat))
        if not run.stage_step:  # hygiene belongs to a stage; optimizer and average travel on
            fresh.pop("hygiene", None)
            flat = _without("hygiene/", flat)
            # An average that starts here, or of new quantizers, starts as what it averages.
            current = flatten({EMA: averages.init(variables)}) if EMA in fresh else {}
            flat = flat if current else _without(f"{EMA}/", flat)
            flat = {**current, **_of_new_quantizers(fresh, {**current, **flat}), **flat}
        found[net] = unflatten_like(flat, fresh)
    return found


def _with_averages(stage: Stage, plan: Plan, state: TrainState) -> TrainState:
    """The state at a stage's end, whose nets are their averages where that is asked for."""
    last = {
        plan.slots[net]: average
        for net, average in average_variables(plan, state).items()
        if stage.fields["optim"][net].get("ema_final", True)
    }
    return state.replace(nets={**state.nets, **last})


def _without(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in flat.items() if not name.startswith(prefix)}


def _under(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    return {n.removeprefix(prefix): leaf for n, leaf in flat.items() if n.startswith(prefix)}


def _stale(run: Run, stage: Stage, plan: Plan) -> dict[str, Any]:
    """Copies through which nets teach, where a stage was interrupted; a new one takes others."""
    nets = [plan.name_of(slot) for slot in plan.structure.stale] if run.stage_step else []
    return {
        net: unflatten_like(_under(STALE, run.optimizers[stage.name][net]), run.variables[net])
        for net in nets
    }


def _owned(run: Run, stage: Stage, plan: Plan) -> dict[str, dict[str, Any]]:
    """State of loss terms to start from: the stage's own if interrupted, else the continued one's.

    A stage that continues another's optimizer keeps the adaptors and memories of the terms that
    have the same label and shapes there; all others are initialised.
    """
    found: dict[str, dict[str, Any]] = {}
    for learner in plan.structure.learners:
        net = plan.name_of(learner.slot)
        before = stage.name if run.stage_step else plan.continues.get(net)
        flat = run.optimizers[before][net] if before else {}
        for term, label in plan.labels[learner.slot].items():
            saved = _under(f"{OWNED}{label}/", flat)
            if not saved:
                continue
            (source,) = [t.sources[:1] for t in learner.terms if t.name == term]
            fresh = jax.eval_shape(
                functools.partial(init_term_state, plan, net, term),
                jax.random.key(0),
                run.variables[plan.name_of(source[0])] if source else None,
            )
            try:
                found.setdefault(net, {})[label] = unflatten_like(saved, fresh)
            except ValueError:
                if run.stage_step:
                    raise
    return found


def _of_new_quantizers(fresh: Any, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Moments of quantizers that were calibrated since (inputs after weights, say): zeros.

    AdamW counts its steps for all arrays together, so its correction of the first moments' bias
    is over by then, and the first steps of these parameters are longer than a fresh AdamW's.
    """
    return {
        name: np.zeros(leaf.shape, leaf.dtype)
        for name, leaf in flatten(fresh).items()
        if name not in flat and "/quant/" in name
    }


def _take(run: Run, stage: Stage, plan: Plan, state: TrainState, step: int, window: Window) -> None:
    """Takes the state of a stage over into the run."""
    for net, variables in net_variables(plan, state).items():
        run.put(net, variables)
    run.optimizers[stage.name] = {}
    owned, copies = term_states(plan, state), stale_variables(plan, state)
    for net, opt in optimizer_states(plan, state).items():
        of_terms = {f"{OWNED}{name}": leaf for name, leaf in flatten(owned.get(net, {})).items()}
        of_copy = {f"{STALE}{name}": leaf for name, leaf in flatten(copies.get(net, {})).items()}
        run.optimizers[stage.name][net] = {**flatten(opt), **of_terms, **of_copy}
        run.oscillating[net] = oscillating(opt.get("hygiene", {}))
    run.stage_step, run.window = step, window


def _hooks(run: Run, stage: Stage, plan: Plan) -> Hooks:
    every = run.settings["log"]
    eval_every, quant_every = every["eval_every_steps"], every["quant_every_steps"]
    save_steps = run.settings["checkpoint"]["every_steps"]
    save_seconds = run.settings["checkpoint"]["every_seconds"]
    best = {"top1": -1.0, "step": -1, "last": time.monotonic()}

    def at(step: int, interval: int) -> bool:
        return bool(interval) and (step % interval == 0 or step == stage.steps)

    def log(step: int, values: dict[str, float]) -> None:
        run.log(stage, step, "train", values)

    def look(step: int, state: TrainState) -> None:
        nets = net_variables(plan, state)
        live_values.look(run, stage, step, nets, every)
        _report_collapsed(run, stage, step, nets)
        if at(step, quant_every):
            paths = quantizer_means(nets)
            if paths:
                run.log(stage, step, "quant", paths)
            shares = _oscillating(plan, state)
            if shares:
                run.log(stage, step, "oscillating", shares)
        if at(step, eval_every):
            found = {net: run.evaluate(net, variables=v).metrics for net, v in nets.items()}
            values = {f"{n}/{k}": v for n, m in found.items() for k, v in m.items() if k != "count"}
            for net, average in average_variables(plan, state).items():
                means = run.evaluate(net, variables=average).metrics
                values |= {f"{net}/ema_{k}": v for k, v in means.items() if k != "count"}
            run.log(stage, step, "test", values)
            # The best is of what the net ends as.
            first = plan.learners[0]
            ends_as_average = stage.fields["optim"][first].get("ema_final", True)
            key = f"{first}/ema_top1"
            top1 = values[key if ends_as_average and key in values else f"{first}/top1"]
            if top1 > best["top1"]:
                best.update(top1=top1, step=step)

    def save_at(step: int) -> bool:
        return bool(save_steps) and step % save_steps == 0

    def late() -> bool:
        since = time.monotonic() - best["last"]
        return bool(save_seconds) and not run.follows and since >= save_seconds

    def save(step: int, state: TrainState, window: Window) -> None:
        _take(run, stage, plan, state, step, window)
        # Later stages rank above earlier ones: the best is the best of the newest stage.
        score = stage.index + best["top1"] if best["step"] == step else None
        run.save(score=score)
        best["last"] = time.monotonic()

    intervals = eval_every, quant_every, every["codes_every_steps"]
    return Hooks(
        log=log,
        look=run.alone(look),
        look_at=lambda step: step == stage.steps or any(at(step, i) for i in intervals),
        save=run.alone(save),
        save_at=save_at,
        stop=run.stopping,
        late=late,
        log_every=every["every_steps"],
        trace=no_trace
        if run.profile is None or run.follows
        else tracer(run.profile, stage.first, print),
    )


def _report_collapsed(run: Run, stage: Stage, step: int, nets: Mapping[str, Any]) -> None:
    """Records the grids that training has carried to 0 or below, and says so."""
    values = {
        f"{net}/{path}": lowest
        for net, variables in nets.items()
        for path, lowest in collapsed(run.nets[net], jax.device_get(variables)).items()
    }
    if not values:
        return
    run.log(stage, step, "collapsed", values)
    if run.verbose:
        listed = ", ".join(f"{name} {lowest:.3g}" for name, lowest in values.items())
        print(
            f"{stage.name}, step {step}: a grid's size is not above 0, so that nothing passes it: "
            f"{listed}. Train with a lower quant_lr or with hygiene.<net>.max_ratio; such a net is "
            "not deployed.",
            flush=True,
        )


def _oscillating(plan: Plan, state: TrainState) -> dict[str, float]:
    """{"<net>/<layer>": share of its weights that oscillate} where that is tracked."""
    return {
        f"{net}/{path}": share
        for net, opt in optimizer_states(plan, state).items()
        for path, share in oscillating(opt.get("hygiene", {})).items()
    }


def quantizer_means(nets: Mapping[str, Any]) -> dict[str, float]:
    """{"<net>/<layer>/<quantizer>/<parameter>": mean} of everything that quantizers own."""
    quant = {net: v["quant"] for net, v in nets.items() if v.get("quant")}
    flat = flatten(jax.device_get(quant))
    return {name: float(np.mean(value)) for name, value in flat.items()}
