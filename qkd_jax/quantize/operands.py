"""One operand of a layer while a net runs: what a hook of `Frame` is given, and the usual hooks.

A hook is a function `hook(use: OperandUse) -> (x_hat, grid)`; it is called for every operand that
has a spec, inside the trace. `grid` is an `OperandGrid`, and `x_hat` then float32 or wider; or None
where the contraction has to run on `x_hat`: the operand is float, its grid is not uniform, or its
scale varies along an axis that is summed over. `quantize_operand` is the hook of an ordinary
application. Write another one to observe operands, to switch quantizers or to look at them; state
that a hook writes next to a quantizer comes out of `nn.scan`, `nn.vmap` and `nn.remat` as the
layer's parameters do, where values handed to a callback would leak.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from qkd_jax.graph import marker_name
from qkd_jax.numerics import Spec, widened
from qkd_jax.quantize.contraction import Contraction, OperandGrid, last_summed
from qkd_jax.quantize.variables import quantizer_key
from qkd_jax.quantizers import QUANTIZERS, dynamic_params, live

ROUNDING = "rounding"
"""Name of the random stream of stochastic rounding, in the `rngs` of `apply`."""


class OperandAxes(NamedTuple):
    """The axes of an operand that its quantizer must know.

    Attributes:
        channels: axes with a scale of their own under granularity "channel".
        rows: the same under "token".
        group_axis: the axis that groups cut, or None where there are none.
        blocks: the axes beside it along which groups differ, of an activation: all others, so that
            no block sees another. None for a weight, whose groups differ along `channels`.
    """

    channels: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    group_axis: int | None = None
    blocks: tuple[int, ...] | None = None


class QuantizedOperand(NamedTuple):
    """An operand on its grid.

    Attributes:
        x_hat: the operand as its layer reads it; x itself where it is not calibrated. In float32 or
            wider where it has a grid: bfloat16 has not every code.
        grid: of its codes, or None; see the module's docstring.
        params: the quantizer's parameters as they are for x, or None where it is not calibrated.
    """

    x_hat: jax.Array
    grid: OperandGrid | None
    params: Mapping[str, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class OperandUse:
    """One use of an operand with a spec.

    Attributes:
        path: the layer's path.
        operand: "weight", "input", "other" or "output".
        x: the operand, in float.
        spec: its spec.
        axes: axes of x, its groups cut, that have parameters of their own.
        group: (axis, size) of the groups that x is cut into, or None.
        module: the bound module whose scope holds the variables.
        part: name of the contraction inside the module (attention has two), or "".
        batch_axes: axes of x that count examples.
        axis_name: the mapped axis over which a dynamic range is shared, or None.
    """

    path: str
    operand: str
    x: jax.Array
    spec: Spec
    axes: tuple[int, ...]
    group: tuple[int, int] | None
    module: nn.Module
    part: str = ""
    batch_axes: tuple[int, ...] = ()
    axis_name: str | None = None

    @property
    def params(self) -> Mapping[str, jax.Array] | None:
        """The quantizer's parameters, or None before calibration; numbers where all x shares them.

        Those of a lifted layer (`nn.scan`, `nn.vmap`) are kept with the rank of x.
        """
        params = self.read(quantizer_key(self.operand))
        if params is None or self.axes:
            return params
        return jax.tree.map(lambda a: jnp.reshape(a, ()) if a.size == 1 else a, params)

    def read(self, key: str) -> Any:
        """Returns a variable next to the quantizer, or None."""
        return read_variable(self.module, self.part, key)

    def write(self, key: str, value: Any) -> None:
        """Sets a variable next to the quantizer; the collection "params" must be mutable."""
        scope = self.module.scope
        assert scope is not None
        if self.part:
            key, value = self.part, {**(scope.get_variable("params", self.part) or {}), key: value}
        scope.put_variable("params", key, value)

    def cut(self, x: jax.Array) -> jax.Array:
        """Returns an array of x's shape with its groups cut."""
        return x if self.group is None else split_groups(x, *self.group)

    def fake_quant(
        self, x: jax.Array, params: Mapping[str, jax.Array], **options: Any
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Returns (x on the grid of `params`, in float32 or wider, the parameters for x)."""
        axis_name = options.pop("axis_name", None)
        cut = self.cut(widened(x))
        if self.spec.dynamic:
            params = dynamic_params(cut, self.spec, self.axes, axis_name=axis_name, known=params)
        axes, rank = self.axes, cut.ndim
        if self.group is not None:
            cut, axes = joined_axes(cut, axes)
            params = {k: _with_axes(a, self.axes, axes, cut.ndim) for k, a in params.items()}
        params = live(cut, params, self.spec)
        x_hat = QUANTIZERS[self.spec.quantizer].fake_quant(cut, params, self.spec, **options)
        if self.group is not None:
            params = {k: _with_axes(a, axes, self.axes, rank) for k, a in params.items()}
        return jnp.reshape(x_hat, x.shape), params

    def quantize(self) -> QuantizedOperand:
        """Quantizes x where its quantizer is calibrated."""
        params, spec = self.params, self.spec
        if params is None:
            return QuantizedOperand(self.x, None, None)
        key = None
        assert self.module.scope is not None
        if spec.rounding == "stochastic" and self.module.scope.has_rng(ROUNDING):
            key = self.module.make_rng(ROUNDING)
        quantized = functools.partial(
            self.fake_quant, batch_axes=self.batch_axes, key=key, axis_name=self.axis_name
        )
        if jnp.issubdtype(self.x.dtype, jnp.floating) and self.x.dtype.itemsize < 4:
            # Kept for the backward pass as it is, in place of what it is widened to.
            quantized = jax.checkpoint(quantized)
        with jax.named_scope(quantizer_key(self.operand)):  # for profiles
            x_hat, params = quantized(self.x, params)
        grid = None
        if self.group is None:
            grid = QUANTIZERS[spec.quantizer].integer_view(params, spec)
        if grid is None:
            return QuantizedOperand(x_hat.astype(self.x.dtype), None, params)
        scale, _, format = grid
        return QuantizedOperand(x_hat, OperandGrid(scale, format, not spec.symmetric), params)


OperandHook = Callable[[OperandUse], tuple[jax.Array, OperandGrid | None]]


def quantize_operand(use: OperandUse) -> tuple[jax.Array, OperandGrid | None]:
    """Hook of an ordinary application: fake quantization where the operand is calibrated."""
    return use.quantize()[:2]


def watching(watch: Callable[..., None]) -> OperandHook:
    """Returns a hook that quantizes and calls watch(path, operand, x, x_hat, spec, params)."""

    def hook(use: OperandUse) -> tuple[jax.Array, OperandGrid | None]:
        x_hat, grid, params = use.quantize()
        if params is not None:
            watch(use.path, use.operand, use.x, x_hat, use.spec, params)
        return x_hat, grid

    return hook


def mark_unquantized(use: OperandUse) -> tuple[jax.Array, None]:
    """Hook that traces quantizers as equations which name them and compute nothing."""
    name = marker_name("quantizer", use.path, use.operand, _axes_text(_own_axes(use)), use.group)
    return _marked(name, _unchanged, use.x), None


def mark_operand(use: OperandUse) -> tuple[jax.Array, None]:
    """Hook of a traced application: each quantizer is one named equation, for `graph`.

    Its result is float32 or wider: a layer of bfloat16 casts it, and what reads codes need not.
    """
    own = _own_axes(use)
    params = use.params
    if params is None:
        return mark_unquantized(use)
    keys = sorted(params)

    def fake_quant(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        given = dict(zip(keys, leaves, strict=True))
        return use.fake_quant(x, given, batch_axes=(), key=None)[0]

    values = [params[k] for k in keys]
    call = fake_quant, use.x, values
    return _marked_quantizer(use.path, use.operand, own, use.group, *call), None


def _own_axes(use: OperandUse) -> tuple[bool, ...] | None:
    """Per axis, whether it has dynamic ranges of its own, which no parameter shows; else None."""
    rank = use.x.ndim + (use.group is not None)
    return tuple(i in use.axes for i in range(rank)) if use.spec.dynamic else None


def _axes_text(own: tuple[bool, ...] | None) -> str:
    return "" if own is None else "".join("01"[axis] for axis in own)


def _marked_quantizer(
    path: str,
    operand: str,
    own: tuple[bool, ...] | None,
    group: tuple[int, int] | None,
    function: Callable[..., jax.Array],
    x: jax.Array,
    params: Sequence[jax.Array],
) -> jax.Array:
    """Runs a quantizer as one equation, whose parameters broadcast against x under vmap too.

    The members of a vmapped layer lie along the first axis of what the equation reads and writes.

    Args:
        path: the layer's path.
        operand: the operand's name.
        own: per axis of x, its groups cut, whether it has dynamic ranges of its own; None for
            static ones.
        group: (axis, size) of the groups, or None.
        function: the quantizer, of x and its parameters.
        x: the operand.
        params: its parameters, numbers or of the rank of x with its groups cut.
    """
    name = marker_name("quantizer", path, operand, _axes_text(own), group)
    call = custom_vmap(lambda x, *params: _marked(name, function, x, *params))

    @call.def_vmap
    def _(size: int, is_mapped: Any, x: jax.Array, *params: jax.Array) -> tuple[jax.Array, bool]:
        x_mapped, *mapped = is_mapped
        if own is not None and not x_mapped:  # the range is that of x: one for all members
            one = [p[0] if m else p for p, m in zip(params, mapped, strict=True)]
            return _marked_quantizer(path, operand, own, group, function, x, one), False
        rank, stacked = x.ndim - x_mapped + (group is not None), []
        for param, is_stacked in zip(params, mapped, strict=True):
            if is_stacked and param.ndim == 1:  # a number of each member
                param = jnp.reshape(param, (size, *(1,) * rank))
            stacked.append(param if is_stacked or param.ndim == 0 else param[None])

        def members(x: jax.Array, *params: jax.Array) -> jax.Array:
            shared = [p.ndim == 0 or p.shape[0] == 1 for p in params]
            args = [p[0] if s and p.ndim else p for p, s in zip(params, shared, strict=True)]
            return jax.vmap(function, (0, *(None if s else 0 for s in shared)))(x, *args)

        x = x if x_mapped else jnp.broadcast_to(x, (size, *x.shape))
        ranges = None if own is None else (True, *own)
        groups = None if group is None else (group[0] + 1, group[1])
        return _marked_quantizer(path, operand, ranges, groups, members, x, stacked), True

    return call(x, *params)


def mark_skipped(path: str, operand: str, x: jax.Array) -> jax.Array:
    """Returns x behind a marker: it stays in float."""
    return _marked(marker_name("skipped", path, operand), _unchanged, x)


def _marked(
    name: str, function: Callable[..., jax.Array], x: jax.Array, *params: jax.Array
) -> jax.Array:
    """Runs `function` as one jaxpr equation that carries `name`."""

    def call(x: jax.Array, *params: jax.Array) -> jax.Array:
        return function(x, *params)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call)(x, *params)


def _unchanged(x: jax.Array) -> jax.Array:
    # A bare identity would be forwarded around its equation, and the marker lost.
    return lax.optimization_barrier(x)


def read_variable(module: nn.Module, part: str, key: str) -> Any:
    """Returns a variable of ours under a bound layer (or under a part of it), or None."""
    if module.scope is None:
        return None
    if not part:
        return module.scope.get_variable("params", key)
    return (module.scope.get_variable("params", part) or {}).get(key)


def split_groups(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cuts an axis into [..., groups, size, ...]."""
    return jnp.reshape(x, (*x.shape[:axis], -1, size, *x.shape[axis + 1 :]))


def joined_axes(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """Joins neighbouring axes that share parameters; returns x and the axes that have their own.

    A convolution's kernel in groups is [height, width, groups, size, outputs]. On the CPU jaxlib
    0.10.1 ends the process where something is added to a sum or an extremum over its axes 0, 1 and
    3; over two of four axes it does not.

    Args:
        x: an operand with its groups cut.
        axes: those that have parameters of their own.
    """
    sizes: list[int] = []
    own: list[int] = []
    for axis, size in enumerate(x.shape):
        if axis in axes:
            own.append(len(sizes))
        elif axis and axis - 1 not in axes:
            sizes[-1] *= size
            continue
        sizes.append(size)
    return jnp.reshape(x, sizes), tuple(own)


def _with_axes(param: jax.Array, old: Sequence[int], new: Sequence[int], rank: int) -> jax.Array:
    """Returns a parameter with its own axes at other places among `rank`; a number as it is."""
    if param.ndim == 0:
        return param
    sizes = dict(zip(new, (param.shape[axis] for axis in old), strict=True))
    return jnp.reshape(param, [sizes.get(axis, 1) for axis in range(rank)])


def parameter_axes(
    spec: Spec, axes: OperandAxes, path: str, operand: str, x: jax.Array
) -> tuple[tuple[int, ...], tuple[int, int] | None]:
    """Returns (axes with parameters of their own, (axis, size) of the groups or None).

    Raises:
        ValueError: groups where nothing is summed over, that do not divide the axis, or of an
            activation whose range is not dynamic.
    """
    if spec.granularity in ("tensor", "channel", "token", "example"):
        own = dict(tensor=(), channel=axes.channels, token=axes.rows, example=batch_axes_of(x))
        return own[spec.granularity], None
    size, axis = int(spec.granularity), axes.group_axis
    if axis is None:
        raise ValueError(
            f"{operand} of layer {path!r} has granularity={size}, but it has no axis that groups "
            "can cut: it goes into no sum, or its sum runs over tokens. Use granularity='channel' "
            "for a weight, 'token' with dynamic=True for others."
        )
    if axes.blocks is not None and not spec.dynamic:
        raise ValueError(
            f"{operand} of layer {path!r} has granularity={size} and dynamic=False; the blocks of "
            "an activation have ranges at run time alone. Use dynamic=True, or "
            "granularity='tensor'."
        )
    if x.shape[axis] % size:
        fitting = [n for n in range(1, x.shape[axis] + 1) if x.shape[axis] % n == 0]
        raise ValueError(
            f"{operand} of layer {path!r} has granularity={size}, which does not divide its "
            f"contraction axis of {x.shape[axis]} (axis {axis} of {tuple(x.shape)}). Use one of "
            f"{', '.join(map(str, fitting))}, or 'channel'."
        )
    beside = axes.channels if axes.blocks is None else axes.blocks
    kept = [a if a < axis else a + 1 for a in beside]
    return tuple(sorted([*kept, axis])), (axis, size)


def left_axes(contraction: Contraction) -> OperandAxes:
    """Returns the axes of a contraction's left operand."""
    axis = last_summed(contraction.lhs_axes)
    return OperandAxes((), contraction.rows, axis, _others(axis, len(contraction.lhs_axes)))


def other_axes(contraction: Contraction, *, masked: bool) -> OperandAxes:
    """Returns the axes of a contraction's right operand that is an activation.

    Args:
        contraction: of two activations.
        masked: whether its sums run over tokens of which some are hidden; then it has no blocks.
    """
    if masked:
        return OperandAxes(rows=contraction.right_rows)
    axis = contraction.group_axis
    blocks = _others(axis, len(contraction.rhs_axes))
    return OperandAxes((), contraction.weight_channels, axis, blocks)


def _others(axis: int | None, rank: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if i != axis)


def right_axes(contraction: Contraction) -> OperandAxes:
    """Returns the axes of a contraction's right operand, a weight."""
    channels = contraction.weight_channels
    return OperandAxes(channels, channels, contraction.group_axis)


def batch_axes_of(x: jax.Array) -> tuple[int, ...]:
    """Axes that count examples: the first, unless the layer is called on one example's features."""
    return (0,) if x.ndim > 1 else ()
