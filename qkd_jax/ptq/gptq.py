"""GPTQ: weights are rounded one input after another, and the rest makes up for each error.

Frantar, Ashkboos, Hoefler and Alistarh, 2022 (arXiv 2210.17323), here for convolutions too, by the
columns of their input patches. The loop over columns is in `gptq_core`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.graph import execute
from qkd_jax.numerics import Spec
from qkd_jax.ptq.error_propagation import corrected_weight
from qkd_jax.ptq.gptq_core import quantize_columns
from qkd_jax.ptq.kernel_matrices import KernelMatrices, hessian, kernel_matrices
from qkd_jax.ptq.kernels import kernel
from qkd_jax.ptq.leaves import entries, put_entries, readers
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import contractions, quantizer_params, trace_net
from qkd_jax.quantize.variables import quantizers, refuse_folded, without_quantizers
from qkd_jax.quantizers import QUANTIZERS
from qkd_jax.trees import get


def gptq(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    percdamp: float = 0.01,
    block: int = 128,
    sequential: bool = True,
    order: str = "columns",
    static_groups: bool = False,
    propagation: float = 0.0,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Rounds each quantized weight so that the layer's output on real inputs changes least.

    Minimises |W X - W' X|^2 for W' on the grid, with H = X X^T over inputs and image positions:
    see `quantize_columns`. A convolution's columns are its taps and input channels; each group of a
    grouped or depthwise one has an H of its own. The grid is the calibrated one; where a spec has
    groups (`granularity=32`), each gets its scale from its weights as they stand when its turn
    comes, by the quantizer's `init` (groups that another observer than "minmax" has measured keep
    their scales, and all do with `static_groups`). Groups are neighbours along the input in every
    order, so files need no list of which column belongs to which group.

    Args:
        net: the net.
        variables: calibrated.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array. 128 images are plenty.
        percdamp: added to H's diagonal, as a share of its mean.
        block: how many columns are updated before the rest is, once for all.
        sequential: take X from the quantized layers before, with their inputs quantized; False
            takes it from the float net.
        order: "columns" rounds inputs as they stand, "activation" the strongest ones first (the
            authors' act-order), with their groups where these find their scales on the way.
        static_groups: keep the scales that groups were calibrated with; then "activation" sorts
            inputs without regard to groups.
        propagation: alpha of QEP (`propagate_errors`), 0 to 1: before it is rounded, each weight is
            changed to make up for the errors of the layers before it. Needs `sequential`.
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables whose kernels lie exactly on their grids. Weights that several layers share, or
        that are not simply a layer's kernel, stay as they are (and so are rounded to nearest).

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into quantized
            layers, no batch, a dynamic weight spec, a quantizer that moves values of its own grid,
            or inputs that are not finite.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> rounded = qk.ptq.gptq(net, variables, [x])
        >>> jax.numpy.unique(rounded["params"]["layers_0"]["kernel"]).size <= 2**4
        True
    """
    checks.number("percdamp", percdamp, low=0, low_allowed=False)
    checks.integer_in("block", block, 1)
    checks.one_of("order", order, ("columns", "activation"))
    checks.one_of("static_groups", static_groups, (True, False))
    checks.number("propagation", propagation, low=0, high=1)
    if propagation and not sequential:
        raise ValueError(
            f"propagation={propagation} came with sequential=False, under which no layer sees the "
            "errors of those before it. Use sequential=True, or propagation=0."
        )
    if not any(operand == "weight" for _, operand, _ in quantizers(variables)):
        raise ValueError("variables has no weight quantizers to round for. Call `calibrate` first.")
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("gptq", traced.multipliers)
    source = traced
    if not sequential:
        source = trace_net(net, without_quantizers(variables), images[0], **kwargs)
    stream, variable_readers = Stream(source.graph, images), readers(traced.graph)
    floats = Stream(traced.graph, images, quantized=False) if propagation else None
    result = unfreeze(dict(variables))
    for product, twin in zip(contractions(traced.graph), contractions(source.graph), strict=True):
        weight = product.weight
        if weight is None or weight.marker is None or not weight.quantized:
            continue
        spec = traced.spec(weight.marker)
        if spec.dynamic:
            raise ValueError(
                f"weight of layer {product.path!r} has dynamic=True: its grid would move with the "
                "rounding. Use dynamic=False and calibrate."
            )
        layer_kernel = kernel(traced, product, variable_readers, part=True)
        layout = kernel_matrices(layer_kernel, spec) if layer_kernel is not None else None
        if layer_kernel is None or layout is None or hasattr(QUANTIZERS[spec.quantizer], "live"):
            if report is not None:
                report(f"left {product.path}: its weight is shared or rearranged")
            continue
        inputs = stream.values(twin.node.inputs[0])
        h = np.sum([hessian(twin, x) for x in inputs], axis=0)
        if not np.isfinite(h).all():
            raise ValueError(
                f"inputs of layer {product.path!r} are not all finite; check the images' "
                "normalisation and the weights."
            )
        old = np.asarray(get(result, layer_kernel.path), np.float32)
        old = old.reshape(-1)[layer_kernel.entries]
        if floats is not None:
            pairs = zip(inputs, floats.values(product.node.inputs[0]), strict=True)
            change = np.sum([hessian(product, x - y, y) for y, x in pairs], axis=0)
            target = corrected_weight(
                layout.matrices(old), h, change, strength=propagation, percdamp=percdamp
            )
            old = layout.kernel(target).astype(np.float32)
        params = quantizer_params(traced, weight.marker)
        renew = layout.cut and spec.observer in (None, "minmax") and not static_groups
        new, params = _rounded(
            layout, old, h, params, spec, renew=renew, order=order, percdamp=percdamp, block=block
        )
        leaves = [jnp.asarray(params[k]) for k in sorted(params)]
        (again,) = execute(weight.marker, [jnp.asarray(new), *leaves])
        if np.abs(np.asarray(again) - new).max() > 1e-6 * max(np.abs(new).max(), 1e-30):
            raise ValueError(
                f"quantizer {spec.quantizer!r} of layer {product.path!r} moves values that lie on "
                "its own grid, so rounded weights would be rounded again. Use a quantizer without "
                "a transform of its own, such as 'uniform' or 'lsq'."
            )
        result = put_entries(result, layer_kernel.path, layer_kernel.entries, new)
        for value, kept in zip(weight.marker.inputs[1:], leaves, strict=True):
            if (found := entries(traced.graph, value)) is not None:
                result = put_entries(result, *found, kept)
        if sequential:
            stream.replace(weight.marker.outputs[0], lambda _, w=again: w)
        if report is not None:
            nearest = np.asarray(traced.graph.constants[weight.marker.outputs[0]])
            before, after = (layout.error(w - old, h) for w in (nearest, new))
            report(
                f"rounded {product.path}: squared error of its output {after:.3g}, "
                f"{before:.3g} by nearest rounding"
            )
    return result


def _rounded(
    layout: KernelMatrices,
    array: np.ndarray,
    h: np.ndarray,
    params: Mapping[str, np.ndarray],
    spec: Spec,
    *,
    renew: bool,
    **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns (kernel on its grid, parameters), both as the net keeps them."""
    columns = layout.order
    new, grouped = quantize_columns(
        layout.matrices(array)[..., columns],
        h[..., columns[:, None], columns],
        {k: layout.by_group(np.asarray(v)) for k, v in params.items()},
        spec,
        group=layout.group_size if renew else None,
        **options,
    )
    matrices = np.empty_like(new)
    matrices[..., columns] = new
    if renew:
        kept = {k: layout.cut_param(v) for k, v in grouped.items()}
    else:
        kept = {k: np.asarray(v) for k, v in params.items()}
    return layout.kernel(matrices), kept
