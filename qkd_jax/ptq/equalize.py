"""Cross-layer equalization: neighbouring weights get the same range in every channel.

Per-tensor quantization of a weight wastes its codes on the widest channel. A ReLU is positively
homogeneous, relu(s x) = s relu(x), so a channel's factor can be moved from one product into the
next without a change of the function. Nagel, van Baalen, Blankevoort and Welling, 2019 (arXiv
1906.04721, section 4.1).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.ptq.channel_links import Link, links
from qkd_jax.ptq.kernels import Kernel
from qkd_jax.ptq.leaves import float64
from qkd_jax.ptq.moments import norms_by_layer, rescale_folded
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import trace_net
from qkd_jax.quantize.variables import refuse_folded, refuse_quantized
from qkd_jax.trees import put


@dataclasses.dataclass(frozen=True, eq=False)
class _Chain:
    """Layers in a row: all but the first and the last are depthwise with one output each."""

    kernels: tuple[Kernel, ...]
    links: tuple[Link, ...]  # between neighbours

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(kernel.layer for kernel in self.kernels)


def equalize(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    sweeps: int = 20,
    tolerance: float = 1e-3,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Equalizes the weight ranges of every pair of layers that nothing but ReLUs lies between.

        r1 = max |W1[..., i]|,  r2 = max |W2[..., i, :]|,  S = sqrt(r1 / r2)
        W1 / S,  b1 / S,  W2 * S                      for each channel i between the two
        triple: S1 = r1 / (r1 r2 r3)^(1/3),  S2 = (r1 r2 r3)^(1/3) / r3

    A pair is found in the graph: one product's output reaches one other product, and nothing else
    reads it, through positively homogeneous operations alone (ReLU, max and average pooling, means
    over positions, flattening; never an add, ReLU6 or SiLU). Depthwise layers between two others
    are solved with them in one step, whatever their number. Pairs that share a layer are swept in
    turn until no S is further from 1 than `tolerance`. A channel with a range of 0 keeps S = 1.

    The float net computes what it did. The scale and bias of a folded BatchNorm, which no longer
    take part in the net, are divided too: so they remain the standard deviation and the mean of the
    layer's output, which `absorb_bias` and `correct_bias` read.

    Args:
        net: the net.
        variables: float, with their BatchNorms folded (`fold_bn`).
        images: example input; only its shape is used.
        sweeps: at most so many passes over all pairs.
        tolerance: when to stop.
        report: called with a line for each chain of layers, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other weights and biases; without pairs, the same ones.

    Raises:
        ValueError: calibrated variables, or a BatchNorm between the layers of a pair.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> equal = qk.ptq.equalize(net, variables, x)
        >>> bool(jax.numpy.allclose(net.apply(equal, x), net.apply(variables, x), atol=1e-5))
        True
    """
    checks.integer_in("sweeps", sweeps, 1)
    checks.number("tolerance", tolerance, low=0)
    chains, norms = _chains(net, variables, images, kwargs)
    result = unfreeze(dict(variables))
    paths = {k.path for chain in chains for k in chain.kernels}
    paths |= {path for chain in chains for link in chain.links for path in link.shifts}
    values = {path: float64(result, path) for path in paths}
    before = dict(values)
    totals = {link.name: np.ones(link.channels) for chain in chains for link in chain.links}
    for _ in range(sweeps):
        furthest = 0.0
        for chain in chains:
            for i, factor in enumerate(_factors(chain, values)):
                _move(chain, i, factor, values)
                totals[chain.links[i].name] *= factor
                furthest = max(furthest, float(np.abs(factor - 1).max()))
        if furthest < tolerance:
            break
    for path, value in values.items():
        result = put(result, path, value)
    for layer, total in totals.items():
        if layer in norms:
            result = rescale_folded(result, norms[layer], total)
    if report is not None:
        for chain in chains:
            first = chain.kernels[0]
            old, new = (_ratio(first.out_ranges(v[first.path])) for v in (before, values))
            report(
                f"equalized {' -> '.join(chain.layers)}: widest over narrowest channel of the "
                f"first {old:.3g} -> {new:.3g}"
            )
    return result


def equalization_pairs(
    net: QuantizedModel, variables: Mapping[str, Any], images: Any, **kwargs: Any
) -> list[tuple[str, ...]]:
    """Lists the layers that `equalize` takes together: pairs, and triples around depthwise ones.

    Arguments and errors are those of `equalize`.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> qk.ptq.equalization_pairs(net, variables, x)
        [('layers_0', 'layers_2')]
    """
    return [chain.layers for chain in _chains(net, variables, images, kwargs)[0]]


def _chains(
    net: QuantizedModel, variables: Mapping[str, Any], images: Any, kwargs: Mapping[str, Any]
) -> tuple[list[_Chain], dict[str, str]]:
    """Returns the chains, and the folded BatchNorm behind each layer."""
    refuse_quantized("equalize", variables)
    traced = trace_net(net, variables, images, **kwargs)
    refuse_folded("equalize", traced.multipliers)
    pairs: dict[str, Link] = {}
    for link in links(traced):
        if link.source is None or len(link.targets) != 1:
            continue
        if link.norms:
            raise ValueError(
                f"BatchNorm {min(link.norms)!r} stands between {link.name!r} and "
                f"{link.targets[0].layer!r}; equalize works on the weights as they are "
                "quantized. Call `fold_bn` first."
            )
        pairs[link.source.path] = link
    targets = [link.targets[0] for link in pairs.values()]
    inside = {t.path for t in targets if t.path in pairs and t.depthwise}
    chains = []
    for start, first in pairs.items():
        if start in inside:
            continue
        row = [first]
        while (path := row[-1].targets[0].path) in inside:
            row.append(pairs[path])
        kernels = [link.source for link in row if link.source] + [row[-1].targets[0]]
        chains.append(_Chain(tuple(kernels), tuple(row)))
    return chains, norms_by_layer(net, variables, images, kwargs)


def _factors(chain: _Chain, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """S between each two neighbours; all ranges of a channel meet in their geometric mean."""
    channels = chain.links[0].channels
    ranges = [k.out_ranges(values[k.path]) for k in chain.kernels[:-1]]
    last = chain.kernels[-1]
    ranges.append(last.in_ranges(values[last.path], channels))
    stacked = np.stack(ranges)
    alive = (stacked > 0).all(axis=0) & np.isfinite(stacked).all(axis=0)
    logs = np.log(np.where(alive, stacked, 1.0))
    return list(np.exp(np.cumsum(logs - logs.mean(axis=0), axis=0)[:-1]))


def _move(chain: _Chain, i: int, factor: np.ndarray, values: dict[str, np.ndarray]) -> None:
    """Moves a factor from the i-th layer of a chain into the next one."""
    left, right = chain.kernels[i], chain.kernels[i + 1]
    values[left.path] = left.scale_out(values[left.path], 1 / factor)
    values[right.path] = right.scale_in(values[right.path], factor)
    for path in chain.links[i].shifts:
        values[path] = values[path] / factor.reshape(values[path].shape)


def _ratio(ranges: np.ndarray) -> float:
    """Returns the widest range over the narrowest that is not 0."""
    alive = ranges[ranges > 0]
    return float(alive.max() / alive.min()) if alive.size else 1.0
