"""Formats of scales: float32, half precision, powers of two (MX), two levels (NVFP4).

    float32, float16, bfloat16   s = max|x| / M, rounded to the format
    e8m0                         s = 2^(floor(log2 max|x|) - floor(log2 M))
    e4m3fn                       s = b t,  t = max|x over the tensor| / (448 M),
                                 b = e4m3fn(max|x| / M / t)

M is the highest value of the elements' format. The second line is the rule of the OCP Microscaling
specification 1.0 (section 6.3), where elements beyond M saturate; with elements in int8 its s is
the shared scale times 2^-6. The third line is NVFP4 (NVIDIA, 2025, arXiv 2509.25149): b is stored
beside each block and t once. What an observer found takes the place of max|x|. The scale of a block
with infinity or NaN is not finite, in each format; but for float32 it is NaN.
"""

import math

import jax.numpy as jnp

from qkd_jax import checks
from qkd_jax.numerics.arrays import Array, Params
from qkd_jax.numerics.floats import FLOAT_FORMATS
from qkd_jax.numerics.mapping import MIN_SCALE, guarded
from qkd_jax.numerics.spec import Spec

SCALE_FORMATS = ("float32", "float16", "bfloat16", "e8m0", "e4m3fn")
SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "e8m0": 8, "e4m3fn": 8}
"""Bits of a stored scale; "e4m3fn" has a float32 number for each tensor on top."""

TENSOR_SCALE = "tensor_scale"
"""Name of the second level among a quantizer's parameters."""

# Below 2^-39 a scale would be less than MIN_SCALE; 2^127 is the highest that float32 has.
LOWEST_EXPONENT, HIGHEST_EXPONENT = math.ceil(math.log2(MIN_SCALE)), 127
_HALF = {"float16": FLOAT_FORMATS["half"], "bfloat16": FLOAT_FORMATS["bf16"]}


def scale_format(spec: Spec) -> str:
    """Returns the format of a spec's scales: its option `scale_format`, else "float32"."""
    return spec.option("scale_format", "float32")


def check_scale_format(spec: Spec) -> None:
    """Raises ValueError for an unknown format of scales, or one that the spec does not go with."""
    name = scale_format(spec)
    if name == "float32":
        return
    if name not in SCALE_FORMATS:
        raise checks.unknown(
            f"option scale_format of quantizer {spec.quantizer!r}", name, SCALE_FORMATS
        )
    given = f"quantizer {spec.quantizer!r} came with scale_format={name!r}"
    if spec.power_of_two:
        raise ValueError(
            f"{given} and power_of_two=True; each says how a scale is rounded. Drop one: "
            "scale_format='e8m0' has powers of two."
        )
    if not spec.symmetric and name in ("e8m0", "e4m3fn"):
        raise ValueError(
            f"{given} and symmetric=False; block scales have no zero point. Use symmetric=True, or "
            "scale_format='float16' or 'bfloat16'."
        )
    if spec.option("learned", False):
        raise ValueError(
            f"{given} and learned=True; a learned scale would leave its format at the first step. "
            "Drop one of the two (quantizer='tqt' learns powers of two)."
        )


def scale_names(spec: Spec) -> tuple[str, ...]:
    """Returns the names of the parameters that hold a spec's scale."""
    return ("scale", TENSOR_SCALE) if scale_format(spec) == "e4m3fn" else ("scale",)


def total_scale(params: Params) -> Array:
    """Returns the scale that values are multiplied by: that of both levels where there are two."""
    scale = params["scale"]
    return scale * params[TENSOR_SCALE] if TENSOR_SCALE in params else scale


def scale_params(
    far: Array, highest: float, spec: Spec, *, tensor_scale: Array | None = None
) -> dict[str, Array]:
    """Returns the scales of largest magnitudes, in the format that a spec wants.

    Args:
        far: the largest magnitudes, at least 0; of any shape.
        highest: of the elements' format, which the largest magnitude becomes.
        spec: the spec.
        tensor_scale: the second level of "e4m3fn" where it is known; by default that of the largest
            of all magnitudes.

    Returns:
        {"scale"} in the shape of `far`, with "e4m3fn" also {"tensor_scale"}; each 1 for zeros, and
        NaN or infinite for magnitudes that are.
    """
    name = scale_format(spec)
    if name != "float32":  # infinity would saturate, and its block become finite
        far = jnp.where(jnp.isfinite(far), far, jnp.nan)
    if name == "e8m0":
        return {"scale": _power_of_two(far, highest)}
    scale = far / highest
    if name in _HALF:
        half = _HALF[name]
        cast = half.fake_cast(jnp.maximum(scale, max(half.smallest, 2.0**LOWEST_EXPONENT)))
        return {"scale": jnp.where(far == 0, jnp.ones_like(cast), cast)}
    if name == "e4m3fn":
        small = FLOAT_FORMATS["e4m3fn"]
        if tensor_scale is None:
            tensor_scale = guarded(jnp.max(far) / (small.max * highest))
        tensor_scale = jnp.broadcast_to(tensor_scale, far.shape).astype(far.dtype)
        # The product of both is at least MIN_SCALE then.
        tensor_scale = jnp.maximum(tensor_scale, 2.0**LOWEST_EXPONENT / small.smallest)
        block = small.fake_cast(jnp.maximum(scale / tensor_scale, small.smallest))
        block = jnp.where(far == 0, jnp.ones_like(block), block)
        return {"scale": block, TENSOR_SCALE: tensor_scale}
    return {"scale": guarded(scale, spec.power_of_two)}


def _power_of_two(far: Array, highest: float) -> Array:
    exponent = jnp.frexp(far)[1] - 1 - math.floor(math.log2(highest))
    exponent = jnp.clip(exponent, LOWEST_EXPONENT, HIGHEST_EXPONENT)
    power = jnp.where(far == 0, jnp.ones_like(far), jnp.ldexp(jnp.ones_like(far), exponent))
    return jnp.where(jnp.isnan(far), far, power)  # NaN has no exponent


def scale_codes(scale: Array, name: str) -> Array:
    """Returns the stored bits of scales: uint8 or uint16, or the float32 numbers themselves.

    Exact for scales that the format has: E8M0 is the exponent plus 127.
    """
    if name == "float32":
        return scale
    if name == "e8m0":
        return (jnp.frexp(scale)[1] - 1 + 127).astype(jnp.uint8)
    format = _HALF.get(name, FLOAT_FORMATS["e4m3fn"])
    return format.encode(scale).astype(format.storage)


def scale_values(codes: Array, name: str) -> Array:
    """Inverts `scale_codes`: float32."""
    if name == "float32":
        return codes
    if name == "e8m0":
        return jnp.ldexp(jnp.float32(1), codes.astype(jnp.int32) - 127)
    return _HALF.get(name, FLOAT_FORMATS["e4m3fn"]).decode(codes)
