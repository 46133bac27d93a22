"""Walks a traced net and writes each of its operations in ONNX."""

from __future__ import annotations

from qkd_jax import graph as graphs
from qkd_jax.deploy.onnx.context import Export, UnsupportedError, unsupported
from qkd_jax.deploy.onnx.contractions import write_product
from qkd_jax.deploy.onnx.patterns import find
from qkd_jax.deploy.onnx.primitives import OPERATIONS, write_pattern
from qkd_jax.deploy.onnx.quantize_linear import write_quantizer
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node
from qkd_jax.quantize.traced import is_quantizer

__all__ = ["write"]


def write(export: Export) -> list[Tensor]:
    """Writes all nodes; returns the results, in the model's own order of axes."""
    for value in export.graph.inputs:
        export.tensors[value] = export.input(value)
    patterns = {p.y: p for p in find(export)}
    inside = {n for p in patterns.values() for n in p.nodes}
    for node in export.graph.nodes:
        if export.dynamic.isdisjoint(node.outputs):
            continue
        if node in inside:
            if node.outputs[0] in patterns:
                export.tensors[node.outputs[0]] = write_pattern(export, patterns[node.outputs[0]])
            continue
        if node in export.absorbed:
            export.tensors[node.outputs[0]] = export.tensors[export.absorbed[node]]
            continue
        try:
            made = write_node(export, node)
        except UnsupportedError as error:
            supported = ", ".join(sorted(OPERATIONS))
            raise ValueError(
                f"{error} Supported: {supported}, conv_general_dilated, dot_general."
            ) from None
        made = made if isinstance(made, tuple) else (made,)
        export.tensors.update(zip(node.outputs, made, strict=True))
    results = []
    for value in export.graph.outputs:
        if value not in export.tensors:
            raise ValueError("a result of the model does not depend on its input.")
        results.append(export.writer.plain(export.tensors[value], ""))
    return results


def write_node(export: Export, node: Node) -> Tensor | tuple[Tensor, ...]:
    """Writes one node; several results come as a tuple."""
    if node.op in graphs.MARKERS:
        if is_quantizer(node):
            return write_quantizer(export, node)
        return export.tensors[node.inputs[0]]
    if node in export.products:
        return write_product(export, export.products[node])
    if node.op not in OPERATIONS:
        raise unsupported(node)
    operands = [export.operand(v) for v in node.inputs]
    return OPERATIONS[node.op](export, node, *operands)
