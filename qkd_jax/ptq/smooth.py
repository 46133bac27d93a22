"""SmoothQuant: outlier channels of an activation are shrunk, and the next weights grow instead.

Activations with a few wide channels are hard to quantize per tensor, weights are easy; a factor per
channel moves the difficulty. Xiao, Lin, Seznec, Wu, Demouth and Han, 2022 (arXiv 2211.10438).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.ptq.channel_links import Link, divided, nearest_links
from qkd_jax.ptq.leaves import float64
from qkd_jax.ptq.moments import norms_by_layer
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import contractions, trace_net
from qkd_jax.quantize.variables import refuse_folded, refuse_quantized

MIN_SCALE = 1e-5


def smoothing_scale(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """Returns s = max|X|^alpha / max|W|^(1 - alpha), at least 1e-5 (section 4, eq. 4).

    Args:
        activations: max |x| per channel, [channels].
        weights: max |w| per input channel over all layers that read x, [channels].
        alpha: how much of the difficulty moves into the weights, 0 to 1.

    Returns:
        [channels], float64; 1 for a channel whose activations or weights are all zero, which the
        paper does not speak of (its formula gives 0 or infinity there).
    """
    x, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    alive = (x > 0) & (w > 0)
    x, w = np.where(alive, x, 1.0), np.where(alive, w, 1.0)
    return np.where(alive, np.maximum(x**alpha / w ** (1 - alpha), MIN_SCALE), 1.0)


def smooth(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    alpha: float = 0.5,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Divides the inputs of quantized layers by a factor per channel, and multiplies their weights.

        X / s,   W[..., j, :] * s_j,   s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

    The division costs nothing at run time, for it goes into what makes X: the gain and bias of the
    LayerNorm or BatchNorm before it, or the weight and bias of the previous layer (also a folded
    one), where only ReLUs, pools and the like lie between. Layers that read the same tensor share
    s. Where something else reads it too (a residual sum), or where nothing before it has a factor
    per channel, the layer is left as it is and reported.

    The float net computes what it did.

    Args:
        net: the net; layers whose input its rules quantize are smoothed.
        variables: float.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array.
        alpha: 0.5 in the paper, 0.75 for models with stronger outliers.
        report: called with a line for each layer, smoothed or left, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other weights, gains and biases.

    Raises:
        ValueError: calibrated variables, no batch, or alpha outside [0, 1].

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(8))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> easier = qk.ptq.smooth(net, variables, [x])
        >>> bool(jax.numpy.allclose(net.apply(easier, x), net.apply(variables, x), atol=1e-5))
        True
    """
    checks.in_range("alpha", alpha, 0, 1)
    refuse_quantized("smooth", variables)
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("smooth", traced.multipliers)
    wanted = lambda target: net.spec_of(target.layer, "input") is not None
    chosen = nearest_links(traced, wanted)
    input_ranges = _input_ranges(Stream(traced.graph, images), chosen)
    norms = norms_by_layer(net, variables, images[0], kwargs)
    result = unfreeze(dict(variables))
    for link, largest in zip(chosen, input_ranges, strict=True):
        ranges = [t.in_ranges(float64(result, t.path), link.channels) for t in link.targets]
        scale = smoothing_scale(largest, np.max(ranges, axis=0), alpha)
        result = divided(result, link, scale, norms)
        if report is not None:
            names = ", ".join(t.layer for t in link.targets)
            report(
                f"smoothed {names} by {link.name}: s from {scale.min():.3g} to {scale.max():.3g}"
            )
    if report is not None:
        done = {t.layer for link in chosen for t in link.targets}
        for product in contractions(traced.graph):
            if product.weight is not None and product.path not in done:
                if net.spec_of(product.path, "input") is not None:
                    report(f"left {product.path}: nothing before its input can take a factor")
    return result


def _input_ranges(stream: Stream, chosen: list[Link]) -> list[np.ndarray]:
    """The largest |x| per channel of what each link's targets read."""
    readers = {t.product.node: i for i, link in enumerate(chosen) for t in link.targets}
    ranges = [np.zeros(link.channels) for link in chosen]
    for node in stream.graph.nodes:
        if node in readers:
            i = readers[node]
            for value in stream.values(node.inputs[0]):
                flat = np.abs(np.asarray(value, np.float64)).reshape(-1, chosen[i].channels)
                ranges[i] = np.maximum(ranges[i], flat.max(axis=0))
    return ranges
