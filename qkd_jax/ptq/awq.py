"""AWQ: input channels with large activations get finer codes, and ranges are clipped.

Few channels of an input carry most of a layer's output. Their weights are scaled up before they are
rounded, so that they lose less of themselves, and the factor is taken out of what makes the input.
Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, 2023 (arXiv 2306.00978).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.graph import Node
from qkd_jax.numerics import Spec
from qkd_jax.ptq.channel_links import Link, divided, nearest_links
from qkd_jax.ptq.kernel_matrices import KernelMatrices, hessian, kernel_matrices
from qkd_jax.ptq.kernels import Kernel, kernel
from qkd_jax.ptq.leaves import float64, put_entries, readers
from qkd_jax.ptq.moments import norms_by_layer
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import TracedNet, contractions, trace_net
from qkd_jax.quantize.variables import refuse_folded, refuse_quantized
from qkd_jax.trees import get

MIN_SCALE = 1e-4


def activation_scales(magnitudes: np.ndarray, alpha: float) -> np.ndarray:
    """Returns s = max(m^alpha, 1e-4), divided by sqrt(max s * min s).

    Args:
        magnitudes: mean |x| per channel, [channels].
        alpha: 0 leaves all channels alike.
    """
    scale = np.maximum(np.asarray(magnitudes, np.float64) ** alpha, MIN_SCALE)
    return scale / np.sqrt(scale.max() * scale.min())


def clipped_weight(
    layout: KernelMatrices,
    matrices: np.ndarray,
    hessian: np.ndarray,
    spec: Spec,
    *,
    steps: int = 20,
    most: float = 0.5,
) -> np.ndarray:
    """Returns weights cut off at the range that serves each row of each group best.

        max|w| (1 - i / steps) for 0 <= i < most steps,   the least (w - Q(w'))  H_g  (w - Q(w'))^T

    with w' the clipped weights and H_g the part of H that belongs to the group: each group's share
    in the output by itself, as in the authors' code.

    Args:
        layout: of the kernel.
        matrices: W, [matrices, rows, columns].
        hessian: H, [matrices, columns, columns].
        spec: of the weight.
        steps: the grid's fineness.
        most: the largest share of a range that is cut off.

    Returns:
        W clipped, [matrices, rows, columns].
    """
    columns = layout.order.reshape(layout.groups, -1)
    parts = np.stack([hessian[:, c[:, None], c] for c in columns], axis=1)
    cut = np.asarray(layout.by_columns(matrices))  # [matrices, groups, rows, columns of a group]
    together = spec.granularity == "tensor"
    limit = np.abs(cut).max(axis=None if together else -1, keepdims=True)
    least = np.full((*cut.shape[:3], 1), np.inf)
    best = np.broadcast_to(limit, least.shape)
    for i in range(max(1, int(most * steps))):
        bound = limit * (1 - i / steps)
        clipped = layout.from_columns(np.clip(cut, -bound, bound))
        rounded = layout.on_grid(clipped, layout.grid(clipped, spec), spec)
        change = np.asarray(layout.by_columns(rounded), np.float64) - cut
        error = np.einsum("mgri,mgij,mgrj->mgr", change, parts, change, optimize=True)[..., None]
        if together:
            error = np.full_like(error, error.sum())
        better = error < least
        best, least = np.where(better, bound, best), np.where(better, error, least)
    return layout.from_columns(np.clip(cut, -best, best))


def awq(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 20,
    scale: bool = True,
    clip: bool = True,
    unclipped: str = "(.*/)?(query|key|q_proj|k_proj)",
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Scales the input channels of quantized weights by their activations, and clips the weights.

        X / s,   W[..., j, :] * s_j,   s = mean|X|^alpha / sqrt(max s min s)
        the least |W X - Q(W s) (X / s)|^2 over alpha = 0, 1/steps, ..., (steps - 1)/steps

    The division goes into what makes X, where `smooth` puts it: the gain and bias of the
    normalisation before, or the previous layer's weight and bias. Layers that read one tensor share
    s, and the sum of their errors is compared. Where nothing before can take a factor (a residual
    sum, a GELU), channels stay as they are, which is reported; the float net computes what it did.

    Then each row's range in each group is cut down to the share of it, at least a half, that leaves
    the group's own part of the output the least error, and the weights are clipped to it: this
    changes the float net. Calibrate afterwards, with ranges that take all of the weights
    (observer="minmax", or none for 'uniform').

    Differences from the paper: the error is that of the layers' own products, not of an attention
    block's output; it is computed from X X^T, so it is exact over all of `batches`.

    Args:
        net: the net; layers whose weight its rules quantize take part.
        variables: float.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array.
        steps: fineness of both searches.
        scale: whether channels are scaled.
        clip: whether weights are clipped.
        unclipped: a regular expression of layers that are not clipped; as the authors have it,
            queries and keys, whose errors multiply.
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other weights, gains and biases.

    Raises:
        ValueError: calibrated variables, no batch, no layer with a weight spec, inputs that are not
            finite, or numbers out of range.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.LayerNorm(), nn.Dense(4)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4, granularity=8))])
        >>> x = jax.random.normal(jax.random.key(1), (64, 16))
        >>> variables = net.init(jax.random.key(0), x)
        >>> variables = qk.ptq.awq(net, variables, [x], clip=False)
        >>> sorted(variables["params"]["layers_0"])
        ['bias', 'scale']
    """
    checks.integer_in("steps", steps, 1)
    for name, value in (("scale", scale), ("clip", clip)):
        checks.one_of(name, value, (True, False))
    checks.regular_expression("unclipped", unclipped)
    refuse_quantized("awq", variables)
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("awq", traced.multipliers)
    layers = _layers(net, traced)
    wanted = lambda target: target.product.node in layers
    chosen = nearest_links(traced, wanted) if scale else []
    magnitudes = _measure(Stream(traced.graph, images), layers, chosen)
    norms = norms_by_layer(net, variables, images[0], kwargs)
    result = unfreeze(dict(variables))
    for link, largest in zip(chosen, magnitudes, strict=True):
        found = _best_scale(result, link, layers, largest, steps)
        result = divided(result, link, found[0], norms)
        for target in link.targets:
            if (layer := layers.get(target.product.node)) is not None:
                factor = layer.factor(target, found[0])
                layer.hessian = layer.hessian / (factor[..., None] * factor[:, None])
        if report is not None:
            names = ", ".join(t.layer for t in link.targets)
            report(
                f"scaled {names} by {link.name}: alpha {found[1]:.2f}, squared error of the output "
                f"{found[2]:.3g}, {found[3]:.3g} unscaled"
            )
    done = {t.product.node for link in chosen for t in link.targets}
    for node, layer in layers.items():
        if scale and node not in done and report is not None:
            report(f"not scaled {layer.path}: nothing before its input can take a factor")
        if not clip or re.fullmatch(unclipped, layer.path):
            continue
        old = np.asarray(get(result, layer.kernel.path), np.float32)
        old = layer.layout.matrices(old.reshape(-1)[layer.kernel.entries])
        new = clipped_weight(layer.layout, old, layer.hessian, layer.spec, steps=steps)
        result = put_entries(
            result, layer.kernel.path, layer.kernel.entries, layer.layout.kernel(new)
        )
        if report is not None:
            report(f"clipped {layer.path}: {np.mean(new != old):.2%} of its weights")
    return result


@dataclasses.dataclass(eq=False)
class _Layer:
    """A layer whose weight is quantized, and X X^T of its inputs."""

    path: str
    kernel: Kernel
    layout: KernelMatrices
    spec: Spec
    hessian: Any = 0.0

    def factor(self, kernel: Kernel, scale: np.ndarray) -> np.ndarray:
        """Returns the factor of each column for a scale of the input channels."""
        ones = np.ones(self.layout.shape)
        return self.layout.matrices(kernel.scale_in(ones, scale))[:, 0]


def _layers(net: QuantizedModel, traced: TracedNet) -> dict[Node, _Layer]:
    found, variable_readers = {}, readers(traced.graph)
    for product in contractions(traced.graph):
        spec = net.spec_of(product.path, "weight")
        own = kernel(traced, product, variable_readers, part=True) if spec else None
        layout = kernel_matrices(own, spec) if own is not None and spec is not None else None
        if own is not None and layout is not None and spec is not None:
            found[product.node] = _Layer(product.path, own, layout, spec)
    if not found:
        raise ValueError(
            "no layer of this net has a weight spec, and a weight that it alone reads. Give its "
            "rules a weight spec, such as Spec(4, granularity=32)."
        )
    return found


def _measure(stream: Stream, layers: Mapping[Node, _Layer], chosen: list[Link]) -> list[np.ndarray]:
    """Sets each layer's X X^T, and returns the mean |x| per channel at each link."""
    by_node = {t.product.node: i for i, link in enumerate(chosen) for t in link.targets}
    magnitudes = [np.ones(link.channels) for link in chosen]
    for node in stream.graph.nodes:
        if node not in layers and node not in by_node:
            continue
        values = stream.values(node.inputs[0])
        if (layer := layers.get(node)) is not None:
            layer.hessian = np.sum([hessian(layer.kernel.product, x) for x in values], axis=0)
            if not np.isfinite(layer.hessian).all():
                raise ValueError(
                    f"inputs of layer {layer.path!r} are not all finite; check the images' "
                    "normalisation and the weights."
                )
        if (i := by_node.get(node)) is not None:
            flat = [
                np.abs(np.asarray(x, np.float64)).reshape(-1, len(magnitudes[i])) for x in values
            ]
            magnitudes[i] = np.concatenate(flat).mean(axis=0)
    return magnitudes


def _best_scale(
    variables: Mapping[str, Any],
    link: Link,
    layers: Mapping[Node, _Layer],
    magnitudes: np.ndarray,
    steps: int,
) -> tuple[np.ndarray, float, float, float]:
    """Returns (scale, alpha, squared error of the output, the same unscaled)."""
    weights = [
        (t, layers[t.product.node], float64(variables, t.path))
        for t in link.targets
        if t.product.node in layers
    ]
    best, unscaled = None, 0.0
    for step in range(steps):
        scale = activation_scales(magnitudes, step / steps)
        error = 0.0
        for target, layer, weight in weights:
            scaled = layer.layout.matrices(target.scale_in(weight, scale))
            rounded = layer.layout.on_grid(
                scaled, layer.layout.grid(scaled, layer.spec), layer.spec
            )
            back = layer.layout.kernel(rounded / layer.factor(target, scale)[:, None])
            error += layer.layout.error(back - weight, layer.hessian)
        unscaled = error if step == 0 else unscaled
        if best is None or error < best[2]:
            best = scale, step / steps, error
    assert best is not None
    return *best, unscaled
