"""Steps after training: functions from variables to variables, in the order in which they run.

`reestimate_batch_norm` renews BatchNorm's statistics, `fold_bn` takes BatchNorm out of the graph.
Add one as a file with a function `(net, variables, ..., **options) -> variables`.
"""

from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.ptq.reestimate_bn import reestimate_batch_norm

__all__ = ["fold_bn", "reestimate_batch_norm"]
