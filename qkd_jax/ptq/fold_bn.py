"""Folding BatchNorm into the product before it, on the graph and not by names.

Behind a convolution or dense layer, BatchNorm in eval mode is a gain k and a shift c per channel:

- A quantized layer keeps its codes. Its output is `product(codes) * (s_x * s_w)`; folding changes
  the multiplier to s_x * s_w * k and nothing else, so no weight is rounded a second time, whatever
  the sign of k and whether scales are per tensor or per channel.
- A layer left in float gets the kernel W * k.
- The bias b becomes b * k + c.

Jacob et al., 2017 (arXiv 1712.05877, section 3.2); the multiplier form is what integer engines run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import unfreeze

from qkd_jax.graph import MARKERS, Graph, Node
from qkd_jax.numerics import IntFormat
from qkd_jax.ptq.leaves import Readers, float64, module_of, readers
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import (
    TracedContraction,
    TracedNet,
    contractions,
    grid_of,
    has_codes,
    scale_in_output,
    trace_net,
)
from qkd_jax.quantize.variables import folded_path
from qkd_jax.trees import join, put


@dataclasses.dataclass(frozen=True, eq=False)
class _Chain:
    """A product followed by a BatchNorm: y = gain * (product + bias) + shift, per channel."""

    product: TracedContraction
    norm: str
    bias: str | None  # path of the layer's own bias
    gain: np.ndarray
    shift: np.ndarray


def fold_bn(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    any_batch: bool = True,
    **kwargs: Any,
) -> dict[str, Any]:
    """Folds every BatchNorm that follows a convolution or dense layer, and it alone.

        y = (product + b - mean) * scale / sqrt(var + eps) + bias
          = product * k + (b - mean) * k + bias,   k = scale / sqrt(var + eps)

    Left as it is: a BatchNorm that reads anything else (a sum, a pooled map, a quantized output),
    one that several layers or calls share, a layer that runs more than once, and a layer whose
    product does not run on codes of scales known beforehand (weight alone quantized, dynamic
    ranges, groups, grids that are not uniform).

    Args:
        net: the net.
        variables: float or calibrated; running statistics are used. Folding twice changes nothing.
        images: example input; only its shape is used.
        any_batch: False for a net that has no batch, as `convert` says.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables for `net.apply` in eval mode: `quant/<layer>/folded/{multiplier,bias}` and
        `quant/<norm>/folded/identity` are added, and a float layer's kernel, and the bias of a
        layer that has one, are rewritten. Training on from them makes no sense.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.BatchNorm(use_running_average=True)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> sorted(qk.ptq.fold_bn(net, variables, x)["quant"])
        ['layers_1']
    """
    traced = trace_net(net, variables, images, any_batch=any_batch, **kwargs)
    result = unfreeze(dict(variables))
    for chain in _chains(traced):
        result = _fold(traced, result, chain)
    return result


def _chains(traced: TracedNet) -> list[_Chain]:
    graph = traced.graph
    found = contractions(graph)
    paths = [p.path for p in found]
    variable_readers = readers(graph)
    chains = []
    for product in found:
        weight = product.weight
        if weight is None or weight.marker is None or product.path not in traced.layers:
            continue
        source = graph.leaves.get(weight.marker.inputs[0], "")
        alone = paths.count(product.path) == 1 and variable_readers.get(source) == [weight.marker]
        plain = source == f"params/{product.path}/kernel" and not weight.moves
        # A layer that is folded already has its gain in the stored multiplier, which is not traced.
        folded = product.path in traced.multipliers
        codes = all(has_codes(traced, operand) for operand in product.operands)
        scalable = not folded and (codes or (plain and not weight.quantized))
        if alone and scalable and (chain := _walk(traced, product, variable_readers)):
            chains.append(chain)
    return chains


def _walk(traced: TracedNet, product: TracedContraction, readers: Readers) -> _Chain | None:
    """Follows the product's output through its bias and the BatchNorm behind it."""
    graph, bias, norm = traced.graph, None, None
    gain, shift = np.float64(1), np.float64(0)
    own_bias, value, walked = f"params/{product.path}/bias", product.node.outputs[0], []
    while (node := graph.sole_consumer(value)) is not None:
        if node.op not in ("add", "sub", "mul", "div") or len(set(node.inputs)) != 2:
            break
        left = node.inputs[0] == value
        other = node.inputs[1 if left else 0]
        sources = graph.sources.get(other, frozenset())
        if not sources or (node.op == "div" and not left):
            break
        if node.op == "add" and norm is None and bias is None and sources == {own_bias}:
            if readers[own_bias] != [node]:
                break
            bias = own_bias
        else:
            module = _module(sources, traced.norms)
            if module is None or norm not in (None, module):
                break
            constant = _per_channel(graph.constants[other], graph.shape(value))
            if constant is None:
                return None
            norm = module
            gain, shift = _compose(node.op, left, gain, shift, constant)
            walked.append(node)
        value = node.outputs[0]
    if norm is None or not _whole(graph, norm, walked, readers):
        return None
    channels = graph.shape(value)[-1]
    gain, shift = (np.broadcast_to(a, (channels,)) for a in (gain, shift))
    return _Chain(product, norm, bias, gain, shift)


def _compose(op: str, left: bool, gain: Any, shift: Any, c: np.ndarray) -> tuple[Any, Any]:
    """Applies one more operation to x -> gain * x + shift."""
    if op == "add":
        return gain, shift + c
    if op == "sub":
        return (gain, shift - c) if left else (-gain, c - shift)
    return (gain * c, shift * c) if op == "mul" else (gain / c, shift / c)


def _module(sources: frozenset[str], norms: frozenset[str]) -> str | None:
    """Returns the BatchNorm whose variables these are, or None."""
    modules = {module_of(path) for path in sources}
    return next(iter(modules)) if len(modules) == 1 and modules <= norms else None


def _whole(graph: Graph, norm: str, walked: list[Node], readers: Readers) -> bool:
    """Whether the walked nodes are all of a BatchNorm that runs once and uses its statistics."""
    own = [n for n in graph.nodes if n.op not in MARKERS]  # a grid of its output comes after it
    inside = [n for n in own if n.scope == norm or n.scope.startswith(norm + "/")]
    leaves = [path for path in readers if module_of(path) == norm]
    statistics = any(path.startswith("batch_stats/") for path in leaves)
    used = {node for path in leaves for node in readers[path]}
    return statistics and set(inside) <= set(walked) and used <= set(walked)


def _per_channel(constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a constant that varies along the last axis only as float64 [channels] or scalar."""
    if constant.ndim == 0:
        return constant.astype(np.float64)
    if constant.size != constant.shape[-1] or constant.shape[-1] not in (1, shape[-1]):
        return None
    return constant.reshape(-1).astype(np.float64)


def _fold(traced: TracedNet, variables: dict[str, Any], chain: _Chain) -> dict[str, Any]:
    product, path = chain.product, chain.product.path
    if all(has_codes(traced, operand) for operand in product.operands):
        (left, _), (right, _) = output_scales(traced, product)
        multiplier = left * right * _last(chain.gain, product.rank)
        if multiplier.size == multiplier.shape[-1]:
            multiplier = multiplier.reshape(-1)
        variables = put(variables, folded_path(path, "multiplier"), multiplier)
    else:
        assert product.weight is not None
        kernel, axes = join("params", path, "kernel"), product.weight.output_axes
        old = float64(variables, kernel)
        shape = [1] * old.ndim
        shape[axes.index(product.rank - 1)] = -1
        variables = put(variables, kernel, old * chain.gain.reshape(shape))
    if chain.bias is not None:
        old = float64(variables, chain.bias)
        new = old * _last(chain.gain, old.ndim) + _last(chain.shift, old.ndim)
        variables = put(variables, chain.bias, new)
    else:
        variables = put(variables, folded_path(path, "bias"), chain.shift)
    return put(variables, folded_path(chain.norm, "identity"), 0)


def output_scales(
    traced: TracedNet, product: TracedContraction
) -> list[tuple[np.ndarray, IntFormat]]:
    """Returns (scale at the output's rank, in float64; format) of both operands."""
    pairs = []
    for side, operand in enumerate(product.operands):
        assert operand.marker is not None
        grid = grid_of(traced, operand.marker)
        scale = scale_in_output(product, side, grid.scale.astype(np.float64))
        pairs.append((scale, grid.format))
    return pairs


def _last(array: np.ndarray, rank: int) -> np.ndarray:
    """Reshapes [channels] to the last axis of an array of that rank."""
    return array.reshape((1,) * (rank - 1) + (-1,))
