"""DAFL: images from a generator that a frozen net's answers teach (Chen et al. 2019).

    made = dafl(net, variables, image_shape=(32, 32, 3), count=256, key=key, bounds=(low, high))

The paper trains the student beside the generator, which never asks it. Here the generator is
trained first, and the student learns from its images afterwards, as from any other data set.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.data_free.generator import (
    Generator,
    check_fields,
    finite,
    in_range,
    new_generator,
    told,
)
from qkd_jax.data_free.inversion import Synthesis
from qkd_jax.distillation.forward import forward_taps
from qkd_jax.distillation.taps import features_of, resolve_taps
from qkd_jax.training.state import jit_once

__all__ = ["activation_loss", "check_dafl", "dafl", "entropy_loss", "one_hot_loss"]


def one_hot_loss(logits: jax.Array) -> jax.Array:
    """Mean over the batch of -log max_k p[k]: the cross-entropy to the net's own answer, a scalar.

    Reference:
        Chen et al., 2019, arXiv 1904.01186.
    """
    return -jnp.mean(jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1))


def activation_loss(features: jax.Array) -> jax.Array:
    """-mean |f| of features [batch, ...]: low where the net responds strongly, a scalar.

    The mean over features is the code's.
    """
    return -jnp.mean(jnp.abs(features.astype(jnp.float32)))


def entropy_loss(logits: jax.Array) -> jax.Array:
    """sum_k q[k] log10 q[k] with q the mean of p over the batch: low where classes are balanced.

    A scalar in [-log10 K, 0]. The base is the code's, to which its weight of 5 belongs.

    Reference:
        Chen et al., 2019, arXiv 1904.01186.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_q = jax.nn.logsumexp(log_p, axis=0) - math.log(logits.shape[0])
    return jnp.sum(jnp.exp(log_q) * log_q) / math.log(10)


def dafl(
    net: Any,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    count: int,
    key: jax.Array,
    bounds: tuple[Any, Any],
    batch_size: int = 256,
    steps: int = 2000,
    lr: float = 0.02,
    latent: int = 100,
    width: int = 64,
    one_hot_weight: float = 1.0,
    activation_weight: float = 0.1,
    entropy_weight: float = 5.0,
    tap: str = "pooled",
    report: Callable[[int, float | None], None] | None = None,
) -> Synthesis:
    """Trains a generator against a frozen net and makes images with it.

        one_hot_weight * (-mean log max_k p) + activation_weight * (-mean |f|)
            + entropy_weight * sum_k q log10 q,    q = mean of p over the batch

    Args:
        net: QuantizedModel, float or not; it needs no BatchNorm.
        variables: Its variables.
        image_shape: (height, width, channels).
        count: Images to make, all of them by the generator as it ends.
        key: Of weights and noise; the result is a pure function of it.
        bounds: (low, high) of pixels as the net takes them, broadcast against [batch, H, W, C].
        batch_size: Images of a step.
        steps: Of Adam.
        lr: Its rate, which stays.
        latent: Size of the noise.
        width: Channels of the generator.
        one_hot_weight: See above.
        activation_weight: Likewise.
        entropy_weight: Likewise.
        tap: Where f is seen; see `taps`.
        report: Called as report(step, loss) after every step, from 1; the loss is None but for now
            and then, since it must be waited for.

    Returns:
        Images, and the classes that the net gives them.

    Raises:
        ValueError: Numbers out of range, an unknown tap, or images that are not finite.

    Note:
        The weights are those of the authors' code for MNIST, which takes 24,000 steps of 512 at a
        rate of 0.2; for CIFAR-10 it takes 0.05, 0.01 and 5, noise of 1000, and 0.02. Its generator
        ends in tanh and BatchNorm, which leave the range of pixels; ours in a sigmoid.

    Reference:
        Chen et al., 2019, arXiv 1904.01186.
    """
    weights = {
        "one_hot_weight": one_hot_weight,
        "activation_weight": activation_weight,
        "entropy_weight": entropy_weight,
    }
    sizes = {"batch_size": batch_size, "steps": steps, "latent": latent, "width": width}
    checks.integer_in("count", count, 1)
    check_dafl({**sizes, "lr": lr, "tap": tap, **weights}, net, image_shape)
    (tap,) = resolve_taps("tap", features_of(net, tuple(image_shape)), (tap,))
    generator = Generator(tuple(image_shape), width)
    made = new_generator(generator, jax.random.fold_in(key, 0), latent)
    state = optax.scale_by_adam().init(made["params"])
    numbers = {"lr": lr, **weights}
    noise = _noise((batch_size, latent))
    for step in range(1, steps + 1):
        z = noise(jax.random.fold_in(key, 1), step)
        made, state, loss = _descend(
            net, generator, tap, variables, made, state, z, numbers, bounds
        )
        if report is not None:
            report(step, told(loss, step, steps))
    found = []
    for batch in range(-(-count // batch_size)):
        z = noise(jax.random.fold_in(key, 2), batch)
        found.append(jax.device_get(_show(net, generator, variables, made, z, bounds)))
    images, labels = (np.concatenate(part)[:count] for part in zip(*found, strict=True))
    return finite(images, labels, lr)


def check_dafl(fields: Mapping[str, Any], net: Any, image_shape: tuple[int, ...]) -> None:
    """Refuses numbers of `dafl` that are out of range, and a tap that the net has not."""
    check_fields(
        fields,
        sizes=("batch_size", "steps", "latent", "width"),
        rates=("lr",),
        weights=("one_hot_weight", "activation_weight", "entropy_weight"),
    )
    resolve_taps("tap", features_of(net, tuple(image_shape)), (fields["tap"],))


@functools.lru_cache(maxsize=16)
def _noise(size: tuple[int, int]) -> Any:
    """Compiled (key, number) -> noise."""
    return jit_once(lambda key, number: jax.random.normal(jax.random.fold_in(key, number), size))


def _images(generator: Generator, made: Any, z: jax.Array, bounds: Any) -> jax.Array:
    pixels, _ = generator.apply(made, z, mutable=["batch_stats"])
    return in_range(pixels, bounds)


@functools.partial(jax.jit, static_argnames=("net", "generator", "tap"))
def _descend(
    net: Any,
    generator: Generator,
    tap: str,
    variables: Any,
    made: Any,
    state: Any,
    z: jax.Array,
    numbers: Mapping[str, jax.Array],
    bounds: Any,
) -> tuple[Any, Any, jax.Array]:
    """One step of Adam on the generator: (its variables, state, loss before the step)."""

    def loss_of(params: Any) -> jax.Array:
        images = _images(generator, {**made, "params": params}, z, bounds)
        logits, _, features = forward_taps(net, variables, images, taps=(tap,))
        return (
            numbers["one_hot_weight"] * one_hot_loss(logits)
            + numbers["activation_weight"] * activation_loss(features[tap])
            + numbers["entropy_weight"] * entropy_loss(logits)
        )

    loss, gradient = jax.value_and_grad(loss_of)(made["params"])
    updates, state = optax.scale_by_adam().update(gradient, state)
    params = jax.tree.map(lambda x, u: x - numbers["lr"] * u, made["params"], updates)
    return {**made, "params": params}, state, loss


@functools.partial(jax.jit, static_argnames=("net", "generator"))
def _show(
    net: Any, generator: Generator, variables: Any, made: Any, z: jax.Array, bounds: Any
) -> tuple[jax.Array, jax.Array]:
    images = _images(generator, made, z, bounds)
    logits, _, _ = forward_taps(net, variables, images)
    return images, jnp.argmax(logits, axis=-1)
