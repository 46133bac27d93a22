"""Softmax, LayerNorm and GELU in ONNX, which has each of them as one operation."""

import dataclasses
import math

import numpy as np

from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.deploy.patterns import Pattern
from qkd_jax.graph import Node

# ONNX has them as one operation since.
LAYER_NORM_OPSET, GELU_OPSET = 17, 20


def write_pattern(export: Export, pattern: Pattern) -> Tensor:
    """Writes a part of the graph as the operation that ONNX has for it."""
    node = export.graph.producer(pattern.y)
    assert node is not None
    x = export.tensors[pattern.x]
    if pattern.op == "Gelu":
        return dataclasses.replace(x, name=_write_gelu(export, node, x.name, **pattern.attributes))
    x = export.writer.ordered(x, node.scope)
    if pattern.op == "Softmax":
        return export.add_like(x, "Softmax", [x.name], node, axis=x.perm.index(pattern.axis))
    if x.perm[-1] != len(x.perm) - 1:
        x = export.writer.plain(x, node.scope)
    constants = [
        export.writer.constant(a, f"{node.scope}/norm") for a in (pattern.scale, pattern.bias)
    ]
    attributes = {"axis": -1, **pattern.attributes}
    return export.add_like(x, pattern.op, [x.name, *constants], node, **attributes)


def _write_gelu(export: Export, node: Node, x: str, *, tanh: bool) -> str:
    """Writes one node since opset 20; before that, for erf, the five that engines fuse into one."""
    if export.writer.opset >= GELU_OPSET:
        return export.add("Gelu", [x], node, approximate="tanh" if tanh else "none")

    number = lambda value: export.writer.constant(np.float32(value), "number")
    if tanh:
        cube = export.add("Mul", [export.add("Mul", [x, x], node), x], node)
        inner = export.add("Add", [x, export.add("Mul", [cube, number(0.044715)], node)], node)
        inner = export.add("Mul", [inner, number(math.sqrt(2 / math.pi))], node)
        curve = export.add("Tanh", [inner], node)
    else:
        curve = export.add("Erf", [export.add("Div", [x, number(math.sqrt(2))], node)], node)
    twice = export.add("Mul", [x, export.add("Add", [curve, number(1)], node)], node)
    return export.add("Mul", [twice, number(0.5)], node)
