"""The fields of linen layers through which a contraction, or its operands, can be replaced.

`Conv`, `Dense` and attention build their contraction from a field that holds a zero-argument
factory; `Einsum`, `ConvTranspose` and `Embed` keep theirs, but pass the operands through
`promote_dtype`. Both are public fields of a bound module, set for the length of one call.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import _Conv

from qkd_jax.numerics import Spec
from qkd_jax.quantize.contraction import Contraction, einsum_contraction, sequence_positions


class ContractionFactory:
    """The zero-argument factory that a layer's `*_cls` field takes; remembers what it replaces."""

    def __init__(self, function: Callable[..., Any], base: Any):
        self.function, self.base = function, base

    def __call__(self) -> Callable[..., Any]:
        """Returns the function that contracts."""
        return self.function


class Promotion:
    """A replacement of a layer's `promote_dtype`; remembers what it replaces."""

    def __init__(self, function: Callable[..., Any], base: Callable[..., Any]):
        self.function, self.base = function, base

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Returns the operands as the layer reads them."""
        return self.function(*arrays, **options)


class MasterKernel(Promotion):
    """A layer's own `promote_dtype`, which remembers the kernel as it was before.

    A layer of bfloat16 with parameters of float32 rounds its kernel first. Codes are those of the
    kernel that is trained and deployed.
    """

    def __init__(self, module: Any):
        base = module.promote_dtype
        super().__init__(self._promote, base.base if isinstance(base, Promotion) else base)
        self._before: Any = None
        self._after: Any = None

    def _promote(self, *arrays: Any, **options: Any) -> tuple[Any, ...]:
        promoted = tuple(self.base(*arrays, **options))
        self._before, self._after = arrays[1], promoted[1]
        return promoted

    def master(self, kernel: jax.Array) -> jax.Array:
        """Returns what the kernel was before it was promoted."""
        return self._before if kernel is self._after else kernel


def injected(factory: Any, function: Any) -> Any:
    """Returns the contraction that the model itself injected into a layer, or None."""
    if isinstance(factory, ContractionFactory):
        return factory.base
    return factory() if factory is not None else function


def outermost_module(module: nn.Module) -> nn.Module:
    """Returns the module that was applied: the end of the chain of parents."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return module


@contextlib.contextmanager
def set_fields(module: nn.Module, **fields: Any) -> Iterator[None]:
    """Sets fields of a bound layer for one call; the bound module is a clone of this apply's."""
    before = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _not_ours(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    raise NotImplementedError("this contraction is computed by its layer")


def describe(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    x: jax.Array | None,
    w: jax.Array,
) -> tuple[Contraction, str]:
    """Returns (contraction, kind) of an `Embed`, `Einsum` or `ConvTranspose` and its operands."""
    if isinstance(module, nn.Embed):  # attend: query [..., F] with table [V, F] to [..., V]
        rank = 1 if x is None else x.ndim
        axes = (*range(rank - 1), None), (rank - 1, None)
        return Contraction(_not_ours, *axes, rank), "embed"
    assert x is not None
    if isinstance(module, nn.Einsum):
        equation = module.einsum_str or (args[1] if len(args) > 1 else kwargs["einsum_str"])
        return einsum_contraction(equation, x, w), "einsum"
    assert isinstance(module, nn.ConvTranspose)
    # NHWC; the kernel is [..., in, out], or [..., out, in] when transposed.
    out_axis = w.ndim - 2 if module.transpose_kernel else w.ndim - 1
    rhs_axes = tuple(x.ndim - 1 if i == out_axis else None for i in range(w.ndim))
    lhs_axes = (0,) + (None,) * (x.ndim - 1)
    positions = sequence_positions((0, x.ndim - 1, *range(1, x.ndim - 1)))
    return Contraction(_not_ours, lhs_axes, rhs_axes, x.ndim, positions), "conv_transpose"


def check_positions(module: _Conv, path: str, spec: Spec | None) -> None:
    """Raises ValueError for a range over an image of which the layer hides a part from a position.

    A mask hides one, and padding that lies in front of the window alone.
    """
    sizes, padding = module.kernel_size, module.padding
    if spec is None or not spec.dynamic or spec.granularity != "token":
        return
    if isinstance(sizes, int) or len(sizes) == 1:
        return  # a sequence has a range for each position
    hides = module.mask is not None
    if not hides and not isinstance(padding, str | int):
        steps = np.broadcast_to(module.kernel_dilation or 1, len(sizes))
        hides = any(
            size > 1 and tuple(np.broadcast_to(pair, 2)) == ((size - 1) * step, 0)
            for size, step, pair in zip(sizes, steps, padding, strict=True)
        )
    if hides:
        raise ValueError(
            f"the input of the masked or causal convolution {path!r} has a dynamic range with "
            "granularity='token', which is one for each example: what it hides would change the "
            "codes of what it shows. Use dynamic=False and calibrate, there and in the net's other "
            "convolutions, or granularity='example' if a range may see the whole image."
        )


def bias_in_output(module: nn.Module, contraction: Contraction, bias: jax.Array) -> jax.Array:
    """Reshapes the bias of an `Einsum` or `ConvTranspose` to the output's rank."""
    if isinstance(module, nn.ConvTranspose):
        return jnp.reshape(bias, (1,) * (contraction.rank - 1) + (-1,))
    # Einsum: the bias has the weight's free axes, in the order of the output.
    shape, sizes = [1] * contraction.rank, iter(bias.shape)
    for axis in sorted(out for out in contraction.rhs_axes if out is not None):
        shape[axis] = next(sizes)
    return jnp.reshape(bias, shape)
