"""The `calibrate` stage: quantizers get their parameters from training images."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from qkd_jax import checks, weights
from qkd_jax.experiment.config_checks import check_rules
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.stages.train import quantizer_means
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calibration import calibrate as calibrate_net
from qkd_jax.quantize.calibration import check_observer
from qkd_jax.quantize.variables import OPERANDS, is_calibrated


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

    `operands` ("weight", "input", "other", "output") calibrates these alone and leaves the others
    as they are: weights first, say, and inputs after some training. Empty means all.
    `images` names a stage that makes images, which replace the training images.
    `observer` serves every quantizer, with `observer_options` such as ("power:2.4",).
    """
    batches = run.images(examples, batch_size=256, source=images)
    options = checks.named_numbers("observer_options", observer_options, "power:2.4")
    for name in nets:
        if run.folder is not None and not is_calibrated(
            run.variables[name]
        ):  # the report shows weights before and after
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


def check_calibrate(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
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
