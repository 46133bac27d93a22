"""Kernels as the matrices that GPTQ rounds, and the Hessians of their layers.

A row is an output, a column an input: a convolution's columns are its taps and input channels, and
each group of a grouped one is a matrix of its own.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.numerics import Spec, stats
from qkd_jax.ptq.kernels import Kernel
from qkd_jax.quantize.traced import TracedContraction
from qkd_jax.quantizers import QUANTIZERS


@dataclasses.dataclass(frozen=True, eq=False)
class KernelMatrices:
    """The layout of a kernel as [matrices, rows, columns].

    Attributes:
        shape: the kernel's shape.
        outs: its axes that reach the output; those that the input has too come first.
        ins: its axes that are summed over; a spec with groups cuts the last one.
        count: the number of matrices: groups of a convolution, members with their own inputs.
        width: entries of the last summed axis that share parameters: all, or a spec's group.
        cut: whether parameters are kept against the kernel with that axis cut in two.
    """

    shape: tuple[int, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    count: int
    width: int
    cut: bool

    @property
    def order(self) -> np.ndarray:
        """The columns' order in which those of one group are neighbours."""
        sizes = [self.shape[a] for a in self.ins]
        taps = math.prod(sizes[:-1])
        order = np.arange(math.prod(sizes)).reshape(taps, self.groups, self.width)
        return order.transpose(1, 0, 2).reshape(-1)

    @property
    def groups(self) -> int:
        """The number of groups of columns."""
        return self.shape[self.ins[-1]] // self.width

    @property
    def group_size(self) -> int:
        """The number of columns in a group."""
        return math.prod(self.shape[a] for a in self.ins) // self.groups

    def matrices(self, array: np.ndarray) -> np.ndarray:
        """Returns a kernel as matrices, columns in the kernel's own order."""
        columns = math.prod(self.shape[a] for a in self.ins)
        return array.transpose(*self.outs, *self.ins).reshape(self.count, -1, columns)

    def kernel(self, matrices: np.ndarray) -> np.ndarray:
        """Returns matrices as a kernel."""
        axes = (*self.outs, *self.ins)
        return matrices.reshape([self.shape[a] for a in axes]).transpose(np.argsort(axes))

    def by_group(self, param: np.ndarray) -> np.ndarray:
        """Returns a quantizer's parameter as [matrices, groups, rows, 1]."""
        outs = [self.shape[a] for a in self.outs]
        if self.cut:
            axes, rest = self._cut_axes(len(self.shape) + 1)
            kept = param.transpose(*axes, *rest).reshape(*outs, self.groups)
        else:
            whole = [n if a in self.outs else 1 for a, n in enumerate(self.shape)]
            wide = np.broadcast_to(param, whole)
            kept = wide.transpose(*self.outs, *self.ins).reshape(*outs, 1)
        return kept.reshape(self.count, -1, kept.shape[-1]).swapaxes(1, 2)[..., None]

    def cut_param(self, by_group: np.ndarray) -> np.ndarray:
        """Returns a parameter of `by_group` as the quantizer keeps it, against the cut kernel."""
        outs = [self.shape[a] for a in self.outs]
        param = by_group[..., 0].swapaxes(1, 2).reshape([*outs, self.groups])
        axes, rest = self._cut_axes(param.ndim + len(self.ins))
        return param.reshape(*param.shape, *[1] * len(rest)).transpose(np.argsort([*axes, *rest]))

    def kept(self, by_group: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a parameter [matrices, groups, rows, 1] in the shape that the quantizer keeps."""
        if self.cut:
            return self.cut_param(by_group)
        columns = math.prod(self.shape[a] for a in self.ins)
        wide = np.broadcast_to(by_group[:, 0], (*by_group[:, 0].shape[:2], columns))
        first = tuple(
            slice(1) if a in self.ins or not shape else slice(None) for a in range(len(self.shape))
        )
        return self.kernel(wide)[first].reshape(shape)

    def grid(self, matrices: np.ndarray, spec: Spec) -> dict[str, np.ndarray]:
        """Returns the parameters that a quantizer takes from weights: [matrices, groups, rows, 1].

        Args:
            matrices: [matrices, rows, columns], columns in the kernel's own order.
            spec: of the weight; its observer is not asked, the whole range counts.
        """
        cut = self.by_columns(matrices)
        shared = isinstance(spec.granularity, int) or spec.granularity == "channel"
        moments = stats.finish(stats.measure(cut, channel_axes=(0, 1, 2) if shared else ()))
        params = QUANTIZERS[spec.quantizer].init(moments, spec)
        return {k: np.broadcast_to(v, (*cut.shape[:3], 1)) for k, v in params.items()}

    def on_grid(self, matrices: np.ndarray, params: Any, spec: Spec) -> np.ndarray:
        """Returns matrices rounded to the nearest values of the grid of `params`."""
        cut = self.by_columns(matrices)
        params = {
            k: jnp.asarray(np.broadcast_to(v, (*cut.shape[:3], 1))) for k, v in params.items()
        }
        return self.from_columns(QUANTIZERS[spec.quantizer].fake_quant(cut, params, spec))

    def by_columns(self, matrices: np.ndarray) -> jax.Array:
        """Returns [matrices, groups, rows, columns of the group]."""
        ordered = np.asarray(matrices, np.float32)[..., self.order]
        return jnp.asarray(ordered.reshape(*ordered.shape[:2], self.groups, -1).swapaxes(1, 2))

    def from_columns(self, cut: Any) -> np.ndarray:
        """Returns what `by_columns` was given."""
        rows = np.asarray(cut).swapaxes(1, 2)
        new = np.empty((*rows.shape[:2], len(self.order)), rows.dtype)
        new[..., self.order] = rows.reshape(new.shape)
        return new

    def _cut_axes(self, rank: int) -> tuple[list[int], list[int]]:
        """Returns the cut kernel's axes of outputs and groups, and the others."""
        split = self.ins[-1]  # groups lie here, their entries on the next axis
        axes = [a if a < split else a + 1 for a in self.outs] + [split]
        return axes, [a for a in range(rank) if a not in axes]

    def error(self, change: np.ndarray, hessian: np.ndarray) -> float:
        """Returns dW H dW^T, summed over outputs."""
        flat = self.matrices(np.asarray(change, np.float64))
        return float(np.einsum("mri,mij,mrj->", flat, hessian, flat, optimize=True))


def kernel_matrices(kernel: Kernel, spec: Spec) -> KernelMatrices | None:
    """Returns a kernel's layout; None where inputs do not meet it as columns of patches."""
    product, weight = kernel.product, kernel.product.operands[1]
    outs = tuple(i for i, out in enumerate(weight.output_axes) if out is not None)
    ins = tuple(i for i, out in enumerate(weight.output_axes) if out is None)
    params, count = product.node.params, kernel.groups
    if product.node.op == "conv_general_dilated":
        plain = all(d == 1 for d in params["lhs_dilation"]) and kernel.in_axis == ins[-1]
        if not plain or min(n for pair in params["padding"] for n in pair) < 0:
            return None
    else:
        batch = params["dimension_numbers"][1][1]
        outs = (*batch, *(a for a in outs if a not in batch))
        count = math.prod(weight.shape[a] for a in batch)
    cut = isinstance(spec.granularity, int)
    width = spec.granularity if isinstance(spec.granularity, int) else weight.shape[ins[-1]]
    return KernelMatrices(weight.shape, outs, ins, count, width, cut)


def hessian(product: TracedContraction, x: Any, other: Any = None) -> np.ndarray:
    """Returns x x^T, summed over examples and positions: [matrices, columns, columns].

    With `other`, a second input of the layer, that is x other^T.
    """
    node = product.node
    if node.op == "conv_general_dilated":
        spec = node.params["dimension_numbers"]
        window = [product.operands[1].shape[a] for a in spec.rhs_spec[2:]]
        static = tuple(node.params[k] for k in ("window_strides", "padding", "rhs_dilation"))
        last = (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
        both = [None if values is None else jnp.transpose(values, last) for values in (x, other)]
        groups = node.params["feature_group_count"]
        return np.asarray(_conv_hessian(*both, tuple(window), *static, groups), float)
    (left, right), (batch, _) = node.params["dimension_numbers"]
    order = [axis for _, axis in sorted(zip(right, left, strict=True))]
    free = [i for i in range(x.ndim) if i not in left and i not in batch]
    size, count = (math.prod(x.shape[i] for i in axes) for axes in (order, batch))
    flat, rows = (
        jnp.transpose(values, (*batch, *free, *order)).reshape(count, -1, size).astype(jnp.float32)
        for values in (x, x if other is None else other)
    )
    return np.stack([np.asarray(a.T @ b, np.float64) for a, b in zip(flat, rows, strict=True)])


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _conv_hessian(
    x: jax.Array,
    other: jax.Array | None,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> jax.Array:
    """Sums p q^T over the patches p, q of two inputs [batch, ..., channels], for each group."""
    static = (window, strides, padding, dilation, groups)
    patches = _patches(x, *static)
    rows = patches if other is None else _patches(other, *static)
    return jnp.matmul(patches.swapaxes(1, 2), rows)


def _patches(
    x: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> jax.Array:
    """Returns what a convolution's window sees: [groups, positions, columns]."""
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), *padding, (0, 0)))
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape[1:-1], window, dilation, strides, strict=True)
    ]
    taps = []
    for tap in np.ndindex(*window):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        positions = tuple(
            slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, strides, strict=True)
        )
        taps.append(x[(slice(None), *positions)])
    patches = jnp.stack(taps, axis=-2)  # [batch, ..., taps, channels]
    patches = patches.reshape(-1, len(taps), groups, x.shape[-1] // groups)
    return jnp.transpose(patches, (2, 0, 1, 3)).reshape(groups, patches.shape[0], -1)
