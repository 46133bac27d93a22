"""Training: state, optimizers, the step, the loop, checkpoints and the record of a run.

plan       who learns from whom: a table becomes structure (compiled) and numbers (arguments)
rows       one row of that table: a term of a loss, checked; terms, owned: what becomes of it
taps       where losses look into a net, by name
adaptors   what stands between two nets' features and a loss, and learns beside the student
forward    one pass of a net, with the features that somebody asked for
hygiene    oscillation, clamps, annealing and budgets of quantizers in training
optim      optimizers and schedules over the groups weights, plain and quant
state      what a step reads and writes; random streams
step       the step and the evaluation, pure functions
parallel   the step compiled for devices; the compilation cache
synthesis  images from the statistics that a net remembers; generator, generator_dafl,
           generator_cmi: from a generator that learns from a net
nonfinite  which layer went bad first
loop, checkpoint, tracking are imported by name: they reach for the disk
"""

from qkd_jax.training.adaptors import ADAPTORS
from qkd_jax.training.forward import forward
from qkd_jax.training.generator_cmi import cmi
from qkd_jax.training.generator_dafl import dafl
from qkd_jax.training.nonfinite import NonFinite, locate_nonfinite
from qkd_jax.training.optim import OPTIMIZERS, SCHEDULES
from qkd_jax.training.parallel import (
    CompiledStep,
    StepCache,
    compile_step,
    enable_compilation_cache,
)
from qkd_jax.training.plan import Plan, StepStructure, plan_step
from qkd_jax.training.state import (
    TrainState,
    frozen_variables,
    net_variables,
    optimizer_states,
    start_state,
    step_key,
    stream_key,
)
from qkd_jax.training.step import eval_step, make_step, name_metrics
from qkd_jax.training.synthesis import Synthesis, synthesize
from qkd_jax.training.taps import DataShape

__all__ = [
    "ADAPTORS",
    "OPTIMIZERS",
    "SCHEDULES",
    "CompiledStep",
    "DataShape",
    "NonFinite",
    "Plan",
    "StepCache",
    "StepStructure",
    "Synthesis",
    "TrainState",
    "cmi",
    "compile_step",
    "dafl",
    "enable_compilation_cache",
    "eval_step",
    "forward",
    "frozen_variables",
    "locate_nonfinite",
    "make_step",
    "name_metrics",
    "net_variables",
    "optimizer_states",
    "plan_step",
    "start_state",
    "step_key",
    "stream_key",
    "synthesize",
]
