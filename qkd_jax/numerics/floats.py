"""Small floating-point formats, down to 4 bits, bit-exact with their hardware definitions.

x = (-1)^s 2^(e - bias) (1 + m / 2^M), and without the leading 1 where the exponent field is 0
(subnormals). The 8-bit formats are those of Micikevicius et al., 2022 (arXiv 2209.05433); the 6-
and 4-bit ones of the OCP Microscaling specification 1.0, which have neither infinity nor NaN.
Where a backend flushes float32's own subnormals to zero, those of bf16 go with them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks

SPECIALS = ("ieee", "nan", "none")


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A floating-point format with a sign bit.

    Args:
        exponent_bits: width of the exponent field, 2 to 8.
        mantissa_bits: width of the mantissa field, 1 to 10.
        specials: "ieee": the highest exponent is for infinity and NaN; "nan": the highest code
            alone is NaN and there is no infinity ("fn"); "none": every code is a number.

    Raises:
        ValueError: a width out of range, or more than 16 bits.
    """

    exponent_bits: int
    mantissa_bits: int
    specials: str = "ieee"

    def __post_init__(self) -> None:
        checks.integer_in("exponent_bits", self.exponent_bits, 2, 8)
        checks.integer_in("mantissa_bits", self.mantissa_bits, 1, 10)
        checks.integer_in("bits (exponent, mantissa and sign)", self.bits, 4, 16)
        checks.one_of("specials", self.specials, SPECIALS)

    @property
    def bits(self) -> int:
        """All bits, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def storage(self) -> np.dtype:
        """The NumPy type of a bit pattern: uint8 or uint16."""
        return np.dtype("uint8" if self.bits <= 8 else "uint16")

    @property
    def bias(self) -> int:
        """2^(exponent_bits - 1) - 1."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def _highest(self) -> int:
        """The code of the highest value."""
        top = 2 ** (self.bits - 1) - 1
        if self.specials == "ieee":
            return top - 2**self.mantissa_bits
        return top - int(self.specials == "nan")

    @property
    def _smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def max(self) -> float:
        """The highest value."""
        return float(_value(self._highest, self))

    @property
    def min(self) -> float:
        """The lowest value."""
        return -self.max

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal: 2^(1 - bias - mantissa_bits)."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def name(self) -> str:
        """The short name, such as "e4m3"."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    def values(self) -> np.ndarray:
        """All finite values, in order, float64; zero once."""
        positive = _value(np.arange(self._highest + 1), self)
        return np.concatenate([-positive[:0:-1], positive])

    def fake_cast(self, x: jax.Array, *, saturate: bool = True) -> jax.Array:
        """The nearest value of the format, float32; ties go to the even mantissa.

        Args:
            x: float32.
            saturate: what lies beyond the highest value becomes it, infinity too. Otherwise it
                becomes infinity, or NaN where the format has none; formats without both saturate.
        """
        x = x.astype(jnp.float32)
        size = jnp.abs(x)
        if saturate or self.specials == "none":
            size = jnp.minimum(size, self.max)
        if self.exponent_bits == 8:
            # Its subnormals are subnormal in float32 too, which arithmetic may flush to zero.
            near = size.astype(jnp.bfloat16).astype(jnp.float32)
            return jnp.where(jnp.isnan(x), x, jnp.copysign(near, x))
        # The power of two below a magnitude is its exponent field alone; frexp and ldexp are slow.
        field = jax.lax.bitcast_convert_type(size, jnp.int32) & jnp.int32(0x7F800000)
        power = jax.lax.bitcast_convert_type(field, jnp.float32)
        unit = jnp.clip(power, self._smallest_normal, self.max) * 2.0**-self.mantissa_bits
        near = jnp.round(size / unit) * unit
        beyond = jnp.inf if self.specials == "ieee" else jnp.nan
        near = jnp.where(near > self.max, beyond, near)
        return jnp.where(jnp.isnan(x), x, jnp.copysign(near, x))

    def _exponent(self, size: jax.Array) -> jax.Array:
        """floor(log2) of a magnitude; that of the subnormals for 0, infinity and NaN."""
        plain = jnp.isfinite(size) & (size > 0)
        return jnp.where(plain, jnp.frexp(jnp.where(plain, size, 1))[1] - 1, 1 - self.bias)

    def _unit(self, size: jax.Array) -> jax.Array:
        """The distance of neighbours at a magnitude, a power of two."""
        exponent = jnp.maximum(self._exponent(size), 1 - self.bias)
        return jnp.ldexp(jnp.ones_like(size), exponent - self.mantissa_bits)

    def encode(self, x: jax.Array, *, saturate: bool = True) -> jax.Array:
        """Real numbers to bit patterns, int32; NaN to the format's quiet one, or to 0."""
        if self.exponent_bits == 8:
            kept = self.fake_cast(x, saturate=saturate).astype(jnp.bfloat16)
            return jax.lax.bitcast_convert_type(kept, jnp.uint16).astype(jnp.int32)
        near = self.fake_cast(x, saturate=saturate)
        size = jnp.abs(near)
        unit = self._unit(size)
        field = jnp.maximum(self._exponent(size) + self.bias, 1)
        whole = jnp.where(jnp.isfinite(size), size / unit, 0).astype(jnp.int32)
        # A normal's significand carries the leading 1, which adds to the field what it starts from.
        code = ((field - 1) << self.mantissa_bits) + whole
        if self.specials != "none":
            infinity = self._highest + 1
            quiet = infinity + (2 ** (self.mantissa_bits - 1) if self.specials == "ieee" else 0)
            code = jnp.where(jnp.isinf(size), infinity, code)
            code = jnp.where(jnp.isnan(size), quiet, code)
        return code + (jnp.signbit(near).astype(jnp.int32) << (self.bits - 1))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Bit patterns to real numbers, float32."""
        codes = jnp.asarray(codes).astype(jnp.int32)
        if self.exponent_bits == 8:
            bits = jax.lax.bitcast_convert_type(codes.astype(jnp.uint16), jnp.bfloat16)
            return bits.astype(jnp.float32)
        if self == FLOAT_FORMATS["half"]:  # a table of 65,536 values would lie in each program
            bits = jax.lax.bitcast_convert_type(codes.astype(jnp.uint16), jnp.float16)
            return bits.astype(jnp.float32)
        return jnp.asarray(_table(self))[codes]


def _value(code: np.ndarray | int, format: FloatFormat) -> np.ndarray:
    """The value of non-negative codes below infinity and NaN, float64."""
    code = np.asarray(code, np.int64)
    field, mantissa = code >> format.mantissa_bits, code & (2**format.mantissa_bits - 1)
    whole = np.where(field > 0, 2**format.mantissa_bits + mantissa, mantissa)
    return whole * 2.0 ** (np.maximum(field, 1) - format.bias - format.mantissa_bits)


def _table(format: FloatFormat) -> np.ndarray:
    """The value of every bit pattern, float32."""
    code = np.arange(2 ** (format.bits - 1))
    value = _value(code, format)
    value[code > format._highest] = np.nan
    if format.specials == "ieee":
        value[format._highest + 1] = np.inf
    return np.concatenate([value, np.copysign(value, -1)]).astype(np.float32)


FLOAT_FORMATS: dict[str, FloatFormat] = {
    "e4m3fn": FloatFormat(4, 3, "nan"),
    "e5m2": FloatFormat(5, 2),
    "e3m2": FloatFormat(3, 2, "none"),
    "e2m3": FloatFormat(2, 3, "none"),
    "e2m1": FloatFormat(2, 1, "none"),
    "bf16": FloatFormat(8, 7),
    "half": FloatFormat(5, 10),
}
