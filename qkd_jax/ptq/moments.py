"""Moments of activations from BatchNorm's parameters, without data.

In eval mode a BatchNorm's output has the mean `bias` and the standard deviation `|scale|` per
channel, over the data it was trained on; taken as Gaussian, the moments behind a ReLU follow. A
BatchNorm that is folded still has these two in `params`, and the methods that rescale or shift
channels keep them true. Nagel et al., 2019 (arXiv 1906.04721, sections 4.2.1 and 4.2.2).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.special

from qkd_jax.graph import IDENTITY, MARKERS, Graph
from qkd_jax.ptq.leaves import float64, is_relu, norms_of
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions, trace_net
from qkd_jax.quantize.variables import unfolded
from qkd_jax.trees import get, join, put


def norms_by_layer(
    net: QuantizedModel, variables: Mapping[str, Any], images: Any, kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Returns {layer: the BatchNorm that normalises its output}, folded or not."""
    traced = trace_net(net, unfolded(variables), images, **kwargs)
    return {layer: norm for layer, norm, _ in _normed(traced)}


def output_moments(variables: Mapping[str, Any], norm: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns mean and standard deviation of a BatchNorm's output; None without scale or bias."""
    params = get(variables, join("params", norm))
    if "scale" not in params or "bias" not in params:
        return None
    return np.asarray(params["bias"], np.float64), np.abs(np.asarray(params["scale"], np.float64))


def rescale_folded(variables: Mapping[str, Any], norm: str, factor: np.ndarray) -> dict[str, Any]:
    """Divides the stated moments of a folded BatchNorm, as its layer's output was divided."""
    result = dict(variables)
    for name in ("scale", "bias"):
        if name in get(result, join("params", norm)):
            path = join("params", norm, name)
            result = put(result, path, float64(result, path) / factor)
    return result


def rectified_mean(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Returns E[max(x, 0)] for x ~ N(mean, std^2): std phi(mean / std) + mean Phi(mean / std)."""
    safe = np.where(std > 0, std, 1.0)
    ratio = mean / safe
    density = np.exp(-0.5 * ratio**2) / np.sqrt(2 * np.pi)
    gaussian = safe * density + mean * scipy.special.ndtr(ratio)
    return np.where(std > 0, gaussian, np.maximum(mean, 0))


def input_means(
    net: QuantizedModel, variables: Mapping[str, Any], images: Any, kwargs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns {layer: mean of its input per channel}, behind a BatchNorm or its ReLU alone."""
    traced = trace_net(net, unfolded(variables), images, **kwargs)
    norms = {value: norm for _, norm, value in _normed(traced)}
    means = {}
    for product in contractions(traced.graph):
        value, rectified = _before(traced.graph, product.node.inputs[0])
        if value in norms and (moments := output_moments(variables, norms[value])) is not None:
            means[product.path] = rectified_mean(*moments) if rectified else moments[0]
    return means


def _normed(traced: TracedNet) -> Iterator[tuple[str, str, int]]:
    """Yields (layer, the BatchNorm right behind it, the value that the BatchNorm writes)."""
    for product in contractions(traced.graph):
        if (found := _behind(traced, product)) is not None:
            yield product.path, *found


def _behind(traced: TracedNet, product: TracedContraction) -> tuple[str, int] | None:
    """Returns the last BatchNorm right behind a product, and the value that it writes."""
    graph, value, found = traced.graph, product.node.outputs[0], None
    while (node := graph.sole_consumer(value)) is not None:
        other = [v for v in node.inputs if v != value]
        affine = node.op in ("add", "sub", "mul") and len(other) == 1
        if node.op not in IDENTITY and not (affine and other[0] in graph.constants):
            break
        norms = norms_of(traced, node)
        if not norms and found is not None:
            break
        value = node.outputs[0]
        if norms:
            found = min(norms), value
    return found


def _before(graph: Graph, value: int) -> tuple[int, bool]:
    """Follows a product's input back over its quantizer and a ReLU; (value, whether rectified)."""
    rectified = False
    while (node := graph.producer(value)) is not None:
        if node.op in MARKERS or node.op in IDENTITY:
            value = node.inputs[0]
        elif is_relu(graph, node) and not rectified:
            value = next(v for v in node.inputs if v not in graph.constants)
            rectified = True
        else:
            break
    return value, rectified
