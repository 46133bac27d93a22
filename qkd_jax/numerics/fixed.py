"""Fixed-point formats: integers whose unit is a power of two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics.formats import MAX_BITS, IntFormat


@dataclasses.dataclass(frozen=True)
class FixedPointFormat:
    """Two's complement with a binary point: x = code * 2^-fraction_bits.

    Conversion rounds half to even and saturates.

    Args:
        integer_bits: bits before the point, without the sign.
        fraction_bits: bits behind it.
        signed: whether there is a sign bit on top.

    Raises:
        ValueError: fewer than 1 or more than 16 bits in all.
    """

    integer_bits: int
    fraction_bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        for name in ("integer_bits", "fraction_bits"):
            checks.integer_in(name, getattr(self, name), 0, MAX_BITS)
        checks.integer_in(
            "integer_bits + fraction_bits + sign bit", self.bits, 1 + int(self.signed), MAX_BITS
        )

    @property
    def bits(self) -> int:
        """All bits, the sign included."""
        return self.integer_bits + self.fraction_bits + int(self.signed)

    @property
    def codes(self) -> IntFormat:
        """The format of the codes."""
        return IntFormat(self.bits, self.signed)

    @property
    def smallest(self) -> float:
        """The smallest positive value, 2^-fraction_bits: the distance of neighbours."""
        return 2.0**-self.fraction_bits

    @property
    def min(self) -> float:
        """The lowest value."""
        return self.codes.qmin * self.smallest

    @property
    def max(self) -> float:
        """The highest value."""
        return self.codes.qmax * self.smallest

    @property
    def name(self) -> str:
        """The short name: "q3.4", or "uq4.4" without a sign."""
        return f"{'' if self.signed else 'u'}q{self.integer_bits}.{self.fraction_bits}"

    def values(self) -> np.ndarray:
        """All values, in order, float64."""
        return np.arange(self.codes.qmin, self.codes.qmax + 1) * self.smallest

    def encode(self, x: jax.Array) -> jax.Array:
        """Real numbers to codes, int32. NaN becomes 0."""
        return self.codes.encode(x * 2.0**self.fraction_bits)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes to real numbers, float32."""
        return codes.astype(jnp.float32) * self.smallest

    def fake_cast(self, x: jax.Array) -> jax.Array:
        """The nearest value of the format, float32; NaN stays."""
        return self.codes.fake_cast(x * 2.0**self.fraction_bits) * self.smallest
