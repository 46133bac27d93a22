"""Hadamard matrices, and the product with one in n log n operations.

A Hadamard matrix H of order n has entries 1 and -1 and H H^T = n I, so H / sqrt(n) is a rotation in
which every number goes into every other: a few large ones are spread over all. Sylvester's powers
of two and Paley's orders (q + 1 and 2 (q + 1) for primes q; Paley, 1933) are made here, and their
products: 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, ... up to a few gaps (92).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST_FACTOR = 64
"""Powers of two are multiplied in factors of at most this order: two of 64 for 4,096."""


@functools.cache
def hadamard_matrix(order: int) -> np.ndarray:
    """Returns a Hadamard matrix of 1 and -1 whose first row is all ones, int8 [order, order].

    Raises:
        ValueError: no such matrix is known here.

    Example:
        >>> h = hadamard_matrix(12).astype(int)
        >>> bool(np.array_equal(h @ h.T, 12 * np.eye(12)))
        True
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order % 2 == 0 and is_hadamard_order(order // 2):
        half = hadamard_matrix(order // 2)
        return np.block([[half, half], [half, -half]])
    matrix = _paley(order)
    if matrix is None:
        raise ValueError(
            f"order is {order}, and no Hadamard matrix of that order is made here; the largest one "
            f"that divides it is {largest_order(order)}."
        )
    return (matrix * matrix[:1]).astype(np.int8)


@functools.cache
def is_hadamard_order(order: int) -> bool:
    """Whether `hadamard_matrix` makes one of this order."""
    if order == 1:
        return True
    return (order % 2 == 0 and is_hadamard_order(order // 2)) or _paley_prime(order) is not None


def largest_order(size: int) -> int:
    """Returns the largest known order that divides a size: that of the blocks of its rotation."""
    return next(n for n in range(size, 0, -1) if size % n == 0 and is_hadamard_order(n))


@functools.cache
def factors_of(order: int) -> tuple[int, ...]:
    """Returns orders whose matrices' Kronecker product is a rotation of an order, none too large.

    One that is no power of two, where there is one, and powers of two of up to `LARGEST_FACTOR`.
    """
    odd, power = order, 0
    while odd % 2 == 0 and is_hadamard_order(odd // 2):
        odd, power = odd // 2, power + 1
    count = -(-power // int(math.log2(LARGEST_FACTOR)))
    shares = [power // count + (i < power % count) for i in range(count)]
    return tuple(n for n in (odd, *(2**share for share in shares)) if n > 1) or (1,)


def hadamard_transform(
    x: jax.Array,
    order: int | None = None,
    *,
    mark: Callable[[jax.Array], jax.Array] = lambda operand: operand,
) -> jax.Array:
    """Multiplies the last axis by a block-diagonal matrix of Hadamard matrices, of 1 and -1.

        y = x (I (x) H_1 (x) H_2 (x) ...)^T,   to be divided by sqrt(order) for a rotation

    in one small product for each factor, so that the cost is n times the sum of the factors.

    Args:
        x: [..., n].
        order: of the blocks, a divisor of n; None takes the largest one known.
        mark: called with both operands of each product; what it returns is multiplied.

    Returns:
        Of x's shape and type.
    """
    size = x.shape[-1]
    order = largest_order(size) if order is None else order
    factors = factors_of(order)
    y = jnp.reshape(x, (*x.shape[:-1], size // order, *factors))
    for factor in factors:
        # The first factor's axis is contracted and its result stands last, until all have been.
        matrix = jnp.asarray(hadamard_matrix(factor), x.dtype)
        axis = y.ndim - len(factors)
        y = lax.dot_general(
            mark(y), mark(matrix), (((axis,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
    return jnp.reshape(y, x.shape)


def random_rotation(size: int, rng: np.random.Generator, *, keeps_mean: bool = False) -> np.ndarray:
    """Returns a random orthogonal matrix that mixes all entries, float64 [size, size].

    From a Hadamard matrix with random signs where the size is an order, else from a Gaussian one.

    Args:
        size: its order.
        rng: of the signs or numbers.
        keeps_mean: Q 1 = 1, so that a row's mean and its deviations' norm are those of the rotated
            row: a LayerNorm without gain and bias gives LN(x Q) = LN(x) Q. That is H^T D H / n with
            signs D, the first of which is 1.
    """
    if is_hadamard_order(size):
        h = hadamard_matrix(size).astype(np.float64) / math.sqrt(size)
        signs = rng.choice([-1.0, 1.0], size)
        if not keeps_mean:
            return signs[:, None] * h
        signs[0] = 1
        return h.T @ (signs[:, None] * h)
    start = rng.normal(size=(size, size))
    if keeps_mean:
        start[:, 0] = 1
    basis, _ = np.linalg.qr(start)
    if not keeps_mean:
        return basis
    other, _ = np.linalg.qr(rng.normal(size=(size - 1, size - 1)))
    inner = np.eye(size)
    inner[1:, 1:] = other
    return basis @ inner @ basis.T


def _paley_prime(order: int) -> tuple[int, bool] | None:
    """Returns (q, whether of the second kind) of Paley's construction of an order, or None."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1, False
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        return half - 1, True
    return None


def _paley(order: int) -> np.ndarray | None:
    found = _paley_prime(order)
    if found is None:
        return None
    prime, second = found
    squares = {i * i % prime for i in range(1, prime)}
    residue = np.array([0, *(1 if i in squares else -1 for i in range(1, prime))])
    index = np.arange(prime)
    jacobsthal = residue[(index[:, None] - index) % prime]
    border = np.ones((prime, 1), int)
    if not second:  # I + S, S skew
        skew = np.block([[np.zeros((1, 1), int), border.T], [-border, jacobsthal]])
        return np.eye(order, dtype=int) + skew
    conference = np.block([[np.zeros((1, 1), int), border.T], [border, jacobsthal]])
    identity = np.eye(order // 2, dtype=int)
    return np.block(
        [
            [conference + identity, conference - identity],
            [conference - identity, -conference - identity],
        ]
    )


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))
