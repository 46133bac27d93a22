"""Walks a traced net and writes each of its operations in ONNX.

A new operation is an entry of `ELEMENTWISE`, `INDEXING`, `MOVES`, `ORDERING` or `REDUCTIONS`.
"""

from qkd_jax.deploy.graph_values import UnsupportedError, unsupported
from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.contractions import write_product
from qkd_jax.deploy.onnx.elementwise import ELEMENTWISE
from qkd_jax.deploy.onnx.indexing import INDEXING
from qkd_jax.deploy.onnx.moves import MOVES
from qkd_jax.deploy.onnx.ordering import ORDERING
from qkd_jax.deploy.onnx.pattern_nodes import LAYER_NORM_OPSET, write_pattern
from qkd_jax.deploy.onnx.quantize_linear import write_quantizer
from qkd_jax.deploy.onnx.reductions import REDUCTIONS
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.deploy.patterns import Pattern, find_patterns
from qkd_jax.graph import MARKERS, Node
from qkd_jax.quantize.traced import is_quantizer

OPERATIONS = {**ELEMENTWISE, **INDEXING, **MOVES, **ORDERING, **REDUCTIONS}


def write(export: Export) -> list[Tensor]:
    """Writes all nodes; returns the results, in the model's own order of axes.

    Raises:
        ValueError: an operation that ONNX has no form for, named with its module.
    """
    try:
        return _write_nodes(export)
    except UnsupportedError as error:
        supported = ", ".join(sorted(OPERATIONS))
        raise ValueError(
            f"to_onnx {error} Supported: {supported}, conv_general_dilated, dot_general."
        ) from None


def _patterns(export: Export) -> list[Pattern]:
    return find_patterns(export.values, layer_norm=export.writer.opset >= LAYER_NORM_OPSET)


def _write_nodes(export: Export) -> list[Tensor]:
    graph, tensors = export.graph, export.tensors
    for value in graph.inputs:
        tensors[value] = _input(export, value)
    patterns = {p.y: p for p in _patterns(export)}
    inside = {n for p in patterns.values() for n in p.nodes}
    for node in graph.nodes:
        if export.values.dynamic.isdisjoint(node.outputs):
            continue
        if node in inside:
            if node.outputs[0] in patterns:
                tensors[node.outputs[0]] = write_pattern(export, patterns[node.outputs[0]])
            continue
        if node in export.absorbed:
            tensors[node.outputs[0]] = tensors[export.absorbed[node]]
            continue
        results = _write_node(export, node)
        results = results if isinstance(results, tuple) else (results,)
        tensors.update(zip(node.outputs, results, strict=True))
    return [export.writer.plain(export.tensor(value), "") for value in graph.outputs]


def _input(export: Export, value: int) -> Tensor:
    """Declares an input; images come channels first, and a cache as it leaves."""
    shape = export.values.shape(value)
    rank = len(shape)
    images = rank >= 4 and value not in export.traced.states
    perm = (0, rank - 1, *range(1, rank - 1)) if images else tuple(range(rank))
    name = "images" if len(export.graph.inputs) == 1 else f"input{len(export.tensors)}"
    return Tensor(export.writer.unique(name), shape, perm)


def _write_node(export: Export, node: Node) -> Tensor | tuple[Tensor, ...]:
    """Writes one node; several results come as a tuple."""
    if node.op in MARKERS:
        if is_quantizer(node):
            return write_quantizer(export, node)
        return export.tensors[node.inputs[0]]
    if node in export.products:
        return write_product(export, export.products[node])
    if node.op not in OPERATIONS:
        raise unsupported(node)
    # Beside numbers that are computed, a constant has to bring the batch axis itself.
    computed = [v for v in node.inputs if v in export.values.dynamic]
    scalar = bool(computed) and not any(export.graph.shape(v) for v in computed)
    read = export.tensor if scalar else export.operand
    operands = (read(v) if export.graph.shape(v) else export.operand(v) for v in node.inputs)
    return OPERATIONS[node.op](export, node, *operands)
