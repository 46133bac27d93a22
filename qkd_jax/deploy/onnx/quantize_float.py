"""Activations on a floating-point grid in ONNX, written out in float32 arithmetic.

Engines have no kernels that compute on such codes, and their own conversions to them differ from
engine to engine; what stands here is `FloatFormat.fake_cast`, operation by operation.
"""

import dataclasses
import math

import numpy as np

from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.numerics import FloatFormat, Grid, check_scale
from qkd_jax.quantize.traced import known_params, named
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
