"""From a range to a scale and zero point, and from real numbers to codes and back.

    code  = clip(round(x * (1 / scale)) + zero_point, qmin, qmax)
    x_hat = (code - zero_point) * scale

Rounding is half to even unless a spec says otherwise. The reciprocal is written out: XLA compiles a
division by a broadcast scale to it anyway, and only so do compiled code, eager code and a NumPy
twin give the same codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics.formats import IntFormat
from qkd_jax.numerics.rounding import compute_dtype, round_codes
from qkd_jax.numerics.spec import SCALINGS, Spec

# The smallest scale. Its reciprocal and the product of two of them are normal float32 numbers, and
# it is far below any step that trained values need, 16-bit ones included.
MIN_SCALE = 1e-12


class Grid(NamedTuple):
    """A grid: what codes mean.

        x_hat = (format.decode(code) - zero_point) * scale

    It is uniform where the format is an `IntFormat`, whose values are the codes themselves:

        qmin <= code <= qmax,  code = codes_of(x_hat, scale) + zero_point, exactly

    Arrays are NumPy's or JAX's and broadcast against x_hat.

    Attributes:
        scale: above 0, in input units per unit of the format.
        zero_point: the code of 0, integer-valued; 0 for symmetric specs.
        format: the codes: integers from `format.qmin` to `format.qmax`, bit patterns, or indices.
    """

    scale: Any
    zero_point: Any
    format: Any

    @classmethod
    def symmetric(cls, scale: jax.Array, format: Any) -> Grid:
        """Returns the grid of a zero point 0."""
        return cls(scale, jnp.zeros_like(scale), format)


def codes_of(x_hat: Any, scale: Any) -> Any:
    """Centred codes, `code - zero_point`, of values on a grid: round(x_hat * (1 / scale)).

    Exact, for the rounding takes back the error of the product. NumPy or JAX arrays.
    """
    number = np if isinstance(x_hat, np.ndarray) else jnp
    return number.round(x_hat * (1 / scale))


def guarded(scale: jax.Array, power_of_two: bool = False) -> jax.Array:
    """Replaces the scale of an all-zero range by 1, and keeps others at MIN_SCALE or above.

    At scale 1 a channel that was dead when it was calibrated encodes to zero and still lets
    gradients through when it wakes up; at a tiny scale it would be saturated for good.
    """
    scale = jnp.where(scale == 0, jnp.ones_like(scale), jnp.maximum(scale, MIN_SCALE))
    return power_of_two_above(scale) if power_of_two else scale


def power_of_two_above(scale: jax.Array) -> jax.Array:
    """The smallest power of two that is not below a positive scale, exactly."""
    mantissa, exponent = jnp.frexp(scale)
    # frexp's mantissa lies in [1/2, 1): 1/2 is a power of two already.
    return jnp.ldexp(jnp.ones_like(scale), exponent - (mantissa == 0.5).astype(exponent.dtype))


def _float(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(compute_dtype(x))


def check_sign(lo: jax.Array, format: IntFormat) -> None:
    """Raises ValueError when known negative values meet an unsigned symmetric format."""
    if format.signed or isinstance(lo, jax.core.Tracer):
        return
    lowest = float(np.min(np.asarray(lo)))
    if lowest < 0:
        raise ValueError(
            f"the data reach down to {lowest:.6g}, but the spec is unsigned and symmetric "
            f"({format.name}), which would set every negative value to 0. Use signed=True, or "
            "symmetric=False for a zero point."
        )


def symmetric_scale(
    lo: jax.Array,
    hi: jax.Array,
    format: IntFormat,
    *,
    scaling: str = "cover",
    power_of_two: bool = False,
) -> jax.Array:
    """The scale of a symmetric grid over [lo, hi].

    - "cover": max(lo / qmin, hi / qmax), hi / qmax for an unsigned format: the smallest scale that
      clips nothing. On a narrow grid this is "qmax".
    - "qmax": max|x| / qmax on the full grid too, which wastes the lowest code.
    - "qmax_half": max|x| / (qmax + 1/2): the largest value is clipped by up to half a step, and
      the other ones have a finer grid.

    Args:
        lo: lower end of the range, any shape.
        hi: upper end, of the same shape.
        format: the codes.
        scaling: one of the three conventions in use.
        power_of_two: round the scale up to a power of two; then nothing more is clipped.

    Returns:
        The scale, in input units per code; 1 where the range is all zero.

    Raises:
        ValueError: the format has no positive code, or is unsigned and `lo` is known to be
            negative.
    """
    if format.qmax == 0:
        raise ValueError(
            f"format is {format}, whose codes are {{-1, 0}}; a symmetric scale needs a positive "
            "code. Use 2 bits or more, or signed=False."
        )
    check_sign(lo, format)
    lo, hi = _float(lo), _float(hi)
    if scaling != "cover":
        checks.one_of("scaling", scaling, SCALINGS)
        amax = jnp.maximum(jnp.maximum(hi, 0), -jnp.minimum(lo, 0))
        scale = amax / (format.qmax + (0.5 if scaling == "qmax_half" else 0))
    else:
        scale = jnp.maximum(hi, 0) / format.qmax
        if format.signed:
            scale = jnp.maximum(scale, jnp.minimum(lo, 0) / format.qmin)
    return guarded(scale, power_of_two)


def affine_parameters(
    lo: jax.Array, hi: jax.Array, format: IntFormat, *, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The scale and zero point that spread the codes over [lo, hi].

    The range is first widened to contain 0; scale = (hi - lo) / (qmax - qmin) and
    zero_point = clip(round(qmin - lo / scale), qmin, qmax), an integer, so that 0 has a code of
    its own and zero padding stays exact (Jacob et al., 2017, arXiv 1712.05877, section 2.1).

    Returns:
        (scale, zero_point), both float; the zero point is integer-valued. An all-zero range gives
        scale 1 and the zero point nearest to 0.
    """
    lo, hi = jnp.minimum(_float(lo), 0), jnp.maximum(_float(hi), 0)
    width = (hi - lo) / (format.qmax - format.qmin)
    scale = guarded(width, power_of_two)
    zero_point = jnp.clip(jnp.round(format.qmin - lo * (1 / scale)), format.qmin, format.qmax)
    nearest = jnp.full_like(zero_point, min(max(0, format.qmin), format.qmax))
    return scale, jnp.where(width == 0, nearest, zero_point)


def range_parameters(lo: jax.Array, hi: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """(scale, zero_point) of a range: symmetric (zero point 0) or affine, as the spec says."""
    if not spec.symmetric:
        return affine_parameters(lo, hi, spec.format, power_of_two=spec.power_of_two)
    scale = symmetric_scale(
        lo, hi, spec.format, scaling=spec.scaling, power_of_two=spec.power_of_two
    )
    return scale, jnp.zeros_like(scale)


def encode(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | float,
    format: IntFormat,
    *,
    rounding: str = "even",
    key: jax.Array | None = None,
) -> jax.Array:
    """Real numbers to codes: clip(round(x * (1 / scale)) + zero_point, qmin, qmax).

    `rounding` and `key` are those of `numerics.round_codes`.

    Returns:
        Codes as floats (float32, or float64 for float64 input), integer-valued and not centred.
        NaN stays NaN; +-inf saturates.
    """
    codes = round_codes(_float(x) * (1 / scale), rounding, key) + zero_point
    return jnp.clip(codes, format.qmin, format.qmax)


def decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | float) -> jax.Array:
    """Codes to real numbers: (codes - zero_point) * scale."""
    return (codes - zero_point) * scale


def nearest_level(u: jax.Array, levels: Sequence[float]) -> jax.Array:
    """The nearest of some ascending levels, the lower of two at equal distance; NaN stays NaN.

    A chain of selections, which compilers vectorise, where a search would gather; levels that begin
    with 0, 1, 2 are rounded to as far as they go on like this.
    """
    whole = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], enumerate(levels)))
    if whole > 2:
        nearest = jnp.clip(jnp.ceil(u - 0.5), 0, whole - 1)
    else:
        whole, nearest = 1, jnp.where(jnp.isnan(u), u, levels[0])
    for low, high in itertools.pairwise(levels[whole - 1 :]):
        nearest = jnp.where(u > (low + high) / 2, high, nearest)
    return nearest


def check_scale(name: str, scale: jax.Array) -> None:
    """Raises ValueError for a scale that is known to be NaN, infinite, zero or negative."""
    if isinstance(scale, jax.core.Tracer):
        return
    values = np.asarray(scale)
    if not (np.isfinite(values).all() and (values > 0).all()):
        bad = values[~(np.isfinite(values) & (values > 0))].reshape(-1)[0]
        raise ValueError(
            f"{name} holds {bad}; a scale must be finite and greater than 0. Calibrate again on "
            "finite data; `calibrate` gives all-zero tensors the scale 1."
        )


def check_zero_point(name: str, zero_point: Any, format: IntFormat) -> None:
    """Raises ValueError for a zero point outside of the codes, which files could not hold."""
    values = np.asarray(zero_point)
    if ((values < min(format.qmin, 0)) | (values > format.qmax)).any():
        raise ValueError(
            f"{name} has zero points from {values.min():g} to {values.max():g}, and its codes go "
            f"from {format.qmin} to {format.qmax}. Calibrate again."
        )


def shared_axes(x: jax.Array, param: jax.Array) -> tuple[int, ...]:
    """The axes of `x` that share an entry of a parameter which broadcasts against it."""
    if param.ndim == 0:
        return tuple(range(x.ndim))
    return tuple(i for i in range(x.ndim) if param.shape[i] == 1)


def check_operand(x: jax.Array, params: Mapping[str, jax.Array], names: Sequence[str]) -> None:
    """Raises ValueError unless `params` has exactly `names`, each of a shape that fits `x`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; quantizers take floating-point arrays. Cast it.")
    if set(params) != set(names):
        raise ValueError(
            f"params has the keys {sorted(params)}; this quantizer needs {sorted(names)}. "
            "Make them with its `init`."
        )
    for name in names:
        shape = params[name].shape
        fits = len(shape) == x.ndim and all(
            a in (1, b) for a, b in zip(shape, x.shape, strict=True)
        )
        if shape != () and not fits:
            raise ValueError(
                f"params[{name!r}] has shape {shape}, x {x.shape}; allowed: () for one value per "
                "tensor, or the axes of x with size 1 where values are shared."
            )
