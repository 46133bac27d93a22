"""A bilinear product and what it does to the axes of its operands.

Every layer that quantization reaches is one product (a convolution, a `dot_general`, an einsum). A
`Product` holds the function and, for each axis of each operand, the output axis that it becomes
(None for an axis that is summed over). From that alone follow the channel axes of a weight and the
place where its scales belong in the output, for any layout.

`quantized_product` computes on codes and scales once: `product(codes_x, codes_w) * (s_x * s_w)`.
Integer codes are exact in float32, so training, evaluation and the integer path see the same sums.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qkd_jax.numerics import IntFormat, codes_of

__all__ = ["Product", "conv_product", "dot_product", "einsum_product", "quantized_product"]

Axes = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """A function that is linear in each of its two operands.

    Attributes:
      fn: `fn(lhs, rhs) -> out`.
      lhs_out: per axis of the left operand, the output axis it becomes, or None.
      rhs_out: the same for the right operand.
      ndim: rank of the output.
    """

    fn: Callable[[jax.Array, jax.Array], jax.Array]
    lhs_out: Axes
    rhs_out: Axes
    ndim: int

    @property
    def weight_channels(self) -> tuple[int, ...]:
        """Axes of the right operand along which a scale may vary."""
        return tuple(i for i, out in enumerate(self.rhs_out) if out is not None)

    @property
    def group_axis(self) -> int | None:
        """The axis of the right operand that groups cut: the last one that is summed over."""
        summed = [i for i, out in enumerate(self.rhs_out) if out is None]
        return summed[-1] if summed else None

    @property
    def rows(self) -> tuple[int, ...]:
        """Axes of the left operand along which a scale may vary: one scale per row ("token")."""
        return tuple(i for i, out in enumerate(self.lhs_out) if out is not None)

    def scales_in_output(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The product of both operands' scales, at the output's rank."""
        left, right = (lhs, self.lhs_out), (rhs, self.rhs_out)
        return self.scale_in_output(*left) * self.scale_in_output(*right)

    def scale_in_output(self, scale: jax.Array, axes: Axes) -> jax.Array:
        """Reshapes an operand's scale (scalar, or 1 on every summed axis) to the output's rank."""
        if jnp.ndim(scale) == 0:
            return scale
        kept = [i for i, out in enumerate(axes) if out is not None]
        if any(n != 1 for i, n in enumerate(scale.shape) if i not in kept):
            raise ValueError(
                f"a scale of shape {scale.shape} varies along a summed axis; it must be 1 on every "
                "axis that the product sums over."
            )
        kept.sort(key=lambda i: axes[i] or 0)
        shape = [1] * self.ndim
        for i in kept:
            shape[axes[i] or 0] = scale.shape[i]
        summed = [i for i in range(len(axes)) if i not in kept]
        return jnp.reshape(jnp.transpose(scale, kept + summed), shape)


def conv_product(
    lhs: Any, rhs: Any, *args: Any, base: Callable[..., Any], **kwargs: Any
) -> Product:
    """The product of `lax.conv_general_dilated(lhs, rhs, *args, **kwargs)`."""
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.get("dimension_numbers"))
    lhs_out: list[int | None] = [None] * lhs.ndim
    rhs_out: list[int | None] = [None] * rhs.ndim
    lhs_out[numbers.lhs_spec[0]] = numbers.out_spec[0]
    rhs_out[numbers.rhs_spec[0]] = numbers.out_spec[1]
    return Product(
        lambda a, b: base(a, b, *args, **kwargs), tuple(lhs_out), tuple(rhs_out), lhs.ndim
    )


def dot_product(
    lhs: Any, rhs: Any, dimension_numbers: Any, *args: Any, base: Callable[..., Any], **kwargs: Any
) -> Product:
    """The product of `lax.dot_general(lhs, rhs, dimension_numbers, ...)`."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers

    def places(ndim: int, summed: Any, batch: Any, first_free: int) -> Axes:
        places: list[int | None] = [None] * ndim
        for place, axis in enumerate(batch):
            places[axis] = place
        free = [i for i in range(ndim) if i not in tuple(summed) + tuple(batch)]
        for offset, axis in enumerate(free):
            places[axis] = first_free + offset
        return tuple(places)

    lhs_free = lhs.ndim - len(lhs_sum)  # batch axes included
    return Product(
        lambda a, b: base(a, b, dimension_numbers, *args, **kwargs),
        places(lhs.ndim, lhs_sum, lhs_batch, len(lhs_batch)),
        places(rhs.ndim, rhs_sum, rhs_batch, lhs_free),
        lhs_free + rhs.ndim - len(rhs_sum) - len(rhs_batch),
    )


def einsum_product(equation: str, lhs: Any, rhs: Any, **kwargs: Any) -> Product:
    """The product of `jnp.einsum(equation, lhs, rhs)`, an explicit equation of two operands."""
    operands, result = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    unused = [c for c in string.ascii_letters if c not in equation]

    def expand(labels: str, dots: int) -> str:
        # An ellipsis stands for the last `dots` of one list of labels: it aligns to the right.
        return labels.replace("...", "".join(unused[:dots][::-1]))

    def ellipsis(labels: str, ndim: int) -> int:
        return ndim - len(labels) + 3 if "..." in labels else 0

    dots = ellipsis(left, lhs.ndim), ellipsis(right, rhs.ndim)
    left, right, result = expand(left, dots[0]), expand(right, dots[1]), expand(result, max(dots))

    def places(labels: str) -> Axes:
        return tuple(result.index(c) if c in result else None for c in labels)

    return Product(
        lambda a, b: jnp.einsum(equation, a, b, **kwargs), places(left), places(right), len(result)
    )


def code_dtype(format: IntFormat, zero_point: bool) -> Any:
    """The narrowest dtype that holds centred codes (`code - zero_point`) between the passes."""
    if not zero_point:
        return format.storage
    widest = format.qmax - format.qmin
    return np.int8 if widest <= 127 else np.int16 if widest <= 32767 else np.int32


def sum_dtype(dtype: Any, *formats: IntFormat) -> Any:
    """The dtype in which sums of codes are formed for operands of `dtype`.

    float16 overflows on unscaled sums, and bfloat16 holds no code above 8 bits: both widen.
    """
    if dtype == jnp.bfloat16 and all(f.bits <= 8 for f in formats):
        return dtype
    return jnp.promote_types(dtype, jnp.float32)


class _Static(NamedTuple):
    """What a compiled product is keyed by: the product, the dtypes of its stages, its folding."""

    product: Product
    kept_x: Any  # codes between the passes
    kept_w: Any
    sums: Any
    operands: Any
    out: Any
    folded: bool  # whether a multiplier was given in place of the scales' product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x_hat, w_hat, x_scale, w_scale, multiplier):
    return _forward(static, x_hat, w_hat, x_scale, w_scale, multiplier)[0]


def _forward(static, x_hat, w_hat, x_scale, w_scale, multiplier):
    codes_x = codes_of(x_hat, x_scale).astype(static.sums)
    codes_w = codes_of(w_hat, w_scale).astype(static.sums)
    out = (static.product.fn(codes_x, codes_w) * multiplier).astype(static.out)
    # Residuals: codes in their own width (a quarter of float32 or less), and two small scales.
    kept = codes_x.astype(static.kept_x), codes_w.astype(static.kept_w)
    return out, (*kept, x_scale, w_scale, multiplier)


def _backward(static, residuals, grad):
    codes_x, codes_w, x_scale, w_scale, multiplier = residuals
    # The derivative is that of product(x_hat, w_hat), times what batch normalization does to it;
    # scales multiply the weight-sized side, where the sums' dtype has room for unscaled codes.
    if static.folded:
        grad = grad * (multiplier / static.product.scales_in_output(x_scale, w_scale))
    grad = grad.astype(static.sums)
    x = codes_x.astype(static.sums)
    w = (codes_w.astype(jnp.float32) * w_scale).astype(static.sums)
    grad_x = jax.vjp(lambda a: static.product.fn(a, w), x)[1](grad)[0]
    after = x_scale
    if jnp.size(x_scale) > 1:  # a scale per row can't wait until the rows are summed
        x, after = (codes_x.astype(jnp.float32) * x_scale).astype(static.sums), 1
    grad_w = jax.vjp(lambda b: static.product.fn(x, b), w)[1](grad)[0] * after
    zeros = jax.tree.map(jnp.zeros_like, (x_scale, w_scale, multiplier))
    return (grad_x.astype(static.operands), grad_w.astype(static.operands), *zeros)


_product.defvjp(_forward, _backward)


def quantized_product(
    product: Product,
    x_hat: jax.Array,
    w_hat: jax.Array,
    x_view: tuple[jax.Array, IntFormat, bool],
    w_view: tuple[jax.Array, IntFormat, bool],
    multiplier: jax.Array | None = None,
) -> jax.Array:
    """Computes `product(codes_x, codes_w) * (s_x * s_w)`; differentiates `product(x_hat, w_hat)`.

    With a `multiplier` the derivative is that times `multiplier / (s_x * s_w)`. The codes are
    centred (the zero point is taken off), so zero padding pads with real zero. The gradients of the
    scales flow through `x_hat` and `w_hat`, that is through the quantizers' own closed forms; none
    flows here.

    Args:
      product: what to compute.
      x_hat: left operand on its grid, `scale * centred codes`.
      w_hat: right operand on its grid.
      x_view: (scale, format, has a zero point) of the left operand; the scale does not vary along
        a summed axis.
      w_view: the same for the right operand.
      multiplier: replaces `s_x * s_w` in the output (batch normalization folded in), or None.

    Returns:
      The product, in the dtype that `product.fn` gives the operands.
    """
    (x_scale, x_format, x_affine), (w_scale, w_format, w_affine) = x_view, w_view
    folded = multiplier is not None
    if multiplier is None:
        multiplier = product.scales_in_output(x_scale, w_scale)
    elif jnp.ndim(multiplier) not in (0, product.ndim):
        multiplier = jnp.reshape(multiplier, (1,) * (product.ndim - 1) + (-1,))
    stop = lax.stop_gradient
    static = _Static(
        product,
        code_dtype(x_format, x_affine),
        code_dtype(w_format, w_affine),
        sum_dtype(x_hat.dtype, x_format, w_format),
        x_hat.dtype,
        jax.eval_shape(product.fn, x_hat, w_hat).dtype,
        folded,
    )
    return _product(
        static,
        x_hat,
        w_hat,
        stop(x_scale),
        stop(w_scale),
        stop(multiplier),
    )
