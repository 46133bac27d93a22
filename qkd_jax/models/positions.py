"""Learned positions of one grid of patches, resampled to another one as PyTorch does."""

import jax
import jax.numpy as jnp
import numpy as np

RESAMPLINGS = ("bicubic", "bicubic_antialias")


def bicubic(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """Returns the matrix [new, old] that resamples one axis by cubic convolution.

    The kernel, with a = -0.75, and a = -0.5 if `antialias`, as `torch.nn.functional.interpolate`
    has them (mode="bicubic", align_corners=False):

        k(t) = (a + 2)|t|^3 - (a + 3)|t|^2 + 1          for |t| < 1
               a|t|^3 - 5a|t|^2 + 8a|t| - 4a            for 1 <= |t| < 2

    With `antialias` a smaller axis widens the kernel by old / new, and taps beyond the border are
    left out; without, they take the value at the border.

    Reference: Keys, 1981, IEEE Transactions on Acoustics, Speech, and Signal Processing 29(6).
    """
    a = -0.5 if antialias else -0.75
    scale = old / new
    wide = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * scale - 0.5
    reach = int(np.ceil(2 * wide)) + 1
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 2)
    t = np.abs(taps - centres[:, None]) / wide
    inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
    outer = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    weights = np.where(t < 1, inner, np.where(t < 2, outer, 0.0))
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), weights)
    return matrix


def resampled(positions: jax.Array, side: int, rows: int, columns: int, how: str) -> jax.Array:
    """Resamples positions of a square grid, in float32.

    A sum of products instead of a matrix product: no layer of the net, it asks for no rule.

    Args:
        positions: [1, side * side, width], row by row.
        side: rows and columns that it has.
        rows: wanted rows.
        columns: wanted columns.
        how: of `RESAMPLINGS`.

    Returns:
        [1, rows * columns, width].
    """
    if (rows, columns) == (side, side):
        return positions
    down, across = (
        jnp.asarray(bicubic(side, n, antialias=how == "bicubic_antialias"), jnp.float32)
        for n in (rows, columns)
    )
    grid = positions.astype(jnp.float32).reshape(side, side, -1)
    grid = jnp.sum(down[:, :, None, None] * grid[None], axis=1)
    grid = jnp.sum(across[None, :, :, None] * grid[:, None], axis=2)
    return grid.reshape(1, rows * columns, -1)
