"""The `synthesize` stage: images made from a trained net, for stages that name it."""

from collections.abc import Mapping, Sequence

import numpy as np

from qkd_jax import checks
from qkd_jax.data_free import batch_norm, inversion
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.stages.generate import check_batch_norm, reporter
from qkd_jax.quantize import QuantizedModel
from qkd_jax.record.progress import Progress
from qkd_jax.training.state import stream_key


def synthesize(
    run: Run,
    stage: Stage,
    *,
    nets: Sequence[str],
    examples: int = 256,
    method: str = "deep_inversion",
    batch_size: int = 256,
    steps: int = 0,
    lr: float = 0.0,
    bn_weight: float = 10.0,
    tv_weight: float = 2.5e-5,
    l2_weight: float = 0.0,
    jitter: int = 2,
) -> None:
    """Makes images whose statistics match those in a net's BatchNorms; no data is seen.

    Train and calibrate stages take them by `images=<name of this stage>`. Of the data set only the
    mean and standard deviation of its pixels are used, which belong to the net's input.
    DeepInversion's images are clipped to the range of pixels; ZeroQ's are not. An interrupted stage
    starts over and makes the same images; `steps` and `lr` of 0 are the method's own.
    """
    (net,) = nets
    parts = -(-examples // batch_size)
    total = (steps or inversion.DEFAULTS[method][0]) * parts
    last: list[float] = []
    with Progress(stage.name, total, -(-examples // parts), enabled=run.verbose) as progress:
        report_step = reporter(run, stage, progress, [])

        def report(batch: int, step: int, loss: float | None) -> None:
            if step == total // parts and loss is not None:
                last.append(loss)
            report_step((batch - 1) * (total // parts) + step, loss)

        made = inversion.synthesize(
            run.nets[net],
            run.variables[net],
            image_shape=run.dataset.image_shape,
            count=examples,
            key=stream_key(run.settings["seed"], f"synthesize/{stage.name}"),
            method=method,
            batch_size=batch_size,
            steps=steps or None,
            lr=lr or None,
            bn_weight=bn_weight,
            tv_weight=tv_weight,
            l2_weight=l2_weight,
            jitter=jitter,
            bounds=run.pixel_bounds if method == "deep_inversion" else None,
            report=report,
        )
    run.keep_images(stage.name, made.images, made.labels)
    run.log(stage, 1, "synthetic", {f"{net}/loss": float(np.mean(last))})


def check_synthesize(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of a `synthesize` stage."""
    where, fields = f"stages.{stage.name}", stage.fields
    if len(fields["nets"]) != 1:
        raise ValueError(f"{where}.nets is {fields['nets']!r}; images are made from one net.")
    checks.one_of(f"{where}.method", fields["method"], batch_norm.METHODS)
    for name, low in (("examples", 1), ("batch_size", 1), ("steps", 0), ("jitter", 0)):
        checks.integer_in(f"{where}.{name}", fields[name], low)
    for name in ("lr", "bn_weight", "tv_weight", "l2_weight"):
        checks.in_range(f"{where}.{name}", fields[name], 0, 1e9)
    check_batch_norm(nets, stage)
