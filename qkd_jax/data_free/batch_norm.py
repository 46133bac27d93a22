"""Statistics of a net's BatchNorm inputs, and their distance to the running statistics.

Inputs are read from the calls of BatchNorms, so any linen model with BatchNorm will do.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.interceptors import intercepting
from qkd_jax.quantize.variables import is_folded

SOWN = "measured_input_"
ZEROQ_EPSILON = 1e-6
Measure = Callable[[jax.Array, jax.Array, jax.Array, tuple[int, ...]], jax.Array]


def deep_inversion_distance(
    x: jax.Array, mean: jax.Array, var: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """||mean(x) - mean||_2 + ||var(x) - var||_2 of one BatchNorm's input: a scalar.

    The norms are not squared and the batch's variance is the biased one.

    Args:
        x: what the BatchNorm normalises.
        mean: its running mean, of the shape of `axes`.
        var: its running variance.
        axes: the axes of x, in order, that have statistics of their own (the channels).

    Reference:
        Yin et al., 2019, arXiv 1912.08795, equation 4.
    """
    x = x.astype(jnp.float32)
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    return norm(jnp.mean(x, others) - mean) + norm(jnp.var(x, others) - var)


def zeroq_distance(
    x: jax.Array, mean: jax.Array, var: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """||mean(x_i) - mean||_2^2 + ||std(x_i) - std||_2^2, averaged over the images i: a scalar.

    Each image has statistics of its own, over its positions; std = sqrt(variance + 1e-6) with the
    unbiased variance. Where an image has one position only (behind a dense layer) the statistics
    are those of the batch, which the paper, whose nets are convolutional, does not need.

    Args:
        x: what the BatchNorm normalises, the batch first.
        mean: its running mean, of the shape of `axes`.
        var: its running variance.
        axes: the axes of x, in order, that have statistics of their own.

    Reference:
        Cai et al., 2020, arXiv 2001.00281, equation 3.
    """
    target = jnp.sqrt(var + ZEROQ_EPSILON)
    return distance_of_images(x.astype(jnp.float32), mean, target, axes)


def distance_of_images(
    x: jax.Array, mean: jax.Array, std: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """`zeroq_distance` to a standard deviation instead of a variance."""
    positions = tuple(axis for axis in range(1, x.ndim) if axis not in axes)
    if math.prod(x.shape[axis] for axis in positions) < 2:
        x, positions = x[None], (1, *(axis + 1 for axis in positions))
    stds = jnp.sqrt(jnp.var(x, positions, ddof=1) + ZEROQ_EPSILON)
    squares = (jnp.mean(x, positions) - mean[None]) ** 2 + (stds - std[None]) ** 2
    return jnp.sum(squares) / x.shape[0]


def norm(x: jax.Array) -> jax.Array:
    """||x||_2, with gradient 0 at 0."""
    square = jnp.sum(x * x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


METHODS: dict[str, Measure] = {
    "deep_inversion": deep_inversion_distance,
    "zeroq": zeroq_distance,
}


def statistics_loss(
    net: QuantizedModel, variables: Mapping[str, Any], images: jax.Array, method: str
) -> tuple[jax.Array, jax.Array]:
    """Runs a net and adds up its BatchNorms' distances between their inputs and their statistics.

    Args:
        net: float or quantized.
        variables: its variables; BatchNorms that are not folded.
        images: [batch, height, width, channels] float32.
        method: a key of METHODS.

    Returns:
        (logits [batch, classes], the sum).

    Raises:
        ValueError: No BatchNorm is called, or one is folded.
    """
    logits, measured = batch_norm_inputs(net, variables, images, {"distance": METHODS[method]})
    values = [jnp.sum(value) for value in measured["distance"]]
    return logits, sum(values[1:], values[0])


def batch_norm_inputs(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: jax.Array,
    measures: Mapping[str, Measure],
) -> tuple[jax.Array, dict[str, list[jax.Array]]]:
    """Runs a net in evaluation mode and measures what its BatchNorms normalise.

    Args:
        net: float or quantized.
        variables: its variables; BatchNorms that are not folded.
        images: [batch, height, width, channels] float32.
        measures: {name: f(x, mean, var, axes) -> array}, with the arguments of METHODS; the calls
            of one BatchNorm are added up.

    Returns:
        (logits [batch, classes] float32, {name: one array for each BatchNorm, with a leading axis
        for its layers if it stands in a scan}).

    Raises:
        ValueError: No BatchNorm is called, or one is folded.
    """
    active: list[Any] = []
    mode: dict[str, Any] = mode_arguments(net, False)

    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        outermost = module.path not in active  # `super().__call__` of a subclass is intercepted too
        active.append(module.path)
        try:
            out = next_fun(*args, **kwargs)
        finally:
            active.pop()
        if outermost and module.has_variable("batch_stats", "mean"):
            x = args[0] if args else kwargs["x"]
            axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
            for name, measure in measures.items():
                value = measure(
                    x,
                    module.get_variable("batch_stats", "mean"),
                    module.get_variable("batch_stats", "var"),
                    tuple(sorted(axis % x.ndim for axis in axes)),
                )
                # In a collection that every lifted model (`nn.scan`) carries anyway.
                module.sow(
                    "batch_stats", SOWN + name, value, reduce_fn=jnp.add, init_fn=lambda: 0.0
                )
        return out

    if is_folded(variables):
        raise ValueError(
            "a BatchNorm of this net is folded, and its statistics are gone; make the images "
            "before it is folded."
        )
    with intercepting(watch):
        logits, updated = net.apply(variables, images, mutable=["batch_stats"], **mode)
    leaves = jax.tree_util.tree_leaves_with_path(updated.get("batch_stats", {}))
    measured = {
        name: [leaf for path, leaf in leaves if getattr(path[-1], "key", None) == SOWN + name]
        for name in measures
    }
    if not all(measured.values()):
        raise ValueError(
            "this net calls no BatchNorm with running statistics, so it remembers nothing of the "
            "data that images could be made from; take a net with BatchNorm (mlp: "
            "batch_norm=True)."
        )
    return logits.astype(jnp.float32), measured
