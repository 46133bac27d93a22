"""Activations on a grid in ONNX: an optional Clip, QuantizeLinear, DequantizeLinear.

For an engine that adds a grid's lowest code before it rounds (`Target.offset_before_rounding`),
Mul and Round, the net's own arithmetic, stand before QuantizeLinear, whose scale is then 1: what it
stores are integers already. It stays because engines choose their integer kernels by it.

Codes of more than 8 bits are Mul, Round, Clip and Mul throughout. No engine here has kernels for
them, and OpenVINO leaves a pair of 16 bits out and does not round one of 9 to 15
(findings/openvino_wide_grids.sh).

A dynamic range is written out, in the net's own arithmetic: ONNX's DynamicQuantizeLinear has one
range for the whole tensor, unsigned and affine, and divides.
"""

import dataclasses

import numpy as np

from qkd_jax.deploy.graph_values import is_transformed, pre_affine
from qkd_jax.deploy.onnx.context import Dequantized, DynamicRange, Export
from qkd_jax.deploy.onnx.quantize_float import (
    float_format,
    has_own_scale,
    write_dynamic,
    write_float,
)
from qkd_jax.deploy.onnx.writer import Tensor, Writer
from qkd_jax.graph import Node
from qkd_jax.numerics import MIN_SCALE, Grid
from qkd_jax.quantize.dynamic_grids import dynamic_grid
from qkd_jax.quantize.traced import grid_of, is_dynamic
from qkd_jax.quantizers import facts

# Operations that grids are moved across before neighbours are compared.
MOVED = frozenset("MaxPool Reshape Transpose Squeeze Unsqueeze Slice Gather".split())


def write_quantizer(export: Export, node: Node) -> Tensor:
    """Writes a quantizer of an activation.

    The grid's own range is narrower than the type's below 8 bits and for narrow ranges, so a Clip
    to its ends comes first. A ReLU in front of a Clip at 0 does nothing and is left out.
    """
    if is_dynamic(export.traced, node):
        own = has_own_scale(export, node)
        return write_dynamic(export, node) if own else _write_dynamic(export, node)
    format = float_format(export, node)
    if format is not None:
        return write_float(export, node, format)
    x, path = export.tensors[node.inputs[0]], node.params["path"]
    grid = grid_of(export.traced, node)
    if grid.scale.size > 1 or grid.zero_point.size > 1:
        raise ValueError(
            f"the {node.params['operand']} of {path!r} has {grid.scale.size} scales, one for each "
            "channel or member of nn.vmap; to_onnx writes activations per tensor. Leave this "
            "operand in float, or give it a dynamic range."
        )
    grid = Grid(grid.scale.reshape(()), grid.zero_point.reshape(()), grid.format)
    if any(not np.isfinite(a) for a in (grid.scale, grid.zero_point)):
        raise ValueError(f"the step of {path!r} is not finite: {grid.scale}.")
    grid = Grid(np.float32(grid.scale), int(grid.zero_point), grid.format)
    known, transformed = export.dequantized.get(x.name), is_transformed(export.traced, node)
    if known is not None and known.grid == grid and not transformed:
        return x  # on this very grid already: its codes would come out as they are
    parameters = node.inputs[1:] if transformed else None
    key = (x.name, parameters, grid, export.traced.spec(node).rounding)
    if key not in export.grids:
        before = _transform if transformed else _floored
        export.grids[key] = _write_grid(export, node, before(export, node, x.name, grid), grid)
    return dataclasses.replace(x, name=export.grids[key])


def _write_dynamic(export: Export, node: Node) -> Tensor:
    """Writes a quantizer with a dynamic range, operation by operation."""
    format, axes = dynamic_grid(export.traced, node)
    spec, path = export.traced.spec(node), node.params["path"]
    if not facts(spec.quantizer).range_grid or spec.power_of_two or spec.rounding == "away":
        raise ValueError(
            f"the {node.params['operand']} of {path!r} has a dynamic range ({spec.label}); to_onnx "
            "writes such ranges for quantizer='uniform' with a scale of any size, rounded half to "
            "even or down."
        )
    writer, x = export.writer, export.tensors[node.inputs[0]]
    if x.order is not None and x.order[0] in axes:
        x = writer.ordered(x, node.scope)
    add = lambda op, *inputs, **attributes: export.add(op, list(inputs), node, **attributes)
    number = lambda value: writer.constant(np.float32(value), "number")
    # As XLA compiles the net's division by a number.
    divided = lambda name, by: add("Mul", name, number(np.float32(1) / np.float32(by)))
    reduced = [i for i, axis in enumerate(x.perm) if axis not in axes]
    ends = {}
    for kind in ("Min", "Max"):
        end = export.add_reduced(f"Reduce{kind}", x.name, reduced, node)
        if not axes:
            end = add("Squeeze", end, writer.shape_constant(reduced, "axes"))
        ends[kind] = add(kind, end, number(0))
    lo, hi = ends["Min"], ends["Max"]
    if not spec.symmetric:
        width = divided(add("Sub", hi, lo), format.qmax - format.qmin)
    elif spec.scaling != "cover":
        half = 0.5 if spec.scaling == "qmax_half" else 0
        width = divided(add("Max", hi, add("Neg", lo)), format.qmax + half)
    else:
        width = divided(hi, format.qmax)
        if format.signed:
            width = add("Max", width, divided(lo, format.qmin))
    is_constant = add("Equal", width, number(0))
    scale = add("Where", is_constant, number(1), add("Max", width, number(MIN_SCALE)))
    inverse, zero_point = add("Div", number(1), scale), ""
    if not spec.symmetric:
        lowest = add("Round", add("Sub", number(format.qmin), add("Mul", lo, inverse)))
        lowest = add("Clip", lowest, number(format.qmin), number(format.qmax))
        nearest = number(min(max(0, format.qmin), format.qmax))
        zero_point = add("Where", is_constant, nearest, lowest)
    codes = add("Floor" if spec.rounding == "floor" else "Round", add("Mul", x.name, inverse))
    codes = add("Add", codes, zero_point) if zero_point else codes
    codes = add("Clip", codes, number(format.qmin), number(format.qmax))
    centred = add("Sub", codes, zero_point) if zero_point else codes
    real = add("Mul", centred, scale)
    dynamic = DynamicRange("", centred, scale, zero_point, axes, format)
    if format.bits <= 8:
        held = add("Add", codes, number(dynamic.offset)) if dynamic.offset else codes
        dynamic = dataclasses.replace(dynamic, codes=export.cast(held, np.uint8, node))
    export.dequantized[real] = Dequantized(format, range=dynamic)
    return dataclasses.replace(x, name=real)


def _transform(export: Export, node: Node, name: str, grid: Grid) -> str:
    """Writes the affine function before a grid, with the Clip of a signed one."""
    writer = export.writer
    constants = [
        writer.constant(np.float32(c), "quantizer_constant")
        for c in pre_affine(export.traced, node)
    ]
    magnitude = export.add("Abs", [name], node) if grid.format.signed else name
    affine = export.add("Mul", [magnitude, constants[0]], node)
    affine = export.add("Add", [affine, constants[1]], node)
    affine = _floored(export, node, affine, grid)
    if not grid.format.signed:
        return affine
    # Signed grids treat magnitudes alike on both sides of zero.
    ends = (np.float32(0), np.float32(grid.format.qmax) * grid.scale)
    bounds = [writer.constant(np.float32(b), "bound") for b in ends]
    clipped = export.add("Clip", [affine, *bounds], node)
    return export.add("Mul", [clipped, export.add("Sign", [name], node)], node)


def _floored(export: Export, node: Node, name: str, grid: Grid) -> str:
    """Takes values down to their codes where the spec does; QuantizeLinear takes the nearest."""
    if export.traced.spec(node).rounding != "floor":
        return name
    steps = (np.float32(1) / grid.scale, grid.scale)
    down, back = (export.writer.constant(s, "quantizer_constant") for s in steps)
    codes = export.add("Floor", [export.add("Mul", [name, down], node)], node)
    return export.add("Mul", [codes, back], node)


def _reads_grid(writer: Writer, name: str) -> bool:
    """Whether a tensor is a dequantized one, or such a one moved or pooled."""
    while (producer := writer.producer(name)) is not None and producer.op in MOVED:
        name = producer.inputs[0]
    return producer is not None and producer.op == "DequantizeLinear"


def _write_grid(export: Export, node: Node, name: str, grid: Grid) -> str:
    """Writes a static grid; returns the name of the dequantized form."""
    writer, (scale, zero_point, format) = export.writer, grid
    clipped = format.signed and is_transformed(export.traced, node)
    storage, stored_zero_point = np.dtype(format.storage), zero_point
    if export.activations == "uint8" and storage == np.int8:
        storage, stored_zero_point = np.dtype(np.uint8), zero_point + 128
    elif export.activations == "int8" and storage == np.uint8:
        storage, stored_zero_point = np.dtype(np.int8), zero_point - 128
    producer = writer.producer(name)
    if producer is not None and producer.op == "Relu":
        if format.qmin == zero_point and not clipped:
            name = producer.inputs[0]
    if export.onnxruntime and _reads_grid(writer, name):
        # Of two grids in a row it keeps one (its DoubleQDQPairsRemover), as if they were the same.
        name = export.fenced(name, node)
    wide = format.bits > 8
    shifted = export.offset_before_rounding and stored_zero_point != np.iinfo(storage).min
    if shifted and format.signed:
        storage, stored_zero_point = np.dtype(format.storage), zero_point
    limits = np.iinfo(format.storage)
    centred = (format.qmin - zero_point, format.qmax - zero_point)
    narrow = (format.qmin, format.qmax) != (limits.min, limits.max)
    number = lambda value: writer.constant(np.float32(value), "number")
    step = scale  # of what QuantizeLinear reads
    if wide or shifted:
        name = export.add("Mul", [name, number(np.float32(1) / scale)], node)
        name, step = export.add("Round", [name], node), np.float32(1)
    if (wide or narrow) and not clipped:
        bounds = [writer.constant(np.float32(code) * step, "bound") for code in centred]
        name = export.add("Clip", [name, *bounds], node)
    stored_scale = writer.constant(scale, f"{node.params['path']}/{node.params['operand']}_scale")
    if wide:
        real = export.add("Mul", [name, stored_scale], node)
    else:
        stored = writer.constant(storage.type(stored_zero_point), "zero_point")
        stored_step = stored_scale if step is scale else number(step)
        codes = export.add("QuantizeLinear", [name, stored_step, stored], node)
        real = export.add("DequantizeLinear", [codes, stored_scale, stored], node)
    export.dequantized[real] = Dequantized(format, grid=grid)
    return real
