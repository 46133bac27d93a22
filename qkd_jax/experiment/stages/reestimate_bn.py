"""The `reestimate_bn` stage: running statistics of BatchNorm from training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkd_jax import checks, ptq
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage

__all__ = ["check_reestimate_bn", "reestimate_bn"]


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
