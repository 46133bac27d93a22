"""Activations on a grid in LiteRT: QUANTIZE, a clip of the codes, DEQUANTIZE.

LiteRT has int8 codes with any zero point and int16 codes with the zero point 0. Unsigned codes of
8 bits are shifted by 128; a range that is narrower than its type's has a MAXIMUM and a MINIMUM of
codes behind it, which is right and one more pass over the tensor.
"""

import numpy as np

from qkd_jax.deploy.graph_values import is_transformed, pre_affine
from qkd_jax.deploy.litert.flat_file import FileTensor, TensorGrid
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.graph import Node
from qkd_jax.numerics import Grid
from qkd_jax.quantize.traced import grid_of, is_dynamic

LIMITS = {"int8": (-128, 127), "int16": (-32768, 32767)}


def write_quantizer(lowering: Lowering, node: Node) -> FileTensor:
    """Writes a quantizer of an activation.

    Raises:
        ValueError: a dynamic range, one scale per channel, or a grid that LiteRT has no type for.
    """
    x, path, operand = lowering.tensors[node.inputs[0]], node.params["path"], node.params["operand"]
    if is_dynamic(lowering.traced, node):
        raise ValueError(
            f"the {operand} of {path!r} finds its range at run time; LiteRT's integer kernels have "
            "ranges that are known beforehand. Use dynamic=False and calibrate, or leave this "
            "operand in float."
        )
    grid = grid_of(lowering.traced, node)
    if grid.scale.size > 1 or grid.zero_point.size > 1:
        raise ValueError(
            f"the {operand} of {path!r} has {grid.scale.size} scales, one for each channel or "
            "member of nn.vmap; LiteRT's activations have one. Leave this operand in float."
        )
    scale, zero_point = np.float32(grid.scale.reshape(())), int(grid.zero_point.reshape(()))
    grid = Grid(scale, zero_point, grid.format)
    dtype, stored, ends = storage_of(grid, f"the {operand} of {path!r}")
    parameters = node.inputs[1:] if is_transformed(lowering.traced, node) else None
    key = x, parameters, stored.scale.item(), int(stored.zero_point), ends, dtype
    key = (*key, lowering.traced.spec(node).rounding)
    if key not in lowering.grids:
        before = _transform if parameters else _floored
        x = before(lowering, node, x, grid)
        name = f"{path}/{operand}" if path else operand
        codes = lowering.add("QUANTIZE", [x], x.shape, node, dtype=dtype, grid=stored, name=name)
        codes = clipped(lowering, node, codes, ends)
        real = lowering.add("DEQUANTIZE", [codes], x.shape, node)
        lowering.grids[key] = real
    return lowering.grids[key]


def storage_of(grid: Grid, where: str) -> tuple[str, TensorGrid, tuple[int, int]]:
    """Returns (type, grid as it is stored, lowest and highest code) of a tensor's codes.

    Raises:
        ValueError: codes of more than 8 bits with a zero point.
    """
    format, zero_point = grid.format, int(grid.zero_point)
    dtype, shift = "int8", 0
    if format.bits > 8:
        dtype = "int16"
        if not format.signed or zero_point:
            kind = "unsigned" if not format.signed and not zero_point else "affine"
            raise ValueError(
                f"{where} has {format.bits} bits and is {kind}; LiteRT's int16 has the zero point "
                "0. Use signed=True, symmetric=True, or 8 bits."
            )
    elif not format.signed:
        shift = 128
    stored = TensorGrid(
        np.asarray(grid.scale, np.float32), np.asarray(zero_point - shift, np.int64)
    )
    return dtype, stored, (format.qmin - shift, format.qmax - shift)


def clipped(lowering: Lowering, node: Node, codes: FileTensor, ends: tuple[int, int]) -> FileTensor:
    """Clips codes to a range, where it is not their type's."""
    for op, end, limit in zip(("MAXIMUM", "MINIMUM"), ends, LIMITS[codes.dtype], strict=True):
        if end != limit:
            assert codes.grid is not None
            number = lowering.constant(np.asarray(end, codes.dtype), "end", codes.grid)
            codes = lowering.add(
                op, [codes, number], codes.shape, node, dtype=codes.dtype, grid=codes.grid
            )
    return codes


def _transform(lowering: Lowering, node: Node, x: FileTensor, grid: Grid) -> FileTensor:
    """Writes the affine function before a grid, of the magnitude where codes are signed."""
    add = lambda op, *inputs: lowering.add(op, list(inputs), x.shape, node)
    gain, offset = (
        lowering.number(c, "quantizer_constant") for c in pre_affine(lowering.traced, node)
    )
    magnitude = add("ABS", x) if grid.format.signed else x
    affine = _floored(lowering, node, add("ADD", add("MUL", magnitude, gain), offset), grid)
    if not grid.format.signed:
        return affine
    highest = np.float32(grid.format.qmax) * np.float32(grid.scale)
    limited = add("MINIMUM", add("RELU", affine), lowering.number(highest, "bound"))
    return add("MUL", limited, add("SIGN", x))


def _floored(lowering: Lowering, node: Node, x: FileTensor, grid: Grid) -> FileTensor:
    """Takes values down to their codes where the spec does; QUANTIZE takes the nearest."""
    if lowering.traced.spec(node).rounding != "floor":
        return x
    scale = np.float32(grid.scale)
    down, back = (lowering.number(s, "step") for s in (np.float32(1) / scale, scale))
    codes = lowering.add("FLOOR", [lowering.add("MUL", [x, down], x.shape, node)], x.shape, node)
    return lowering.add("MUL", [codes, back], x.shape, node)
