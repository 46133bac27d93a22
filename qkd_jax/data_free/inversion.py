"""Images from a trained net alone, by descent to the statistics that its BatchNorms remember.

    made = synthesize(net, variables, image_shape=(32, 32, 3), count=256, key=jax.random.key(0))
    made.images, made.labels

The images are optimised, by Adam, from Gaussian noise; the net is frozen, in evaluation mode.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.data_free.batch_norm import METHODS, distance_of_images, norm, statistics_loss
from qkd_jax.data_free.synthesis import (
    Synthesis,
    check_fields,
    classes_wanted,
    loss_to_report,
    synthesis,
)
from qkd_jax.distillation.forward import forward
from qkd_jax.quantize import QuantizedModel

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
    return sum((norm(a - b) for a, b in pairs), jnp.zeros(()))


def synthesize(
    net: QuantizedModel,
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
        net: the net, float or quantized.
        variables: its variables.
        image_shape: (height, width, channels).
        count: images to make, in batches of near-equal size.
        key: of the noise and the jitter; the result is a pure function of it.
        method: a key of METHODS.
        batch_size: most images that are optimised together; they share the batch's statistics.
        steps: of each batch; None for the method's own, 2000 (deep_inversion) or 500 (zeroq).
        lr: learning rate; None for 0.05 (deep_inversion) or 0.5 (zeroq).
        bn_weight: factor of a term, like the next two; zeroq uses none of them, and no jitter.
        tv_weight: its norm is over the whole batch, so it depends on the batch size.
        l2_weight: likewise.
        jitter: largest shift, in pixels, by which each step rolls the images along each axis.
        labels: [count] classes that deep_inversion aims at; None deals them out in turn. zeroq has
            none, and returns what the net answers.
        bounds: (low, high), broadcast against [batch, H, W, C]: images are clipped to them after
            every step; None does not clip.
        report: called as report(batch, step, loss) after every step of every batch, both from 1;
            the loss is None except every 50 steps and at the last, since it must be waited for.

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
    steps = DEFAULTS[method][0] if steps is None else steps
    lr = DEFAULTS[method][1] if lr is None else lr
    weights = {"bn_weight": bn_weight, "tv_weight": tv_weight, "l2_weight": l2_weight}
    sizes = {"count": count, "batch_size": batch_size, "steps": steps}
    check_fields({**sizes, "lr": lr, **weights}, sizes=sizes, rates=("lr",), weights=weights)
    checks.integer_in("jitter", jitter, 0, min(image_shape[:2]) - 1)
    shape = jax.ShapeDtypeStruct((min(count, batch_size), *image_shape), np.float32)
    logits, _ = jax.eval_shape(
        functools.partial(statistics_loss, net, method=method), variables, shape
    )
    wanted = classes_wanted(labels, count, logits.shape[-1])
    numbers = {"lr": lr, **weights}
    images, answers = [], []
    for batch, part in enumerate(np.array_split(wanted, -(-count // batch_size))):
        batch_key = jax.random.fold_in(key, batch)
        x = jax.random.normal(jax.random.fold_in(batch_key, 0), (len(part), *image_shape))
        state = _optimizer(method).init(x)
        for step in range(1, steps + 1):
            x, state, loss = _descend(
                net, method, jitter, variables, x, state, part, numbers, bounds, batch_key, step
            )
            if report is not None:
                report(batch + 1, step, loss_to_report(loss, step, steps))
        images.append(np.asarray(x))
        answers.append(part if method == "deep_inversion" else _answers(net, variables, x))
    return synthesis(np.concatenate(images), np.concatenate(answers), lr)


def _optimizer(method: str) -> optax.GradientTransformationExtraArgs:
    parts = [optax.scale_by_adam()]
    if method == "zeroq":
        # PyTorch's ReduceLROnPlateau(patience=100, min_lr=1e-4) for a rate of 0.5.
        plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=100, min_scale=2e-4)
        parts.append(plateau)
    return optax.with_extra_args_support(optax.chain(*parts))


@functools.partial(jax.jit, static_argnames=("net", "method", "jitter"))
def _descend(
    net: QuantizedModel,
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
            return loss + distance_of_images(images, channels, channels + 1, (images.ndim - 1,))
        if jitter:
            shift = jax.random.randint(jax.random.fold_in(key, step), (2,), -jitter, jitter + 1)
            images = jnp.roll(images, shift, axis=(1, 2))
        logits, distance = statistics_loss(net, variables, images, method)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        prior = numbers["tv_weight"] * total_variation(images)
        prior += numbers["l2_weight"] * norm(images)
        return jnp.mean(entropy) + numbers["bn_weight"] * distance + prior

    loss, gradient = jax.value_and_grad(loss_of)(images)
    updates, state = _optimizer(method).update(gradient, state, images, value=loss)
    images = jax.tree.map(lambda x, update: x - numbers["lr"] * update, images, updates)
    if bounds is not None:
        low, high = (jnp.broadcast_to(bound, images.shape) for bound in bounds)
        images = jnp.clip(images, low, high)
    return images, state, loss


@functools.partial(jax.jit, static_argnames=("net",))
def _answers(net: QuantizedModel, variables: Any, images: jax.Array) -> jax.Array:
    return jnp.argmax(forward(net, variables, images)[0], axis=-1)
