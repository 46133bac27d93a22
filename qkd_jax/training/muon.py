"""Muon: which arrays are matrices, and how an array with more axes becomes one.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of
every matrix between hidden layers. Its authors leave the rest to Adam: biases and norms, embeddings
and the output head, and here what quantizers learn. A convolution is the matrix from its window
[height, width, channels in] to its channels out, as in their code.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from qkd_jax.trees import unboxed

Tree = Any
# Layers of attention whose kernels are [width, heads, size]: the one input axis comes first.
_PROJECTIONS = ("query", "key", "value")


def transform(
    hyper: dict[str, Any],
    labels: Tree,
    *,
    nesterov: bool,
    consistent_rms: bool,
    stacked: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """Muon for what `labels` calls "muon", Adam for the rest; without decay and learning rate.

    m <- momentum m + (1 - momentum) g; update = s orthogonal(m), where `orthogonal` is five steps
    of Newton-Schulz, and s = 0.2 sqrt(max(in, out)) with `rms` 0.2.

    Args:
        hyper: "momentum", "rms", "eps", and Adam's "b1" and "b2".
        labels: of `labels_of`.
        nesterov: whether the update looks one step ahead.
        consistent_rms: whether `rms` sets the size of updates; else s = sqrt(max(1, out / in)).
        stacked: regular expressions of layers whose first axis counts layers, as `nn.scan` stacks
            them: each layer's matrix is orthogonalised by itself.
    """
    numbers = functools.partial(dimension_numbers, stacked=stacked)
    rms = hyper["rms"] if consistent_rms else None
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=hyper["momentum"],
            eps=hyper["eps"],
            nesterov=nesterov,
            weight_dimension_numbers=numbers,
        ),
        optax.stateless(lambda updates, _: _scaled(updates, numbers(updates), rms)),
    )
    adam = optax.scale_by_adam(hyper["b1"], hyper["b2"], hyper["eps"])
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def labels_of(trainable: Tree, groups: Tree, adam_layers: tuple[str, ...]) -> Tree:
    """Returns "muon" or "adam" for every array.

    Args:
        trainable: {"params": ..., "quant": ...}.
        groups: of `optim.groups`, without frozen arrays.
        adam_layers: regular expressions of layers that Adam trains, such as the head.
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        parts = _names(path)
        matrix = jnp.ndim(leaf) == 2 or (parts[-1] == "kernel" and jnp.ndim(leaf) > 2)
        return (
            "adam" if _is_in(adam_layers, parts) or not matrix or "embed" in parts[-1] else "muon"
        )

    named = jax.tree.leaves(jax.tree_util.tree_map_with_path(label, unboxed(trainable)))
    kinds, structure = jax.tree.flatten(groups)
    chosen = [
        name if kind == "weights" else "adam" for name, kind in zip(named, kinds, strict=True)
    ]
    return jax.tree.unflatten(structure, chosen)


def _is_in(layers: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Whether the layer of an array, or one around it, matches a pattern."""
    around = ["/".join(path[1:end]) for end in range(2, len(path))]
    return any(re.fullmatch(pattern, layer) for pattern in layers for layer in around)


def _scaled(updates: Tree, numbers: Tree, rms: jax.Array | None) -> Tree:
    def scaled(update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        inputs, outputs = (math.prod(np.take(update.shape, of).tolist()) for of in axes)
        if rms is None:
            return math.sqrt(max(1.0, outputs / inputs)) * update
        return rms * math.sqrt(max(inputs, outputs)) * update

    return jax.tree.map(scaled, updates, numbers)


def dimension_numbers(updates: Tree, stacked: tuple[str, ...] = ()) -> Tree:
    """Returns each matrix's (input axes, output axes); the last axis is the output.

    Attention's `query`, `key` and `value` kernels [width, heads, size] have one input axis. The
    first axis of `stacked` layers is neither.
    """

    def numbers(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers:
        parts = _names(path)
        axes = tuple(range(jnp.ndim(leaf)))[1 if _is_in(stacked, parts) else 0 :]
        inputs = 1 if set(parts[-2:-1]) & set(_PROJECTIONS) else len(axes) - 1
        return MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    named = jax.tree_util.tree_map_with_path(numbers, unboxed(updates))
    found = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers))
    return jax.tree.unflatten(jax.tree.structure(updates), found)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", p)) for p in path)
