"""The kinds of stages: each takes a run and changes its variables, its rows, or both.

Add a kind as a file of this folder, with a function and its check, and a line in `STAGES`.
"""

from qkd_jax.experiment.schedule import Kind
from qkd_jax.experiment.stages.calibrate import calibrate, check_calibrate
from qkd_jax.experiment.stages.deploy import check_deploy, deploy_nets
from qkd_jax.experiment.stages.diagnose import check_diagnose, diagnose
from qkd_jax.experiment.stages.evaluate import check_evaluate, evaluate
from qkd_jax.experiment.stages.generate import GENERATOR_KINDS
from qkd_jax.experiment.stages.post_training import POST_TRAINING_KINDS
from qkd_jax.experiment.stages.reestimate_bn import check_reestimate_bn, reestimate_bn
from qkd_jax.experiment.stages.synthesize import check_synthesize, synthesize
from qkd_jax.experiment.stages.train import plan_stage, train

__all__ = ["STAGES"]


STAGES: dict[str, Kind] = {
    "train": Kind(train, plan_stage),
    "calibrate": Kind(calibrate, check_calibrate),
    "synthesize": Kind(synthesize, check_synthesize, makes_images=True),
    "reestimate_bn": Kind(reestimate_bn, check_reestimate_bn),
    "evaluate": Kind(evaluate, check_evaluate),
    "diagnose": Kind(diagnose, check_diagnose),
    "deploy": Kind(deploy_nets, check_deploy),
    **GENERATOR_KINDS,
    **POST_TRAINING_KINDS,
}
