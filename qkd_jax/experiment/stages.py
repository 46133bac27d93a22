"""The kinds of stages: each takes a run and changes its variables, its rows, or both.

`STAGES[kind](run, stage, **fields)`. The keyword arguments are the fields that a config may give;
one without a default must be given, `nets` (or `learn`) says which nets take part. `CHECKS[kind]
(nets, stage)` refuses wrong values before anything runs. Add a kind as a function and a line in
`STAGES`, and its check in `CHECKS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from qkd_jax import checks, data, metrics, ptq, weights
from qkd_jax.calibration import calibrate as calibrate_net
from qkd_jax.deploy.onnx import TARGETS
from qkd_jax.experiment.deployment import deploy
from qkd_jax.experiment.diagnosis import check_diagnose, diagnose
from qkd_jax.experiment.ptq_stages import PTQ_CHECKS, PTQ_STAGES
from qkd_jax.experiment.run import Run
from qkd_jax.experiment.settings import Stage
from qkd_jax.inspection import layers, size
from qkd_jax.interception import OPERANDS
from qkd_jax.observers import OBSERVERS
from qkd_jax.training import hygiene as healthy
from qkd_jax.training.loop import Hooks, Window, run_steps
from qkd_jax.training.plan import Plan, plan_step
from qkd_jax.training.progress import Progress
from qkd_jax.training.state import (
    TrainState,
    frozen_variables,
    init_opt,
    net_variables,
    optimizer_states,
    split,
    start_state,
)
from qkd_jax.training.trees import flatten, unflatten_like

__all__ = ["CHECKS", "STAGES", "plan_stage"]


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
    hygiene: Mapping[str, Any] | None = None,
) -> None:
    """Trains the nets of `learn`; goes on where the stage was interrupted.

    All arms of an experiment see the same batches: the order of the data follows the step in the
    chain of stages that continue one another, so QKD's phases see what its controls see.
    """
    del learn, optim, epochs, steps, hygiene  # `stage` holds them in the form that the plan reads
    plan = plan_stage(run.nets, stage)
    compiled = run.steps.get(plan)
    done = run.stage_step
    saved = _optimizers(run, stage, plan)
    state = start_state(plan, run.variables, step=run.step, seed=run.settings["seed"], opt=saved)
    start = stage.data_start
    batches = data.train_batches(
        run.dataset,
        batch_size=batch_size,
        seed=run.settings["seed"],
        augment=run.settings["data"]["augment"],
    ).iter(start + done, start + stage.steps)
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
            run.add_times(stage.name, progress.summary())
    _take(run, stage, plan, state, stage.steps, Window())
    # The optimizer travels on only if a later stage continues it.
    kept = {net: run.optimizers[stage.name][net] for net in stage.keeps}
    del run.optimizers[stage.name]
    if kept:
        run.optimizers[stage.name] = kept


def _optimizers(run: Run, stage: Stage, plan: Plan) -> dict[str, Any]:
    """Optimizer states to go on with: the stage's own if interrupted, else the continued one's."""
    found = {}
    for net in plan.learners:
        if run.stage_step:
            flat = run.optimizers[stage.name][net]
        elif net in plan.continues:
            # Taken out: nobody else can continue it, and the checkpoint need not carry it on.
            flat = run.optimizers[plan.continues[net]].pop(net)
        else:
            continue
        learned, _ = split(run.variables[net])
        fresh = jax.eval_shape(lambda tree, net=net: init_opt(plan, net, tree), learned)
        if not run.stage_step:  # hygiene belongs to a stage; the optimizer alone travels on
            fresh.pop("hygiene", None)
            flat = {name: leaf for name, leaf in flat.items() if not name.startswith("hygiene/")}
            flat = {**_of_new_quantizers(fresh, flat), **flat}
        found[net] = unflatten_like(flat, fresh)
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
    for net, opt in optimizer_states(plan, state).items():
        run.optimizers[stage.name][net] = flatten(opt)
        if "hygiene" in opt and (shares := healthy.oscillating(opt["hygiene"])):
            run.oscillating[net] = shares
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
            run.log(stage, step, "test", values)
            top1 = found[plan.learners[0]]["top1"]
            if top1 > best["top1"]:
                best.update(top1=top1, step=step)

    def save_at(step: int) -> bool:
        if step == stage.steps:
            return False  # the end of the stage saves
        late = bool(save_seconds) and time.monotonic() - best["last"] >= save_seconds
        return late or (bool(save_steps) and step % save_steps == 0)

    def save(step: int, state: TrainState, window: Window) -> None:
        _take(run, stage, plan, state, step, window)
        # Later stages rank above earlier ones: the best is the best of the newest stage.
        score = stage.index + best["top1"] if best["step"] == step else None
        run.save(score=score)
        best["last"] = time.monotonic()

    return Hooks(
        log=log,
        look=look,
        look_at=lambda step: at(step, eval_every) or at(step, quant_every),
        save=save,
        save_at=save_at,
        stop=run.stopping,
        log_every=every["every_steps"],
    )


def _oscillating(plan: Plan, state: TrainState) -> dict[str, float]:
    """{"<net>/<layer>": share of its weights that oscillate} where that is tracked."""
    return {
        f"{net}/{path}": share
        for net, opt in optimizer_states(plan, state).items()
        for path, share in healthy.oscillating(opt.get("hygiene", {})).items()
    }


def quantizer_means(nets: Mapping[str, Any]) -> dict[str, float]:
    """{"<net>/<layer>/<quantizer>/<parameter>": mean} of everything that quantizers own."""
    quant = {net: v["quant"] for net, v in nets.items() if v.get("quant")}
    flat = flatten(jax.device_get(quant))
    return {name: float(np.mean(value)) for name, value in flat.items()}


def calibrate(
    run: Run,
    stage: Stage,
    *,
    nets: Sequence[str],
    examples: int = 256,
    observer: str = "",
    operands: Sequence[str] = (),
) -> None:
    """Gives each net the `quant` collection from training images; from here on it is quantized.

    With `operands` ("weight", "input", "other", "output") these alone, and the others as they are:
    weights first and inputs after some training, say. Empty means all.
    """
    batches = run.images(examples, batch_size=256)
    for name in nets:
        quant = flatten(run.variables[name].get("quant", {}))
        float_still = not any("_quantizer/" in f"/{path}" for path in quant)
        if run.folder is not None and float_still:  # the report shows weights before and after
            run.folder.model.mkdir(parents=True, exist_ok=True)
            floats = {k: v for k, v in run.variables[name].items() if k != "quant"}
            weights.save(run.folder.model / f"{name}_float.npz", floats)
        run.put(
            name,
            calibrate_net(
                run.nets[name],
                run.variables[name],
                batches,
                observer=observer or None,
                operands=tuple(operands) or None,
                **cast(dict[str, Any], run.apply_arguments(name)),
            ),
        )
        run.log(stage, 1, "quant", quantizer_means({name: run.variables[name]}))


def check_calibrate(nets: Mapping[str, Any], stage: Stage) -> None:
    """Checks the fields of a `calibrate` stage."""
    where = f"stages.{stage.name}"
    checks.integer_in(f"{where}.examples", stage.fields["examples"], 0)
    checks.one_of(f"{where}.observer", stage.fields["observer"], ("", *OBSERVERS))
    for operand in stage.fields["operands"]:
        if operand not in OPERANDS:
            raise checks.unknown(f"operand in {where}.operands", operand, OPERANDS)
    check_rules(nets, stage)


def check_rules(nets: Mapping[str, Any], stage: Stage) -> None:
    """Refuses nets without rules where a stage is about quantizers."""
    for name in stage.nets:
        if not nets[name].rules:
            raise ValueError(
                f"stages.{stage.name}.nets has {name!r}, whose rules are float; give it others "
                f"(nets.{name}.rules='w4a4'), or take it out of the stage."
            )


def reestimate_bn(
    run: Run, stage: Stage, *, nets: Sequence[str], examples: int = 0, keep: str = "better"
) -> None:
    """Re-estimates BatchNorm's running statistics on training images.

    `keep="better"` takes them only where they lower the cross-entropy on the training split: it
    helps some arms and hurts others, and the test split must not decide. `keep="always"` does not
    ask. Batches are those of the net's last training stage: BatchNorm's inputs depend on them.
    """
    for name in nets:
        batches = run.images(examples, batch_size=_train_batch_size(run, name))
        before, old = run.variables[name], run.evaluate(name, "train").metrics["loss"]
        new = ptq.reestimate_batch_norm(run.nets[name], before, batches)
        found = run.evaluate(name, "train", new).metrics["loss"]
        kept = keep == "always" or found < old
        if kept:
            run.put(name, new)
        run.log(
            stage,
            1,
            "train_split",
            {f"{name}/loss_before": old, f"{name}/loss_after": found, f"{name}/kept": float(kept)},
        )


def _train_batch_size(run: Run, name: str) -> int:
    done = run.settings.stages[: run.stage_index]
    sizes = [stage.fields["batch_size"] for stage in done if name in stage.starts]
    return sizes[-1] if sizes else 64


def check_reestimate_bn(nets: Mapping[str, Any], stage: Stage) -> None:
    """Checks the fields of a `reestimate_bn` stage."""
    checks.integer_in(f"stages.{stage.name}.examples", stage.fields["examples"], 0)
    checks.one_of(f"stages.{stage.name}.keep", stage.fields["keep"], ("better", "always"))


def evaluate(
    run: Run,
    stage: Stage,
    *,
    nets: Sequence[str],
    methods: Mapping[str, str],
    reference: str = "",
    ensembles: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Adds a row to the results for each net: quality on the test split, agreement, and size.

    `methods` gives the row's method by net; `reference` is the net with whose argmax agreement is
    counted, as it stands now. `ensembles` adds rows of several nets together, {name: nets}: the
    mean of their probabilities.
    """
    found = {
        name: run.evaluate(name) for name in dict.fromkeys([*nets, *filter(None, [reference])])
    }
    for name in nets:
        run.rows.append(
            row(
                run,
                name,
                methods.get(name, stage.name),
                found[name].metrics,
                stage=stage.name,
                agreement=agreement(found[name].logits, found[reference].logits)
                if reference not in ("", name)
                else None,
                agreement_with=reference or None,
            )
        )
        run.log(stage, 1, "test", {f"{name}/{k}": v for k, v in found[name].metrics.items()})
    for name, members in (ensembles or {}).items():
        run.rows.append(ensemble_row(run, stage, name, {net: found[net].logits for net in members}))


def ensemble_row(
    run: Run, stage: Stage, name: str, logits: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The row of several nets that answer with the mean of their probabilities.

    It costs what its members cost together: steps, parameters and bytes are their sums.
    """
    scores = np.stack([jax.nn.log_softmax(z) for z in logits.values()])
    mean = jax.nn.logsumexp(scores, axis=0) - np.log(len(logits))
    found = jax.device_get(_classification(mean, run.dataset.test_labels))
    rows = [row(run, net, stage.name, metrics.finish(found)) for net in logits]
    added = {key: sum(r[key] for r in rows) for key in ("student_steps", "params", "weight_bytes")}
    widths = {key: max(r[key] for r in rows) for key in ("weight_bits", "activation_bits")}
    models = " + ".join(dict.fromkeys(r["model"] for r in rows))
    method = f"mean of {len(rows)}"
    return {**rows[0], **added, **widths, "net": name, "method": method, "model": models} | dict(
        stage=stage.name, agreement=None, agreement_with=None
    )


def check_evaluate(nets: Mapping[str, Any], stage: Stage) -> None:
    """Checks the fields of an `evaluate` stage."""
    for name, members in (stage.fields["ensembles"] or {}).items():
        where = f"stages.{stage.name}.ensembles.{name}"
        if name in nets:
            raise ValueError(f"{where} has the name of a net; give the ensemble one of its own.")
        checks.at_least_one(where, members)
        for net in members:
            if net not in stage.fields["nets"]:
                raise checks.unknown(f"net in {where}", net, stage.fields["nets"])
    for name in stage.fields["methods"]:
        if name not in stage.fields["nets"]:
            where = f"net in stages.{stage.name}.methods"
            raise checks.unknown(where, name, stage.fields["nets"])


def check_deploy(nets: Mapping[str, Any], stage: Stage) -> None:
    """Checks the fields of a `deploy` stage."""
    where, fields = f"stages.{stage.name}", stage.fields
    checks.one_of(f"{where}.target", fields["target"], ("", *filter(None, TARGETS)))
    checks.integer_in(f"{where}.latency_rounds", fields["latency_rounds"], 0)
    batches = fields["latency_batches"]
    if not isinstance(batches, list | tuple):
        raise ValueError(f"{where}.latency_batches is {batches!r}; give a tuple, such as (1, 64).")
    for place, size_of_batch in enumerate(batches):
        checks.integer_in(f"{where}.latency_batches[{place}]", size_of_batch, 1)
    check_rules(nets, stage)


def agreement(logits: np.ndarray, others: np.ndarray) -> float:
    """Share of examples on which two nets have the same argmax."""
    return metrics.finish(jax.device_get(_agreement(logits, others)))["agree"]


_agreement = jax.jit(metrics.agreement)
_classification = jax.jit(metrics.classification)


def row(
    run: Run, name: str, method: str, found: Mapping[str, float], **more: Any
) -> dict[str, Any]:
    """One row of results.json: no times in it."""
    net, variables = run.nets[name], run.variables[name]
    arguments = run.apply_arguments(name)
    sizes = size(net, variables, run.example, **arguments)
    weight_bits, activation_bits = 32, 32
    if variables.get("quant"):
        # A net is called by its lowest widths; the first and the last layer have more.
        found_layers = layers(net, variables, run.example, **arguments)
        weight_bits = min(x.weight.bits if x.weight else 32 for x in found_layers)
        activation_bits = min(x.input.bits if x.input else 32 for x in found_layers)
    return {
        "net": name,
        "method": method,
        "model": run.settings["nets"][name]["model"],
        "top1": found["top1"],
        "top5": found["top5"],
        "loss": found["loss"],
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "student_steps": run.student_steps(name),
        "params": sizes.params,
        "weight_bytes": sizes.bytes,
        "seed": run.settings["seed"],
        **more,
    }


STAGES: dict[str, Callable[..., None]] = {
    "train": train,
    "calibrate": calibrate,
    "reestimate_bn": reestimate_bn,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "deploy": deploy,
    **PTQ_STAGES,
}

CHECKS: dict[str, Callable[[Mapping[str, Any], Stage], Any]] = {
    "train": plan_stage,
    "calibrate": check_calibrate,
    "reestimate_bn": check_reestimate_bn,
    "evaluate": check_evaluate,
    "diagnose": check_diagnose,
    "deploy": check_deploy,
    **PTQ_CHECKS,
}
