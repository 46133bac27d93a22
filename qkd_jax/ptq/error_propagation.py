"""Weights that make up for the errors of the layers before them.

Layer-wise methods ask each layer to repeat its float output from inputs that the quantized layers
before have already changed, so errors add up. Quantization error propagation (Arai and Ichikawa,
2025, arXiv 2504.09629) lets the weight answer for the change of its inputs first.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.graph import execute
from qkd_jax.ptq.kernel_matrices import hessian, kernel_matrices
from qkd_jax.ptq.kernels import kernel
from qkd_jax.ptq.leaves import entries, put_entries, readers
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import contractions, quantizer_params, trace_net
from qkd_jax.quantize.variables import quantizers, refuse_folded
from qkd_jax.trees import get


def corrected_weight(
    weight: np.ndarray,
    hessian: np.ndarray,
    change: np.ndarray,
    *,
    strength: float,
    percdamp: float = 0.01,
) -> np.ndarray:
    """Returns W + strength W D (H + percdamp mean(diag H) I)^-1.

        H = X' X'^T,   D = (X - X') X'^T

    With strength 1 and no damping this minimises |W X - W* X'|^2: the output that the float net's
    inputs X give, from the inputs X' that the quantized net has. Inputs that were always zero
    (H[j, j] = 0) get zero weights.

    Args:
        weight: W, [..., rows, columns].
        hessian: H, [..., columns, columns].
        change: D, [..., columns, columns].
        strength: how much of the correction is made, 0 to 1.
        percdamp: dampening, as in GPTQ.

    Returns:
        W*, float64.
    """
    h, w = np.array(hessian, np.float64), np.asarray(weight, np.float64)
    diagonal = np.arange(h.shape[-1])
    own = h[..., diagonal, diagonal]
    h[..., diagonal, diagonal] += (own == 0) + percdamp * own.mean(axis=-1, keepdims=True)
    w = np.where((own == 0)[..., None, :], 0, w)
    return w + strength * np.linalg.solve(h, (w @ change).swapaxes(-1, -2)).swapaxes(-1, -2)


def propagate_errors(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    strength: float = 0.5,
    percdamp: float = 0.01,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Changes each weight so that it makes up for the quantization of the layers before it.

        W* = W + strength W (X - X') X'^T (X' X'^T)^-1

    X are a layer's inputs in the float net, X' those of the net whose earlier layers are corrected
    and quantized. Weights are rounded to nearest afterwards, on grids that are measured again on
    W*, unless their spec names another observer than "minmax", which keeps its scales. For GPTQ's
    rounding instead, use `gptq(..., propagation=0.5)`, which does both in one pass.

    The first layer, and others whose inputs are as in the float net, stay as they are.

    Args:
        net: the net.
        variables: calibrated.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array. As many as there are columns in the widest layer, or W* fits their noise.
        strength: alpha of the paper, 0 to 1: how much of the correction is made. Below 1 it is
            held back from fitting the calibration data.
        percdamp: added to the diagonal of X' X'^T, as a share of its mean.
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other kernels, not on their grids, and grids that fit them. Weights that
        several layers share, or that are not simply a layer's kernel, stay as they are.

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into quantized
            layers, no batch, or inputs that are not finite.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(3))])
        >>> x = jax.random.normal(jax.random.key(1), (64, 3))
        >>> floats = net.init(jax.random.key(0), x)
        >>> variables = qk.calibrate(net, floats, [x])
        >>> found = qk.ptq.propagate_errors(net, variables, [x], strength=1.0)
        >>> error = lambda v: jax.numpy.mean((net.apply(v, x) - net.apply(floats, x)) ** 2)
        >>> bool(error(found) < error(variables))
        True
    """
    checks.number("strength", strength, low=0, high=1)
    checks.number("percdamp", percdamp, low=0, low_allowed=False)
    if not any(operand == "weight" for _, operand, _ in quantizers(variables)):
        raise ValueError("variables has no weight quantizers to correct. Call `calibrate` first.")
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("propagate_errors", traced.multipliers)
    floats = Stream(traced.graph, images, quantized=False)
    stream, variable_readers = Stream(traced.graph, images), readers(traced.graph)
    result = unfreeze(dict(variables))
    for product in contractions(traced.graph):
        weight = product.weight
        if weight is None or weight.marker is None or not weight.quantized:
            continue
        spec = traced.spec(weight.marker)
        layer = kernel(traced, product, variable_readers, part=True)
        layout = kernel_matrices(layer, spec) if layer is not None else None
        if layer is None or layout is None or spec.dynamic:
            if report is not None:
                report(f"left {product.path}: its weight is shared, rearranged or dynamic")
            continue
        inputs = product.node.inputs[0]
        pairs = list(zip(stream.values(inputs), floats.values(inputs), strict=True))
        change = np.sum([hessian(product, x - y, y) for y, x in pairs], axis=0)
        if not change.any():
            continue
        h = np.sum([hessian(product, y) for y, _ in pairs], axis=0)
        if not np.isfinite(h).all() or not np.isfinite(change).all():
            raise ValueError(
                f"inputs of layer {product.path!r} are not all finite; check the images' "
                "normalisation and the weights."
            )
        old = np.asarray(get(result, layer.path), np.float32).reshape(-1)[layer.entries]
        matrices = layout.matrices(old)
        new = corrected_weight(matrices, h, change, strength=strength, percdamp=percdamp)
        params = quantizer_params(traced, weight.marker)
        if spec.observer in (None, "minmax"):
            fitted = layout.grid(new, spec)
            params = {k: layout.kept(fitted[k], np.shape(v)) for k, v in params.items()}
        whole = layout.kernel(new).astype(np.float32)
        leaves = [jnp.asarray(params[k], jnp.float32) for k in sorted(params)]
        (rounded,) = execute(weight.marker, [jnp.asarray(whole), *leaves])
        result = put_entries(result, layer.path, layer.entries, whole)
        for value, kept in zip(weight.marker.inputs[1:], leaves, strict=True):
            if (found := entries(traced.graph, value)) is not None:
                result = put_entries(result, *found, kept)
        stream.replace(weight.marker.outputs[0], lambda _, w=rounded: w)
        if report is not None:
            moved = np.linalg.norm(new - matrices) / max(np.linalg.norm(matrices), 1e-30)
            report(f"corrected {product.path}: weights moved by {moved:.3g} of their norm")
    return result
