"""Online rotations: a layer's input goes through a Hadamard transform before it is quantized.

A few wide channels leave an activation's other channels a handful of codes. A rotation spreads them
over all channels, and the weight takes the inverse, so that the layer computes what it did. Where
nothing before the layer can take the rotation (a GELU, a ReLU) it runs with the net: Ashkboos,
Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler and Hensman, 2024 (QuaRot, arXiv
2404.00456), Tseng et al., 2024 (QuIP#, arXiv 2402.04396) for the random signs.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.numerics.hadamard import largest_order
from qkd_jax.ptq.kernels import Kernel, kernel
from qkd_jax.ptq.leaves import put_entries, readers
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calls import call_arguments, own_arguments
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.operands import OperandUse
from qkd_jax.quantize.rotations import rotated
from qkd_jax.quantize.traced import TracedContraction, TracedNet, contractions, trace_net
from qkd_jax.quantize.variables import (
    FOLDED,
    ROTATION,
    folded_path,
    refuse_folded,
    refuse_quantized,
)
from qkd_jax.trees import find, get, merged


def rotate_inputs(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    layers: str = ".*",
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Rotates the inputs of quantized layers at run time, and their weights against it.

        x W = (x R) (R^T W),   R = diag(signs) H^T / sqrt(n)

    H is a Hadamard matrix of the number of input channels n, as a product of small ones; where none
    of that order is known, blocks of the largest order that divides n. The transform costs n times
    the sum of its factors (12 to 128) for each input, against n times the outputs of the layer. Of
    a convolution the channels are rotated, at every position, so zero padding stays zero.

    The float net computes what it did. The rotation stays with the net: `calibrate` sees rotated
    inputs, and files and converted nets contain it. A net with rotations does not train.

    Args:
        net: the net; layers whose input its rules quantize are rotated.
        variables: float.
        images: example input; only its shape is used.
        layers: a regular expression that must match a layer's whole path.
        seed: of the random signs, without which a constant input would go into one channel.
        report: called with a line for each layer, rotated or left, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other kernels, and `quant/<layer>/folded/rotation` for each layer. Left are
        layers that run more than once, grouped convolutions, layers that are no convolution or
        dense layer, and an odd number of channels.

    Raises:
        ValueError: calibrated variables, or a pattern that no layer with an input spec matches.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(8), nn.relu, nn.Dense(2)))
        >>> rules = [qk.Rule("layers_2", weight=qk.Spec(4), input=qk.Spec(4))]
        >>> net = qk.quantize(model, rules)
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> turned = qk.ptq.rotate_inputs(net, variables, x)
        >>> bool(jax.numpy.allclose(net.apply(turned, x), net.apply(variables, x), atol=1e-5))
        True
    """
    checks.integer_in("seed", seed, 0)
    checks.regular_expression("layers", layers)
    refuse_quantized("rotate_inputs", variables)
    traced = trace_net(net, variables, images, **kwargs)
    refuse_folded("rotate_inputs", traced.multipliers)
    variable_readers = readers(traced.graph)
    found = [p for p in contractions(traced.graph) if p.weight is not None]
    wanted = [p for p in found if net.spec_of(p.path, "input") and re.fullmatch(layers, p.path)]
    if not wanted:
        names = ", ".join(sorted({p.path for p in found if net.spec_of(p.path, "input")}))
        raise ValueError(
            f"layers is {layers!r}, which matches no layer whose input is quantized. These are: "
            f"{names or 'none; give a rule an input spec'}."
        )
    kernels: dict[str, list[Kernel]] = {}
    left: dict[str, str] = {}
    for product in wanted:
        own = kernel(traced, product, variable_readers, part=True)
        why = _hindrance(traced, product, own, variables)
        if why or own is None:
            left[product.path] = why
        else:
            kernels.setdefault(product.path, []).append(own)
    kernels = {path: own for path, own in kernels.items() if path not in left}
    signs = {path: _signs(own[0].in_channels, seed) for path, own in kernels.items()}
    result = unfreeze(dict(variables))
    for path, own in kernels.items():
        for each in own:
            assert each.in_axis is not None
            array = np.asarray(get(result, each.path)).reshape(-1)[each.entries]
            moved = jnp.asarray(np.moveaxis(array, each.in_axis, -1))
            # In the kernel's own precision: a net of float64 is rotated exactly.
            turned = np.moveaxis(
                np.asarray(rotated(moved, jnp.asarray(signs[path]))), -1, each.in_axis
            )
            result = put_entries(result, each.path, each.entries, turned)
        if report is not None:
            size = own[0].in_channels
            report(f"rotated {path}: {size} channels in blocks of {largest_order(size)}")
    if report is not None:
        for path, why in left.items():
            report(f"left {path}: {why}")
    return _with_rotations(net, result, images, signs, kwargs)


def _hindrance(
    traced: TracedNet,
    product: TracedContraction,
    own: Kernel | None,
    variables: Mapping[str, Any],
) -> str:
    """Returns why a layer's input cannot be rotated, or ""."""
    if product.path not in traced.layers:
        return "it is no convolution or dense layer"
    if own is None:
        return "its weight is shared or rearranged"
    if own.in_axis is None or own.groups != 1:
        return "it does not sum over all channels of its input"
    if largest_order(own.in_channels) == 1:
        return f"{own.in_channels} channels have no Hadamard matrix, nor have blocks of them"
    if find(variables, folded_path(product.path, ROTATION)) is not None:
        return "its input is rotated already"
    return ""


def _signs(size: int, seed: int) -> np.ndarray:
    """Returns random signs of the size of one over the root of a block.

    Layers of one size have the same ones, so that an engine may rotate what they share once.
    """
    rng = np.random.default_rng([seed, size])
    return rng.choice([-1.0, 1.0], size) / math.sqrt(largest_order(size))


def _with_rotations(
    net: QuantizedModel,
    variables: dict[str, Any],
    images: Any,
    signs: Mapping[str, np.ndarray],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the signs from inside the layers, so that scanned and vmapped ones stack theirs."""

    def write(use: OperandUse) -> tuple[jax.Array, None]:
        if use.path in signs and not use.part:
            stored = use.read(FOLDED) or {}
            use.write(FOLDED, {**stored, ROTATION: jnp.asarray(signs[use.path])})
        return use.x, None

    arguments = call_arguments(net.model, kwargs.get("method"), images, own_arguments(kwargs))
    options = {name: value for name, value in kwargs.items() if name != "mutable"}
    frame = Frame(net.spec_of, write)
    _, changed = net.apply_in(frame, variables, *arguments, mutable=["params"], **options)
    return merged(variables, {"quant": changed["quant"]}) if signs else variables
