"""Walks a config's schedule of stages; the only orchestrator.

    from qkd_jax import experiment
    results = experiment.run(config, "runs/mine")

settings    the config checked, the schedule laid out in steps
values      the checks of what is neither a net nor a stage
run         what a run has in its hands, and how it is saved
stages      the kinds of stages: STAGES
deployment  the `deploy` stage: integers, ONNX, agreement, latency
diagnosis   the `diagnose` stage: ranges, clipping, codes, SQNR, oscillation by operand
synthesis   the `synthesize` stage: images from a trained net; generation: by generators
hygiene     the checks of a train stage's hygiene
soft_labels what the report shows of soft labels
teacher_cache  a train stage's cached logits
overview    `--mode=inspect`
"""

from qkd_jax.experiment.orchestrate import (
    evaluate,
    export,
    inspect,
    main,
    read,
    report,
    restore,
    run,
)
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.settings import Settings
from qkd_jax.experiment.stages import STAGES
from qkd_jax.record.stopping import EXIT_INTERRUPTED, EXIT_NONFINITE
from qkd_jax.training.loop import NonFiniteError, Preempted

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_NONFINITE",
    "STAGES",
    "NonFiniteError",
    "Preempted",
    "Run",
    "Settings",
    "Stage",
    "evaluate",
    "export",
    "inspect",
    "main",
    "read",
    "report",
    "restore",
    "run",
]
