"""Observers: find the range [lo, hi] that a tensor's grid shall span, from calibration data.

Each is three pure functions and a flag:

- `init(shape, spec) -> state`, a flat dict of arrays; `shape` is that of lo and hi: () for one
  range per tensor, else 1 on the axes that share a range;
- `update(state, x, spec, *, channel_axes=(), stats=None, axis_name=None) -> state` sees one batch;
- `range(state, spec) -> (lo, hi)`, at the end. It raises ValueError for no data, and for data that
  are NaN or infinite (outside `jit`, where values are known);
- `NEEDS_STATS`: whether `update` wants `stats`, the finished statistics of a first pass over all
  batches;
- `ANY_SPEC`, only where it is True: `init` and `update` do not look at the spec, so that operands
  of one shape share a compiled program;
- `OF_CODES`, only where it is True: the range depends on the number of evenly spaced codes, so
  quantizers with other levels are refused.

With `axis_name`, each device sees its part of the batch and all hold the state of the whole. To
add one, write the file and name it in `OBSERVERS`: the tests in
`tests/observers/test_every_observer.py` run over that dict.
"""

from types import ModuleType

from qkd_jax.observers import ema, entropy, minmax, mse, percentile, rms

__all__ = ["OBSERVERS", "ema", "entropy", "minmax", "mse", "percentile", "rms"]

OBSERVERS: dict[str, ModuleType] = {
    "minmax": minmax,
    "ema": ema,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
    "rms": rms,
}
