"""Hutchinson's estimate of the Hessian's trace, layer by layer, and the errors it multiplies.

    tr(H_i) = E v^T H_i v,  v of independent signs

One vector for all layers at once: the terms between layers have the mean 0, so that one product
with the Hessian serves every layer. HAWQ-V2 (Dong et al., 2019, arXiv 1911.03852) averages the
estimates and divides by the number of weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.diagnostics import operand_sums
from qkd_jax.trees import get, insert, join

Tree = Mapping[str, Any]
Kernels = dict[str, jax.Array]  # by layer path


def mean_curvatures(
    logits_of: Callable[[Tree, jax.Array], jax.Array],
    floats: Tree,
    batches: Sequence[tuple[jax.Array, jax.Array | None]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    probes: int,
    seed: int,
) -> dict[str, float]:
    """tr(H_i) / n_i of the mean cross-entropy over all examples, for each layer's weight.

    Args:
        logits_of: (float variables, images) -> [..., classes].
        floats: float variables.
        batches: (images, labels); without labels, the net's own predictions are the target.
        shapes: path -> shape of the weight as its layer sees it.
        probes: number of sign vectors a batch.
        seed: of these vectors.

    Raises:
        ValueError: a layer inside `nn.scan` or `nn.vmap`, whose weights lie in one array with
            others.
    """
    arrays = {path: _array_path(floats["params"], path) for path in shapes}
    kernels = {path: get(floats["params"], array) for path, array in arrays.items()}
    for path, kernel in kernels.items():
        if kernel.size != math.prod(shapes[path]):
            raise ValueError(
                f"layer {path!r} is one of {kernel.shape[0]} steps of nn.scan or nn.vmap, whose "
                "weights lie in one array. Use metric='mse' or 'kl'."
            )

    def loss(kernels: Kernels, images: jax.Array, labels: jax.Array | None) -> jax.Array:
        params = floats["params"]
        for path, array in arrays.items():
            params = insert(params, array, kernels[path])
        logits = jax.nn.log_softmax(logits_of({**floats, "params": params}, images))
        if labels is None:
            target = jnp.exp(jax.lax.stop_gradient(logits))
        else:
            # In the labels' own type the classes from 128 on would be counted as int8.
            target = jax.nn.one_hot(labels.astype(int), logits.shape[-1], dtype=logits.dtype)
        return -jnp.sum(target * logits) / (logits.size // logits.shape[-1])

    @jax.jit
    def estimate(
        key: jax.Array, kernels: Kernels, images: jax.Array, labels: jax.Array | None
    ) -> Kernels:
        def slope(kernels: Kernels, v: Kernels) -> jax.Array | int:
            grads = jax.grad(loss)(kernels, images, labels)
            return sum(jnp.vdot(grads[path], v[path]) for path in v)

        def one(key: jax.Array) -> Kernels:
            keys = dict(zip(kernels, jax.random.split(key, len(kernels)), strict=True))
            v = {p: jax.random.rademacher(keys[p], k.shape, k.dtype) for p, k in kernels.items()}
            # Reverse over reverse: a model with a custom_vjp of its own has no forward mode.
            product = jax.grad(slope)(kernels, v)
            return {p: jnp.vdot(v[p], product[p]) / v[p].size for p in v}

        found = jax.lax.map(one, jax.random.split(key, probes))
        return {path: jnp.mean(values) for path, values in found.items()}

    totals, examples = dict.fromkeys(shapes, 0.0), 0
    for number, (images, labels) in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        for path, value in estimate(key, kernels, images, labels).items():
            totals[path] += images.shape[0] * float(value)
        examples += images.shape[0]
    return {path: total / examples for path, total in totals.items()}


def weight_errors(
    net: QuantizedModel, variables: Tree, batches: Sequence[Any], **kwargs: Any
) -> dict[str, float]:
    """||W_q - W||^2 of each quantized weight that the batches reach, by path."""
    found = operand_sums(net, variables, batches, **kwargs)
    return {
        p: float(sums["noise"]) for (p, operand, _), sums in found.items() if operand == "weight"
    }


def _array_path(params: Tree, path: str) -> str:
    """Returns the path of a layer's weight in `params`."""
    return join(path, "kernel" if "kernel" in get(params, path) else "embedding")
