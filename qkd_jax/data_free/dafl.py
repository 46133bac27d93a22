"""DAFL: images from a generator that is trained on a frozen net's answers (Chen et al. 2019).

    made = dafl(net, variables, image_shape=(32, 32, 3), count=256, key=key, bounds=(low, high))

The paper trains the student beside the generator, which never asks it. Here the generator is
trained first, and the student learns from its images afterwards, as from any other data set.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkd_jax import checks
from qkd_jax.data_free.generator import Generator, in_range, new_generator
from qkd_jax.data_free.synthesis import Synthesis, check_fields, loss_to_report, synthesis
from qkd_jax.distillation.forward import forward, forward_taps
from qkd_jax.distillation.taps import features_of, resolve_taps
from qkd_jax.quantize import QuantizedModel
from qkd_jax.training.state import jit_once


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
    net: QuantizedModel,
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
        net: the net, float or quantized; it needs no BatchNorm.
        variables: its variables.
        image_shape: (height, width, channels).
        count: images to make, all of them by the trained generator.
        key: of weights and noise; the result is a pure function of it.
        bounds: (low, high) of pixels as the net takes them, broadcast against [batch, H, W, C].
        batch_size: images of a step.
        steps: of Adam.
        lr: its learning rate, constant.
        latent: size of the noise.
        width: channels of the generator.
        one_hot_weight: factor of `one_hot_loss`.
        activation_weight: factor of `activation_loss`.
        entropy_weight: factor of `entropy_loss`.
        tap: the tap of f; see `taps`.
        report: called as report(step, loss) after every step, from 1; the loss is None
            except every 50 steps and at the last, since it must be waited for.

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
    numbers = {
        "lr": lr,
        "one_hot_weight": one_hot_weight,
        "activation_weight": activation_weight,
        "entropy_weight": entropy_weight,
    }
    sizes = {"batch_size": batch_size, "steps": steps, "latent": latent, "width": width}
    checks.integer_in("count", count, 1)
    check_dafl({**sizes, "tap": tap, **numbers}, net, image_shape)
    (tap,) = resolve_taps("tap", features_of(net, tuple(image_shape)), (tap,))
    generator = Generator(tuple(image_shape), width)
    weights = new_generator(generator, jax.random.fold_in(key, 0), latent)
    state = optax.scale_by_adam().init(weights["params"])
    noise = _noise((batch_size, latent))
    for step in range(1, steps + 1):
        z = noise(jax.random.fold_in(key, 1), step)
        weights, state, loss = _descend(
            net, generator, tap, variables, weights, state, z, numbers, bounds
        )
        if report is not None:
            report(step, loss_to_report(loss, step, steps))
    batches = []
    for batch in range(-(-count // batch_size)):
        z = noise(jax.random.fold_in(key, 2), batch)
        batches.append(jax.device_get(_generate(net, generator, variables, weights, z, bounds)))
    images, labels = (np.concatenate(part)[:count] for part in zip(*batches, strict=True))
    return synthesis(images, labels, lr)


def check_dafl(
    fields: Mapping[str, Any], net: QuantizedModel, image_shape: tuple[int, ...]
) -> None:
    """Refuses numbers of `dafl` that are out of range, and a tap that the net does not have."""
    check_fields(
        fields,
        sizes=("batch_size", "steps", "latent", "width"),
        rates=("lr",),
        weights=("one_hot_weight", "activation_weight", "entropy_weight"),
    )
    resolve_taps("tap", features_of(net, tuple(image_shape)), (fields["tap"],))


@functools.lru_cache(maxsize=16)
def _noise(size: tuple[int, int]) -> Callable[..., Any]:
    """Compiled (key, number) -> noise."""
    return jit_once(lambda key, number: jax.random.normal(jax.random.fold_in(key, number), size))


def _images(generator: Generator, weights: Any, z: jax.Array, bounds: Any) -> jax.Array:
    pixels, _ = generator.apply(weights, z, mutable=["batch_stats"])
    return in_range(pixels, bounds)


@functools.partial(jax.jit, static_argnames=("net", "generator", "tap"))
def _descend(
    net: QuantizedModel,
    generator: Generator,
    tap: str,
    variables: Any,
    weights: Any,
    state: Any,
    z: jax.Array,
    numbers: Mapping[str, jax.Array],
    bounds: Any,
) -> tuple[Any, Any, jax.Array]:
    """One step of Adam on the generator: (its variables, state, loss before the step)."""

    def loss_of(params: Any) -> jax.Array:
        images = _images(generator, {**weights, "params": params}, z, bounds)
        logits, _, features = forward_taps(net, variables, images, taps=(tap,))
        return (
            numbers["one_hot_weight"] * one_hot_loss(logits)
            + numbers["activation_weight"] * activation_loss(features[tap])
            + numbers["entropy_weight"] * entropy_loss(logits)
        )

    loss, gradient = jax.value_and_grad(loss_of)(weights["params"])
    updates, state = optax.scale_by_adam().update(gradient, state)
    params = jax.tree.map(lambda x, u: x - numbers["lr"] * u, weights["params"], updates)
    return {**weights, "params": params}, state, loss


@functools.partial(jax.jit, static_argnames=("net", "generator"))
def _generate(
    net: QuantizedModel,
    generator: Generator,
    variables: Any,
    weights: Any,
    z: jax.Array,
    bounds: Any,
) -> tuple[jax.Array, jax.Array]:
    images = _images(generator, weights, z, bounds)
    logits, _ = forward(net, variables, images)
    return images, jnp.argmax(logits, axis=-1)
