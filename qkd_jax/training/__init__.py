"""Training: state, optimizers, the step and the loop.

plan       who learns from whom: a table becomes structure (compiled) and numbers (arguments)
hygiene    oscillation, clamps, annealing and budgets of quantizers in training
optim      optimizers and schedules over the groups weights, plain and quant
state      what a step reads and writes; random streams
step       the step and the evaluation, pure functions
parallel   the step compiled for devices; the compilation cache
nonfinite  the first layer with a NaN or inf
loop       is imported by name: it reaches for the disk
"""

from qkd_jax.distillation.forward import forward
from qkd_jax.distillation.taps import DataShape
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

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "CompiledStep",
    "DataShape",
    "NonFinite",
    "Plan",
    "StepCache",
    "StepStructure",
    "TrainState",
    "compile_step",
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
]
