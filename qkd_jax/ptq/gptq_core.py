"""GPTQ's loop over columns, on plain matrices; the layout of layers is `kernel_matrices`' matter.

Frantar, Ashkboos, Hoefler and Alistarh, 2022 (arXiv 2210.17323, algorithm 1), in their symbols: W
is the weight [rows, columns], H = X X^T the Hessian of the layer's squared error, U the upper
Cholesky factor of its inverse, Q the rounding, E the errors that later columns make up for.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qkd_jax.numerics import Spec, stats
from qkd_jax.quantizers import QUANTIZERS

Params = dict[str, jax.Array]


def quantize_columns(
    weight: Any,
    hessian: Any,
    params: Mapping[str, Any],
    spec: Spec,
    *,
    group: int | None = None,
    order: str = "columns",
    percdamp: float = 0.01,
    block: int = 128,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rounds a matrix column by column.

        H + percdamp mean(diag H) I,   U = chol(H^-1), upper
        for each column j:  q = Q(W[:, j]),  e = (W[:, j] - q) / U[j, j],  W[:, j:] -= e U[j, j:]

    Inputs that were always zero (H[j, j] = 0) get zero weights. U is computed in float64.

    With order="activation" the columns of the largest H[j, j] come first, while all others can
    still make up for their errors. Parameters belong to columns, in whichever order these come, so
    groups stay neighbours: where `group` renews them, whole groups are sorted, by their largest
    H[j, j], and each one's columns inside it (Gafni, Karnieli and Hanani, 2025, arXiv 2505.14638).

    Args:
        weight: W, [rows, columns], or [matrices, rows, columns].
        hessian: H, [columns, columns], or [matrices, columns, columns]; a constant factor is free.
        params: of the quantizer, each [groups of columns, rows or 1, 1], with a leading axis for
            several matrices.
        spec: of the weight.
        group: columns that share parameters, which are computed from the weights as they stand when
            the group's turn comes; None keeps `params`.
        order: in which columns are rounded: "columns", as they stand, or "activation".
        percdamp: dampening.
        block: B, columns that are updated at once; rounded down to a multiple of `group`.

    Returns:
        (weights on the grid, parameters), shaped like `weight` and `params`.
    """
    w = np.asarray(weight, np.float32)
    h = np.array(hessian, np.float64)
    params = {k: np.asarray(v, np.float32) for k, v in params.items()}
    single = w.ndim == 2
    if single:
        w, h, params = w[None], h[None], {k: v[None] for k, v in params.items()}
    columns, diagonal = w.shape[-1], np.arange(w.shape[-1])
    mean = h[:, diagonal, diagonal].mean(axis=-1)
    dead = h[:, diagonal, diagonal] == 0
    w = np.where(dead[:, None], 0, w).astype(np.float32)
    h[:, diagonal, diagonal] += dead + percdamp * mean[:, None]
    groups = next(iter(params.values())).shape[1]
    size = group if group is not None else -(-columns // groups)
    turns = np.broadcast_to(diagonal, dead.shape)
    if order == "activation":
        turns = by_activation(h[:, diagonal, diagonal], group)
    w = np.take_along_axis(w, turns[:, None], axis=-1)
    h = np.take_along_axis(h, turns[:, None], axis=-1)
    h = np.take_along_axis(h, turns[..., None], axis=-2)
    u = np.linalg.cholesky(np.linalg.inv(h)).swapaxes(-1, -2)
    if group is not None:
        block = group * max(1, block // group)
    block = min(block, columns)
    renew = group is not None
    owners = np.minimum(turns // size, groups - 1)
    rounded, params = _columns(
        jnp.asarray(w), jnp.asarray(u, jnp.float32), params, owners, spec, size, block, renew
    )
    new = np.empty_like(w)
    np.put_along_axis(new, turns[:, None], np.asarray(rounded), axis=-1)
    first = 0 if single else slice(None)
    return new[first], {k: np.asarray(v)[first] for k, v in params.items()}


def by_activation(diagonal: np.ndarray, group: int | None = None) -> np.ndarray:
    """Returns columns by descending H[j, j], equal ones in their order: [matrices, columns].

    Args:
        diagonal: of H, [matrices, columns].
        group: this many neighbours stay together, in the order of each group's largest.
    """
    if group is None:
        return np.argsort(-diagonal, axis=-1, kind="stable")
    cut = diagonal.reshape(len(diagonal), -1, group)
    inside = np.argsort(-cut, axis=-1, kind="stable")
    groups = np.argsort(-cut.max(axis=-1), axis=-1, kind="stable")[..., None]
    return (np.take_along_axis(inside, groups, axis=1) + group * groups).reshape(diagonal.shape)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _columns(
    w: jax.Array,
    u: jax.Array,
    params: Params,
    owners: jax.Array,
    spec: Spec,
    size: int,
    block: int,
    renew: bool,
) -> tuple[jax.Array, Params]:
    """Runs the loop over several matrices at once.

    `owners` [matrices, columns] says whose parameters a column takes; where they are renewed,
    `size` neighbours share theirs.
    """
    columns = w.shape[-1]
    extra = -columns % block
    # Columns that fill the last block up are tied to none of the others.
    w = jnp.pad(w, ((0, 0), (0, 0), (0, extra)))
    u = jnp.pad(u, ((0, 0), (0, extra), (0, extra)))
    u = u + jnp.diag(jnp.arange(columns + extra) >= columns).astype(u.dtype)[None]
    owners = jnp.pad(owners, ((0, 0), (0, extra)), mode="edge")
    quantizer = QUANTIZERS[spec.quantizer]

    def renewed(params: Params, part: jax.Array, group: jax.Array) -> Params:
        """Takes a group's parameters from its weights as they stand."""
        new = quantizer.init(stats.finish(stats.measure(part, channel_axes=(0,))), spec)
        return {k: lax.dynamic_update_index_in_dim(v, new[k], group, 0) for k, v in params.items()}

    def one_block(number, state, u, owners):
        w, params = state
        start = number * block
        part = lax.dynamic_slice_in_dim(w, start, block, 1)
        rows = lax.dynamic_slice_in_dim(u, start, block, 0)
        inner = lax.dynamic_slice_in_dim(rows, start, block, 1)

        def column(i, state):
            part, errors, params = state
            group = owners[start + i]
            if renew:
                first = ((start + i) % size == 0) & (start + i < columns)
                ahead = lax.dynamic_slice_in_dim(part, jnp.minimum(i, block - size), size, 1)
                params = lax.cond(
                    first, lambda p: renewed(p, ahead, group), lambda p: dict(p), params
                )
            own = {k: lax.dynamic_index_in_dim(v, group, 0, False) for k, v in params.items()}
            w_j = lax.dynamic_slice_in_dim(part, i, 1, 1)
            q = quantizer.fake_quant(w_j, own, spec)
            u_j = lax.dynamic_slice_in_dim(inner, i, 1, 0)
            e = (w_j - q) / lax.dynamic_slice_in_dim(u_j, i, 1, 1)
            later = (jnp.arange(block) > i)[None]
            part = part - jnp.where(later, e * u_j, 0)
            part = lax.dynamic_update_slice_in_dim(part, q, i, 1)
            return part, lax.dynamic_update_slice_in_dim(errors, e, i, 1), params

        part, errors, params = lax.fori_loop(
            0, block, column, (part, jnp.zeros_like(part), dict(params))
        )
        later = (jnp.arange(w.shape[1]) >= start + block)[None]
        w = w - jnp.where(later, errors @ rows, 0)
        return lax.dynamic_update_slice_in_dim(w, part, start, 1), params

    def one_matrix(w, u, params, owners):
        step = functools.partial(one_block, u=u, owners=owners)
        return lax.fori_loop(0, w.shape[1] // block, step, (w, params))

    w, params = jax.vmap(one_matrix)(w, u, params, owners)
    return w[..., :columns], params
