"""The post-training methods as kinds of stages, one for each function of `qkd_jax.ptq`.

A stage takes `nets`, the number of training images to show (`examples`), the stage whose images to
show instead (`images`) and whatever the method takes by keyword, with the method's own defaults.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkd_jax import checks, ptq
from qkd_jax.experiment.config_checks import check_rules
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Kind, Stage
from qkd_jax.quantize import QuantizedModel

# Arguments of a method that the stage passes itself.
PASSED = ("seed", "report")
# Methods that work on a calibrated net; the others bring a float one to another form.
OF_QUANTIZERS = (
    "correct_bias",
    "hqq",
    "propagate_errors",
    "gptq",
    "adaround",
    "brecq",
    "qdrop",
)
OF_FLOAT_NETS = ("fold_bn", "equalize", "absorb_bias", "smooth", "awq", "rotate", "rotate_inputs")
METHODS = (*OF_FLOAT_NETS, *OF_QUANTIZERS)


def _kind(name: str) -> Kind:
    method: Callable[..., Any] = getattr(ptq, name)
    parameters = inspect.signature(method).parameters
    fields = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in PASSED}
    if "reference" in fields:  # in a stage, the name of a net as it is when the stage runs
        fields["reference"] = fields["reference"].replace(default="")

    def stage(
        run: Run,
        stage: Stage,
        *,
        nets: Sequence[str],
        examples: int = 256,
        images: str = "",
        **options: Any,
    ) -> None:
        batches = run.images(examples, batch_size=min(examples, 256), source=images)
        # Methods that work on the graph alone need the shape of the images only.
        shown = batches[0] if "images" in parameters else batches
        if "seed" in parameters:
            options["seed"] = run.settings["seed"]
        reference = options.pop("reference", "")
        for net in nets:
            if reference:
                options["reference"] = run.variables[reference]
            variables = method(
                run.nets[net], run.variables[net], shown, **options, **run.apply_arguments(net)
            )
            run.put(net, variables)
            if run.verbose:
                print(f"{stage.name}: {name} of {net} done", flush=True)

    stage.__doc__ = (method.__doc__ or "").splitlines()[0]
    return Kind(stage, check, fields)


def check(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of a post-training stage."""
    where = f"stages.{stage.name}"
    checks.integer_in(f"{where}.examples", stage.fields["examples"], 1)
    if "how" in stage.fields:
        checks.one_of(f"{where}.how", stage.fields["how"], ("empirical", "analytic"))
    for field in ("steps", "batch_size"):
        if field in stage.fields:
            checks.integer_in(f"{where}.{field}", stage.fields[field], 1)
    if stage.kind in OF_QUANTIZERS:
        check_rules(nets, stage)


POST_TRAINING_KINDS: dict[str, Kind] = {name: _kind(name) for name in METHODS}
