"""Steps after training: functions from variables to variables, in the order in which they run.

`reestimate_batch_norm` renews BatchNorm's statistics, `fold_bn` takes BatchNorm out of the graph,
`integer_bias` does that and rounds biases as integer kernels do.
`equalize`, `absorb_bias` and `smooth` move factors and constants between the layers of a float net,
before `calibrate`; `gptq`, `adaround`, `brecq` and `qdrop` round the weights of a calibrated one
better than to the nearest code, and `correct_bias` takes the mean error out of its layers.
Add one as a file with a function `(net, variables, ..., **options) -> variables`.
"""

from qkd_jax.ptq.absorb_bias import absorb_bias
from qkd_jax.ptq.batch_norm_statistics import reestimate_batch_norm
from qkd_jax.ptq.correct_bias import correct_bias
from qkd_jax.ptq.equalize import equalization_pairs, equalize
from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.ptq.gptq import gptq
from qkd_jax.ptq.integer_bias import integer_bias
from qkd_jax.ptq.reconstruct import adaround, brecq, qdrop
from qkd_jax.ptq.smooth import smooth

__all__ = [
    "absorb_bias",
    "adaround",
    "brecq",
    "correct_bias",
    "equalization_pairs",
    "equalize",
    "fold_bn",
    "gptq",
    "integer_bias",
    "qdrop",
    "reestimate_batch_norm",
    "smooth",
]
