"""Activations on a grid in ONNX: an optional Clip, QuantizeLinear, DequantizeLinear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkd_jax.deploy.onnx_writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.numerics import IntFormat
from qkd_jax.ptq.products import quantizer_params, view
from qkd_jax.quantizers import QUANTIZERS

if TYPE_CHECKING:
    from qkd_jax.deploy.onnx import Export

__all__ = ["needs_opset_21", "write_quantizer"]


def needs_opset_21(export: Export, path: str, format: IntFormat) -> None:
    """Raises ValueError for codes that the opset has no type for."""
    if format.bits > 8 and export.writer.opset < 21:
        raise ValueError(
            f"layer {path!r} has codes of {format.bits} bits, and ONNX quantizes to 16 bits since "
            f"opset 21; this export has opset={export.writer.opset}."
        )


def write_quantizer(export: Export, node: Node) -> Tensor:
    """Writes a quantizer of an activation.

    The grid's own range is narrower than the type's below 8 bits and for narrow ranges, so a Clip
    to its ends comes first. A ReLU in front of a Clip at 0 does nothing and is passed by.
    """
    x = export.tensors[node.inputs[0]]
    scale, zero_point, format = view(export.traced, node)
    if scale.ndim or zero_point.ndim:
        raise ValueError(
            f"the {node.params['operand']} of {node.params['path']!r} has a scale per channel; "
            "to_onnx writes activations per tensor."
        )
    needs_opset_21(export, node.params["path"], format)
    if any(not np.isfinite(a) for a in (scale, zero_point)):
        raise ValueError(f"the step of {node.params['path']!r} is not finite: {scale}.")
    if export.written.get(x.name) == (float(scale), int(zero_point), format):
        if not _transformed(export, node):
            return x  # on this very grid already: its codes would come out as they are
    key = (x.name, node.inputs[1:] if _transformed(export, node) else float(scale), int(zero_point))
    key = (*key, format, export.traced.spec(node).rounding)
    if key not in export.grids:
        name, clipped = _before(export, node, x.name, scale, format)
        export.grids[key] = _grid(export, node, name, scale, int(zero_point), format, clipped)
    return export.same(x, export.grids[key])


def _transformed(export: Export, node: Node) -> bool:
    spec = export.traced.spec(node)
    if spec.rounding == "floor" and hasattr(QUANTIZERS[spec.quantizer], "pre_affine"):
        return True  # these round the magnitude, which is another thing below zero
    return _pre_affine(export, node) != (1.0, 0.0)


def _pre_affine(export: Export, node: Node) -> tuple[float, float]:
    spec = export.traced.spec(node)
    quantizer: Any = QUANTIZERS[spec.quantizer]
    if not hasattr(quantizer, "pre_affine"):
        return 1.0, 0.0
    gain, offset = quantizer.pre_affine(quantizer_params(export.traced, node), spec)
    return float(gain), float(offset)


def _before(
    export: Export, node: Node, name: str, scale: np.ndarray, format: IntFormat
) -> tuple[str, bool]:
    """Writes what a quantizer does before its grid; returns the name and whether it has clipped."""
    gain, offset = _pre_affine(export, node)
    if not _transformed(export, node):
        return _floored(export, node, name, scale), False
    writer = export.writer
    constants = [writer.constant(np.float32(c), "quantizer_constant") for c in (gain, offset)]
    magnitude = export.add("Abs", [name], node) if format.signed else name
    affine = export.add("Mul", [magnitude, constants[0]], node)
    affine = export.add("Add", [affine, constants[1]], node)
    affine = _floored(export, node, affine, scale)
    if not format.signed:
        return affine, False
    # Signed grids treat magnitudes alike on both sides of zero.
    ends = (np.float32(0), np.float32(format.qmax) * scale)
    bounds = [writer.constant(np.float32(b), "bound") for b in ends]
    clipped = export.add("Clip", [affine, *bounds], node)
    return export.add("Mul", [clipped, export.add("Sign", [name], node)], node), True


def _floored(export: Export, node: Node, name: str, scale: np.ndarray) -> str:
    """Takes values down to their codes where the spec does; QuantizeLinear takes the nearest."""
    if export.traced.spec(node).rounding != "floor":
        return name
    steps = (np.float32(1) / np.float32(scale), np.float32(scale))
    down, back = (export.writer.constant(s, "quantizer_constant") for s in steps)
    codes = export.add("Floor", [export.add("Mul", [name, down], node)], node)
    return export.add("Mul", [codes, back], node)


def _grid(
    export: Export,
    node: Node,
    name: str,
    scale: np.ndarray,
    zero_point: int,
    format: IntFormat,
    clipped: bool,
) -> str:
    writer = export.writer
    storage, stored_zero_point = np.dtype(format.storage), zero_point
    if export.activations == "uint8" and storage == np.int8:
        storage, stored_zero_point = np.dtype(np.uint8), zero_point + 128
    elif export.activations == "int8" and storage == np.uint8:
        storage, stored_zero_point = np.dtype(np.int8), zero_point - 128
    limits = np.iinfo(format.storage)
    scale32 = np.float32(scale)
    ends = [np.float32(code - zero_point) * scale32 for code in (format.qmin, format.qmax)]
    maker = writer.maker(name)
    if maker is not None and maker[0] == "Relu" and format.qmin == zero_point and not clipped:
        name = maker[1][0]
    if (format.qmin, format.qmax) != (limits.min, limits.max) and not clipped:
        name = export.add("Clip", [name, *(writer.constant(e, "bound") for e in ends)], node)
    grid = [
        writer.constant(scale32, f"{node.params['path']}/{node.params['operand']}_scale"),
        writer.constant(storage.type(stored_zero_point), "zero_point"),
    ]
    codes = export.add("QuantizeLinear", [name, *grid], node)
    real = export.add("DequantizeLinear", [codes, *grid], node)
    export.written[real] = (float(scale32), zero_point, format)
    # Kernels see signed codes shifted by 128; the largest of them decides about saturation.
    export.largest[real] = format.qmax + (128 if format.signed else 0)
    return real
