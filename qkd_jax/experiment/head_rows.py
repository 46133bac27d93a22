"""Rows of the results for auxiliary classifiers, which serve a net's training alone."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import metrics
from qkd_jax.distillation.head_evaluation import eval_heads
from qkd_jax.experiment.run_state import Run, to_device
from qkd_jax.losses import TABLE
from qkd_jax.training.plan import Plan
from qkd_jax.training.state import TrainState

ENSEMBLE = "ensemble"
# What is known of the net and not of its classifiers.
WITHOUT = (
    *("params", "weight_bytes", "bit_operations", "class_correct"),
    *("agreement", "agreement_with"),
)


def evaluate_heads(run: Run, plan: Plan, state: TrainState) -> dict[str, list[dict[str, Any]]]:
    """{net that learns: [{"head", metrics on the test split}]} at the end of a stage."""
    rows: dict[str, list[dict[str, Any]]] = {net: [] for net in plan.learners}
    for learner in plan.structure.learners:
        net = plan.name_of(learner.slot)
        for term in learner.terms:
            if not TABLE[term.loss].has_heads:
                continue
            compiled = eval_heads(learner.net, term)
            own = to_device(jax.device_get(state.loss_state[learner.slot][term.name]))
            totals: list[Any] = []
            logits: list[tuple[np.ndarray, ...]] = []
            for batch in run.eval_batches("test"):
                inputs = {k: batch[k] for k in ("image", "label", "mask")}
                sums, z = zip(
                    *jax.device_get(compiled(run.variables[net], own, inputs)), strict=True
                )
                totals = list(map(metrics.add, totals, sums)) if totals else list(sums)
                logits.append(tuple(x[batch["mask"]] for x in z))
            names = (*term.adaptor.model.head_names(term.taps), ENSEMBLE)
            for name, sums, z in zip(names, totals, zip(*logits, strict=True), strict=True):
                severity = run.severity(np.concatenate(z))
                rows[net].append({"head": name, **metrics.finish(sums), **severity})
    return rows


def head_rows(run: Run, net: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns rows for the classifiers of a net's last training stage, like the net's own `row`.

    Their metrics are those at the end of that stage. They have no size: they are not deployed.
    """
    rows = []
    heads = run.heads.get(net, [])
    for head in heads:
        name, count = head["head"], len(heads)
        method = f"ensemble of {count} classifiers" if name == ENSEMBLE else f"classifier at {name}"
        known = {key: head.get(key) for key in ("top1", "top5", "loss", "severity") if key in row}
        rows.append(
            {**row, **known, "net": f"{net}.{name}", "method": method} | dict.fromkeys(WITHOUT)
        )
        rows[-1].pop("hierarchy", None)
    return rows
