"""The kinds of stages: each takes a run and changes its variables, its rows, or both.

`STAGES[kind](run, stage, **fields)`. The keyword arguments are the fields that a config may give;
one without a default must be given, `nets` (or `learn`) says which nets take part. `CHECKS[kind]
(nets, stage)` refuses wrong values before anything runs. Add a kind as a function and a line in
`STAGES`, and its check in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from qkd_jax import checks, metrics, ptq, weights
from qkd_jax.calibration import calibrate as calibrate_net
from qkd_jax.calibration import check_observer
from qkd_jax.deploy import targets
from qkd_jax.experiment.deployment import deploy
from qkd_jax.experiment.diagnosis import check_diagnose, diagnose
from qkd_jax.experiment.generation import GENERATOR_CHECKS, GENERATOR_STAGES
from qkd_jax.experiment.heads import head_rows
from qkd_jax.experiment.ptq_stages import PTQ_CHECKS, PTQ_STAGES
from qkd_jax.experiment.run import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.synthesis import check_synthesize, synthesize
from qkd_jax.experiment.training_stage import plan_stage, quantizer_means, train
from qkd_jax.experiment.values import check_rules
from qkd_jax.inspection import layers, size
from qkd_jax.interception import OPERANDS
from qkd_jax.training.trees import flatten

__all__ = ["CHECKS", "STAGES", "plan_stage"]


def calibrate(
    run: Run,
    stage: Stage,
    *,
    nets: Sequence[str],
    examples: int = 256,
    observer: str = "",
    observer_options: Sequence[str] | Mapping[str, Any] = (),
    operands: Sequence[str] = (),
    images: str = "",
) -> None:
    """Gives each net the `quant` collection from training images; from here on it is quantized.

    With `operands` ("weight", "input", "other", "output") these alone, and the others as they are:
    weights first and inputs after some training, say. Empty means all.
    `images` names a stage that makes images, which are taken in place of training images.
    `observer` serves every quantizer, with `observer_options` such as ("power:2.4",).
    """
    batches = run.images(examples, batch_size=256, source=images)
    options = checks.named_numbers("observer_options", observer_options, "power:2.4")
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
                observer_options=options,
                operands=tuple(operands) or None,
                **cast(dict[str, Any], run.apply_arguments(name)),
            ),
        )
        run.log(stage, 1, "quant", quantizer_means({name: run.variables[name]}))


def check_calibrate(nets: Mapping[str, Any], stage: Stage) -> None:
    """Checks the fields of a `calibrate` stage."""
    where = f"stages.{stage.name}"
    checks.integer_in(f"{where}.examples", stage.fields["examples"], 0)
    options = stage.fields["observer_options"]
    options = checks.named_numbers(f"{where}.observer_options", options, "power:2.4")
    check_observer(f"{where}.", stage.fields["observer"] or None, options)
    for operand in stage.fields["operands"]:
        if operand not in OPERANDS:
            raise checks.unknown(f"operand in {where}.operands", operand, OPERANDS)
    check_rules(nets, stage)


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
    mean of their probabilities. Classifiers that trained a net (`byot`, `one`) have rows behind it.
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
        run.rows += head_rows(run, name, run.rows[-1])
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
    sums = jax.device_get(_classification(mean, run.dataset.test_labels))
    found = {**metrics.finish(sums), **run.severity(np.asarray(mean))}
    rows = [row(run, net, stage.name, found) for net in logits]
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
    target = fields["target"]
    checks.one_of(f"{where}.target", target, ("", "host", *targets.TARGETS))
    for name in stage.nets if target in targets.TARGETS else ():
        try:
            targets.check(nets[name].rules, target)
        except ValueError as error:
            raise ValueError(f"{where}.target: {error} (nets.{name})") from error
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
    # With a class tree: None where no mistake was made.
    of_tree: dict[str, Any] = {"severity": found.get("severity")} if run.settings.tree else {}
    shared = ("top1", "top5", "loss", "count", "severity")
    rest = {key: value for key, value in found.items() if key not in shared}
    if rest:
        of_tree["hierarchy"] = rest
    return {
        "net": name,
        "method": method,
        "model": run.settings["nets"][name]["model"],
        "top1": found["top1"],
        "top5": found["top5"],
        "loss": found["loss"],
        **of_tree,
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
    "synthesize": synthesize,
    "reestimate_bn": reestimate_bn,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "deploy": deploy,
    **GENERATOR_STAGES,
    **PTQ_STAGES,
}

CHECKS: dict[str, Callable[[Mapping[str, Any], Stage], Any]] = {
    "train": plan_stage,
    "calibrate": check_calibrate,
    "synthesize": check_synthesize,
    "reestimate_bn": check_reestimate_bn,
    "evaluate": check_evaluate,
    "diagnose": check_diagnose,
    "deploy": check_deploy,
    **GENERATOR_CHECKS,
    **PTQ_CHECKS,
}
