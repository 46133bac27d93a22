"""Images out of a trained net alone: inputs with the statistics that its BatchNorms remember.

    made = synthesize(net, variables, image_shape=(32, 32, 3), count=256, key=jax.random.key(0))
    made.images, made.labels

The images are what is optimised, by Adam, from Gaussian noise; the net stands still, in evaluation
mode. What its BatchNorms see is read from their calls, so any linen model with BatchNorm will do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.quantize.variables import is_folded

__all__ = [
    "METHODS",
    "Synthesis",
    "batch_norm_inputs",
    "classes_wanted",
    "deep_inversion_distance",
    "statistics_loss",
    "synthesize",
    "total_variation",
    "zeroq_distance",
]

SOWN = "measured_input_"
ZEROQ_EPSILON = 1e-6
Measure = Callable[[jax.Array, jax.Array, jax.Array, tuple[int, ...]], jax.Array]


class Synthesis(NamedTuple):
    """Images float32 [count, H, W, C] as the net takes them, and labels int32 [count]."""

    images: np.ndarray
    labels: np.ndarray


def deep_inversion_distance(
    x: jax.Array, mean: jax.Array, var: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """||mean(x) - mean||_2 + ||var(x) - var||_2 of one BatchNorm's input: a scalar.

    The norms are not squared and the batch's variance is the biased one.

    Args:
        x: What the BatchNorm normalises.
        mean: Its running mean, of the shape of `axes`.
        var: Its running variance.
        axes: The axes of x, in order, that have statistics of their own (the channels).

    Reference:
        Yin et al., 2019, arXiv 1912.08795, equation 4.
    """
    x = x.astype(jnp.float32)
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    return _norm(jnp.mean(x, others) - mean) + _norm(jnp.var(x, others) - var)


def zeroq_distance(
    x: jax.Array, mean: jax.Array, var: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """||mean(x_i) - mean||_2^2 + ||std(x_i) - std||_2^2, averaged over the images i: a scalar.

    Each image has statistics of its own, over its positions; std = sqrt(variance + 1e-6) with the
    unbiased variance. Where an image has one position only (behind a dense layer) the statistics
    are those of the batch, which the paper, whose nets are convolutional, does not need.

    Args:
        x: What the BatchNorm normalises, the batch first.
        mean: Its running mean, of the shape of `axes`.
        var: Its running variance.
        axes: The axes of x, in order, that have statistics of their own.

    Reference:
        Cai et al., 2020, arXiv 2001.00281, equation 3.
    """
    target = jnp.sqrt(var + ZEROQ_EPSILON)
    return _distance_of_images(x.astype(jnp.float32), mean, target, axes)


def _distance_of_images(
    x: jax.Array, mean: jax.Array, std: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    positions = tuple(axis for axis in range(1, x.ndim) if axis not in axes)
    if math.prod(x.shape[axis] for axis in positions) < 2:
        x, positions = x[None], (1, *(axis + 1 for axis in positions))
    found = jnp.sqrt(jnp.var(x, positions, ddof=1) + ZEROQ_EPSILON)
    apart = (jnp.mean(x, positions) - mean[None]) ** 2 + (found - std[None]) ** 2
    return jnp.sum(apart) / x.shape[0]


def _norm(x: jax.Array) -> jax.Array:
    """||x||_2, with gradient 0 at 0."""
    square = jnp.sum(x * x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


METHODS: dict[str, Measure] = {
    "deep_inversion": deep_inversion_distance,
    "zeroq": zeroq_distance,
}
DEFAULTS = {"deep_inversion": (2000, 0.05), "zeroq": (500, 0.5)}  # steps, learning rate


def total_variation(images: jax.Array) -> jax.Array:
    """Sum over four directions of the 2-norm of all differences of neighbours, as a scalar.

    Right, down and the two diagonals; each norm is over the whole batch [batch, H, W, C].
    """
    pairs = (
        (images[:, :, :-1], images[:, :, 1:]),
        (images[:, :-1], images[:, 1:]),
        (images[:, 1:, :-1], images[:, :-1, 1:]),
        (images[:, :-1, :-1], images[:, 1:, 1:]),
    )
    return sum((_norm(a - b) for a, b in pairs), jnp.zeros(()))


def statistics_loss(
    net: Any, variables: Mapping[str, Any], images: jax.Array, method: str
) -> tuple[jax.Array, jax.Array]:
    """Runs a net and sums, over the calls of its BatchNorms, their distance to what they remember.

    Args:
        net: QuantizedModel, float or not.
        variables: Its variables; BatchNorms that are not folded.
        images: [batch, height, width, channels] float32.
        method: A key of METHODS.

    Returns:
        (logits [batch, classes], the sum).

    Raises:
        ValueError: No BatchNorm is called, or one is folded.
    """
    logits, found = batch_norm_inputs(net, variables, images, {"distance": METHODS[method]})
    values = [jnp.sum(value) for value in found["distance"]]
    return logits, sum(values[1:], values[0])


def batch_norm_inputs(
    net: Any, variables: Mapping[str, Any], images: jax.Array, measures: Mapping[str, Measure]
) -> tuple[jax.Array, dict[str, list[jax.Array]]]:
    """Runs a net in evaluation mode and measures what its BatchNorms normalise.

    Args:
        net: QuantizedModel, float or not.
        variables: Its variables; BatchNorms that are not folded.
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

    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        outermost = module.path not in active  # `super().__call__` of a subclass comes by twice
        active.append(module.path)
        try:
            out = next_fun(*args, **kwargs)
        finally:
            active.pop()
        if outermost and module.has_variable("batch_stats", "mean"):
            x = args[0] if args else kwargs["x"]
            axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
            for name, measure in measures.items():
                found = measure(
                    x,
                    module.get_variable("batch_stats", "mean"),
                    module.get_variable("batch_stats", "var"),
                    tuple(sorted(axis % x.ndim for axis in axes)),
                )
                # In a collection that every lifted model (`nn.scan`) has to carry along anyway.
                module.sow(
                    "batch_stats", SOWN + name, found, reduce_fn=jnp.add, init_fn=lambda: 0.0
                )
        return out

    if is_folded(variables):
        raise ValueError(
            "a BatchNorm of this net is folded, and its statistics are gone; make the images "
            "before it is folded."
        )
    with nn.intercept_methods(watch):
        logits, updated = net.apply(
            variables, images, mutable=["batch_stats"], **mode_arguments(net, False)
        )
    leaves = jax.tree_util.tree_leaves_with_path(updated.get("batch_stats", {}))
    found = {
        name: [leaf for path, leaf in leaves if getattr(path[-1], "key", None) == SOWN + name]
        for name in measures
    }
    if not all(found.values()):
        raise ValueError(
            "this net calls no BatchNorm with running statistics, so it remembers nothing of the "
            "data that images could be made from; take a net with BatchNorm (mlp: "
            "batch_norm=True)."
        )
    return logits.astype(jnp.float32), found


def synthesize(
    net: Any,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    count: int,
    key: jax.Array,
    method: str = "deep_inversion",
    batch_size: int = 256,
    steps: int | None = None,
    lr: float | None = None,
    bn_weight: float = 10.0,
    tv_weight: float = 2.5e-5,
    l2_weight: float = 0.0,
    jitter: int = 2,
    labels: np.ndarray | None = None,
    bounds: tuple[Any, Any] | None = None,
    report: Callable[[int, int, float | None], None] | None = None,
) -> Synthesis:
    """Makes images that a net takes for those that it was trained on.

        deep_inversion  CE(net(x), y)
                        + bn_weight sum_l (||mean_l(x) - mean_l|| + ||var_l(x) - var_l||)
                        + tv_weight TV(x) + l2_weight ||x||_2,  Adam at a constant rate
        zeroq           sum_l mean_i (||mean_l(x_i) - mean_l||^2 + ||std_l(x_i) - std_l||^2)
                        + the same of x_i itself against 0 and 1; Adam, whose rate falls to a tenth
                        whenever the loss has not for 100 steps, down to lr / 5000

    Args:
        net: QuantizedModel, float or not.
        variables: Its variables.
        image_shape: (height, width, channels).
        count: Images to make, in batches of near-equal size.
        key: Of the noise and the jitter; the result is a pure function of it.
        method: A key of METHODS.
        batch_size: Most images that are optimised together; they share the batch's statistics.
        steps: Of each batch; None for the method's own, 2000 (deep_inversion) or 500 (zeroq).
        lr: Learning rate; None for 0.05 (deep_inversion) or 0.5 (zeroq).
        bn_weight: See above; these four are not for zeroq.
        tv_weight: The norm is over the whole batch, so it depends on the batch size.
        l2_weight: Likewise.
        jitter: Each step sees the images rolled by up to so many pixels along each axis.
        labels: [count] classes that deep_inversion aims at; None deals them out in turn. zeroq has
            none, and returns what the net answers.
        bounds: (low, high), broadcast against [batch, H, W, C]: images are clipped to them after
            every step; None does not clip.
        report: Called as report(batch, step, loss) after every step of every batch, both from 1;
            the loss is None but for now and then, since it must be waited for.

    Returns:
        Images and labels.

    Raises:
        ValueError: No BatchNorm, one that is folded, numbers out of range, an unknown method, or
            images that are not finite in the end.

    Note:
        DeepInversion's numbers are its CIFAR-10 code's; its competition with a student is left out.
        ZeroQ's code exists with the squares divided by the number of images, as here, and with them
        divided by that of channels; it also stops early at a fixed loss.

    Reference:
        Yin et al., 2019, arXiv 1912.08795; Cai et al., 2020, arXiv 2001.00281.
    """
    checks.one_of("method", method, METHODS)
    checks.integer_in("count", count, 1)
    checks.integer_in("batch_size", batch_size, 1)
    steps = DEFAULTS[method][0] if steps is None else steps
    lr = DEFAULTS[method][1] if lr is None else lr
    checks.integer_in("steps", steps, 1)
    checks.integer_in("jitter", jitter, 0, min(image_shape[:2]) - 1)
    checks.positive("lr", lr)
    weights = {"bn_weight": bn_weight, "tv_weight": tv_weight, "l2_weight": l2_weight}
    for name, value in weights.items():
        checks.in_range(name, value, 0, math.inf)
    shape = jax.ShapeDtypeStruct((min(count, batch_size), *image_shape), np.float32)
    logits, _ = jax.eval_shape(
        functools.partial(statistics_loss, net, method=method), variables, shape
    )
    wanted = classes_wanted(labels, count, logits.shape[-1])
    numbers = {"lr": lr, **weights}
    images, found = [], []
    for batch, part in enumerate(np.array_split(wanted, -(-count // batch_size))):
        batch_key = jax.random.fold_in(key, batch)
        x = jax.random.normal(jax.random.fold_in(batch_key, 0), (len(part), *image_shape))
        state = _optimizer(method).init(x)
        for step in range(1, steps + 1):
            x, state, loss = _descend(
                net, method, jitter, variables, x, state, part, numbers, bounds, batch_key, step
            )
            if report is not None:
                known = float(loss) if step == steps or step % 50 == 0 else None
                report(batch + 1, step, known)
        images.append(np.asarray(x))
        found.append(part if method == "deep_inversion" else _answers(net, variables, x))
    made = np.concatenate(images)
    if not np.isfinite(made).all():
        raise ValueError(f"the images are not finite after {steps} steps; lower lr, now {lr}.")
    return Synthesis(made, np.concatenate(found).astype(np.int32))


def classes_wanted(labels: Any, count: int, classes: int) -> np.ndarray:
    """Returns the class that each of `count` images aims at; None deals them out in turn.

    Raises:
        ValueError: Another number of labels, or one out of range.
    """
    wanted = np.arange(count) % classes if labels is None else np.asarray(labels)
    if wanted.shape != (count,) or wanted.min() < 0 or wanted.max() >= classes:
        raise ValueError(
            f"labels is {wanted.shape} from {wanted.min()} to {wanted.max()}; it must be one class "
            f"below {classes} for each of the {count} images."
        )
    return wanted


def _optimizer(method: str) -> optax.GradientTransformationExtraArgs:
    parts = [optax.scale_by_adam()]
    if (
        method == "zeroq"
    ):  # PyTorch's ReduceLROnPlateau(patience=100, min_lr=1e-4) for a rate of 0.5
        plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=100, min_scale=2e-4)
        parts.append(plateau)
    return optax.with_extra_args_support(optax.chain(*parts))


@functools.partial(jax.jit, static_argnames=("net", "method", "jitter"))
def _descend(
    net: Any,
    method: str,
    jitter: int,
    variables: Any,
    images: jax.Array,
    state: Any,
    labels: jax.Array,
    numbers: Mapping[str, jax.Array],
    bounds: Any,
    key: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Any, jax.Array]:
    """One step of Adam on the images: (images, optimizer's state, loss before the step)."""

    def loss_of(images: jax.Array) -> jax.Array:
        if method == "zeroq":
            _, loss = statistics_loss(net, variables, images, method)
            channels = jnp.zeros(images.shape[-1])
            return loss + _distance_of_images(images, channels, channels + 1, (images.ndim - 1,))
        if jitter:
            shift = jax.random.randint(jax.random.fold_in(key, step), (2,), -jitter, jitter + 1)
            images = jnp.roll(images, shift, axis=(1, 2))
        logits, distance = statistics_loss(net, variables, images, method)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        prior = numbers["tv_weight"] * total_variation(images)
        prior += numbers["l2_weight"] * _norm(images)
        return jnp.mean(entropy) + numbers["bn_weight"] * distance + prior

    loss, gradient = jax.value_and_grad(loss_of)(images)
    updates, state = _optimizer(method).update(gradient, state, images, value=loss)
    images = jax.tree.map(lambda x, update: x - numbers["lr"] * update, images, updates)
    if bounds is not None:
        low, high = (jnp.broadcast_to(bound, images.shape) for bound in bounds)
        images = jnp.clip(images, low, high)
    return images, state, loss


@functools.partial(jax.jit, static_argnames=("net",))
def _answers(net: Any, variables: Any, images: jax.Array) -> jax.Array:
    return jnp.argmax(net.apply(variables, images, **mode_arguments(net, False)), axis=-1)
