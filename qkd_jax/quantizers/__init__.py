"""Quantizers: one paper a file, each three pure functions and a check.

- `check(spec)` raises ValueError for a spec that makes no sense for the quantizer;
- `init(stats, spec) -> params` makes the parameters, a flat dict of arrays, shaped like the
  statistics;
- `fake_quant(x, params, spec, *, batch_axes=()) -> x_hat` rounds to the grid, with a closed-form
  backward pass;
- `integer_view(params, spec) -> (scale, zero_point, format)` says what the codes mean:
  x_hat is exactly (code - zero_point) * scale;
- `pre_affine(params, spec) -> (gain, offset)`, only where the codes are those of
  gain * x + offset instead of x.

To add one, write the file and name it in `QUANTIZERS`: the tests in
`tests/quantizers/test_every_quantizer.py` run over that dict.
"""

from types import ModuleType

from qkd_jax import checks
from qkd_jax.numerics import Spec
from qkd_jax.quantizers import lsq, qil, uniform

__all__ = ["QUANTIZERS", "check", "lsq", "qil", "uniform"]

QUANTIZERS: dict[str, ModuleType] = {
    "uniform": uniform,
    "lsq": lsq,
    "qil": qil,
}


def check(spec: Spec) -> None:
    """Raises ValueError for an unknown quantizer, or a spec that its quantizer refuses."""
    if spec.quantizer not in QUANTIZERS:
        raise checks.unknown("quantizer", spec.quantizer, QUANTIZERS)
    QUANTIZERS[spec.quantizer].check(spec)
