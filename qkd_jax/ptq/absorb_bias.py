"""High-bias absorption: a ReLU's constant part moves into the next layer's bias.

Equalization can leave channels whose pre-activations lie far above zero; their offset widens the
range of the activations and says nothing. Nagel et al., 2019 (arXiv 1906.04721, section 4.1.3).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.graph import IDENTITY, MARKERS, Graph, Node
from qkd_jax.ptq.channel_links import Link, links
from qkd_jax.ptq.leaves import (
    BiasSite,
    add_to_output,
    bias_site,
    float64,
    is_relu,
    readers,
)
from qkd_jax.ptq.moments import norms_by_layer, output_moments
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import TracedNet, trace_net
from qkd_jax.quantize.variables import refuse_folded, refuse_quantized
from qkd_jax.trees import get, join, put


def absorb_bias(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    how: str = "empirical",
    deviations: float = 3.0,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Moves what a ReLU always passes on into the bias behind the next layer.

        c = max(0, mean - 3 std)  per channel of the pre-activation
        b1 - c,   b2 + sum over taps of W2 c

    since relu(x - c) = relu(x) - c for all x >= c, which under a Gaussian are 99.87 percent. Values
    below c change. So do a padded convolution's outputs next to the border, however the data lie:
    the next layer gives back W2 c for all its taps, and where taps read zero padding they had taken
    nothing. It is exact only away from zero padding.

    Taken are products that reach others through additions of constants and one ReLU alone, and
    that nothing else reads.

    Args:
        net: the net.
        variables: float; usually folded and equalized.
        batches: model inputs: arrays [batch, ...], dicts with "image" (and "mask"), or tuples of
            one array. With how="analytic" only the first one's shape is used.
        how: "empirical": mean and standard deviation of the pre-activations over `batches`;
            "analytic": those that BatchNorm states, bias and |scale|; layers without one are left.
        deviations: the 3 in the formula.
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other biases. A layer without one gets `quant/<layer>/folded/bias`.

    Raises:
        ValueError: calibrated variables, no batch, or an unknown `how`.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> _ = qk.ptq.absorb_bias(net, variables, [x], report=print)
        absorbed 0 of 4 channels: layers_0 -> layers_2
    """
    checks.one_of("how", how, ("empirical", "analytic"))
    checks.number("deviations", deviations, low=0)
    refuse_quantized("absorb_bias", variables)
    images = image_batches(batches)
    traced = trace_net(net, variables, images[0], **kwargs)
    refuse_folded("absorb_bias", traced.multipliers)
    result = unfreeze(dict(variables))
    norms = norms_by_layer(net, variables, images[0], kwargs)
    stream, variable_readers = Stream(traced.graph, images), readers(traced.graph)
    candidates = [(link, _before_relu(traced, link)) for link in links(traced)]
    chosen = [(link, node) for link, node in candidates if node is not None and link.source]
    for link, node in sorted(chosen, key=lambda pair: stream.index[pair[1]]):
        assert link.source is not None
        layer = link.source.layer
        own = bias_site(traced, link.source.product, variable_readers)
        if node.op in ("add", "sub"):  # the last constant before the ReLU, of a BatchNorm say
            last = len(traced.graph.shape(node.outputs[0])) - 1
            own = BiasSite(link.shifts[-1], 1 if node.op == "add" else -1, node, (last,))
        sites = [bias_site(traced, t.product, variable_readers) for t in link.targets]
        norm = norms.get(layer)
        if how == "empirical":
            moments = _measured(stream.values(node.outputs[0]))
        else:
            moments = output_moments(result, norm) if norm else None
        one = all(kernel.one_output for kernel in (link.source, *link.targets))
        if own is None or moments is None or None in sites or not one:
            if report is not None:
                lacks = "are no statistics" if moments is None else "is no place for a bias"
                report(f"left {layer}: there {lacks}")
            continue
        c = np.maximum(0, moments[0] - deviations * moments[1])
        result = add_to_output(result, own, -c)
        stated = join("params", norm or "", "bias")
        if norm and norm not in link.norms and "bias" in get(result, join("params", norm)):
            # It is folded, and still states the moments of the layer's output.
            result = put(result, stated, float64(result, stated) - c)
        for target, site in zip(link.targets, sites, strict=True):
            assert site is not None
            result = add_to_output(result, site, target.through(float64(result, target.path), c))
        if report is not None:
            names = ", ".join(t.layer for t in link.targets)
            report(f"absorbed {int((c > 0).sum())} of {c.size} channels: {layer} -> {names}")
    return result


def _before_relu(traced: TracedNet, link: Link) -> Node | None:
    """The node before a link's ReLU, if there is nothing but constants before and nothing after."""
    graph = traced.graph
    steps = [n for n in link.nodes if n.op not in IDENTITY and n.op not in MARKERS]
    if not steps or not is_relu(graph, steps[-1]):
        return None
    if any(n.op not in ("add", "sub", "mul") or _data(graph, n) != 0 for n in steps[:-1]):
        return None
    before = steps[-2] if steps[:-1] else link.source.product.node if link.source else None
    # Behind a multiplication there is no place for a constant.
    return None if before is None or before.op == "mul" else before


def _data(graph: Graph, node: Node) -> int | None:
    """Place of the one input that is no constant; of an addition's or product's two, 0."""
    data = [i for i, v in enumerate(node.inputs) if v not in graph.constants]
    if len(data) != 1:
        return None
    return 0 if node.op in ("add", "mul") else data[0]


def _measured(values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over batches."""
    # Widened first: NumPy adds bfloat16 in bfloat16 (findings/numpy_bfloat16_mean.sh).
    flat = [np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in values]
    count = sum(len(v) for v in flat)
    mean = np.sum([v.sum(axis=0) for v in flat], axis=0) / count
    squares = np.sum([((v - mean) ** 2).sum(axis=0) for v in flat], axis=0)
    return mean, np.sqrt(squares / count)
