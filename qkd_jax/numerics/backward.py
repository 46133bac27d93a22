"""Backward passes of quantizers: the gradient of the input, and sums for the parameters.

XLA:CPU fuses the sums of one `lax.reduce` with what makes their terms, vectorised, where the summed
axis is short and the axis behind it is long and contiguous. Activations of a net have other shapes,
and a `jnp.sum` for each parameter reads all of them again. So tensors that share one set of
parameters are viewed as [first axis, many, short, long], and all terms are summed at once. A sum by
itself is written as additions of slices, which take half the time of its `reduce`, or less.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from qkd_jax.numerics.rounding import match_cotangent, sum_to

# Smaller tensors cost less to sum than to view in another shape.
_LEAST = 4096


def _view(shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    """[first axis, many, short, long] of a shape, or None where its sizes have no such factors."""
    size = math.prod(shape)
    if len(shape) < 2 or size < _LEAST:
        return None
    each = size // shape[0]
    for long in (256, 128, 64, 32):
        for short in (8, 9, 7, 10, 12, 6, 14, 16):
            if each % (long * short) == 0:
                return shape[0], each // (long * short), short, long
    return None


def cotangents(
    x: jax.Array,
    g: jax.Array,
    params: Sequence[jax.Array],
    slope: Callable[[jax.Array, jax.Array], jax.Array],
    terms: Callable[[jax.Array, jax.Array, jax.Array], Sequence[jax.Array]],
    *,
    factor: float | jax.Array = 1.0,
    as_given: bool = False,
    apart: bool = False,
) -> tuple[jax.Array, ...]:
    """The cotangents of a quantizer's input and of its parameters.

    Args:
        x: the input.
        g: the upstream gradient, of its shape.
        params: the parameters that have a gradient; () or broadcasting against `x`.
        slope: (x, g) -> the gradient of `x`, element by element.
        terms: (x, g, dx) -> for each parameter the array whose sum is its gradient, before
            `factor`. dx is read back from memory: worth it where it is dear to compute again.
        factor: multiplies the gradients of the parameters.
        as_given: call `slope` and `terms` on the shapes as they are, for functions that depend on
            more than the element (random numbers).
        apart: sum each term in a loop of its own. A loop of several sums is vectorised for cheap
            terms alone, without transcendental functions (measured: 20 times slower with a tanh).

    Returns:
        dx in the dtype of `g`, then a gradient for each parameter, in its shape and dtype.
    """
    view = None if as_given or any(p.ndim for p in params) else _view(x.shape)
    if view is None:
        dx = slope(x, g)
        parts = [part * factor for part in terms(x, g, dx)]
    else:
        # Both are in memory anyway: `x` is a residual, `g` a product's result. With the barriers
        # the two loops have nothing in common, else XLA would store what they share.
        views = jax.lax.optimization_barrier((x.reshape(view), g.reshape(view)))
        dx = slope(*views)
        parts = partial_sums(terms, *views, dx, factor=factor, apart=apart)
        dx = dx.reshape(x.shape)
    grads = [
        match_cotangent(part, p).astype(p.dtype) for part, p in zip(parts, params, strict=True)
    ]
    return match_cotangent(dx.astype(g.dtype), x), *grads


def partial_sums(
    terms: Callable[..., Sequence[jax.Array]],
    *arrays: jax.Array,
    factor: float | jax.Array = 1.0,
    apart: bool = False,
) -> Sequence[jax.Array]:
    """Sums `terms(*arrays)`, computed element by element, over some of the axes.

    `terms` may use scalars, and nothing else of a shape. The result is smaller where the shape
    allows it, and its sums over everything are those of the terms.
    """
    view = _view(arrays[0].shape)
    if view is None:
        return [part * factor for part in terms(*arrays)]
    arrays = jax.lax.optimization_barrier(tuple(a.reshape(view) for a in arrays))
    parts = tuple(part * factor for part in terms(*arrays))
    sums = tuple(s for p in parts for s in _short_sums((p,))) if apart else _short_sums(parts)
    return jax.lax.optimization_barrier(sums)


def mean_of(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, param: jax.Array
) -> jax.Array:
    """The mean of `function(x)`, element by element, over what shares a parameter, in its shape.

    Args:
        function: may use arrays of the parameter's shape.
        x: the tensor.
        param: () or broadcasting against `x`.
    """
    share = param.size / max(x.size, 1)
    if param.ndim:
        return sum_to(function(x), param.shape) * share
    return sum_to(partial_sums(lambda x: (function(x),), x, factor=share)[0], ())


def _short_sums(parts: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums over the axis before the last, all in one loop."""
    if len(parts) == 1:
        rows = (parts[0][..., i, :] for i in range(parts[0].shape[-2]))
        return (functools.reduce(jnp.add, rows),)

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(p + q for p, q in zip(a, b, strict=True))

    zeros = tuple(jnp.zeros((), part.dtype) for part in parts)
    return tuple(jax.lax.reduce(tuple(parts), zeros, add, (parts[0].ndim - 2,)))
