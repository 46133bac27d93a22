"""The stages `dafl` and `cmi`: a data set made by generators that learn from a trained net alone.

Of the data set only the mean and standard deviation of its pixels are used, which belong to the
net's input. The fields of a stage are the keyword arguments of its method, with the method's
defaults. An interrupted stage starts over and makes the same images.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkd_jax import checks, data_free
from qkd_jax.data_free.cmi import check_cmi, cmi_steps
from qkd_jax.data_free.dafl import check_dafl
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Kind, Stage
from qkd_jax.experiment.settings import shapes
from qkd_jax.quantize import QuantizedModel
from qkd_jax.record.progress import Progress
from qkd_jax.training.loop import Preempted
from qkd_jax.training.state import stream_key

# Arguments of a method that the stage passes itself.
PASSED = ("image_shape", "count", "key", "bounds", "student", "labels", "report")


def reporter(
    run: Run, stage: Stage, progress: Progress, losses: list[float]
) -> Callable[[int, float | None], None]:
    """Returns the callback of a method that makes images: it reports a step and raises to stop.

    Known losses are appended to `losses`.
    """

    def report(step: int, loss: float | None) -> None:
        if loss is not None:
            losses.append(loss)
        progress.update(step, loss=loss)
        if loss is not None and run.stopping():
            raise Preempted(f"before stage {stage.name!r}, which starts over")

    return report


def _kind(name: str) -> Kind:
    method = data_free.GENERATORS[name]
    parameters = inspect.signature(method).parameters
    fields = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in PASSED}

    def stage(
        run: Run, stage: Stage, *, nets: Sequence[str], examples: int = 256, **options: Any
    ) -> None:
        net, *student = nets
        total = options["steps"]
        if name == "cmi":
            of_student = options["student_steps"] if student else 0
            total = cmi_steps(examples, options["batch_size"], options["steps"], of_student)
        if student:
            options["student"] = (run.nets[student[0]], run.variables[student[0]])
        losses: list[float] = []
        with Progress(stage.name, total, options["batch_size"], enabled=run.verbose) as progress:
            made = method(
                run.nets[net],
                run.variables[net],
                image_shape=run.dataset.image_shape,
                count=examples,
                key=stream_key(run.settings["seed"], f"{name}/{stage.name}"),
                bounds=run.pixel_bounds,
                report=reporter(run, stage, progress, losses),
                **options,
            )
        run.keep_images(stage.name, made.images, made.labels)
        run.log(stage, 1, "synthetic", {f"{net}/loss": losses[-1]})

    stage.__doc__ = (method.__doc__ or "").splitlines()[0]
    return Kind(stage, check, fields, makes_images=True)


def check(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of a stage with a generator."""
    where, fields = f"stages.{stage.name}", stage.fields
    most = 2 if stage.kind == "cmi" else 1
    if not 1 <= len(fields["nets"]) <= most:
        wanted = "one net, or one and its student" if most == 2 else "one net"
        raise ValueError(f"{where}.nets is {fields['nets']!r}; images are made from {wanted}.")
    checks.integer_in(f"{where}.examples", fields["examples"], 1)
    assert stage.data is not None
    image, net = stage.data.image, nets[fields["nets"][0]]
    try:
        if stage.kind == "dafl":
            check_dafl(fields, net, image)
        else:
            check_cmi(fields, image)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if stage.kind == "cmi":
        check_batch_norm(nets, stage)


def check_batch_norm(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Refuses a net without BatchNorm where a stage makes images from its running statistics."""
    name = stage.fields["nets"][0]
    assert stage.data is not None
    if "batch_stats" not in shapes(nets[name], (1, *stage.data.image)):
        raise ValueError(
            f"stages.{stage.name}.nets has {name!r}, which has no BatchNorm and so remembers "
            f"nothing of its data; take a model with BatchNorm (mlp: nets.{name}.batch_norm=True)."
        )


GENERATOR_KINDS: dict[str, Kind] = {name: _kind(name) for name in data_free.GENERATORS}
