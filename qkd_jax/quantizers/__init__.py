"""Quantizers: one paper per file, each a module of three pure functions and a check.

- `check(spec)` raises ValueError for a spec that makes no sense for the quantizer;
- `init(stats, spec) -> params` returns the first parameters, a flat dict of float32 arrays of the
  statistics' shape. Data are checked too: it raises ValueError for an unsigned symmetric spec and
  data known to be negative (`numerics.check_sign`). With `spec.observer` named the grid covers the
  range [stats.lo, stats.hi], and all-zero data give a grid that is not degenerate;
- `fake_quant(x, params, spec, *, batch_axes=(), key=None) -> x_hat` rounds to the grid, with a
  closed-form backward pass. `x` is computed in float32 (float64 for float64), and x_hat has its
  dtype; NaN stays NaN and infinities saturate. Parameters are () or broadcast against `x`; others
  raise ValueError (`numerics.check_operand`). `batch_axes` are the axes of `x` that count examples,
  () for weights, and `key` is the randomness of stochastic rounding, without which it rounds half
  to even;
- `integer_view(params, spec) -> numerics.Grid`, the meaning of the codes: x_hat is exactly
  (code - zero_point) * scale. None for a grid that is not uniform.

A module may have more functions, for a grid that needs them:

- `code_grid(params, spec) -> numerics.Grid`: the meaning of the codes where `integer_view` is None:
  x_hat is exactly format.decode(code) * scale. A quantizer with neither can't be stored;
- `live(x, params, spec) -> params`: the parameters for `x`, where they depend on the tensor;
- `pre_affine(params, spec) -> (gain, offset)`: the codes are those of gain * x + offset;
- `code_stride(spec) -> int`: the distance of neighbouring codes, where not every code occurs;
- `clip_range(params, spec) -> (low, high)`: the values beyond which `x` is clipped, where `x` is
  bent before it is rounded; elsewhere they are the grid's ends;
- `output_gradient(out, spec, *, batch_axes, key) -> out`: rounds the gradient of a layer's output;
- `grid_sizes(params, spec) -> {name: array}`: what must be above 0 for the grid to be more than a
  point, where that is not `STEP` and `SIZE`;
- `used_bits(params, spec)` and `fewest_bits(spec)`, with the option `learn_bits`: the bits in use,
  and the fewest that can be.

What the rest of the package needs to know of a quantizer, its module states in attributes. `facts`
returns them; behind each stand its default and who reads it:

- `OPTIONS` ({}; `check`): {option: its default};
- `SIZE` ((); `training.clamping`): the parameters in which the size of the grid is learned. A name
  that begins with `log2_` is a logarithm, and `lower` and `upper` are the ends of an interval;
- `SIZE_OPTION` (""; `training.clamping`): the option without which nothing learns them;
- `ANNEALED` (""; `training.hygiene`): the parameter that a train stage may take to a value;
- `STEP` (""; `ptq.reconstruct`, `quantize.traced`): the parameter that is the scale of a grid which
  stays while weights move on it, so that roundings can be learned;
- `RANGE_GRID` (False; dynamic ranges of `quantize.traced` and `deploy.onnx`): True where `init` is
  `numerics.range_parameters` of the range and nothing else;
- `NARROW` (False; `code_format`): True where signed codes are symmetric about zero at every width;
- `SIGNED_INPUTS` (True; `quantize.presets`): False where LSQ takes over inputs of both signs;
- `MIN_BITS` (2; `quantize.presets`): the fewest bits of the preset;
- `PRESET` ({}; `quantize.presets`): {"weight" or "input": fields of `Spec`}, what the preset
  `w<k>a<k>:<name>` has beside or in place of `quantizer=<name>`;
- `PRESET_8_BITS` (`PRESET`; `quantize.presets`): the same at 8 bits.

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
from qkd_jax.numerics import (
    TENSOR_SCALE,
    Array,
    Grid,
    IntFormat,
    Spec,
    check_sign,
    scale_format,
    stats,
)
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
    "Facts",
    "calibrated_params",
    "check",
    "check_sizes",
    "code_format",
    "code_grid",
    "dynamic_params",
    "facts",
    "fewest_bits",
    "grid_sizes",
    "in_use",
    "is_uniform",
    "learns_bits",
    "live",
    "used_bits",
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


@dataclasses.dataclass(frozen=True)
class Facts:
    """Attributes that a quantizer's module states; `qkd_jax.quantizers` says what they mean."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: tuple[str, ...] = ()
    size_option: str = ""
    annealed: str = ""
    step: str = ""
    range_grid: bool = False
    narrow: bool = False
    signed_inputs: bool = True
    min_bits: int = 2
    preset: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    preset_8_bits: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def facts(quantizer: str) -> Facts:
    """Returns what the module of a quantizer, a key of QUANTIZERS, states of itself."""
    module = QUANTIZERS[quantizer]
    names = [
        field.name for field in dataclasses.fields(Facts) if hasattr(module, field.name.upper())
    ]
    stated = {name: getattr(module, name.upper()) for name in names}
    return Facts(**{"preset_8_bits": stated.get("preset", {}), **stated})


def code_format(spec: Spec) -> IntFormat:
    """Returns `spec.format`, narrow where the quantizer's codes are and the spec does not say."""
    if spec.narrow_range is None and facts(spec.quantizer).narrow:
        return dataclasses.replace(spec, narrow_range=spec.signed and spec.symmetric).format
    return spec.format


def code_grid(params: Mapping[str, Any], spec: Spec) -> Grid | None:
    """Returns the grid of a quantizer's codes, uniform or not; None where it states none.

    The format has the bits in use where bits are learned and known: the most that a channel uses.
    """
    module = QUANTIZERS[spec.quantizer]
    grid = module.integer_view(params, spec)
    if grid is not None:
        return grid._replace(format=in_use(spec, params).format) if learns_bits(spec) else grid
    return module.code_grid(params, spec) if hasattr(module, "code_grid") else None


def check(spec: Spec, *, observer_options: Iterable[str] = ()) -> None:
    """Raises ValueError for an unknown quantizer or option, or a spec that its quantizer refuses.

    Args:
        spec: the spec.
        observer_options: options that the spec's observer knows.
    """
    if spec.quantizer not in QUANTIZERS:
        raise checks.unknown("quantizer", spec.quantizer, QUANTIZERS)
    known = [*facts(spec.quantizer).options, *observer_options]
    for name, _ in spec.options:
        if not known:
            raise ValueError(
                f"quantizer {spec.quantizer!r} came with the option {name!r}; it has none. Drop it."
            )
        if name not in known:
            raise checks.unknown(f"option of quantizer {spec.quantizer!r}", name, known)
    QUANTIZERS[spec.quantizer].check(spec)


def live(x: Array, params: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Returns the parameters for `x`: `params`, unless they depend on the tensor itself."""
    module = QUANTIZERS[spec.quantizer]
    return module.live(x, params, spec) if hasattr(module, "live") else dict(params)


@functools.lru_cache
def is_uniform(spec: Spec) -> bool:
    """Returns True for a spec whose grid is uniform: codes are integers times a scale."""
    module, one = QUANTIZERS[spec.quantizer], jax.ShapeDtypeStruct((), jnp.float32)

    def view(*moments: jax.Array) -> tuple[()] | None:
        grid = module.integer_view(module.init(stats.Stats(*moments), spec), spec)
        return None if grid is None else ()

    return jax.eval_shape(view, *[one] * len(stats.Stats._fields)) is not None


def calibrated_params(moments: Any, spec: Spec) -> dict[str, Any]:
    """Returns what a dynamic spec takes from calibration: the second level of its scales, if any.

    So that no block of a dynamic tensor sees another.

    Args:
        moments: statistics of the whole tensor, `numerics.Stats`.
        spec: with `dynamic=True`.
    """
    if scale_format(spec) != "e4m3fn":
        return {}
    return {TENSOR_SCALE: QUANTIZERS[spec.quantizer].init(moments, spec)[TENSOR_SCALE]}


def dynamic_params(
    x: Array,
    spec: Spec,
    axes: Sequence[int],
    *,
    axis_name: Any = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The parameters of a dynamic spec: those that its quantizer starts from on `x` itself.

    Args:
        x: the tensor.
        spec: with `dynamic=True`.
        axes: of `x`, whose entries have a range of their own.
        axis_name: mapped axes to find the range over.
        known: the parameters that calibration left, of which `calibrated_params` are used.
    """
    if spec.symmetric and not spec.signed and not isinstance(x, jax.core.Tracer):
        check_sign(jnp.min(x), spec.format)
    known = known or {}
    kept = {TENSOR_SCALE: known[TENSOR_SCALE]} if TENSOR_SCALE in known else {}
    return _dynamic_params(x, kept, spec, tuple(axes), axis_name)


# Compiled outside of jit too: a compiler multiplies by the reciprocal of a constant, and a division
# on its own does not, so that codes would depend on what is compiled together.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _dynamic_params(
    x: Array, kept: dict[str, Any], spec: Spec, axes: tuple[int, ...], axis_name: Any
) -> dict[str, Any]:
    sums = stats.measure(jax.lax.stop_gradient(x), channel_axes=axes, axis_name=axis_name)
    params = QUANTIZERS[spec.quantizer].init(stats.finish(sums), spec, **kept)
    return jax.tree.map(jax.lax.stop_gradient, params)


def grid_sizes(params: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Returns {name: array} of what must be above 0 for a grid to be more than a point.

    A learned size that is not computes with the smallest scale, so that training can bring it back.
    """
    module, stated = QUANTIZERS[spec.quantizer], facts(spec.quantizer)
    if hasattr(module, "grid_sizes"):
        return module.grid_sizes(params, spec)
    names = dict.fromkeys((stated.step, *stated.size))
    return {
        name: jnp.exp2(params[name]) if name.startswith("log2_") else params[name]
        for name in names
        if name in params
    }


def check_sizes(where: str, params: Mapping[str, Any], spec: Spec) -> None:
    """Raises ValueError for a grid of which a size is NaN, infinite, zero or negative.

    Args:
        where: whose grid, such as "weight of layer 'stem' (int4 lsq)".
        params: the quantizer's parameters, as they are for the tensor.
        spec: its spec.
    """
    learned = facts(spec.quantizer).size
    for name, size in grid_sizes(params, spec).items():
        values = np.asarray(size)
        bad = values[~(np.isfinite(values) & (values > 0))]
        if bad.size:
            raise ValueError(
                f"{name} of the {where} holds {bad.reshape(-1)[0]}; it must be finite and greater "
                "than 0, for with this one the grid is a point. "
                + (
                    "Training carried it there: train with a lower quant_lr, or keep it near its "
                    "start with hygiene.<net>.max_ratio; or calibrate again."
                    if learned
                    else "Calibrate again on finite data; `calibrate` gives all-zero tensors 1."
                )
            )


def learns_bits(spec: Spec) -> bool:
    """Returns True where the number of bits is a parameter and `spec.bits` its upper bound."""
    return bool(spec.option("learn_bits", False))


def fewest_bits(spec: Spec) -> int:
    """The fewest bits that learned bits can come to."""
    return QUANTIZERS[spec.quantizer].fewest_bits(spec)


def used_bits(params: Mapping[str, Any], spec: Spec) -> Array:
    """The bits that learned bits stand for: whole numbers, up to `spec.bits`."""
    return QUANTIZERS[spec.quantizer].used_bits(params, spec)


def in_use(spec: Spec, params: Mapping[str, Any] | None) -> Spec:
    """The spec with the bits that its quantizer really has: learned bits where they are known.

    Args:
        spec: the spec, whose `bits` are the upper bound of learned ones.
        params: the quantizer's parameters, their shapes, or None before calibration. Of bits by
            channel the most count, for a tensor is stored at one width.
    """
    learned = (params or {}).get("bits") if learns_bits(spec) else None
    known = isinstance(learned, jax.Array | np.ndarray | np.generic)
    if not known or isinstance(learned, jax.core.Tracer):
        return spec
    bits = int(np.max(used_bits({"bits": jnp.asarray(learned)}, spec)))
    # The grid is narrow or not as it was at the upper bound.
    return dataclasses.replace(spec, bits=bits, narrow_range=spec.format.narrow_range)
