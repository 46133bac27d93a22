"""The integer model: its arrays, its program, and how the program runs.

A program is a list of steps over numbered values. Quantizers turn activations into centred codes
(`Quantize`), weights are unpacked (`Unpack`), products run on codes and are scaled by one
multiplier per output channel (`Multiply`), and everything between (bias, ReLU, sums, pooling) is a
node of the net's graph, in float32. `convert` writes programs.

An integer-only program (`integer_only.rewrite`) has no floats inside: `Encode` makes the codes of
the net's input, a `Multiply` without a multiplier leaves its int32 sums, `Rescale` and `Table` turn
integers into the next codes, nodes of the graph move, pool and concatenate integers, and `Decode`
scales the codes of the output.

A step names arrays by their key in `IntegerModel.arrays`: `<layer>/weight` packed codes,
`<layer>/multiplier` float32, `<layer>/zero_point` of a weight, `<layer>/scale` and
`<layer>/tensor_scale` of one that is no operand of an integer product (groups, floats, code books),
`<layer>/<operand>_quantizer/<name>` the parameters of a quantizer, the model's own names for the
rest (`<layer>/bias`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import graph as graphs
from qkd_jax.deploy.integer import fixed_point
from qkd_jax.deploy.integer.pack import unpack
from qkd_jax.graph import Axes, Node, scale_in_output
from qkd_jax.numerics import (
    FloatFormat,
    Grid,
    IntFormat,
    Spec,
    TableFormat,
    codes_of,
    scale_values,
    widened,
)
from qkd_jax.quantize.operands import split_groups
from qkd_jax.quantizers import QUANTIZERS, code_grid, dynamic_params, live

FLOAT32_EXACT = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Quantize:
    """Step: a tensor to its grid, as a float (`hat`) and as centred codes.

    A dynamic spec has no parameters in the arrays (but for the second level of its scales): each
    entry along `axes` gets those of its own range, and the scale is written too, as large as the
    tensor. What has no codes to multiply with, for its grid is not uniform or has groups, is
    written as a float alone; `axes` are then those of the tensor with its groups cut.
    """

    name: str
    spec: Spec
    params: tuple[tuple[str, str], ...]  # parameter -> key in the arrays
    input: int
    hat: int
    codes: int = -1
    axes: tuple[int, ...] = ()
    scale: int = -1
    group: tuple[int, int] | None = None  # (axis, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Unpack:
    """Step: packed codes to centred codes and, for readers other than products, to a float.

        hat = (decode(codes) - zero_point) * scale,  scale = stored scale * tensor_scale

    in float32, the groups cut where there are any. Only integers have centred codes.
    """

    key: str
    shape: tuple[int, ...]
    format: IntFormat | FloatFormat | TableFormat
    zero_point: str | None
    scale: str
    hat: int
    codes: int
    dtype: np.dtype  # of the float
    stride: int = 1  # of the packed codes
    group: tuple[int, int] | None = None  # (axis, size)
    scale_format: str = "float32"
    tensor_scale: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Multiply:
    """Step: an integer product and its multiplier."""

    path: str
    node: Node
    inputs: tuple[int, int]  # centred codes
    narrow: bool  # both fit int8
    bound: int
    multiplier: str  # "" leaves the int32 sums
    output: int
    dtype: np.dtype  # of the net's own product
    # Dynamic scales, as large as their operand, and the operand's axes in the output.
    scales: tuple[tuple[int, tuple[int | None, ...]], ...] = ()
    pieces: int = 1  # that its sums are cut into so that each stays within `FLOAT32_EXACT`

    @property
    def exact(self) -> bool:
        """Whether float32 holds its sums, or those of its pieces, exactly in any order."""
        return self.bound <= FLOAT32_EXACT or self.pieces > 1


@dataclasses.dataclass(frozen=True, eq=False)
class Encode:
    """Step: the net's float input to centred codes, clip(round(x / scale), lo, hi)."""

    name: str
    scale: str
    zero_point: str
    lo: int
    hi: int
    input: int
    codes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Rescale:
    """Step: a sum of integers times fixed-point factors to centred codes.

    codes = clip((sum_i x_i * m0_i * 2^(exponent_i - 31) + bias) / 2^shift, lo, hi), each rounded.
    """

    name: str
    terms: tuple[tuple[int, str, str], ...]  # (integers, m0, exponent)
    bias: str
    zero_point: str  # "" for a tensor in fixed point that no quantizer asked for
    shift: int
    lo: int
    hi: int
    codes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Step: integers to centred codes, lo + the number of thresholds that sign * x has reached."""

    name: str
    input: int
    thresholds: str
    sign: str | None
    zero_point: str
    lo: int
    codes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Decode:
    """Step: the codes of the net's output to floats, outside of the integer part."""

    codes: int
    scale: str
    output: int


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """Bytes of one layer's weight, packed and as float32.

    `scale_bytes` are those of scales and zero points that are stored beside the codes; a weight in
    integer products has none, for its scales are part of the layer's multiplier.
    """

    path: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    float_bytes: int
    scale_bytes: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The program of an `IntegerModel`. It holds no arrays and is compared by identity."""

    steps: tuple[Any, ...]
    inputs: tuple[int, ...]
    signature: tuple[jax.ShapeDtypeStruct, ...]  # of the inputs; the batch axis is `batch`
    outputs: tuple[int, ...]
    arrays: dict[int, str]  # value -> key in the arrays
    numbers: dict[int, np.ndarray]  # scalars of the model's code
    batch: int | None
    out_tree: Any
    layers: tuple[LayerSize, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["program"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class IntegerModel:
    """A converted net: a pytree of its arrays.

    Attributes:
        arrays: `<layer>/weight` packed codes, `<layer>/multiplier`, biases and the quantizers'
            parameters. No quantized weight has a float copy.
        program: static.
    """

    arrays: dict[str, jax.Array]
    program: Program

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in self.arrays.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights, with the scales that are stored beside them."""
        return sum(layer.bytes + layer.scale_bytes for layer in self.program.layers)

    def report(self) -> str:
        """Returns a table of the weights: format, shape, and bytes beside those of float32."""
        rows = [("layer", "format", "shape", "bytes", "scales", "float32")]
        for layer in self.program.layers:
            shape = "x".join(map(str, layer.shape))
            sizes = [f"{n:,}" for n in (layer.bytes, layer.scale_bytes, layer.float_bytes)]
            rows.append((layer.path, layer.format, shape, sizes[0], sizes[1], sizes[2]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines.append(
            f"weights {self.weight_bytes:,} bytes, with multipliers, biases and steps "
            f"{self.nbytes:,}"
        )
        return "\n".join(line.rstrip() for line in lines)


@functools.partial(jax.jit, static_argnums=(2, 3))
def run(integer: IntegerModel, images: Any, capture: bool, formulation: str) -> Any:
    """Runs a program; see `integer_apply`."""
    program, arrays = integer.program, integer.arrays
    env: dict[int, Any] = dict(program.numbers)
    env.update((v, arrays[key]) for v, key in program.arrays.items())
    flat = jax.tree.leaves(images)
    env.update(zip(program.inputs, flat, strict=True))
    captured: dict[str, Any] = {}
    for step in program.steps:
        if isinstance(step, Quantize):
            codes = _quantize(step, env, arrays)
            captured[unique_name(captured, step.name)] = codes
        elif isinstance(step, Unpack):
            _unpack(step, env, arrays)
        elif isinstance(step, Multiply):
            env[step.output] = _multiply(step, env, arrays, formulation)
        elif isinstance(step, Encode | Rescale | Table):
            env[step.codes] = _codes(step, env, arrays)
            if step.zero_point:
                codes = env[step.codes] + arrays[step.zero_point]
                captured[unique_name(captured, step.name)] = codes
        elif isinstance(step, Decode):
            env[step.output] = env[step.codes].astype(jnp.float32) * arrays[step.scale]
        else:
            values = [env[v] for v in step.inputs]
            results = graphs.execute(step, values, program.batch, flat[0].shape[0])
            env.update(zip(step.outputs, results, strict=True))
    out = jax.tree.unflatten(program.out_tree, [env[v] for v in program.outputs])
    return (out, captured) if capture else out


def _unpack(step: Unpack, env: dict[int, Any], arrays: Mapping[str, Any]) -> None:
    """Writes a weight's centred codes and, where its scale is given, its float."""
    codes = unpack(arrays[step.key], step.shape, step.format, step.stride)
    zero_point = 0 if step.zero_point is None else arrays[step.zero_point].astype(jnp.int32)
    uniform = isinstance(step.format, IntFormat)
    if uniform and step.group is None:
        env[step.codes] = codes if step.zero_point is None else codes.astype(jnp.int32) - zero_point
    if step.scale:
        numbers = _cut(codes, step.group)
        if uniform:
            numbers = numbers.astype(jnp.int32) - zero_point
        scale = scale_values(arrays[step.scale], step.scale_format)
        if step.tensor_scale:
            scale = scale * arrays[step.tensor_scale]
        hat = step.format.decode(numbers) * scale
        env[step.hat] = hat.reshape(step.shape).astype(step.dtype)


def _cut(x: jax.Array, group: tuple[int, int] | None) -> jax.Array:
    return x if group is None else split_groups(x, *group)


def _quantize(step: Quantize, env: dict[int, Any], arrays: Mapping[str, Any]) -> jax.Array:
    """Writes x_hat and centred codes; returns the codes as the format numbers them."""
    x, quantizer = widened(env[step.input]), QUANTIZERS[step.spec.quantizer]
    params = {name: arrays[key] for name, key in step.params}
    cut = _cut(x, step.group)
    if step.spec.dynamic:
        params = dynamic_params(cut, step.spec, step.axes, known=params)
    params = live(cut, params, step.spec)
    hat = quantizer.fake_quant(cut, params, step.spec)
    grid = code_grid(params, step.spec)
    if grid is None:
        raise ValueError(f"quantizer {step.spec.quantizer!r} of {step.name!r} states no codes.")
    env[step.hat] = hat.reshape(x.shape)
    if step.codes < 0:
        return _numbered(hat, grid).reshape(x.shape)
    if step.spec.dynamic:
        env[step.scale] = jnp.broadcast_to(grid.scale, x.shape)
    # x_hat gives back its code exactly, whatever a quantizer does before it rounds; and so the
    # operations are those of the trained net. XLA fuses the two.
    centred = codes_of(hat, grid.scale)
    env[step.codes] = centred
    return (centred + grid.zero_point).astype(jnp.int32)


def _numbered(hat: jax.Array, grid: Grid) -> jax.Array:
    """Returns the codes of values on any grid, int32."""
    if isinstance(grid.format, IntFormat):
        return (codes_of(hat, grid.scale) + grid.zero_point).astype(jnp.int32)
    return grid.format.encode(hat * (1 / grid.scale)).astype(jnp.int32)


def _codes(step: Any, env: dict[int, Any], arrays: Mapping[str, Any]) -> jax.Array:
    """Computes centred codes of an integer-only program, int32."""
    if isinstance(step, Encode):
        codes = codes_of(env[step.input], arrays[step.scale])
        return jnp.clip(codes, step.lo, step.hi).astype(jnp.int32)
    if isinstance(step, Table):
        sign = None if step.sign is None else arrays[step.sign]
        return fixed_point.table(env[step.input], arrays[step.thresholds], sign) + step.lo
    total = arrays[step.bias]
    for value, m0, exponent in step.terms:
        total = total + fixed_point.rescale(env[value], arrays[m0], arrays[exponent])
    return jnp.clip(fixed_point.rounding_shift(total, step.shift), step.lo, step.hi)


def _multiply(
    step: Multiply, env: dict[int, Any], arrays: Mapping[str, Any], formulation: str
) -> jax.Array:
    lhs, rhs = (env[v] for v in step.inputs)
    if formulation == "float32" and not step.exact:
        raise ValueError(
            f"the sums of layer {step.path!r} reach {step.bound:,}, and float32 is exact up to "
            f"{FLOAT32_EXACT:,}; use formulation='int32' or 'auto'."
        )
    if formulation == "auto":
        formulation = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    if formulation in ("cpu", "accelerator"):
        # Accelerators have products of int8; XLA refuses other integer convolutions on CUDA.
        floats = formulation == "cpu" or not step.narrow
        # Integer-only, which has no multiplier, is to be just that.
        formulation = "float32" if floats and step.exact and step.multiplier else "int32"
    params = dict(step.node.params)
    if formulation == "float32":
        params["preferred_element_type"] = jnp.dtype(jnp.float32)
        params["precision"] = (jax.lax.Precision.HIGHEST,) * 2
        operand = jnp.float32
    else:
        params["preferred_element_type"] = jnp.dtype(jnp.int32)
        params["precision"] = None
        operand = jnp.int8 if step.narrow else jnp.int32
    sums = _sums(step, lhs.astype(operand), rhs.astype(operand), params)
    if not step.multiplier:
        return sums.astype(jnp.int32)
    multiplier = arrays[step.multiplier]
    for value, axes in step.scales:
        multiplier = _in_output(env[value], axes, sums.ndim) * multiplier
    return (sums.astype(jnp.float32) * multiplier).astype(step.dtype)


def _sums(step: Multiply, lhs: Any, rhs: Any, params: Mapping[str, Any]) -> jax.Array:
    """Computes a contraction, or adds those of its pieces, each exact in float32, in int32."""
    product = functools.partial(step.node.primitive.bind, **params)
    axes = cut_axes(step.node)
    most = 1 if axes is None else max(lhs.shape[axes[0]], 1)
    if not 1 <= step.pieces <= most:
        raise ValueError(
            f"the sums of layer {step.path!r} are cut into {step.pieces} pieces; they must be cut "
            f"into 1 to {most}."
        )
    if axes is None or step.pieces == 1 or lhs.dtype != jnp.float32:
        return product(lhs, rhs)
    ends = cut_ends(lhs.shape[axes[0]], step.pieces)
    parts = (
        product(
            jax.lax.slice_in_dim(lhs, lo, hi, axis=axes[0]),
            jax.lax.slice_in_dim(rhs, lo, hi, axis=axes[1]),
        )
        for lo, hi in itertools.pairwise(ends)
    )
    return functools.reduce(jnp.add, (part.astype(jnp.int32) for part in parts))


def cut_axes(node: Node) -> tuple[int, int] | None:
    """Returns the axes of both operands along which a contraction can be cut, or None."""
    numbers, params = node.params["dimension_numbers"], node.params
    if node.op == "dot_general":
        (left, right), _ = numbers
        return (left[-1], right[-1]) if left else None
    if params["feature_group_count"] == params["batch_group_count"] == 1:
        return numbers.lhs_spec[1], numbers.rhs_spec[1]
    return None


def cut_ends(size: int, pieces: int) -> list[int]:
    """Returns the ends of nearly equal pieces of an axis."""
    return [size * i // pieces for i in range(pieces + 1)]


def _in_output(scale: jax.Array, axes: Axes, rank: int) -> jax.Array:
    """One scale for each of a contraction's sums, from scales that are equal along each sum."""
    first = tuple(slice(0, 1) if out is None else slice(None) for out in axes)
    return scale_in_output(scale[first], axes, rank)


def unique_name(names: Container[str], name: str) -> str:
    """Returns `name`, or `name#2` and so on where that exists."""
    count = 1
    while (unique := name if count == 1 else f"{name}#{count}") in names:
        count += 1
    return unique
