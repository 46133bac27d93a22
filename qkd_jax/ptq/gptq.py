"""GPTQ: weights are rounded one input after another, and the rest makes up for each error.

Frantar, Ashkboos, Hoefler and Alistarh, 2022 (arXiv 2210.17323), here for convolutions too, by the
columns of their input patches. The loop over columns runs inside one compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jax import lax

from qkd_jax import checks
from qkd_jax.graph import execute
from qkd_jax.numerics import Spec, stats
from qkd_jax.ptq.channels import kernel, readers
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import Product, TracedNet, products, quantizer_params, trace_net
from qkd_jax.quantize.variables import quantizer_path, quantizers, refuse_folded, without_quantizers
from qkd_jax.quantizers import QUANTIZERS
from qkd_jax.trees import get, put

__all__ = ["gptq", "quantize_columns"]


def gptq(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    percdamp: float = 0.01,
    block: int = 128,
    sequential: bool = True,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Rounds each quantized weight so that the layer's output on real inputs changes least.

    Minimises |W X - W' X|^2 for W' on the grid, with H = X X^T over inputs and image positions:
    see `quantize_columns`. A convolution's columns are its taps and input channels; each group of a
    grouped or depthwise one has an H of its own. The grid is the calibrated one; where a spec has
    groups (`granularity=32`), each gets its scale from its weights as they stand when its turn
    comes, by the quantizer's `init` (groups that another observer than "minmax" has measured keep
    their scales).

    Args:
        net: the net.
        variables: calibrated.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array. 128 images are plenty.
        percdamp: added to H's diagonal, as a share of its mean.
        block: how many columns are updated before the rest is, once for all.
        sequential: take X from the quantized layers before, with their inputs quantized; False
            takes it from the float net.
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables whose kernels lie exactly on their grids. Weights that several layers share, or
        that are not simply a layer's kernel, stay as they are (and so are rounded to nearest).

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into quantized
            layers, no batch, a dynamic weight spec, a quantizer that moves values of its own grid,
            or inputs that are not finite.
    """
    checks.number("percdamp", percdamp, low=0, low_allowed=False)
    checks.integer_in("block", block, 1)
    if not any(operand == "weight" for _, operand, _ in quantizers(variables)):
        raise ValueError("variables has no weight quantizers to round for. Call `calibrate` first.")
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("gptq", traced.multipliers)
    source = traced
    if not sequential:
        source = trace_net(net, without_quantizers(variables), images[0], **kwargs)
    stream, read = Stream(source.graph, images), readers(traced.graph)
    result = unfreeze(dict(variables))
    pairs = zip(products(traced.graph), products(source.graph), strict=True)
    for product, twin in pairs:
        weight = product.weight
        if weight is None or weight.marker is None or not weight.quantized:
            continue
        spec = traced.spec(weight.marker)
        if spec.dynamic:
            raise ValueError(
                f"weight of layer {product.path!r} has dynamic=True: its grid would move with the "
                "rounding. Use dynamic=False and calibrate."
            )
        plan = _plan(traced, product, read, spec)
        if plan is None:
            if report is not None:
                report(f"left {product.path}: its weight is shared or rearranged")
            continue
        stream.before(twin.node)
        inputs = stream.values(twin.node.inputs[0])
        hessian = np.sum([_hessian(twin, x) for x in inputs], axis=0)
        if not np.isfinite(hessian).all():
            raise ValueError(
                f"inputs of layer {product.path!r} are not all finite; check the images' "
                "normalisation and the weights."
            )
        old = np.asarray(get(result, plan.path), np.float32)
        params = quantizer_params(traced, weight.marker)
        new, params = plan.round(old, hessian, params, percdamp, block)
        leaves = [jnp.asarray(params[k]) for k in sorted(params)]
        (again,) = execute(weight.marker, [jnp.asarray(new), *leaves])
        if np.abs(np.asarray(again) - new).max() > 1e-6 * max(np.abs(new).max(), 1e-30):
            raise ValueError(
                f"quantizer {spec.quantizer!r} of layer {product.path!r} moves values that lie on "
                "its own grid, so rounded weights would be rounded again. Use a quantizer without "
                "a transform of its own, such as 'uniform' or 'lsq'."
            )
        result = put(result, plan.path, new)
        for name, value in params.items():
            result = put(result, quantizer_path(product.path, "weight", name), value)
        if sequential:
            stream.replace(weight.marker.outputs[0], lambda _, w=again: w)
        if report is not None:
            nearest = np.asarray(traced.graph.constants[weight.marker.outputs[0]])
            errors = [plan.error(w - old, hessian) for w in (nearest, new)]
            report(
                f"rounded {product.path}: squared error of its output {errors[1]:.3g}, "
                f"{errors[0]:.3g} by nearest rounding"
            )
    return result


def quantize_columns(
    weight: Any,
    hessian: Any,
    params: Mapping[str, Any],
    spec: Spec,
    *,
    group: int | None = None,
    percdamp: float = 0.01,
    block: int = 128,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rounds a matrix column by column.

        H + percdamp mean(diag H) I,   U = chol(H^-1), upper
        for each column j:  q = Q(W[:, j]),  e = (W[:, j] - q) / U[j, j],  W[:, j:] -= e U[j, j:]

    Inputs that were always zero (H[j, j] = 0) get zero weights. U is computed in float64.

    Args:
        weight: [rows, columns], or [matrices, rows, columns].
        hessian: [columns, columns], or [matrices, columns, columns]; a constant factor is free.
        params: of the quantizer, each [groups of columns, rows or 1, 1], with a leading axis for
            several matrices.
        spec: of the weight.
        group: columns that share parameters, which are then made anew from the current weights;
            None keeps those given.
        percdamp: dampening.
        block: columns that are updated at once; made a multiple of `group`.

    Returns:
        (weights on the grid, parameters), shaped like `weight` and `params`.
    """
    w = np.asarray(weight, np.float32)
    h = np.array(hessian, np.float64)
    single = w.ndim == 2
    params = {k: np.asarray(v, np.float32) for k, v in params.items()}
    if single:
        w, h, params = w[None], h[None], {k: v[None] for k, v in params.items()}
    columns, diagonal = w.shape[-1], np.arange(w.shape[-1])
    mean = h[:, diagonal, diagonal].mean(axis=-1)
    dead = h[:, diagonal, diagonal] == 0
    w = np.where(dead[:, None], 0, w).astype(np.float32)
    h[:, diagonal, diagonal] += dead + percdamp * mean[:, None]
    upper = np.linalg.cholesky(np.linalg.inv(h)).swapaxes(-1, -2)
    count = next(iter(params.values())).shape[1]
    size = group if group is not None else -(-columns // count)
    if group is not None:
        block = group * max(1, block // group)
    block = min(block, columns)
    rounded, found = _columns(
        jnp.asarray(w),
        jnp.asarray(upper, jnp.float32),
        params,
        spec,
        size,
        block,
        group is not None,
    )
    new = np.asarray(rounded)
    made: dict[str, np.ndarray] = {k: np.asarray(v) for k, v in found.items()}
    if single:
        return np.asarray(new[0]), {k: np.asarray(v[0]) for k, v in made.items()}
    return new, made


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _columns(weight, upper, params, spec, size, block, renew):
    """The loop of `quantize_columns`, over matrices at once."""
    columns = weight.shape[-1]
    extra = -columns % block
    # Columns that fill the last block up are tied to none of the others.
    weight = jnp.pad(weight, ((0, 0), (0, 0), (0, extra)))
    upper = jnp.pad(upper, ((0, 0), (0, extra), (0, extra)))
    upper = upper + jnp.diag(jnp.arange(columns + extra) >= columns).astype(upper.dtype)[None]
    quantizer = QUANTIZERS[spec.quantizer]

    def anew(part, params, place):
        sums = stats.measure(part, channel_axes=(0,))
        made = quantizer.init(stats.finish(sums), spec)
        return {k: lax.dynamic_update_index_in_dim(v, made[k], place, 0) for k, v in params.items()}

    def one_block(number, state, upper):
        weight, params = state
        start = number * block
        part = lax.dynamic_slice_in_dim(weight, start, block, 1)
        rows = lax.dynamic_slice_in_dim(upper, start, block, 0)
        inner = lax.dynamic_slice_in_dim(rows, start, block, 1)

        def column(i, state):
            part, errors, params = state
            place = jnp.minimum((start + i) // size, len(next(iter(params.values()))) - 1)
            if renew:
                first = ((start + i) % size == 0) & (start + i < columns)
                ahead = lax.dynamic_slice_in_dim(part, jnp.minimum(i, block - size), size, 1)
                params = lax.cond(first, lambda p: anew(ahead, p, place), lambda p: dict(p), params)
            given = {k: lax.dynamic_index_in_dim(v, place, 0, False) for k, v in params.items()}
            w = lax.dynamic_slice_in_dim(part, i, 1, 1)
            q = quantizer.fake_quant(w, given, spec)
            u = lax.dynamic_slice_in_dim(inner, i, 1, 0)
            error = (w - q) / lax.dynamic_slice_in_dim(u, i, 1, 1)
            later = (jnp.arange(block) > i)[None]
            part = part - jnp.where(later, error * u, 0)
            part = lax.dynamic_update_slice_in_dim(part, q, i, 1)
            return part, lax.dynamic_update_slice_in_dim(errors, error, i, 1), params

        part, errors, params = lax.fori_loop(
            0, block, column, (part, jnp.zeros_like(part), dict(params))
        )
        later = (jnp.arange(weight.shape[1]) >= start + block)[None]
        weight = weight - jnp.where(later, errors @ rows, 0)
        return lax.dynamic_update_slice_in_dim(weight, part, start, 1), params

    def matrix(weight, upper, params):
        step = functools.partial(one_block, upper=upper)
        return lax.fori_loop(0, weight.shape[1] // block, step, (weight, params))

    weight, params = jax.vmap(matrix)(weight, upper, params)
    return weight[..., :columns], params


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """How a kernel becomes matrices of rows (outputs) and columns (inputs), and back.

    Attributes:
        path: of the kernel.
        spec: its spec.
        outs: its axes that reach the output.
        ins: its axes that are summed over; the last one is cut into groups.
        matrices: the number of groups of a convolution.
        renew: whether groups of columns get new parameters.
    """

    path: str
    spec: Spec
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    matrices: int
    renew: bool

    def _order(self, shape: tuple[int, ...]) -> tuple[np.ndarray, int, int]:
        """Returns the columns' order, so that groups are runs; their size; their number."""
        sizes = [shape[a] for a in self.ins]
        width = self.spec.granularity if isinstance(self.spec.granularity, int) else sizes[-1]
        taps, groups = math.prod(sizes[:-1]), sizes[-1] // width
        order = np.arange(math.prod(sizes)).reshape(taps, groups, width)
        return order.transpose(1, 0, 2).reshape(-1), taps * width, groups

    def _matrices(self, array: np.ndarray) -> np.ndarray:
        flat = array.transpose(*self.outs, *self.ins)
        columns = math.prod(array.shape[a] for a in self.ins)
        return flat.reshape(self.matrices, -1, columns)

    def round(
        self,
        array: np.ndarray,
        hessian: np.ndarray,
        params: Mapping[str, np.ndarray],
        percdamp: float,
        block: int,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        order, size, groups = self._order(array.shape)
        given = {k: self._rows(np.asarray(v), array.shape, groups) for k, v in params.items()}
        new, made = quantize_columns(
            self._matrices(array)[..., order],
            hessian[..., order[:, None], order],
            given,
            self.spec,
            group=size if self.renew else None,
            percdamp=percdamp,
            block=block,
        )
        flat = np.empty_like(new)
        flat[..., order] = new
        moved = flat.reshape([array.shape[a] for a in (*self.outs, *self.ins)])
        back = moved.transpose(np.argsort((*self.outs, *self.ins)))
        if not self.renew:
            return back, {k: np.asarray(v) for k, v in params.items()}
        shaped = {
            k: v[..., 0].swapaxes(1, 2).reshape([array.shape[a] for a in self.outs] + [groups])
            for k, v in made.items()
        }
        return back, {k: self._stored(v, len(array.shape)) for k, v in shaped.items()}

    def error(self, change: np.ndarray, hessian: np.ndarray) -> float:
        """Returns dW H dW^T, summed over outputs."""
        flat = self._matrices(np.asarray(change, np.float64))
        return float(np.einsum("mri,mij,mrj->", flat, hessian, flat, optimize=True))

    def _rows(self, param: np.ndarray, shape: tuple[int, ...], groups: int) -> np.ndarray:
        """Returns a parameter as [matrices, groups, rows, 1]."""
        outs = [shape[a] for a in self.outs]
        if isinstance(self.spec.granularity, int):
            split = self.ins[-1]  # in the cut kernel, groups lie here and their entries behind
            axes = [a if a < split else a + 1 for a in self.outs]
            rest = [a for a in range(len(shape) + 1) if a not in axes and a != split]
            kept = param.transpose(*axes, split, *rest).reshape(*outs, groups)
        else:
            wide = np.broadcast_to(param, [n if a in self.outs else 1 for a, n in enumerate(shape)])
            kept = wide.transpose(*self.outs, *self.ins).reshape(*outs, 1)
        return kept.reshape(self.matrices, -1, kept.shape[-1]).swapaxes(1, 2)[..., None]

    def _stored(self, param: np.ndarray, rank: int) -> np.ndarray:
        """Returns [outs..., groups] as the quantizer keeps it, against the cut kernel."""
        split = self.ins[-1]
        axes = [a if a < split else a + 1 for a in self.outs] + [split]
        rest = [a for a in range(rank + 1) if a not in axes]
        wide = param.reshape(*param.shape, *[1] * len(rest))
        return wide.transpose(np.argsort([*axes, *rest]))


def _plan(traced: TracedNet, product: Product, read: Mapping[str, Any], spec: Spec) -> _Plan | None:
    taken = kernel(traced.graph, product, read)
    if taken is None or hasattr(QUANTIZERS[spec.quantizer], "live"):
        return None
    axes = product.operands[1].output_axes
    outs = tuple(i for i, out in enumerate(axes) if out is not None)
    ins = tuple(i for i, out in enumerate(axes) if out is None)
    params = product.node.params
    if product.node.op == "conv_general_dilated":
        plain = all(d == 1 for d in params["lhs_dilation"]) and taken.in_axis == ins[-1]
        if not plain or min(n for pair in params["padding"] for n in pair) < 0:
            return None
    elif params["dimension_numbers"][1] != ((), ()):
        return None
    renew = isinstance(spec.granularity, int) and spec.observer in (None, "minmax")
    return _Plan(taken.path, spec, outs, ins, taken.groups, renew)


def _hessian(product: Product, x: Any) -> np.ndarray:
    """Returns x x^T, summed over examples and positions: [matrices, columns, columns]."""
    node = product.node
    if node.op == "conv_general_dilated":
        spec = node.params["dimension_numbers"]
        kernel_shape = [product.operands[1].shape[a] for a in spec.rhs_spec[2:]]
        static = tuple(node.params[k] for k in ("window_strides", "padding", "rhs_dilation"))
        channels_last = jnp.transpose(x, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
        groups = node.params["feature_group_count"]
        return np.asarray(_conv_hessian(channels_last, tuple(kernel_shape), *static, groups), float)
    (left, right), _ = node.params["dimension_numbers"]
    order = [axis for _, axis in sorted(zip(right, left, strict=True))]
    free = [i for i in range(x.ndim) if i not in left]
    size = math.prod(x.shape[i] for i in order)
    flat = jnp.transpose(x, (*free, *order)).reshape(-1, size).astype(jnp.float32)
    return np.asarray(flat.T @ flat, np.float64)[None]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _conv_hessian(x, kernel_shape, strides, padding, dilation, groups):
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), *padding, (0, 0)))
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape[1:-1], kernel_shape, dilation, strides, strict=True)
    ]
    taps = []
    for tap in np.ndindex(*kernel_shape):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        places = tuple(
            slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, strides, strict=True)
        )
        taps.append(x[(slice(None), *places)])
    patches = jnp.stack(taps, axis=-2)  # [batch, ..., taps, channels]
    patches = patches.reshape(-1, len(taps), groups, x.shape[-1] // groups)
    flat = jnp.transpose(patches, (2, 0, 1, 3)).reshape(groups, patches.shape[0], -1)
    return jnp.matmul(flat.swapaxes(1, 2), flat)
