"""Training: state, optimizers, the step and the loop.

plan         a `learn` table becomes structure (compiled) and numbers (arguments)
hygiene      options against oscillation and runaway scales: `oscillation`, `clamping`, `bit_budget`
optim        optimizers over the groups weights, plain and quant: `muon`, `schedules`, `layer_rates`
averages     of the variables of the nets that learn
state        what a step reads and writes; random streams
objective    forward passes and losses of all nets: `accumulation`, `rematerialisation`,
             `precision`
step         the step and the evaluation, pure functions
mesh         devices as (data, model), and the rules by which nets are divided over them
parallel     the step compiled for devices; the compilation cache
nonfinite    the first layer with a NaN or inf
loop         imported by name: it needs `record`
"""

from qkd_jax.distillation.taps import DataShape
from qkd_jax.training.mesh import MeshLayout
from qkd_jax.training.nonfinite import NonFinite, locate_nonfinite
from qkd_jax.training.parallel import (
    CompiledStep,
    StepCache,
    compile_step,
    enable_compilation_cache,
)
from qkd_jax.training.plan import Plan, plan_step
from qkd_jax.training.state import (
    TrainState,
    frozen_variables,
    net_variables,
    optimizer_states,
    start_state,
)
from qkd_jax.training.step import eval_step, make_step, name_metrics

__all__ = [
    "CompiledStep",
    "DataShape",
    "MeshLayout",
    "NonFinite",
    "Plan",
    "StepCache",
    "TrainState",
    "compile_step",
    "enable_compilation_cache",
    "eval_step",
    "frozen_variables",
    "locate_nonfinite",
    "make_step",
    "name_metrics",
    "net_variables",
    "optimizer_states",
    "plan_step",
    "start_state",
]
