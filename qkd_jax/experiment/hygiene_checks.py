"""The hygiene of a train stage, checked against the quantizers that its nets will have by then."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.settings import Settings, shapes
from qkd_jax.numerics import Spec, Stats
from qkd_jax.quantize.inspection import layers
from qkd_jax.quantize.variables import OPERANDS
from qkd_jax.quantizers import QUANTIZERS
from qkd_jax.training import hygiene
from qkd_jax.training.plan import Plan


def check_hygiene(settings: Settings, stage: Stage, plan: Plan) -> None:
    """Refuses hygiene that would have nothing to act on once the stage starts.

    Args:
        settings: the whole schedule, which says what is calibrated before the stage.
        stage: a `train` stage.
        plan: its plan.

    Raises:
        ValueError: as `training.hygiene.check`.
    """
    for learner in plan.structure.learners:
        if learner.hygiene is None:
            continue
        name = plan.name_of(learner.slot)
        net = settings.nets[name]
        operands = calibrated(settings, name, stage.index)
        images = jax.ShapeDtypeStruct(settings.image_shape, np.float32)
        variables = shapes(net, settings.image_shape)
        weights: dict[str, Spec] = {}
        parameters: set[tuple[Spec, str]] = set()
        for layer in layers(net, variables, images, **mode_arguments(net, False)):
            specs = {"weight": layer.weight, "input": layer.input, "output": layer.output}
            for operand, spec in specs.items():
                if spec is None or operand not in operands:
                    continue
                params = _params(spec)
                parameters |= {(spec, name) for name in params}
                if operand == "weight" and _has_codes(spec, params):
                    weights[layer.path] = spec
        where = f"stages.{stage.name}.hygiene.{name}"
        hygiene.check(learner.hygiene, weights, parameters, where=where)


def calibrated(settings: Settings, net: str, end: int) -> set[str]:
    """Returns the operands of a net that have quantizers before the stage with number `end`."""
    operands: set[str] = set()
    for stage in settings.stages[:end]:
        if stage.kind == "calibrate" and net in stage.nets:
            operands |= set(stage.fields["operands"] or OPERANDS)
    source = settings["nets"][net].get("init_from", "")
    if source in settings.nets and settings.nets[source] == settings.nets[net]:
        # A net of the same rules is copied with its quantizers, when it first takes part.
        first = next((stage.index for stage in settings.stages if net in stage.nets), end)
        operands |= calibrated(settings, source, min(first, end))
    return operands


def _params(spec: Spec) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters that `calibrate` makes for a spec, for one channel."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    if spec.dynamic:
        return {"dynamic": scalar}
    init = QUANTIZERS[spec.quantizer].init
    return jax.eval_shape(lambda *s: init(Stats(*s), spec), *[scalar for _ in Stats._fields])


def _has_codes(spec: Spec, params: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    if spec.dynamic:  # as `training.weights.quantized_weights`
        return False
    view = QUANTIZERS[spec.quantizer].integer_view
    return jax.eval_shape(lambda p: (view(p, spec) or (None,))[0], params) is not None
