"""The kinds of stages: each takes a run and changes its variables, its rows, or both.

`STAGES[kind](run, stage, **fields)`. The keyword arguments are the fields that a config may give;
one without a default must be given, `nets` (or `learn`) says which nets take part. `CHECKS[kind]
(nets, stage)` refuses wrong values before anything runs. Add a kind as a function and a line in
`STAGES`, and its check in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.stages.calibrate import calibrate, check_calibrate
from qkd_jax.experiment.stages.deploy import check_deploy, deploy_nets
from qkd_jax.experiment.stages.diagnose import check_diagnose, diagnose
from qkd_jax.experiment.stages.evaluate import check_evaluate, evaluate
from qkd_jax.experiment.stages.generate import GENERATOR_CHECKS, GENERATOR_STAGES
from qkd_jax.experiment.stages.post_training import PTQ_CHECKS, PTQ_STAGES
from qkd_jax.experiment.stages.reestimate_bn import check_reestimate_bn, reestimate_bn
from qkd_jax.experiment.stages.synthesize import check_synthesize, synthesize
from qkd_jax.experiment.stages.train import plan_stage, train

__all__ = ["CHECKS", "STAGES", "plan_stage"]


STAGES: dict[str, Callable[..., None]] = {
    "train": train,
    "calibrate": calibrate,
    "synthesize": synthesize,
    "reestimate_bn": reestimate_bn,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "deploy": deploy_nets,
    **GENERATOR_STAGES,
    **PTQ_STAGES,
}

CHECKS: dict[str, Callable[[Mapping[str, Any], Stage], Any]] = {
    "train": plan_stage,
    "calibrate": check_calibrate,
    "synthesize": check_synthesize,
    "reestimate_bn": check_reestimate_bn,
    "evaluate": check_evaluate,
    "diagnose": check_diagnose,
    "deploy": check_deploy,
    **GENERATOR_CHECKS,
    **PTQ_CHECKS,
}
