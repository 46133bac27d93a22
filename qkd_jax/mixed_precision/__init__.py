"""Mixed precision: measure how each layer bears few bits, then spend a budget where it matters.

    table = sensitivity(net, variables, batches, bits=(2, 3, 4, 8))
    rules = allocate(table, budget_bytes=20_000, pin={"stem": 8, "head": 8})
    mixed = quantize(net.model, rules)

`sensitivity` quantizes one layer at a time; `allocate` picks one choice of bits a layer, so that
the sum of the losses is least and the net fits. That sum takes the layers' losses as independent,
as HAWQ-V2 (Dong et al., 2019, arXiv 1911.03852) and ZeroQ do: right to second order where the
errors of different layers are uncorrelated. Measure the net that comes out.
"""

from qkd_jax.mixed_precision.candidates import Candidate, Sensitivity
from qkd_jax.mixed_precision.measure import METRICS, sensitivity
from qkd_jax.mixed_precision.solve import allocate

__all__ = ["METRICS", "Candidate", "Sensitivity", "allocate", "sensitivity"]
