"""Rotations of layers' inputs at run time.

    x W = (x R) (R^T W),   R = diag(signs) H^T,   signs = +-1 / sqrt(block)

with H block-diagonal of Hadamard matrices. A layer keeps `signs` at `quant/<layer>/folded/rotation`
and R^T W as its kernel; `ptq.rotate_inputs` puts both there. The rotation is part of what the layer
computes, float or quantized, so all that reads a net's graph sees it.
"""

import jax
import jax.numpy as jnp

from qkd_jax.numerics.hadamard import hadamard_transform
from qkd_jax.quantize.operands import mark_skipped
from qkd_jax.quantize.variables import ROTATION


def rotated(x: jax.Array, signs: jax.Array, *, marked: str | None = None) -> jax.Array:
    """Returns x R: x times the signs, times the Hadamard matrices.

    Args:
        x: [..., n].
        signs: [n], of the size of one over the root of a block.
        marked: path of the layer, in a net that is traced: its products with fixed matrices are
            then known as no layer's own.
    """
    signed = x * jnp.reshape(signs, (1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)
    if marked is None:
        return hadamard_transform(signed)
    path = f"{marked}/{ROTATION}" if marked else ROTATION
    return hadamard_transform(signed, mark=lambda side: mark_skipped(path, ROTATION, side))
