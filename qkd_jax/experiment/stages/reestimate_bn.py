"""The `reestimate_bn` stage: running statistics of BatchNorm from training images."""

from collections.abc import Mapping, Sequence

from qkd_jax import checks, ptq
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.quantize import QuantizedModel


def reestimate_bn(
    run: Run, stage: Stage, *, nets: Sequence[str], examples: int = 0, keep: str = "better"
) -> None:
    """Re-estimates BatchNorm's running statistics on training images.

    `keep="better"` takes them only where they lower the cross-entropy on the training split: they
    help some arms and hurt others, and the test split must not decide. `keep="always"` takes them
    in any case. Batches have the size of the net's last training stage, on which BatchNorm's
    inputs depend.
    """
    for name in nets:
        # One pass, batch by batch: the whole of a streamed set does not fit in memory.
        batches = run.image_batches(examples, batch_size=_train_batch_size(run, name))
        before, old = run.variables[name], run.mean_loss(name, "train")
        new = ptq.reestimate_batch_norm(run.nets[name], before, batches)
        after = run.mean_loss(name, "train", new)
        kept = keep == "always" or after < old
        if kept:
            run.put(name, new)
        run.log(
            stage,
            1,
            "train_split",
            {f"{name}/loss_before": old, f"{name}/loss_after": after, f"{name}/kept": float(kept)},
        )


def _train_batch_size(run: Run, name: str) -> int:
    done = run.settings.stages[: run.stage_index]
    sizes = [stage.fields["batch_size"] for stage in done if name in stage.starts]
    return sizes[-1] if sizes else 64


def check_reestimate_bn(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of a `reestimate_bn` stage."""
    checks.integer_in(f"stages.{stage.name}.examples", stage.fields["examples"], 0)
    checks.one_of(f"stages.{stage.name}.keep", stage.fields["keep"], ("better", "always"))
