"""The post-training methods as kinds of stages: one for each, thin over `qkd_jax.ptq`.

A stage takes `nets`, the number of training images to show (`examples`), the `synthesize` stage
whose images to show instead (`images`) and whatever the method takes by keyword; the field's
default is the method's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkd_jax import checks, ptq
from qkd_jax.experiment.config_checks import check_rules
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage

__all__ = ["PTQ_CHECKS", "PTQ_STAGES"]

# Not for configs to say: what a stage gives the method, and callbacks.
OWN = ("seed", "report")
DEFAULT_EXAMPLES = 256


def _options(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(method).parameters.values()
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OWN}
    # In a stage the name of a net, whose variables as they are then are meant.
    return {n: p.replace(default="") if n == "reference" else p for n, p in options.items()}


def _stage(name: str) -> Callable[..., None]:
    method = getattr(ptq, name)
    taken = inspect.signature(method).parameters

    def stage(
        run: Run,
        stage: Stage,
        *,
        nets: Sequence[str],
        examples: int = DEFAULT_EXAMPLES,
        images: str = "",
        **options: Any,
    ) -> None:
        batches = run.images(examples, batch_size=min(examples, 256), source=images)
        # What works on the graph alone needs images for their shape only.
        given = batches[0] if "images" in taken else batches
        extra = {"seed": run.settings["seed"]} if "seed" in taken else {}
        reference = options.pop("reference", "")
        for net in nets:
            if reference:
                extra["reference"] = run.variables[reference]
            variables = method(
                run.nets[net],
                run.variables[net],
                given,
                **options,
                **extra,
                **run.apply_arguments(net),
            )
            run.put(net, variables)
            if run.verbose:
                print(f"{stage.name}: {name} of {net} done", flush=True)

    stage.__doc__ = (method.__doc__ or "").splitlines()[0]
    own = [p for p in inspect.signature(stage).parameters.values() if p.kind is not p.VAR_KEYWORD]
    stage.__signature__ = inspect.Signature([*own, *_options(method).values()])  # type: ignore[attr-defined]
    return stage


def check(nets: Mapping[str, Any], stage: Stage) -> None:
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


# What works on a calibrated net; the others bring a float one to another form.
OF_QUANTIZERS = ("correct_bias", "gptq", "adaround", "brecq", "qdrop")
METHODS = (
    "fold_bn",
    "equalize",
    "absorb_bias",
    "smooth",
    "correct_bias",
    "gptq",
    "adaround",
    "brecq",
    "qdrop",
)

PTQ_STAGES: dict[str, Callable[..., None]] = {name: _stage(name) for name in METHODS}
PTQ_CHECKS: dict[str, Callable[..., Any]] = dict.fromkeys(METHODS, check)
