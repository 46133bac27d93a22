"""Storing codes of 1 to 16 bits: densely up to 8 bits, one to an int16 above.

A code is stored as its index among the codes that can occur: field = (code - lowest) / stride,
never negative. The stride is 2 where only every other code is used (binary weights are -1 and 1,
DoReFa's are odd), so that b bits of information take b bits. Fields lie one after another, in the
low bits first; three bits fill three bytes with eight codes. Codes of 8 bits without a stride are
stored as they are, bit patterns of floats as unsigned numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import FloatFormat, IntFormat, TableFormat

CodeFormat = IntFormat | FloatFormat | TableFormat


def _span(format: CodeFormat) -> tuple[int, int]:
    """Returns the lowest and the highest code."""
    if isinstance(format, IntFormat):
        return format.qmin, format.qmax
    return 0, (format.levels if isinstance(format, TableFormat) else 2**format.bits) - 1


def field_bits(format: CodeFormat, stride: int = 1) -> int:
    """Returns the bits that one stored code takes: 1 to 8, or 16.

    Raises:
        ValueError: a stride that is not between 1 and the largest difference of two codes.
    """
    low, high = _span(format)
    checks.integer_in("stride", stride, 1, max(high - low, 1))
    width = max(((high - low) // stride).bit_length(), 1)
    return width if width <= 8 else 16


def is_packed(format: CodeFormat, stride: int = 1) -> bool:
    """Whether codes are stored as fields; else as they are."""
    field = field_bits(format, stride)
    return field < 8 or (field == 8 and stride > 1)


def packed_bytes(shape: tuple[int, ...], format: CodeFormat, stride: int = 1) -> int:
    """Returns the bytes that `pack` makes of codes of this shape."""
    return math.ceil(math.prod(shape) * field_bits(format, stride) / 8)


def pack(codes: np.ndarray, format: CodeFormat, stride: int = 1) -> np.ndarray:
    """Packs codes.

    Args:
        codes: integers within the format's range, any shape.
        format: the codes' format.
        stride: distance of neighbouring codes, counted from the lowest one.

    Returns:
        uint8 [ceil(size * field / 8)] for fields of up to 7 bits, and of 8 with a stride; else the
        codes themselves in `format.storage`.

    Raises:
        ValueError: a code lies outside the format, or between the codes of the stride.
    """
    codes = np.asarray(codes)
    low, high = _span(format)
    if codes.size and not (low <= codes.min() and codes.max() <= high):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}]; {format.name} holds [{low}, {high}]."
        )
    if not is_packed(format, stride):
        return codes.astype(format.storage)
    field = field_bits(format, stride)
    fields, rest = np.divmod(codes.reshape(-1).astype(np.int64) - low, stride)
    if rest.any():
        raise ValueError(
            f"codes of {format.name} with stride {stride} are {low}, "
            f"{low + stride}, ...; there are others between them."
        )
    bits = (fields[:, None] >> np.arange(field)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def unpack(
    packed: jax.Array, shape: tuple[int, ...], format: CodeFormat, stride: int = 1
) -> jax.Array:
    """Inverts `pack`; returns codes in the narrowest type that holds all of the format's."""
    if not is_packed(format, stride):
        return jnp.reshape(packed, shape)
    field, size = field_bits(format, stride), math.prod(shape)
    if 8 % field == 0:
        shifts = jnp.arange(8 // field, dtype=jnp.uint8)[None, :] * jnp.uint8(field)
        fields = (packed[:, None] >> shifts) & jnp.uint8(2**field - 1)
    else:
        # Eight fields in as many bytes as a field has bits, each in one byte or in two.
        rows = jnp.pad(packed, (0, -packed.size % field)).reshape(-1, field).astype(jnp.uint16)
        rows = jnp.pad(rows, ((0, 0), (0, 1)))
        pairs = ((rows[:, at // 8] | rows[:, at // 8 + 1] << 8, at % 8) for at in _starts(field))
        fields = jnp.stack([pair >> shift for pair, shift in pairs], 1) & jnp.uint16(2**field - 1)
    low, high = _span(format)
    kind = next(t for t in (np.int8, np.uint8, np.int16, np.int32) if _holds(t, low, high))
    codes = fields.reshape(-1)[:size].astype(kind) * np.array(stride, kind)
    return (codes + np.array(low, kind)).reshape(shape)


def _starts(field: int) -> range:
    """Returns the first bits of eight fields."""
    return range(0, 8 * field, field)


def _holds(kind: type[np.signedinteger | np.unsignedinteger], low: int, high: int) -> bool:
    return np.iinfo(kind).min <= low and high <= np.iinfo(kind).max
