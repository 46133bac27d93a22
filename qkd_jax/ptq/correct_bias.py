"""Bias correction: subtracts the mean quantization error from each output channel.

Rounding errors of weights that are multiplied with inputs of non-zero mean do not cancel: they
shift the mean of the output. Nagel et al., 2019 (arXiv 1906.04721, section 4.2).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.ptq.kernels import kernel
from qkd_jax.ptq.leaves import BiasSite, add_to_output, bias_site, float64, readers
from qkd_jax.ptq.moments import input_means
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.stored_weights import quantized_weights, rounded
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions, trace_net
from qkd_jax.quantize.variables import (
    folded_entries,
    is_calibrated,
    refuse_folded,
    without_quantizers,
)


def correct_bias(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    how: str = "empirical",
    reference: Mapping[str, Any] | None = None,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Corrects the bias of each quantized layer, in the order in which they run.

        empirical   b - (E[y_quantized] - E[y_float])            per output channel
        analytic    b - sum over taps of (W_quantized - W) E[x]
                    E[x] = g phi(m / g) + m Phi(m / g),  m, g: bias and |scale| of the BatchNorm
                    whose ReLU makes x; E[x] = m without a ReLU

    Empirically, every layer sees inputs from layers that are corrected already, and the error of
    its input's quantizer counts too. Analytically no data are needed; layers whose input is
    anything else (the image, a sum, a pooled map) are left, and so is what padding takes away.

    The correction goes into the layer's bias, else into the running mean of the BatchNorm behind
    it, else into a new `quant/<layer>/folded/bias`. Call it once: what is corrected already would
    be corrected again, unless `reference` says where from.

    Args:
        net: the net.
        variables: calibrated.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array. With how="analytic" only the first one's shape is used.
        how: "empirical" or "analytic".
        reference: the variables to compare with, whose quantizers play no part, folded like
            `variables`. None takes `variables` themselves, which serve as long as no method has
            moved the weights onto their grid (adaround, brecq, qdrop, gptq).
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other biases.

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into quantized
            layers, no batch, an unknown `how`, a reference that is folded otherwise, or none for
            weights that lie on their grid already.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> qk.ptq.correct_bias(net, variables, [x])["params"]["layers_0"]["bias"].shape
        (4,)
    """
    checks.one_of("how", how, ("empirical", "analytic"))
    if not is_calibrated(variables):
        raise ValueError(
            "variables has no quantizers, so there is no error to correct. Call `calibrate` first."
        )
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("correct_bias", traced.multipliers)
    if reference is None and _on_their_grid(net, variables):
        raise ValueError(
            "the weights lie on their grid already, so these variables say nothing of the error of "
            "rounding them. Give reference= the variables from before (in a stage: the name of a "
            "net that still has them), or correct biases first."
        )
    floats = without_quantizers(variables if reference is None else reference)
    if _folded(variables) != _folded(floats):
        raise ValueError(
            "reference has other BatchNorms folded than variables: "
            f"{sorted(_folded(variables) ^ _folded(floats))}. Fold both, or neither."
        )
    say = report or (lambda text: None)
    if how == "analytic":
        means = input_means(net, variables, images[0], kwargs)
        return _analytic(traced, unfreeze(dict(variables)), floats, means, say)
    reference_net = trace_net(net, floats, images[0], **kwargs)
    return _empirical(traced, reference_net, unfreeze(dict(variables)), images, say)


def _empirical(
    traced: TracedNet,
    reference: TracedNet,
    result: dict[str, Any],
    images: list[np.ndarray],
    say: Callable[[str], None],
) -> dict[str, Any]:
    quantized, floats = (Stream(t.graph, images) for t in (traced, reference))
    variable_readers, reference_readers = readers(traced.graph), readers(reference.graph)
    layers = []
    for product, twin in zip(
        contractions(traced.graph), contractions(reference.graph), strict=True
    ):
        if product.operands[1].name == "weight":
            site = bias_site(traced, product, variable_readers)
            twin_site = bias_site(reference, twin, reference_readers)
            if site is not None and twin_site is not None:
                layers.append((product, site, twin_site))
    for product, site, twin_site in sorted(layers, key=lambda row: quantized.index[row[1].node]):
        error = _mean(site, quantized.values(site.value))
        error = error - _mean(twin_site, floats.values(twin_site.value))
        result = add_to_output(result, site, -error)
        shift = _in_output(site, error, len(traced.graph.shape(site.value)))
        quantized.replace(site.value, lambda y, shift=shift: y - jnp.asarray(shift, y.dtype))
        say(_corrected(product, site, error))
    return result


def _analytic(
    traced: TracedNet,
    result: dict[str, Any],
    floats: Mapping[str, Any],
    means: Mapping[str, np.ndarray],
    say: Callable[[str], None],
) -> dict[str, Any]:
    graph, variable_readers = traced.graph, readers(traced.graph)
    for product in contractions(graph):
        weight = product.weight
        if weight is None or weight.marker is None or not weight.quantized:
            continue
        site = bias_site(traced, product, variable_readers)
        layer_kernel = kernel(traced, product, variable_readers)
        if site is None or layer_kernel is None:
            continue
        if layer_kernel.in_axis is None or not layer_kernel.one_output:
            continue
        mean = means.get(product.path)
        if mean is None:
            say(f"left {product.path}: its input is not a BatchNorm's output or its ReLU")
            continue
        on_grid = np.asarray(graph.constants[weight.marker.outputs[0]], np.float64)
        error = layer_kernel.through(on_grid - float64(floats, layer_kernel.path), mean)
        result = add_to_output(result, site, -error)
        say(_corrected(product, site, error))
    return result


def _mean(site: BiasSite, values: list[Any]) -> np.ndarray:
    """Mean per feature over all batches."""
    axes = tuple(i for i in range(values[0].ndim) if i not in site.features)
    sums = [np.asarray(v, np.float64).sum(axis=axes) for v in values]
    return sum(sums) * (sums[0].size / sum(v.size for v in values))


def _in_output(site: BiasSite, error: np.ndarray, rank: int) -> np.ndarray:
    """Reshapes a number per feature to the output's rank."""
    shape = [1] * rank
    for axis, size in zip(site.features, error.shape, strict=True):
        shape[axis] = size
    return error.reshape(shape)


def _corrected(product: TracedContraction, site: BiasSite, error: np.ndarray) -> str:
    where = "its BatchNorm's mean" if site.sign < 0 else site.path
    return f"corrected {product.path}: largest shift {np.abs(error).max():.3g} in {where}"


def _on_their_grid(net: QuantizedModel, variables: Mapping[str, Any]) -> bool:
    """Whether every weight with codes is what it is rounded to."""
    found = [rounded(dict(variables), weight) for weight in quantized_weights(net, dict(variables))]
    return bool(found) and all(
        bool(jnp.all(jnp.abs(w.values - w.on_grid) <= 1e-3 * w.scale)) for w in found
    )


def _folded(variables: Mapping[str, Any]) -> set[str]:
    """Returns the paths of the BatchNorms that are folded."""
    return {path for path, stored in folded_entries(variables) if "identity" in stored}
