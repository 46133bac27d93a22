"""Quantizers: one paper a file, each three pure functions and a check.

- `check(spec)` raises ValueError for a spec that makes no sense for the quantizer;
- `init(stats, spec) -> params` makes the parameters, a flat dict of arrays, shaped like the
  statistics;
- `fake_quant(x, params, spec, *, batch_axes=(), key=None) -> x_hat` rounds to the grid, with a
  closed-form backward pass; `key` is the randomness of stochastic rounding;
- `integer_view(params, spec) -> (scale, zero_point, format)` says what the codes mean:
  x_hat is exactly (code - zero_point) * scale. None for a grid that is not uniform;
- `live(x, params, spec) -> params`, only where parameters are a function of the tensor itself: the
  parameters as they are for `x`, to hand to the other functions;
- `pre_affine(params, spec) -> (gain, offset)`, only where the codes are those of
  gain * x + offset instead of x;
- `code_stride(spec) -> int`, only where not every code of the format occurs: the distance of
  neighbouring codes, counted from the lowest;
- `clip_range(params, spec) -> (low, high)`, only where x is bent before it is rounded: the values
  beyond which it is clipped, where else they are the grid's ends;
- `output_gradient(out, spec, *, batch_axes, key) -> out`, only where the quantizer of a layer's
  input also rounds the gradient of the layer's output.

To add one, write the file and name it in `QUANTIZERS`: the tests in
`tests/quantizers/test_every_quantizer.py` run over that dict.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import Spec, stats
from qkd_jax.quantizers import (
    apot,
    binary,
    codebook,
    dorefa,
    dsq,
    ewgs,
    floating,
    lsq,
    lsq_plus,
    pact,
    qil,
    sigmoid,
    ternary,
    tqt,
    uniform,
)

__all__ = [
    "QUANTIZERS",
    "apot",
    "binary",
    "check",
    "codebook",
    "dorefa",
    "dsq",
    "ewgs",
    "floating",
    "found_params",
    "in_use",
    "is_uniform",
    "live",
    "lsq",
    "lsq_plus",
    "pact",
    "qil",
    "sigmoid",
    "ternary",
    "tqt",
    "uniform",
]

QUANTIZERS: dict[str, ModuleType] = {
    "uniform": uniform,
    "lsq": lsq,
    "lsq_plus": lsq_plus,
    "tqt": tqt,
    "pact": pact,
    "dorefa": dorefa,
    "ewgs": ewgs,
    "dsq": dsq,
    "sigmoid": sigmoid,
    "qil": qil,
    "apot": apot,
    "binary": binary,
    "ternary": ternary,
    "codebook": codebook,
    "float": floating,
}


def check(spec: Spec, *, observer_options: Iterable[str] = ()) -> None:
    """Raises ValueError for an unknown quantizer or option, or a spec that its quantizer refuses.

    Args:
        spec: the spec.
        observer_options: options that the spec's observer knows.
    """
    if spec.quantizer not in QUANTIZERS:
        raise checks.unknown("quantizer", spec.quantizer, QUANTIZERS)
    module = QUANTIZERS[spec.quantizer]
    known = [*getattr(module, "OPTIONS", {}), *observer_options]
    for name, _ in spec.options:
        if not known:
            raise ValueError(
                f"quantizer {spec.quantizer!r} came with the option {name!r}; it has none. Drop it."
            )
        if name not in known:
            raise checks.unknown(f"option of quantizer {spec.quantizer!r}", name, known)
    module.check(spec)


def live(x: jax.Array, params: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The parameters as they are for `x`: those given, unless they depend on the tensor itself."""
    module = QUANTIZERS[spec.quantizer]
    return module.live(x, params, spec) if hasattr(module, "live") else dict(params)


@functools.lru_cache
def is_uniform(spec: Spec) -> bool:
    """Whether the spec's grid is uniform, so that its codes are integers times a scale."""
    module, one = QUANTIZERS[spec.quantizer], jax.ShapeDtypeStruct((), jnp.float32)

    def view(*moments: jax.Array) -> tuple[()] | None:
        found = module.integer_view(module.init(stats.Stats(*moments), spec), spec)
        return None if found is None else ()

    return jax.eval_shape(view, *[one] * len(stats.Stats._fields)) is not None


def found_params(
    x: jax.Array, spec: Spec, axes: Sequence[int], *, axis_name: Any = None
) -> dict[str, Any]:
    """The parameters of a dynamic spec: those that its quantizer starts from on `x` itself.

    Args:
        x: the tensor.
        spec: with `dynamic=True`.
        axes: of `x`, whose entries have a range of their own.
        axis_name: mapped axes to find the range over.
    """
    sums = stats.measure(jax.lax.stop_gradient(x), channel_axes=axes, axis_name=axis_name)
    params = QUANTIZERS[spec.quantizer].init(stats.finish(sums), spec)
    return jax.tree.map(jax.lax.stop_gradient, params)


def in_use(spec: Spec, params: Mapping[str, Any] | None) -> Spec:
    """The spec with the bits that its quantizer really has: learned bits where they are known.

    Args:
        spec: the spec, whose `bits` are the upper bound of learned ones.
        params: the quantizer's parameters, their shapes, or None before calibration. Of bits by
            channel the most count, for a tensor is stored at one width.
    """
    learned = (params or {}).get("bits") if spec.option("learn_bits", False) else None
    known = isinstance(learned, jax.Array | np.ndarray | np.generic)
    if not known or isinstance(learned, jax.core.Tracer):
        return spec
    bits = int(np.max(lsq.used_bits({"bits": jnp.asarray(learned)}, spec)))
    # The grid is narrow or not as it was at the upper bound.
    return dataclasses.replace(spec, bits=bits, narrow_range=spec.format.narrow_range)
