"""Biases on the grid of their sums, as engines with integer kernels have them.

    b <- round(b / (s_x s_w)) s_x s_w

An engine adds the bias to the sums of a quantized product, as an int32, and so rounds it to their
unit, the product of the two scales (Jacob et al. 2018, arXiv 1712.05877, section 2.4). The step is
some hundredth of an output code, yet one output in a thousand then gets another code, and twenty
layers further on a third of them. Rounded beforehand, the net that is evaluated is the net that
runs.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qkd_jax.ptq.fold_bn import fold_bn, output_scales
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import contractions, has_codes, refuse_uncalibrated, trace_net
from qkd_jax.quantize.variables import folded_path
from qkd_jax.trees import get, join, put

FINE_BITS = 7
"""Below this width of weight or input the unit is coarse, and a bias is better added in float."""


def integer_bias(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    any_batch: bool = True,
    **kwargs: Any,
) -> dict[str, Any]:
    """Folds BatchNorm and rounds the biases of quantized layers to the unit of their sums.

    Layers with fewer than 7 bits on a side keep their biases: `to_onnx` leaves those outside of
    the engine's integer kernel.

    Args:
        net: the net.
        variables: calibrated.
        images: example input; only its shape is used.
        any_batch: False for a net that has no batch, as `convert` says.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables for `net.apply` in eval mode, `convert` and `to_onnx`.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(8))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> qk.ptq.integer_bias(net, variables, x)["params"]["layers_0"]["bias"].shape
        (4,)
    """
    result = unfreeze(dict(fold_bn(net, variables, images, any_batch=any_batch, **kwargs)))
    traced = trace_net(net, result, images, any_batch=any_batch, **kwargs)
    refuse_uncalibrated(traced)
    for product in contractions(traced.graph):
        if not all(has_codes(traced, operand) for operand in product.operands):
            continue
        (left, x_format), (right, w_format) = output_scales(traced, product)
        if min(x_format.bits, w_format.bits) < FINE_BITS:
            continue
        unit = traced.multipliers.get(product.path)
        if unit is None:
            unit = left * right
        for path in (folded_path(product.path, "bias"), join("params", product.path, "bias")):
            with contextlib.suppress(KeyError):  # a layer without a bias, or with one of the two
                bias = np.asarray(get(result, path))
                result = put(result, path, _rounded(bias, np.asarray(unit)))
    return result


def _rounded(bias: np.ndarray, unit: np.ndarray) -> Any:
    """Rounds a bias to multiples of a unit per channel, or of one for all."""
    unit = unit.astype(np.float64)
    if unit.size > 1:
        unit = unit.reshape(unit.shape[unit.ndim - bias.ndim :])
    return jnp.asarray(np.round(bias / unit) * unit, bias.dtype)
