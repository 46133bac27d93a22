"""Walks a traced net and writes each of its operations in LiteRT, on real numbers.

A new operation is an entry of `ELEMENTWISE`, `MOVES` or `REDUCTIONS`.
"""

import numpy as np

from qkd_jax.deploy.graph_values import UnsupportedError, unsupported
from qkd_jax.deploy.litert.activation_grids import write_quantizer
from qkd_jax.deploy.litert.flat_file import FileTensor
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.deploy.litert.real_elementwise import ELEMENTWISE
from qkd_jax.deploy.litert.real_moves import MOVES
from qkd_jax.deploy.litert.real_pools import REDUCTIONS
from qkd_jax.deploy.litert.real_products import write_product
from qkd_jax.deploy.patterns import Pattern, find_patterns
from qkd_jax.graph import MARKERS, Node
from qkd_jax.quantize.traced import is_quantizer

OPERATIONS = {**ELEMENTWISE, **MOVES, **REDUCTIONS}


def write(lowering: Lowering) -> None:
    """Writes all nodes into `lowering.program`.

    Raises:
        ValueError: an operation that LiteRT has no form for, named with its module.
    """
    try:
        _write_nodes(lowering)
    except UnsupportedError as error:
        supported = ", ".join(sorted(OPERATIONS))
        raise ValueError(
            f"to_tflite {error} Supported: {supported}, conv_general_dilated, dot_general, and "
            "GELU, softmax and LayerNorm however they are spelled."
        ) from None


def _write_nodes(lowering: Lowering) -> None:
    graph, tensors = lowering.graph, lowering.tensors
    for index, value in enumerate(graph.inputs):
        name = "images" if len(graph.inputs) == 1 else f"input{index}"
        kind = graph.dtype(value).name
        tensors[value] = FileTensor(lowering.name(name), lowering.dims(value), kind)
        lowering.program.inputs.append(tensors[value])
    patterns = {p.y: p for p in find_patterns(lowering.values)}
    inside = {n for p in patterns.values() for n in p.nodes}
    for node in graph.nodes:
        if lowering.values.dynamic.isdisjoint(node.outputs):
            continue
        if node in inside:
            if node.outputs[0] in patterns:
                pattern = patterns[node.outputs[0]]
                tensors[node.outputs[0]] = _write_pattern(lowering, pattern)
            continue
        if node in lowering.absorbed:
            tensors[node.outputs[0]] = tensors[lowering.absorbed[node]]
            continue
        results = _write_node(lowering, node)
        results = results if isinstance(results, tuple) else (results,)
        tensors.update(zip(node.outputs, results, strict=True))
    for value in graph.outputs:
        producer = graph.producer(value)
        node = producer or graph.nodes[-1]
        result = lowering.whole_operand(value, node)
        if result in lowering.program.outputs or result.data is not None:
            raise ValueError(
                "to_tflite cannot write a net that gives one array twice, or a constant; leave it "
                "out of the results."
            )
        lowering.program.outputs.append(result)


def _write_node(lowering: Lowering, node: Node) -> FileTensor | tuple[FileTensor, ...]:
    if node.op in MARKERS:
        if is_quantizer(node):
            return write_quantizer(lowering, node)
        return lowering.tensors[node.inputs[0]]
    if node in lowering.products:
        return write_product(lowering, lowering.products[node])
    if node.op not in OPERATIONS:
        raise unsupported(node)
    return OPERATIONS[node.op](lowering, node)


def _write_pattern(lowering: Lowering, pattern: Pattern) -> FileTensor:
    """Writes a part of the graph as the operations that LiteRT has for it."""
    node = lowering.graph.producer(pattern.y)
    assert node is not None
    x = lowering.tensors[pattern.x]
    if pattern.op == "Gelu":
        return lowering.add_result("GELU", [x], node, approximate=pattern.attributes["tanh"])
    if pattern.op == "Softmax":
        last = len(x.shape) - 1
        axis = pattern.axis % len(x.shape)
        perm = [last if a == axis else axis if a == last else a for a in range(last + 1)]
        moved = lowering.transposed(x, perm, node)
        y = lowering.add("SOFTMAX", [moved], moved.shape, node, beta=1.0)
        return lowering.transposed(y, perm, node)
    return _layer_norm(lowering, pattern, x, node)


def _layer_norm(lowering: Lowering, pattern: Pattern, x: FileTensor, node: Node) -> FileTensor:
    """LiteRT has no LayerNormalization: the mean, the centred values, and their mean square."""
    rows = (*x.shape[:-1], 1)
    axes = lowering.integers([len(x.shape) - 1], "axes")
    mean = lambda t: lowering.add("MEAN", [t, axes], rows, node, keepDims=True)
    add = lambda op, shape, *inputs: lowering.add(op, list(inputs), shape, node)
    centred = add("SUB", x.shape, x, mean(x))
    variance = mean(add("SQUARE", x.shape, centred))
    epsilon = lowering.number(pattern.attributes["epsilon"], "epsilon")
    inverse = add("RSQRT", rows, add("ADD", rows, variance, epsilon))
    y = add("MUL", x.shape, centred, inverse)
    assert pattern.scale is not None and pattern.bias is not None
    for op, vector, nothing in (("MUL", pattern.scale, 1), ("ADD", pattern.bias, 0)):
        if np.any(vector != nothing):
            y = add(op, x.shape, y, lowering.constant(vector, f"{node.scope}/norm"))
    return y
