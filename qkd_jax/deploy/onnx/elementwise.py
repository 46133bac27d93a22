"""Elementwise operations of a traced net in ONNX.

`ELEMENTWISE` maps a primitive's name to a function `(export, node, *tensors or arrays) -> Tensor`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.lax import RoundingMethod

from qkd_jax.deploy.onnx.context import Export
from qkd_jax.deploy.onnx.writer import Tensor
from qkd_jax.graph import Node

_UNARY = (
    "abs acos acosh asin asinh atan atanh ceil cos cosh erf exp floor log neg not sign sin sinh "
    "sqrt tan tanh"
).split()
_BINARY = "add and div max min mul or pow sub xor".split()
# Primitive -> ONNX's operation, which most often is the same word.
UNARY = {name: name.capitalize() for name in _UNARY} | {"logistic": "Sigmoid"}
BINARY = {name: name.capitalize() for name in _BINARY} | {
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
}
COMPARISONS = frozenset({"GreaterOrEqual", "Greater", "LessOrEqual", "Less"})
OF_TRUTHS = {"Max": "Or", "Min": "And"}


def _unary(op: str) -> Callable[..., Tensor]:
    return lambda export, node, x: export.add_like(x, op, [x.name], node)


def _binary(op: str) -> Callable[..., Tensor]:
    def write(export: Export, node: Node, x: Any, y: Any) -> Tensor:
        if op in OF_TRUTHS and export.graph.dtype(node.inputs[0]) == np.bool_:
            return _binary(OF_TRUTHS[op])(export, node, x, y)
        if op in COMPARISONS:
            x, y = (export.number(o, v, node) for o, v in zip((x, y), node.inputs, strict=True))
        for side, other in ((x, y), (y, x)):
            zero = not isinstance(other, Tensor) and other.ndim == 0 and other == 0
            if op == "Max" and isinstance(side, Tensor) and zero:
                return export.add_like(side, "Relu", [side.name], node)
        names, guide = export.aligned(node, x, y)
        return export.add_result(guide, op, names, node)

    return write


def _same(export: Export, node: Node, x: Tensor) -> Tensor:
    return x


def _rsqrt(export: Export, node: Node, x: Tensor) -> Tensor:
    root = export.add("Sqrt", [x.name], node)
    return export.add_like(x, "Reciprocal", [root], node)


def _not_equal(export: Export, node: Node, x: Any, y: Any) -> Tensor:
    equal = _binary("Equal")(export, node, x, y)
    return export.add_like(equal, "Not", [equal.name], node)


def _square(export: Export, node: Node, x: Tensor) -> Tensor:
    return export.add_like(x, "Mul", [x.name, x.name], node)


def _integer_pow(export: Export, node: Node, x: Tensor) -> Tensor:
    power = export.writer.constant(np.float32(node.params["y"]), "power")
    return export.add_like(x, "Pow", [x.name, power], node)


def _erfc(export: Export, node: Node, x: Tensor) -> Tensor:
    one = export.writer.constant(np.float32(1), "one")
    return export.add_like(x, "Sub", [one, export.add("Erf", [x.name], node)], node)


def _log1p(export: Export, node: Node, x: Tensor) -> Tensor:
    one = export.writer.constant(np.float32(1), "one")
    return export.add_like(x, "Log", [export.add("Add", [x.name, one], node)], node)


def _expm1(export: Export, node: Node, x: Tensor) -> Tensor:
    one = export.writer.constant(np.float32(1), "one")
    return export.add_like(x, "Sub", [export.add("Exp", [x.name], node), one], node)


def _convert(export: Export, node: Node, x: Tensor) -> Tensor:
    before, after = export.graph.dtype(node.inputs[0]), np.dtype(node.params["new_dtype"])
    if before == after:
        return x
    return export.add_like(x, "Cast", [x.name], node, to=export.element_type(after))


def _clamp(export: Export, node: Node, low: Any, x: Tensor, high: Any) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low.ndim or high.ndim:
        larger = _binary("Max")(export, node, x, low)
        return _binary("Min")(export, node, larger, high)
    bounds = [export.writer.constant(b, "bound") for b in (low, high)]
    return export.add_like(x, "Clip", [x.name, *bounds], node)


def _rem(export: Export, node: Node, x: Any, y: Any) -> Tensor:
    names, guide = export.aligned(node, x, y)
    return export.add_result(guide, "Mod", names, node, fmod=1)  # with the sign of x


def _round(export: Export, node: Node, x: Tensor) -> Tensor:
    if node.params["rounding_method"] == RoundingMethod.TO_NEAREST_EVEN:
        return export.add_like(x, "Round", [x.name], node)
    half = export.writer.constant(np.float32(0.5), "half")
    up = export.add("Add", [export.add("Abs", [x.name], node), half], node)
    up = export.add("Floor", [up], node)
    return export.add_like(x, "Mul", [export.add("Sign", [x.name], node), up], node)


def _is_finite(export: Export, node: Node, x: Tensor) -> Tensor:
    infinite = [export.add(op, [x.name], node) for op in ("IsInf", "IsNaN")]
    return export.add_like(x, "Not", [export.add("Or", infinite, node)], node)


def _select(export: Export, node: Node, which: Any, *cases: Any) -> Tensor:
    # ONNX Runtime has no Where of truths.
    cases = tuple(export.number(c, v, node) for c, v in zip(cases, node.inputs[1:], strict=True))
    names, guide = export.aligned(node, which, *cases)
    which, *names = names
    dtype = export.graph.dtype(node.inputs[0])
    out = names[-1]
    for number in reversed(range(len(names) - 1)):
        if dtype == np.bool_:
            out = export.add("Where", [which, out, names[number]], node)
            continue
        stored = export.writer.constant(np.asarray(number, dtype), "case")
        here = export.add("Equal", [which, stored], node)
        out = export.add("Where", [here, names[number], out], node)
    if export.graph.dtype(node.outputs[0]) == np.bool_:
        out = export.cast(out, np.bool_, node)
    return dataclasses.replace(guide, name=out, shape=export.shape(node))


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    **{name: _unary(op) for name, op in UNARY.items()},
    **{name: _binary(op) for name, op in BINARY.items()},
    "clamp": _clamp,
    "convert_element_type": _convert,
    "copy": _same,
    "erfc": _erfc,
    "expm1": _expm1,
    "integer_pow": _integer_pow,
    "is_finite": _is_finite,
    "log1p": _log1p,
    "ne": _not_equal,
    "optimization_barrier": _same,
    "rem": _rem,
    "round": _round,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "square": _square,
    "stop_gradient": _same,
}
