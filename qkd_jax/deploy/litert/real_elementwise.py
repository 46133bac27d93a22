"""Elementwise operations of a traced net in LiteRT.

`ELEMENTWISE` maps a primitive's name to a function `(lowering, node) -> FileTensor`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.lax import RoundingMethod

from qkd_jax.deploy.graph_values import unsupported
from qkd_jax.deploy.litert.flat_file import FileTensor
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.graph import Node

Writer = Callable[[Lowering, Node], FileTensor]

_UNARY = "abs ceil cos exp floor log neg rsqrt sign sin sqrt square tanh logistic".split()
UNARY = {name: name.upper() for name in _UNARY} | {"not": "LOGICAL_NOT"}
BINARY = {
    "add": "ADD",
    "sub": "SUB",
    "mul": "MUL",
    "div": "DIV",
    "max": "MAXIMUM",
    "min": "MINIMUM",
    "pow": "POW",
    "and": "LOGICAL_AND",
    "or": "LOGICAL_OR",
    "eq": "EQUAL",
    "ne": "NOT_EQUAL",
    "lt": "LESS",
    "le": "LESS_EQUAL",
    "gt": "GREATER",
    "ge": "GREATER_EQUAL",
}
OF_TRUTHS = {"max": "LOGICAL_OR", "min": "LOGICAL_AND"}
# What one kernel does for two bounds.
CLAMPS = {(0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1", (0.0, 1.0): "RELU_0_TO_1"}


def _unary(op: str) -> Writer:
    def write(lowering: Lowering, node: Node) -> FileTensor:
        return lowering.add_result(op, [lowering.tensors[node.inputs[0]]], node)

    return write


def _binary(name: str) -> Writer:
    def write(lowering: Lowering, node: Node) -> FileTensor:
        op, kind = BINARY[name], lowering.graph.dtype(node.inputs[0])
        if kind == np.bool_:
            op = OF_TRUTHS.get(name, op)
        elif op.startswith("LOGICAL"):
            raise unsupported(node, f"of type {kind.name}")
        if name == "max" and kind == np.float32:
            for side in (0, 1):
                if _scalar(lowering, node.inputs[1 - side]) == 0:
                    return lowering.add_result("RELU", [lowering.tensors[node.inputs[side]]], node)
        if name == "min" and kind == np.float32:
            for side in (0, 1):
                if _scalar(lowering, node.inputs[1 - side]) == 6:
                    clipped = _behind_relu(lowering, node.inputs[side])
                    if clipped is not None:
                        return lowering.add_result("RELU6", [clipped], node)
        operands = [lowering.stored_operand(v, node) for v in node.inputs]
        return lowering.add_result(op, operands, node)

    return write


def _behind_relu(lowering: Lowering, value: int) -> FileTensor | None:
    """Returns what a ReLU reads that only one operation reads, the last one written."""
    last = lowering.program.operations[-1] if lowering.program.operations else None
    if last is None or last.op != "RELU" or last.outputs[0] is not lowering.tensors.get(value):
        return None
    return last.inputs[0]


def _scalar(lowering: Lowering, value: int) -> float | None:
    """Returns a constant that is one number everywhere, else None."""
    if value in lowering.values.dynamic:
        return None
    array = np.asarray(lowering.values.fixed(value))
    return float(array.flat[0]) if array.size and (array == array.flat[0]).all() else None


def _same(lowering: Lowering, node: Node) -> FileTensor:
    return lowering.tensors[node.inputs[0]]


def _composed(*steps: tuple[str, float | None]) -> Writer:
    """Writes one operation after the other, each with a number on its right, or with none."""

    def write(lowering: Lowering, node: Node) -> FileTensor:
        x = lowering.tensors[node.inputs[0]]
        for op, number in steps:
            right = [] if number is None else [lowering.number(number)]
            x = lowering.add_result(op, [x, *right], node)
        return x

    return write


def _integer_pow(lowering: Lowering, node: Node) -> FileTensor:
    x, power = lowering.tensors[node.inputs[0]], node.params["y"]
    if power in (2, 3):
        square = lowering.add_result("SQUARE", [x], node)
        return square if power == 2 else lowering.add_result("MUL", [square, x], node)
    return lowering.add_result("POW", [x, lowering.number(power, "power")], node)


def _convert(lowering: Lowering, node: Node) -> FileTensor:
    x = lowering.tensors[node.inputs[0]]
    after = lowering.dtype(node.outputs[0], node)
    if x.dtype == after:
        return x
    return lowering.add_result("CAST", [x], node, inDataType=x.dtype, outDataType=after)


def _clamp(lowering: Lowering, node: Node) -> FileTensor:
    low, value, high = node.inputs
    bounds = _scalar(lowering, low), _scalar(lowering, high)
    if lowering.graph.dtype(value) == np.float32 and bounds in CLAMPS:
        return lowering.add_result(CLAMPS[bounds], [lowering.tensors[value]], node)
    x: Any = lowering.stored_operand(value, node)
    for op, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        x = lowering.add_result(op, [x, lowering.stored_operand(bound, node)], node)
    return x


def _round(lowering: Lowering, node: Node) -> FileTensor:
    if node.params["rounding_method"] != RoundingMethod.TO_NEAREST_EVEN:
        raise unsupported(node, "it rounds half away from zero, and LiteRT half to even")
    return _unary("ROUND")(lowering, node)


def _select(lowering: Lowering, node: Node) -> FileTensor:
    which, *cases = node.inputs
    if len(cases) != 2 or lowering.graph.dtype(which) != np.bool_:
        raise unsupported(node, "it chooses among more than two cases")
    no, yes = (lowering.stored_operand(v, node) for v in cases)
    return lowering.add_result("SELECT_V2", [lowering.stored_operand(which, node), yes, no], node)


ELEMENTWISE: dict[str, Writer] = {
    **{name: _unary(op) for name, op in UNARY.items()},
    **{name: _binary(name) for name in BINARY},
    "clamp": _clamp,
    "convert_element_type": _convert,
    "copy": _same,
    "expm1": _composed(("EXP", None), ("SUB", 1.0)),
    "integer_pow": _integer_pow,
    "log1p": _composed(("ADD", 1.0), ("LOG", None)),
    "optimization_barrier": _same,
    "round": _round,
    "select_n": _select,
    "stop_gradient": _same,
}
