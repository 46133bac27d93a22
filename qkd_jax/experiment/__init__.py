"""Experiments: a config's schedule of stages, walked and resumed, and run folders read.

    from qkd_jax import experiment
    results = experiment.run(config, "runs/mine")

orchestrate    run, resume, walk the schedule
modes          eval, export, report, inspect, and the command line's `main`
reading        a config checked completely; its data
settings       the checked config: nets built, schedule laid out (`schedule`, `config_checks`)
run_state      the mutable state of a run, and its checkpointing
results        rows of the table, results.json, their text
stages         the kinds of stages: `STAGES`
sweeps         many runs of one config file
overview       the text of `--mode=inspect`
head_rows, hygiene_checks, soft_label_record   parts of these that have a subject of their own
"""

from qkd_jax.experiment.modes import (
    evaluate,
    export,
    inspect,
    main,
    report,
    restore,
)
from qkd_jax.experiment.orchestrate import run
from qkd_jax.experiment.reading import read
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Kind, Stage
from qkd_jax.experiment.settings import Settings
from qkd_jax.experiment.stages import STAGES
from qkd_jax.experiment.sweeps import sweep
from qkd_jax.record.stopping import EXIT_INTERRUPTED, EXIT_NONFINITE
from qkd_jax.training.loop import NonFiniteError, Preempted

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_NONFINITE",
    "STAGES",
    "Kind",
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
    "sweep",
]
