"""Contractions (convolutions, `dot_general`, einsum) and how scales move through their axes.

Every layer that quantization reaches computes one contraction. A `Contraction` holds the function
and, for each axis of each operand, the output axis that it becomes (None for an axis that is summed
over). From that alone follow the channel axes of a weight and the position of its scales in the
output, for any layout.

`quantized_contraction` computes on codes and scales once:
`contraction(codes_x, codes_w) * (s_x * s_w)`. Integer codes are exact in float32, so training,
evaluation and the integer path see the same sums. That holds for layers of bfloat16 and float16
too: their sums are float32, and the scaled output is cast to the layer's type once. Codes of up to
8 bits are exact in bfloat16, so layers of that type multiply them as such.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qkd_jax.graph import Axes, output_axes, scale_in_output
from qkd_jax.numerics import IntFormat, codes_of


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A function that is linear in each of its two operands.

    Attributes:
        fn: `fn(lhs, rhs) -> out`.
        lhs_axes: per axis of the left operand, the output axis it becomes, or None.
        rhs_axes: the same for the right operand.
        rank: of the output.
        positions: axes of the left operand that a window moves along, in a sequence.
        summed_in_float32: `fn` for operands of bfloat16 with a result of float32, or None.
    """

    fn: Callable[[jax.Array, jax.Array], jax.Array]
    lhs_axes: Axes
    rhs_axes: Axes
    rank: int
    positions: tuple[int, ...] = ()
    summed_in_float32: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def dtype(self, lhs: Any, rhs: Any) -> Any:
        """Returns the type in which `fn` gives its result for two operands."""
        return jax.eval_shape(self.fn, lhs, rhs).dtype

    @property
    def weight_channels(self) -> tuple[int, ...]:
        """Axes of the right operand along which a scale may vary."""
        return tuple(i for i, out in enumerate(self.rhs_axes) if out is not None)

    @property
    def group_axis(self) -> int | None:
        """The axis of the right operand that groups cut: the last one that is summed over."""
        return last_summed(self.rhs_axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """Axes of the left operand with ranges of their own under "token".

        Those that reach the output, and the positions of a sequence: a window sees some of them,
        and a range over all would show a causal net its future.
        """
        axes = enumerate(self.lhs_axes)
        return tuple(i for i, out in axes if out is not None or i in self.positions)

    @property
    def right_rows(self) -> tuple[int, ...]:
        """The same for a right operand that is an activation whose sums may be masked.

        Attention's weights hide some of the values that are summed over, so that these share no
        range; what only the right operand brings to the output is the row.
        """
        axes = enumerate(self.rhs_axes)
        return tuple(i for i, out in axes if out is None or out in self.lhs_axes)

    def takes_out(self, lhs: "OperandGrid", rhs: "OperandGrid") -> bool:
        """Whether both operands' scales are constant along each sum."""
        return all(
            jnp.ndim(scale) == 0
            or all(scale.shape[i] == 1 for i, out in enumerate(axes) if out is None)
            for scale, axes in ((lhs.scale, self.lhs_axes), (rhs.scale, self.rhs_axes))
        )

    def scales_in_output(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """Returns the product of both operands' scales, at the output's rank."""
        left = scale_in_output(lhs, self.lhs_axes, self.rank)
        return left * scale_in_output(rhs, self.rhs_axes, self.rank)


def last_summed(axes: Axes) -> int | None:
    """Returns the last axis of an operand that is summed over, or None."""
    summed = [i for i, out in enumerate(axes) if out is None]
    return summed[-1] if summed else None


class OperandGrid(NamedTuple):
    """The grid on which an operand enters a contraction as codes.

    Attributes:
        scale: its size is 1 on every axis that is summed over where sums are of codes.
        format: of the codes.
        affine: whether the grid has a zero point.
    """

    scale: jax.Array
    format: IntFormat
    affine: bool


def conv_contraction(
    lhs: jax.Array, rhs: jax.Array, *args: Any, base: Callable[..., Any], **kwargs: Any
) -> Contraction:
    """Returns the contraction `base(lhs, rhs, *args, **kwargs)` of a `conv_general_dilated`."""
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.get("dimension_numbers"))
    axes = output_axes("conv_general_dilated", numbers, (lhs.ndim, rhs.ndim))
    wide = {**kwargs, "preferred_element_type": jnp.float32}
    return Contraction(
        lambda a, b: base(a, b, *args, **kwargs),
        *axes,
        lhs.ndim,
        sequence_positions(numbers.lhs_spec),
        (lambda a, b: base(a, b, *args, **wide)) if base is lax.conv_general_dilated else None,
    )


def sequence_positions(axes: Sequence[int]) -> tuple[int, ...]:
    """Returns the time axis of a convolution's operand of (batch, features, time), else ()."""
    return tuple(axes[2:]) if len(axes) == 3 else ()


def dot_contraction(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    *args: Any,
    base: Callable[..., Any],
    **kwargs: Any,
) -> Contraction:
    """Returns the contraction `base(lhs, rhs, dimension_numbers, ...)` of a `dot_general`."""
    axes = output_axes("dot_general", dimension_numbers, (lhs.ndim, rhs.ndim))
    rank = len({out for side in axes for out in side if out is not None})
    wide = {**kwargs, "preferred_element_type": jnp.float32}
    return Contraction(
        lambda a, b: base(a, b, dimension_numbers, *args, **kwargs),
        *axes,
        rank,
        summed_in_float32=(lambda a, b: base(a, b, dimension_numbers, *args, **wide))
        if base is lax.dot_general
        else None,
    )


def einsum_contraction(equation: str, lhs: jax.Array, rhs: jax.Array) -> Contraction:
    """Returns the contraction `jnp.einsum(equation, lhs, rhs)` of an explicit equation."""
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

    def axes(labels: str) -> Axes:
        return tuple(result.index(c) if c in result else None for c in labels)

    return Contraction(
        lambda a, b: jnp.einsum(equation, a, b),
        axes(left),
        axes(right),
        len(result),
        summed_in_float32=lambda a, b: jnp.einsum(
            equation, a, b, preferred_element_type=jnp.float32
        ),
    )


def code_dtype(format: IntFormat, zero_point: bool) -> Any:
    """Returns the narrowest dtype of centred codes (`code - zero_point`) between the passes."""
    if not zero_point:
        return format.storage
    widest = format.qmax - format.qmin
    return np.int8 if widest <= 127 else np.int16 if widest <= 32767 else np.int32


def largest_code(format: IntFormat, zero_point: bool) -> int:
    """Returns the largest size of a centred code (`code - zero_point`)."""
    return format.qmax - format.qmin if zero_point else max(format.qmax, -format.qmin)


class _Static(NamedTuple):
    """The static arguments of a compiled contraction: the dtypes of its stages, its folding."""

    contraction: Contraction
    kept_x: Any  # codes between the passes
    kept_w: Any
    sums: Any
    out: Any
    folded: bool  # whether a multiplier was given in place of the scales' product
    narrow: bool  # whether codes are multiplied as bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contracted(
    static: _Static,
    x_hat: jax.Array,
    w_hat: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    multiplier: jax.Array,
) -> jax.Array:
    return _forward(static, x_hat, w_hat, x_scale, w_scale, multiplier)[0]


def _forward(
    static: _Static,
    x_hat: jax.Array,
    w_hat: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    multiplier: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    codes_x, codes_w = codes_of(x_hat, x_scale), codes_of(w_hat, w_scale)
    if static.narrow:
        product = static.contraction.summed_in_float32
        assert product is not None
        sums = product(codes_x.astype(jnp.bfloat16), codes_w.astype(jnp.bfloat16))
    else:
        sums = static.contraction.fn(codes_x, codes_w)
    out = (sums * multiplier).astype(static.out)
    # Residuals: codes in their own width (a quarter of float32 or less), and two small scales.
    kept = codes_x.astype(static.kept_x), codes_w.astype(static.kept_w)
    return out, (*kept, x_scale, w_scale, multiplier)


def _backward(
    static: _Static, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, ...]:
    codes_x, codes_w, x_scale, w_scale, multiplier = residuals
    # The derivative is that of fn(x_hat, w_hat), times what batch normalization does to it; scales
    # multiply the weight-sized side; unscaled codes have room in the sums' dtype.
    if static.folded:
        grad = grad * (multiplier / static.contraction.scales_in_output(x_scale, w_scale))
    grad = grad.astype(static.sums)
    x = codes_x.astype(static.sums)
    w = (codes_w.astype(jnp.float32) * w_scale).astype(static.sums)
    grad_x = jax.vjp(lambda a: static.contraction.fn(a, w), x)[1](grad)[0]
    after = x_scale
    if jnp.size(x_scale) > 1:  # a scale per row can't wait until the rows are summed
        x, after = (codes_x.astype(jnp.float32) * x_scale).astype(static.sums), 1
    grad_w = jax.vjp(lambda b: static.contraction.fn(x, b), w)[1](grad)[0] * after
    zeros = jax.tree.map(jnp.zeros_like, (x_scale, w_scale, multiplier))
    return (grad_x.astype(static.sums), grad_w.astype(static.sums), *zeros)


_contracted.defvjp(_forward, _backward)


def quantized_contraction(
    contraction: Contraction,
    x_hat: jax.Array,
    w_hat: jax.Array,
    x_grid: OperandGrid,
    w_grid: OperandGrid,
    multiplier: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Computes `fn(codes_x, codes_w) * (s_x * s_w)`; differentiates `fn(x_hat, w_hat)`.

    With a `multiplier` the derivative is that times `multiplier / (s_x * s_w)`. The codes are
    centred (the zero point is taken off), so zero padding pads with real zero. The gradients of the
    scales flow through `x_hat` and `w_hat`, that is through the quantizers' own closed forms; none
    flows here.

    Args:
        contraction: its `fn` is computed.
        x_hat: left operand on its grid, `scale * centred codes`, in float32 or wider: a narrower
            type has not every code.
        w_hat: right operand on its grid, likewise.
        x_grid: grid of the left operand.
        w_grid: grid of the right operand.
        multiplier: replaces `s_x * s_w` in the output (batch normalization folded in), or None.
        dtype: of the output; by default what `fn` gives x_hat and w_hat. Sums are as wide as the
            operands, whatever it is.

    Returns:
        The output.
    """
    (x_scale, x_format, x_affine), (w_scale, w_format, w_affine) = x_grid, w_grid
    folded = multiplier is not None
    if multiplier is None:
        multiplier = contraction.scales_in_output(x_scale, w_scale)
    elif jnp.ndim(multiplier) not in (0, contraction.rank):
        multiplier = jnp.reshape(multiplier, (1,) * (contraction.rank - 1) + (-1,))
    stop = lax.stop_gradient
    out = contraction.dtype(x_hat, w_hat) if dtype is None else dtype
    static = _Static(
        contraction,
        code_dtype(x_format, x_affine),
        code_dtype(w_format, w_affine),
        x_hat.dtype,
        out,
        folded,
        narrow=contraction.summed_in_float32 is not None
        and out == jnp.bfloat16
        and all(largest_code(format, affine) <= 256 for _, format, affine in (x_grid, w_grid)),
    )
    return _contracted(static, x_hat, w_hat, stop(x_scale), stop(w_scale), stop(multiplier))


@jax.custom_jvp
def straight_codes(x_hat: jax.Array, scale: jax.Array) -> jax.Array:
    """Centred codes of a tensor on its grid, with the derivative 1 / scale."""
    return codes_of(x_hat, scale).astype(x_hat.dtype)


@straight_codes.defjvp
def _straight_codes_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x_hat, scale = primals
    return straight_codes(x_hat, scale), (tangents[0] * (1 / scale)).astype(x_hat.dtype)
