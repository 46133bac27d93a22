"""Steps after training: functions from variables to variables, in the order in which they run.

`reestimate_batch_norm` renews BatchNorm's statistics, `fold_bn` takes BatchNorm out of the graph,
`integer_bias` does that and rounds biases as integer kernels do.
`equalize`, `absorb_bias`, `smooth` and `awq` move factors and constants between the layers of a
float net, `rotate` and `rotate_inputs` turn its channels, all before `calibrate`; `hqq` finds
better grids for the weights of a calibrated one, `gptq`, `adaround`, `brecq` and `qdrop` round
them better than to the nearest code, `propagate_errors` makes them answer for the layers before,
and `correct_bias` takes the mean error out of its layers.
Add one as a file with a function `(net, variables, ..., **options) -> variables`.
"""

from qkd_jax.ptq.absorb_bias import absorb_bias
from qkd_jax.ptq.awq import awq
from qkd_jax.ptq.batch_norm_statistics import reestimate_batch_norm
from qkd_jax.ptq.correct_bias import correct_bias
from qkd_jax.ptq.equalize import equalization_pairs, equalize
from qkd_jax.ptq.error_propagation import propagate_errors
from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.ptq.gptq import gptq
from qkd_jax.ptq.hqq import hqq
from qkd_jax.ptq.integer_bias import integer_bias
from qkd_jax.ptq.reconstruct import adaround, brecq, qdrop
from qkd_jax.ptq.rotate import rotate
from qkd_jax.ptq.rotate_inputs import rotate_inputs
from qkd_jax.ptq.smooth import smooth

__all__ = [
    "absorb_bias",
    "adaround",
    "awq",
    "brecq",
    "correct_bias",
    "equalization_pairs",
    "equalize",
    "fold_bn",
    "gptq",
    "hqq",
    "integer_bias",
    "propagate_errors",
    "qdrop",
    "reestimate_batch_norm",
    "rotate",
    "rotate_inputs",
    "smooth",
]
