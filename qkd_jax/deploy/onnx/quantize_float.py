"""Activations on a floating-point grid, or in blocks with rounded scales (MX, NVFP4), in ONNX.

They are written out in float32 arithmetic: engines have no kernels that compute on such codes, and
not all of them have the conversions. What stands here is `FloatFormat.fake_cast` and
`numerics.scale_params`, operation by operation.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.numerics import (
    FLOAT_FORMATS,
    MIN_SCALE,
    TENSOR_SCALE,
    FloatFormat,
    Grid,
    Spec,
    check_scale,
    scale_format,
)
from qkd_jax.numerics.scale_formats import HIGHEST_EXPONENT, LOWEST_EXPONENT
from qkd_jax.quantize.traced import known_params, named, own_axes, quantizer_params
from qkd_jax.quantizers import code_grid

LARGEST_BITS = 8


def float_format(export: Export, node: Node) -> FloatFormat | None:
    """Returns the format of a quantizer whose scale is known beforehand, if it is one of floats."""
    grid = _grid(export, node)
    return grid.format if grid is not None and isinstance(grid.format, FloatFormat) else None


def _grid(export: Export, node: Node) -> Grid | None:
    params = known_params(export.traced, node)
    return None if params is None else code_grid(params, export.traced.spec(node))


def write_float(export: Export, node: Node, format: FloatFormat) -> Tensor:
    """Writes a quantizer of floats whose scale is known: cast(x / scale) * scale.

    Raises:
        ValueError: more than one scale, or a format of more than 8 bits.
    """
    where, x = named(export.traced, node), export.tensors[node.inputs[0]]
    grid = _grid(export, node)
    assert grid is not None
    check_scale(f"the scale of {where}", grid.scale)
    scale = np.asarray(grid.scale, np.float32)
    if scale.size > 1 or format.bits > LARGEST_BITS:
        raise ValueError(
            f"{where} has {scale.size} scales of {format.bits} bits; to_onnx writes activations in "
            f"floats of up to {LARGEST_BITS} bits with one scale. Use quantizer='float' with 8 "
            "bits and granularity='tensor', or leave this operand in float."
        )
    scale = scale.reshape(())
    key = (x.name, node.inputs[1:], format)
    if key not in export.grids:
        number = lambda value: export.writer.constant(np.float32(value), "number")
        units = export.add("Mul", [x.name, number(np.float32(1) / scale)], node)
        cast = write_cast(export, node, units, format)
        export.grids[key] = export.add("Mul", [cast, number(scale)], node)
    return dataclasses.replace(x, name=export.grids[key])


def has_own_scale(export: Export, node: Node) -> bool:
    """Whether a dynamic range is one of floats, in blocks, or has scales in another format."""
    spec = export.traced.spec(node)
    in_blocks = node.params["group"] is not None
    return spec.quantizer == "float" or in_blocks or scale_format(spec) != "float32"


def write_dynamic(export: Export, node: Node) -> Tensor:
    """Writes a quantizer whose scales are found at run time: one for each block, row or tensor.

        far = max|x|;  scale = far / highest, as the scale format has it;  cast(x / scale) * scale

    Raises:
        ValueError: a spec that has a zero point, other scales, or another rounding.
    """
    spec, where = export.traced.spec(node), named(export.traced, node)
    name = scale_format(spec)
    elements = spec.format if spec.quantizer == "uniform" else _elements(spec)
    plain = spec.rounding == "even" and not spec.power_of_two and spec.symmetric and spec.signed
    own = name in ("e8m0", "e4m3fn") and spec.scaling != "qmax_half"
    if (
        elements is None
        or not plain
        or not (own or (name == "float32" and elements != spec.format))
    ):
        raise ValueError(
            f"{where} has a dynamic range in blocks, or scales in {name}; to_onnx writes those of "
            "quantizer='float', and of 'uniform' with scale_format 'e8m0' or 'e4m3fn', signed, "
            "symmetric and rounded to the nearest. Use one of these, or granularity='token'."
        )
    writer = export.writer
    add = lambda op, *inputs: export.add(op, list(inputs), node)
    number = lambda value: writer.constant(np.float32(value), "number")
    x = writer.plain(export.tensors[node.inputs[0]], node.scope)
    shape, given = list(x.shape), x.name
    if node.params["group"] is not None:
        axis, size = node.params["group"]
        if shape.count(-1) > 1:
            raise unsupported(node, "the batch is in several of its axes")
        shape[axis : axis + 1] = [shape[axis] // size, size]
        given = add("Reshape", given, writer.shape_constant(shape))
    axes = own_axes(node)
    reduced = [axis for axis in range(len(shape)) if axis not in axes]
    far = export.add_reduced("ReduceMax", add("Abs", given), reduced, node)
    second = None
    if name == "e4m3fn":
        kept = quantizer_params(export.traced, node)[TENSOR_SCALE]
        second = np.float32(np.asarray(kept).reshape(()))
    scale = _scale(export, node, far, elements.max, name, second)
    units = add("Mul", given, add("Div", number(1), add("Max", scale, number(MIN_SCALE))))
    if isinstance(elements, FloatFormat):
        values = write_cast(export, node, units, elements)
    else:
        values = add("Clip", add("Round", units), number(elements.qmin), number(elements.qmax))
    real = add("Mul", values, scale)
    if node.params["group"] is not None:
        real = add("Reshape", real, writer.shape_constant(x.shape))
    return dataclasses.replace(x, name=real)


def _elements(spec: Spec) -> FloatFormat | None:
    params: Any = {"scale": jnp.float32(1)}
    grid = code_grid(params, spec) if spec.quantizer == "float" else None
    return None if grid is None else grid.format


def _scale(
    export: Export, node: Node, far: str, highest: float, name: str, second: np.float32 | None
) -> str:
    """Writes `numerics.scale_params`; `second` is the number of two-level scales."""
    add = lambda op, *inputs: export.add(op, list(inputs), node)
    number = lambda value: export.writer.constant(np.float32(value), "number")
    is_zero, one = add("Equal", far, number(0)), number(1)
    if name == "e8m0":
        top = math.floor(math.log2(highest))
        power = write_power_below(export, node, far, LOWEST_EXPONENT + top, HIGHEST_EXPONENT)
        return add("Where", is_zero, one, add("Mul", power, number(2.0**-top)))
    # As XLA compiles a division by a constant.
    scale = add("Mul", far, number(np.float32(1) / np.float32(highest)))
    if second is None:
        return add("Where", is_zero, one, add("Max", scale, number(MIN_SCALE)))
    small = FLOAT_FORMATS["e4m3fn"]
    whole = number(max(second, np.float32(2.0**LOWEST_EXPONENT / small.smallest)))
    block = write_cast(
        export, node, add("Max", add("Div", scale, whole), number(small.smallest)), small
    )
    return add("Mul", add("Where", is_zero, one, block), whole)


def write_cast(export: Export, node: Node, name: str, format: FloatFormat) -> str:
    """Writes the nearest value of a format: ties to the even mantissa, saturating.

    near = round(|x| / unit) * unit,  unit = 2^(max(floor(log2 |x|), 1 - bias) - mantissa bits)
    """
    add = lambda op, *inputs: export.add(op, list(inputs), node)
    number = lambda value: export.writer.constant(np.float32(value), "number")
    size = add("Min", add("Abs", name), number(format.max))
    lowest, highest = 1 - format.bias, math.floor(math.log2(format.max))
    power = write_power_below(export, node, size, lowest, highest)
    unit = add("Mul", power, number(2.0**-format.mantissa_bits))
    near = add("Mul", add("Round", add("Div", size, unit)), unit)
    return add("Mul", near, add("Sign", name))


def write_power_below(export: Export, node: Node, size: str, lowest: int, highest: int) -> str:
    """Writes the largest power of two up to a magnitude, between 2^lowest and 2^highest.

    A logarithm is right but for its last bits: two comparisons put a neighbour right. The powers
    stand in a table, for engines' own are not exact either.
    """
    add = lambda op, *inputs: export.add(op, list(inputs), node)
    number = lambda value: export.writer.constant(np.float32(value), "number")
    exponent = add("Floor", add("Mul", add("Log", size), number(1 / math.log(2))))
    exponent = add("Clip", exponent, number(lowest), number(highest))
    place = export.cast(add("Sub", exponent, number(lowest)), np.int32, node)
    powers = np.ldexp(np.float32(1), np.arange(lowest, highest + 1)).astype(np.float32)
    power = add("Gather", export.writer.constant(powers, "powers"), place)
    power = add("Where", add("Less", size, power), add("Mul", power, number(0.5)), power)
    twice = add("Mul", power, number(2))
    power = add("Where", add("GreaterOrEqual", size, twice), twice, power)
    return add("Clip", power, number(2.0**lowest), number(2.0**highest))
