"""Learning how to round: AdaRound, BRECQ and QDrop.

Each takes a net that is calibrated, goes through its units in order, and learns for each unit which
weights are rounded up, so that the unit's output on calibration data is that of the float net:

    min_V  E |f(W~ x~) - f(W x)|^2 + weight * penalty(V)

x~ is the output of the units before, which are already done; x that of the float net. The learned
weights lie on the grid of their quantizer, so nothing new has to be stored or deployed.

- `adaround`: layer by layer (Nagel et al., 2020, arXiv 2004.10568).
- `brecq`: block by block, then the steps of the activations too (Li et al., 2021, arXiv
  2102.05426). Their Fisher weighting of the error is left out, as their code does by default.
- `qdrop`: rounding and activation steps together, with half of the activations left unquantized at
  random (Wei et al., 2022, arXiv 2203.05740).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.ptq.leaves import entries, put_entries
from qkd_jax.ptq.stream import Stream, image_batches
from qkd_jax.ptq.unit_learner import Report, Settings, UnitLearner, step_value
from qkd_jax.ptq.units import Unit, block_units, layer_units
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import TracedNet, contractions, grid_of, trace_net
from qkd_jax.quantize.variables import is_calibrated, refuse_folded
from qkd_jax.quantizers import QUANTIZERS, facts

Tree = dict[str, Any]


def adaround(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight: float = 0.01,
    seed: int = 0,
    report: Report | None = None,
    **kwargs: Any,
) -> Tree:
    """Learns the rounding of each layer's weights, one layer after the other.

    Args:
        net: the net.
        variables: calibrated. BatchNorm may be folded (before calibration) or not.
        batches: calibration images: arrays [batch, ...], or dicts with "image" (and "mask").
        steps: Adam steps a layer; the paper takes 10,000.
        batch_size: images a step.
        lr: Adam's learning rate for V.
        weight: lambda, the weight of the penalty.
        seed: of the minibatches.
        report: called every 100 steps of a unit.
        **kwargs: further arguments of the model's call.

    Returns:
        The variables with the weights on their grids.

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into
            multipliers; a weight quantizer without a fixed grid; no data; numbers out of range.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> rounded = qk.ptq.adaround(net, variables, [x], steps=10)
        >>> jax.numpy.unique(rounded["params"]["layers_0"]["kernel"]).size <= 2**4
        True
    """
    settings = Settings(steps, batch_size, lr, weight)
    return _reconstruct(
        "adaround", net, variables, batches, layer_units, settings, seed, report, kwargs
    )


def brecq(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight: float = 0.01,
    step_lr: float = 4e-5,
    seed: int = 0,
    report: Report | None = None,
    **kwargs: Any,
) -> Tree:
    """Learns the rounding block by block, then the steps of the block's activations.

    Args:
        net: the net.
        variables: calibrated, as in `adaround`.
        batches: calibration images, as in `adaround`.
        steps: Adam steps a block for the rounding (the authors take 20,000), a quarter as many for
            the steps of the activations.
        batch_size: images a step.
        lr: Adam's learning rate for V.
        weight: lambda, the weight of the penalty.
        step_lr: Adam's learning rate for the activations' steps, with a cosine; 0 leaves them.
        seed: of the minibatches.
        report: called every 100 steps of a unit.
        **kwargs: further arguments of the model's call.

    Returns:
        The variables with the weights on their grids, and the activations' steps learned.

    Raises:
        ValueError: as `adaround`.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> rounded = qk.ptq.brecq(net, variables, [x], steps=10)
        >>> jax.numpy.unique(rounded["params"]["layers_0"]["kernel"]).size <= 2**4
        True
    """
    settings = Settings(steps, batch_size, lr, weight, step_lr)
    return _reconstruct(
        "brecq", net, variables, batches, block_units, settings, seed, report, kwargs
    )


def qdrop(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight: float = 0.01,
    step_lr: float = 4e-5,
    drop: float = 0.5,
    seed: int = 0,
    report: Report | None = None,
    **kwargs: Any,
) -> Tree:
    """Learns rounding and activation steps together, with activations dropped back to float.

    While learning, each element of each activation is taken unquantized with the probability
    `drop`: at the block's entry from the float net, inside it from before its quantizer. The
    flatter minimum that this finds holds up better when all of them are quantized.

    Args:
        net: the net.
        variables: calibrated, as in `adaround`.
        batches: calibration images, as in `adaround`.
        steps: Adam steps a block; the authors take 20,000.
        batch_size: images a step.
        lr: Adam's learning rate for V.
        weight: lambda, the weight of the penalty.
        step_lr: Adam's learning rate for the activations' steps, with a cosine; 0 leaves them.
        drop: probability of an element to stay unquantized.
        seed: of the minibatches and of the drops.
        report: called every 100 steps of a unit.
        **kwargs: further arguments of the model's call.

    Returns:
        The variables with the weights on their grids, and the activations' steps learned.

    Raises:
        ValueError: as `adaround`.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> rounded = qk.ptq.qdrop(net, variables, [x], steps=10)
        >>> jax.numpy.unique(rounded["params"]["layers_0"]["kernel"]).size <= 2**4
        True
    """
    checks.number("drop", drop, low=0.0, high=1.0)
    settings = Settings(steps, batch_size, lr, weight, step_lr, drop)
    return _reconstruct(
        "qdrop", net, variables, batches, block_units, settings, seed, report, kwargs
    )


def _reconstruct(
    name: str,
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    units_of: Callable[[TracedNet], list[Unit]],
    settings: Settings,
    seed: int,
    report: Report | None,
    kwargs: Mapping[str, Any],
) -> Tree:
    checks.integer_in("steps", settings.steps, 1)
    checks.integer_in("batch_size", settings.batch_size, 1)
    for key in ("lr", "weight", "step_lr"):
        checks.number(key, getattr(settings, key), low=0.0)
    images = np.concatenate(image_batches(batches))
    if not is_calibrated(variables):
        raise ValueError(
            f"variables are not calibrated; {name} rounds to a grid. `calibrate` first."
        )
    traced = trace_net(net, variables, images[:1], **kwargs)
    refuse_folded(name, traced.multipliers)
    _check_weights(name, traced)
    floats = Stream(traced.graph, [images], quantized=False)
    quantized = Stream(traced.graph, [images])
    root = jax.random.key(seed)
    result: Tree = dict(variables)
    for index, unit in enumerate(units_of(traced)):
        (before,), (entry,) = quantized.values(unit.entry), floats.values(unit.entry)
        (target,) = floats.values(unit.exit)
        learner = UnitLearner(traced, unit, settings, report or (lambda *_: None))
        weights, steps = learner.fit((before, entry, target), jax.random.fold_in(root, index))
        for node, value in zip(unit.weights, weights, strict=True):
            quantized.replace(node.outputs[0], lambda _, value=value: value)
            found = entries(traced.graph, node.inputs[0])
            assert found is not None  # of `_check_weights`
            result = put_entries(result, *found, value)
        for node, value in steps.items():
            step = step_value(traced, node)
            quantized.replace(step, lambda _, value=value: value)
            found = entries(traced.graph, step)
            assert found is not None
            result = put_entries(result, *found, value)
    return result


def _check_weights(name: str, traced: TracedNet) -> None:
    """Raises ValueError for weights whose rounding cannot be learned."""
    for product in contractions(traced.graph):
        weight = product.weight
        if weight is None or weight.marker is None or not weight.quantized:
            continue
        spec, marker = traced.spec(weight.marker), weight.marker
        where = f"weight of layer {product.path!r} ({spec.label})"
        if not facts(spec.quantizer).step or spec.dynamic:
            having = tuple(quantizer for quantizer in QUANTIZERS if facts(quantizer).step)
            raise ValueError(
                f"{where}: {name} learns roundings on a grid that stays, which {having} have, and "
                "static ranges. Use one of them for weights."
            )
        grid_of(traced, marker)  # raises for groups
        found = entries(traced.graph, marker.inputs[0])
        if found is None or not found[0].startswith("params/") or weight.moves:
            raise ValueError(
                f"{where}: its kernel is computed from parameters, or rearranged for its product "
                f"(a convolution in nn.vmap), so {name} has nowhere to store what it learns. Leave "
                "the layer in float with a rule without specs before the others, or use `gptq`, "
                "which leaves such weights as they are."
            )
