"""Storing codes of 1 to 16 bits: several to a byte below 5 bits, one to an int8 or int16 above.

Packed codes lie in the low bits first, shifted by the format's lowest code so that they are never
negative: code = field + qmin. A width that does not divide a byte takes the next one that does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics import IntFormat

__all__ = ["pack", "packed_bytes", "unpack"]


def _field(format: IntFormat) -> int:
    """Bits that one stored code takes."""
    return next(width for width in (1, 2, 4, 8, 16) if width >= format.bits)


def packed_bytes(shape: tuple[int, ...], format: IntFormat) -> int:
    """Returns the bytes that `pack` makes of codes of this shape."""
    return math.ceil(math.prod(shape) * _field(format) / 8)


def pack(codes: np.ndarray, format: IntFormat) -> np.ndarray:
    """Packs integer codes.

    Args:
        codes: integers within the format's range, any shape.
        format: the codes' format.

    Returns:
        uint8 [ceil(size * field / 8)] for formats of up to 4 bits; the codes themselves in
        `format.storage` above.

    Raises:
        ValueError: a code lies outside the format.
    """
    codes = np.asarray(codes)
    if codes.size and not (format.qmin <= codes.min() and codes.max() <= format.qmax):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}]; {format.name} holds "
            f"[{format.qmin}, {format.qmax}]."
        )
    field = _field(format)
    if field >= 8:
        return codes.astype(format.storage)
    shifted = (codes.reshape(-1).astype(np.int64) - format.qmin).astype(np.uint8)
    each = 8 // field
    shifted = np.pad(shifted, (0, -shifted.size % each)).reshape(-1, each)
    places = np.arange(each, dtype=np.uint8) * field
    return np.bitwise_or.reduce(shifted << places, axis=1).astype(np.uint8)


def unpack(packed: jax.Array, shape: tuple[int, ...], format: IntFormat) -> jax.Array:
    """Returns codes as `pack` got them: int8, or the format's own type above 4 bits."""
    field = _field(format)
    if field >= 8:
        return jnp.reshape(packed, shape)
    places = jnp.arange(8 // field, dtype=jnp.uint8)[None, :] * jnp.uint8(field)
    fields = (packed[:, None] >> places) & jnp.uint8(2**field - 1)
    codes = fields.reshape(-1)[: math.prod(shape)].astype(jnp.int8)
    return (codes + jnp.int8(format.qmin)).reshape(shape)
