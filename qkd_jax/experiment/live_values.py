"""Values of a training stage that are logged where `config.log` asks for them.

`log.live` names them: "grad_norms" and "agreement" are measured in the step, on every batch;
"ranges" and "oscillating" here, at `quant_every_steps`. `log.codes_every_steps` counts the codes of
weights. All of it goes into metrics.jsonl, in the splits "train", "ranges", "oscillating", "codes".
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.stored_weights import quantized_weights, rounded
from qkd_jax.quantize.variables import quantizer_key, quantizers
from qkd_jax.quantizers import QUANTIZERS
from qkd_jax.record.trackers import CODES
from qkd_jax.trees import join


def with_tracking(run: Run, stage: Stage) -> Stage:
    """Returns a stage in which the weights of all nets that have codes are tracked.

    That is `hygiene.<net>.track`, which changes no number of the nets.
    """
    if "oscillating" not in run.settings["log"]["live"]:
        return stage
    hygiene = dict(stage.fields["hygiene"] or {})
    for net in stage.starts:
        if any(True for _ in quantized_weights(run.nets[net], run.variables[net])):
            hygiene[net] = {**hygiene.get(net, {}), "track": True}
    return dataclasses.replace(stage, fields={**stage.fields, "hygiene": hygiene})


def look(
    run: Run, stage: Stage, step: int, nets: Mapping[str, Any], every: Mapping[str, Any]
) -> None:
    """Logs ranges and codes at a step at which they are due.

    Args:
        run: the run.
        stage: the stage.
        step: steps of it that are done.
        nets: {net: variables}.
        every: config.log.
    """

    def due(interval: int) -> bool:
        return bool(interval) and (step % interval == 0 or step == stage.steps)

    for split, wanted, measure in (
        ("ranges", "ranges" in every["live"] and due(every["quant_every_steps"]), ranges),
        (CODES, due(every["codes_every_steps"]), codes),
    ):
        values = {
            f"{name}/{key}": value
            for name, variables in (nets.items() if wanted else ())
            for key, value in measure(run.nets[name], variables).items()
        }
        if values:
            run.log(stage, step, split, values)


def ranges(net: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, float]:
    """Returns {"<layer>/<operand>_quantizer/low" and "/high": ends of the grid} of a net.

    Over channels the lowest and the highest. Dynamic ranges are no parameters and are left out, as
    are grids without integer codes.
    """
    found = jax.device_get(_ends(net)({"quant": dict(variables.get("quant", {}))}))
    return {name: float(value) for name, value in found.items()}


@functools.lru_cache(maxsize=16)
def _ends(net: QuantizedModel) -> Any:
    def ends(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
        found = {}
        for path, operand, params in quantizers(variables):
            spec = net.spec_of(path, operand)
            if spec is None or spec.dynamic:
                continue
            quantizer = QUANTIZERS[spec.quantizer]
            if (grid := quantizer.integer_view(params, spec)) is None:
                continue
            far, key = jnp.full_like(grid[0], jnp.inf), join(path, quantizer_key(operand))
            found[f"{key}/low"] = jnp.min(quantizer.fake_quant(-far, params, spec))
            found[f"{key}/high"] = jnp.max(quantizer.fake_quant(far, params, spec))
        return found

    return jax.jit(ends)


def codes(net: QuantizedModel, variables: Mapping[str, Any]) -> dict[str, int]:
    """Returns {"<layer>/<code>": how many weights have it} of the weights on integer grids."""
    learned = {key: dict(variables.get(key, {})) for key in ("params", "quant")}
    found = {}
    for path, array in jax.device_get(_rounded(net)(learned)).items():
        values, counts = np.unique(array, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found[f"{path}/{value}"] = count
    return found


@functools.lru_cache(maxsize=16)
def _rounded(net: QuantizedModel) -> Any:
    def rounded_codes(learned: Mapping[str, Any]) -> dict[str, jax.Array]:
        weights = quantized_weights(net, learned)
        return {w.path: jnp.int32(jnp.round(rounded(learned, w).codes)) for w in weights}

    return jax.jit(rounded_codes)
