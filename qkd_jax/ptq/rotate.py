"""Folded rotations: tensors between weights are turned, and cost nothing at run time.

Channels of a transformer's residual stream that are wide in every layer leave all others few codes.
The stream may be turned by any orthogonal matrix, if the weights that write it are turned with it
and those that read it back: Ashkboos et al., 2024 (QuaRot, arXiv 2404.00456), Liu et al., 2024
(SpinQuant's R1 and R2, arXiv 2405.16406).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.graph import Graph, execute
from qkd_jax.numerics.hadamard import random_rotation
from qkd_jax.ptq.kernels import Kernel
from qkd_jax.ptq.leaves import Readers, add_to_output, bias_site, put_entries, readers
from qkd_jax.ptq.rotation_sites import NormSite, RotationSite, rotation_sites
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import TracedNet, trace_net
from qkd_jax.quantize.variables import (
    ROTATION,
    Tree,
    folded_entries,
    refuse_folded,
    refuse_quantized,
)
from qkd_jax.trees import get


def rotate(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Rotates residual streams and attention's values, and the weights around them.

        W_write Q,   Q^T diag(g) W_read,   b_read + b W_read     g, b: gain and bias of the norm
                                                                 between the stream and its reader

    Q is a Hadamard matrix with random signs where there is one of that size, else a random
    orthogonal one. RMSNorm without its gain commutes with every Q; LayerNorm does with those that
    keep the mean (Q 1 = 1), which are taken where a stream has one, so no norm is replaced. Gains
    and biases of norms move into the layers that read them and become 1 and 0.

    Rotated are tensors that nothing but sums, reshapes, norms and products reads: the residual
    stream of a pre-norm transformer, the values of attention on their way to its output layer, and
    what goes from one linear layer straight to the next. Where a GELU or a ReLU reads a tensor it
    cannot be turned here; `rotate_inputs` does so at run time.

    The float net computes what it did.

    Args:
        net: the net.
        variables: float.
        images: example input; only its shape is used.
        seed: of the rotations.
        report: called with a line for each tensor, e.g. `print`; those that stay say why.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other weights and biases; norms with a bias leave
        `quant/<layer>/folded/bias` at a reader that has none.

    Raises:
        ValueError: calibrated variables, or no tensor that can be rotated.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(8), nn.RMSNorm(), nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule("layers_2", weight=qk.Spec(4), input=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> turned = qk.ptq.rotate(net, variables, x, report=print)
        rotated 8 channels of layers_0, read by layers_2
        >>> bool(jax.numpy.allclose(net.apply(turned, x), net.apply(variables, x), atol=1e-5))
        True
    """
    checks.integer_in("seed", seed, 0)
    refuse_quantized("rotate", variables)
    traced = trace_net(net, variables, images, **kwargs)
    refuse_folded("rotate", traced.multipliers)
    variable_readers = readers(traced.graph)
    sites = rotation_sites(traced, variables, images, kwargs)
    behind = {site.source: site for site in sites if site.source is not None}
    _find_problems(traced, variable_readers, sites, behind)
    result = unfreeze(dict(variables))
    turned = [s for s in sites if s.source is None and not s.problem and s.writers]
    turned = [s for s in turned if s.readers or s.norms]
    if not turned:
        why = "; ".join(_line(site, behind) for site in sites if site.problem and site.norms)
        done = any(ROTATION in stored for _, stored in folded_entries(variables))
        hint = (
            "Inputs of its layers are rotated already: call `rotate` before `rotate_inputs`."
            if done
            else "`rotate_inputs` rotates inputs of layers at run time."
        )
        raise ValueError(f"no tensor of this net can be rotated{f': {why}' if why else ''}. {hint}")
    rng = np.random.default_rng(seed)
    for site in turned:
        keeps_mean = any(norm.centred for norm in site.norms)
        rotation = random_rotation(site.channels, rng, keeps_mean=keeps_mean)
        for own, axis in (*site.writers, *site.readers):
            result = _turned(result, own, axis, rotation)
        for path, index in _distinct(site.vectors):
            values = np.asarray(get(result, path), np.float64).reshape(-1)[index]
            result = put_entries(result, path, index, values @ rotation)
        for norm in site.norms:
            for own, axis in behind[norm].readers:
                result = _without_affine(traced, variable_readers, result, norm, own, axis)
                result = _turned(result, own, axis, rotation)
        for norm in site.norms:
            for at, value in ((norm.gain, 1.0), (norm.shift, 0.0)):
                if at is not None:
                    result = put_entries(result, at[0], at[1], np.full(at[1].shape, value))
    if report is not None:
        for site in sites:
            if site.source is None and (site in turned or (site.problem and site.norms)):
                report(_line(site, behind))
    return result


def _line(site: RotationSite, behind: Mapping[NormSite, RotationSite]) -> str:
    """Says what was done with a tensor."""
    names = lambda pairs: ", ".join(dict.fromkeys(own.layer for own, _ in pairs))
    writers = names(site.writers) or ", ".join(norm.path for norm in site.norms)
    if site.problem:
        return f"left {site.channels} channels of {writers}: {site.problem}"
    read = [*site.readers, *(pair for norm in site.norms for pair in behind[norm].readers)]
    return f"rotated {site.channels} channels of {writers}, read by {names(read)}"


def _find_problems(
    traced: TracedNet,
    variable_readers: Readers,
    sites: list[RotationSite],
    behind: Mapping[NormSite, RotationSite],
) -> None:
    """Notes what keeps a tensor from being rotated, beside what the search has met."""
    for norm, site in behind.items():
        if not site.problem and (site.vectors or site.norms or site.writers):
            site.problem = "something is added to what the norm writes"
        if not site.problem and norm.shift is not None:
            lacks = any(
                bias_site(traced, k.product, variable_readers) is None for k, _ in site.readers
            )
            if lacks or not all(_sees_once(traced.graph, site, k) for k, _ in site.readers):
                site.problem = "its bias finds no place in what reads it"
    for site in sites:
        for norm in site.norms:
            after = behind.get(norm)
            if after is None or after.problem:
                why = after.problem if after else "what it writes is part of another tensor"
                site.problem = (
                    site.problem or f"norm {norm.path!r} is not followed by layers: {why}"
                )
    # A variable that something else reads too must stay, and so must all that is turned with it.
    while True:
        nodes = {n for s in sites if not s.problem for n in s.nodes}
        nodes |= {n for s in sites if not s.problem for norm in s.norms for n in norm.nodes}
        changed = False
        for site in sites:
            norms = [at for norm in site.norms for at in (norm.gain, norm.shift) if at is not None]
            for path, _ in (*site.vectors, *norms):
                if not site.problem and not nodes.issuperset(variable_readers[path]):
                    site.problem, changed = f"{path!r} is read elsewhere too", True
        if not changed:
            return


def _sees_once(graph: Graph, site: RotationSite, own: Kernel) -> bool:
    """Whether a constant that a norm adds reaches a reader as it is: by means, not by sums."""
    assert site.source is not None
    start = site.source.output
    shape = [1 if i == graph.batch_axis(start) else n for i, n in enumerate(graph.shape(start))]
    env: dict[int, Any] = {start: np.ones(shape, graph.dtype(start))}
    for node in graph.nodes:
        if node in site.nodes:
            inputs = [env[v] if v in env else graph.constants[v] for v in node.inputs]
            env.update(zip(node.outputs, execute(node, inputs, graph.batch, 1), strict=True))
    seen = env.get(own.product.node.inputs[0])
    # A convolution's padding is no place that the constant reaches.
    padded = any(n for pair in own.product.node.params.get("padding", ()) for n in pair)
    return seen is not None and bool(np.allclose(seen, 1, atol=1e-5)) and not padded


def _turned(variables: Tree, own: Kernel, axis: int, rotation: np.ndarray) -> Tree:
    """Returns variables with a weight turned along an axis."""
    array = np.asarray(get(variables, own.path), np.float64).reshape(-1)[own.entries]
    turned = np.moveaxis(np.moveaxis(array, axis, -1) @ rotation, -1, axis)
    return put_entries(variables, own.path, own.entries, turned)


def _without_affine(
    traced: TracedNet,
    variable_readers: Readers,
    variables: Tree,
    norm: NormSite,
    own: Kernel,
    axis: int,
) -> Tree:
    """Moves a norm's gain and bias into a layer that reads it."""
    array = np.asarray(get(variables, own.path), np.float64).reshape(-1)[own.entries]
    channels_last = np.moveaxis(array, axis, -1)
    if norm.shift is not None:
        bias = np.asarray(get(variables, norm.shift[0]), np.float64).reshape(-1)[norm.shift[1]]
        site = bias_site(traced, own.product, variable_readers)
        assert site is not None  # of `_find_problems`
        axes = own.product.operands[1].output_axes
        summed = tuple(i for i, out in enumerate(axes) if out is None)
        wide = np.moveaxis(channels_last * bias, -1, axis).sum(axis=summed)
        outs = [out for out in axes if out is not None]
        variables = add_to_output(variables, site, wide.transpose(np.argsort(outs)))
    if norm.gain is not None:
        gain = np.asarray(get(variables, norm.gain[0]), np.float64).reshape(-1)[norm.gain[1]]
        scaled = np.moveaxis(channels_last * gain, -1, axis)
        variables = put_entries(variables, own.path, own.entries, scaled)
    return variables


def _distinct(vectors: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Returns each row of channels of each variable once."""
    rows: dict[str, list[np.ndarray]] = {}
    for path, index in vectors:
        rows.setdefault(path, []).append(index)
    return [(path, np.unique(np.concatenate(parts), axis=0)) for path, parts in rows.items()]
