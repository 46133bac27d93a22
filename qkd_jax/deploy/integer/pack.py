"""Storing codes of 1 to 16 bits: several to a byte below 5 bits, one to an int8 or int16 above.

A code is stored as its index among the codes that can occur: field = (code - qmin) / stride, never
negative. The stride is 2 where only every other code is used (binary weights are -1 and 1, DoReFa's
are odd), so that b bits of information take b bits. Fields lie one after another, in the low bits
first; three bits fill three bytes with eight codes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import IntFormat


def field_bits(format: IntFormat, stride: int = 1) -> int:
    """Returns the bits that one stored code takes: 1 to 4, 8 or 16.

    Raises:
        ValueError: a stride that is not between 1 and the largest difference of two codes.
    """
    checks.integer_in("stride", stride, 1, max(format.qmax - format.qmin, 1))
    width = max(((format.qmax - format.qmin) // stride).bit_length(), 1)
    return width if width <= 4 else 8 * format.storage.itemsize


def packed_bytes(shape: tuple[int, ...], format: IntFormat, stride: int = 1) -> int:
    """Returns the bytes that `pack` makes of codes of this shape."""
    return math.ceil(math.prod(shape) * field_bits(format, stride) / 8)


def pack(codes: np.ndarray, format: IntFormat, stride: int = 1) -> np.ndarray:
    """Packs integer codes.

    Args:
        codes: integers within the format's range, any shape.
        format: the codes' format.
        stride: distance of neighbouring codes, counted from `format.qmin`.

    Returns:
        uint8 [ceil(size * field / 8)] for fields of up to 4 bits; the codes themselves in
        `format.storage` above.

    Raises:
        ValueError: a code lies outside the format, or between the codes of the stride.
    """
    codes = np.asarray(codes)
    if codes.size and not (format.qmin <= codes.min() and codes.max() <= format.qmax):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}]; {format.name} holds "
            f"[{format.qmin}, {format.qmax}]."
        )
    field = field_bits(format, stride)
    if field >= 8:
        return codes.astype(format.storage)
    fields, rest = np.divmod(codes.reshape(-1).astype(np.int64) - format.qmin, stride)
    if rest.any():
        raise ValueError(
            f"codes of {format.name} with stride {stride} are {format.qmin}, "
            f"{format.qmin + stride}, ...; there are others between them."
        )
    bits = (fields[:, None] >> np.arange(field)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def unpack(
    packed: jax.Array, shape: tuple[int, ...], format: IntFormat, stride: int = 1
) -> jax.Array:
    """Inverts `pack`; returns codes as int8, or the format's own type above 4 bits."""
    field, size = field_bits(format, stride), math.prod(shape)
    if field >= 8:
        return jnp.reshape(packed, shape)
    if field == 3:
        shifts = jnp.arange(8, dtype=jnp.uint8)[None, :]
        bits = ((packed[:, None] >> shifts) & jnp.uint8(1)).reshape(-1)[: 3 * size].reshape(-1, 3)
        fields = bits[:, 0] | (bits[:, 1] << jnp.uint8(1)) | (bits[:, 2] << jnp.uint8(2))
    else:
        shifts = jnp.arange(8 // field, dtype=jnp.uint8)[None, :] * jnp.uint8(field)
        fields = ((packed[:, None] >> shifts) & jnp.uint8(2**field - 1)).reshape(-1)[:size]
    codes = fields.astype(jnp.int8) * jnp.int8(stride)
    return (codes + jnp.int8(format.qmin)).reshape(shape)
