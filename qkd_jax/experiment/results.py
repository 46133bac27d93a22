"""Rows of the results table, and results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import metrics
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.quantize.inspection import layers, size

__all__ = ["agreement", "ensemble_row", "row"]


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
