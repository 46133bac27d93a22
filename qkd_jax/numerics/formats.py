"""Formats of integer codes and of indices into a table of values, and the types that store them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks

# Float32 products of a 16-bit code and its scale still recover the code; 17 bits would need 32-bit
# storage and gain nothing that float16 does not give.
MAX_BITS = 16


@dataclasses.dataclass(frozen=True)
class IntFormat:
    """A range of integer codes.

    Signed codes run from -2^(bits-1) to 2^(bits-1)-1, unsigned ones from 0 to 2^bits-1. A narrow
    range leaves out the lowest signed code, so that the codes are symmetric about zero: negating a
    tensor then negates its codes, which folding a BatchNorm of negative gain relies on.

    Args:
        bits: number of bits, 1 to 16.
        signed: whether codes may be negative.
        narrow_range: leaves out -2^(bits-1); signed formats of at least 2 bits only.

    Raises:
        ValueError: `bits` outside 1 to 16, or a narrow range that has no codes to leave out.
    """

    bits: int
    signed: bool = True
    narrow_range: bool = False

    def __post_init__(self) -> None:
        checks.integer_in("bits", self.bits, 1, MAX_BITS)
        if self.narrow_range and not self.signed:
            raise ValueError(
                "narrow_range=True came with signed=False; an unsigned format has no code below "
                "-qmax to leave out. Drop narrow_range, or use signed=True."
            )
        if self.narrow_range and self.bits == 1:
            raise ValueError(
                "narrow_range=True came with bits=1; that leaves the code 0 alone. "
                "Use bits=2 for the codes -1, 0, 1."
            )

    @property
    def qmin(self) -> int:
        """The lowest code."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - int(self.signed)) - 1

    @property
    def levels(self) -> int:
        """The number of codes."""
        return self.qmax - self.qmin + 1

    @property
    def storage(self) -> np.dtype:
        """The smallest NumPy type that holds every code: int8, uint8, int16 or uint16."""
        width = 8 if self.bits <= 8 else 16
        return np.dtype(f"{'' if self.signed else 'u'}int{width}")

    @property
    def name(self) -> str:
        """The short name, as in "int4" or "uint8"."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def min(self) -> int:
        """The lowest value at scale 1: the lowest code."""
        return self.qmin

    @property
    def max(self) -> int:
        """The highest value at scale 1: the highest code."""
        return self.qmax

    @property
    def smallest(self) -> int:
        """The smallest positive value at scale 1."""
        return 1

    def values(self) -> np.ndarray:
        """All values at scale 1, in order, float64."""
        return np.arange(self.qmin, self.qmax + 1, dtype=np.float64)

    def encode(self, x: jax.Array) -> jax.Array:
        """The codes at scale 1, int32: rounded half to even, saturating; NaN becomes 0.

        `numerics.encode` has scales and zero points.
        """
        codes = jnp.clip(jnp.round(x), self.qmin, self.qmax)
        return jnp.where(jnp.isnan(codes), 0, codes).astype(jnp.int32)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The values of codes at scale 1, float32."""
        return jnp.asarray(codes).astype(jnp.float32)

    def fake_cast(self, x: jax.Array) -> jax.Array:
        """The nearest value at scale 1, float32; NaN stays."""
        return jnp.clip(jnp.round(x), self.qmin, self.qmax).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TableFormat:
    """A table of values; a code is an index into it.

    Args:
        name: the short name, as in "nf4".
        table: the values at scale 1, ascending; 2 to 2^16 of them.

    Raises:
        ValueError: values that are too few or too many, not finite, or not ascending.
    """

    name: str
    table: tuple[float, ...]

    def __post_init__(self) -> None:
        checks.integer_in(f"values of table {self.name!r}", len(self.table), 2, 2**MAX_BITS)
        values = self.values().astype(np.float32)
        if not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
            raise ValueError(
                f"table {self.name!r} is {self.table!r:.80}; its values must be finite and "
                "ascend, as float32 too. Sort them and drop what occurs twice."
            )

    @property
    def bits(self) -> int:
        """The bits of an index."""
        return (len(self.table) - 1).bit_length()

    @property
    def levels(self) -> int:
        """The number of codes."""
        return len(self.table)

    @property
    def storage(self) -> np.dtype:
        """The smallest NumPy type that holds every code: uint8 or uint16."""
        return np.dtype("uint8" if self.bits <= 8 else "uint16")

    @property
    def min(self) -> float:
        """The lowest value."""
        return self.table[0]

    @property
    def max(self) -> float:
        """The highest value."""
        return self.table[-1]

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return min((v for v in self.table if v > 0), default=0.0)

    def values(self) -> np.ndarray:
        """All values, in order, float64."""
        return np.asarray(self.table, np.float64)

    def encode(self, x: jax.Array) -> jax.Array:
        """The codes of the nearest values, int32: the lower of two at equal distance."""
        table = self.values().astype(np.float32)
        return jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), jnp.asarray(x))

    def decode(self, codes: jax.Array) -> jax.Array:
        """The values of codes, float32."""
        return jnp.asarray(self.values().astype(np.float32))[jnp.asarray(codes)]

    def fake_cast(self, x: jax.Array) -> jax.Array:
        """The nearest value, float32; NaN stays."""
        return jnp.where(jnp.isnan(x), x, self.decode(self.encode(x))).astype(jnp.float32)
