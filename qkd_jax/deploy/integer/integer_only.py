"""A converted net without floats: from the codes of its input to the codes of its output.

Between two quantizers a net computes, channel by channel, a clipped sum of scaled integers,

    y = clip(sum_i multiplier_i * integer_i + bias, lowest, highest)

with one term behind a product, two behind a residual sum, and `lowest = 0` behind a ReLU. `rewrite`
follows a program's values in this form and writes each quantizer as

- `Rescale`: fixed-point factors multiplier_i / scale to `shift` fraction bits, their sum, and one
  rounding shift. It differs from float arithmetic where a value lies within about 2^-shift steps of
  the boundary between two codes; or
- `Table`: the integers at which the code rises, by channel, searched with the quantizer itself.
  Exact for any monotone quantizer; small for grids of few codes (Umuroglu et al., 2016, arXiv
  1612.07119).

What is pooled, or summed again, off the grids becomes integers first: fixed point with one unit for
the whole tensor and `GROUND` bits, also a `Rescale`. Everything else (a product of two activations,
a softmax) is refused, with the module and the rule to add.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax import graph as graphs
from qkd_jax.deploy.integer.fixed_point import decompose
from qkd_jax.deploy.integer.linear import Linear, Raw, compressed
from qkd_jax.deploy.integer.program import (
    Decode,
    Encode,
    IntegerModel,
    Multiply,
    Quantize,
    Rescale,
    Table,
    Unpack,
    unique_name,
)
from qkd_jax.deploy.integer.threshold_search import search_thresholds
from qkd_jax.graph import IDENTITY, Graph, Node
from qkd_jax.numerics import IntFormat
from qkd_jax.quantize.traced import known_grid
from qkd_jax.quantizers import QUANTIZERS

TABLE_CODES = 16  # up to this many codes a quantizer becomes a table
HEADROOM = 30  # bits that a rescaled sum may take
GROUND = 20  # bits of a tensor in fixed point, so that 1,024 of its numbers can be added
LIMIT = 2**31
COARSE = ("bfloat16", "float16")
MOVES = frozenset("reshape transpose rev squeeze slice broadcast_in_dim".split())


def rewrite(model: IntegerModel, graph: Graph) -> IntegerModel:
    """Writes a converted net without floats.

    Args:
        model: the converted net.
        graph: the graph that it was converted from.

    Raises:
        ValueError: a float operation remains; the message names it and the spec that it lacks.
    """
    return _Rewriter(model, graph).model()


class _Rewriter:
    def __init__(self, model: IntegerModel, graph: Graph):
        self.source, self.graph, self.batch = model.program, graph, model.program.batch
        self.given = {key: np.asarray(a) for key, a in model.arrays.items()}
        self.arrays: dict[str, np.ndarray] = {}
        self.numbers: dict[int, np.ndarray] = {}
        self.steps: list[Any] = []
        self.env: dict[int, Any] = {}
        values = (value for step in self.source.steps for value in _written(step))
        self.next = 1 + max(*graph.avals, *self.source.arrays, *values)

    def model(self) -> IntegerModel:
        for step in self.source.steps:
            if isinstance(step, Quantize) and step.spec.dynamic:
                path, _, operand = step.name.rpartition("/")
                raise ValueError(
                    f"integer_only: {operand} of layer {path!r} finds its range at run time, which "
                    "takes a division of floats. Use dynamic=False and calibrate, or convert "
                    "without integer_only."
                )
            if isinstance(step, Quantize | Unpack) and not _has_codes(step):
                name = step.name if isinstance(step, Quantize) else step.key
                raise ValueError(
                    f"integer_only: {name} has no integer codes with one scale for each sum. Use a "
                    "uniform quantizer and granularity='channel', or convert without integer_only."
                )
        for value in self.source.inputs:
            self.env[value] = Raw(value, self.shape(value))
        for value, key in self.source.arrays.items():
            self.env[value] = self.given[key].astype(np.float64)
        for value, number in self.source.numbers.items():
            self.env[value] = np.asarray(number, np.float64)
        if len(self.source.inputs) != 1 or len(self.source.outputs) != 1:
            raise ValueError("integer_only takes nets with one input and one output array.")
        for step in self.source.steps:
            if isinstance(step, Quantize):
                self.quantize(step)
            elif isinstance(step, Unpack):
                self.weight(step)
            elif isinstance(step, Multiply):
                self.multiply(step)
            else:
                self.node(step)
        output = self.decode(self.source.outputs[0])
        program = dataclasses.replace(
            self.source, steps=tuple(self.steps), outputs=(output,), arrays={}, numbers=self.numbers
        )
        return IntegerModel({k: jnp.asarray(a) for k, a in self.arrays.items()}, program)

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns a value's shape in the graph, with a batch of 1."""
        batch, shape = self.batch or 0, self.graph.shape(value)
        return tuple(n // batch if batch and n and n % batch == 0 else n for n in shape)

    def new(self) -> int:
        self.next += 1
        return self.next - 1

    def zero(self) -> int:
        self.numbers[self.next] = np.zeros((), np.int32)
        return self.new()

    def store(self, name: str, array: Any, dtype: Any = np.int32) -> str:
        name = unique_name(self.arrays, name)
        self.arrays[name] = np.asarray(array, dtype)
        return name

    def refuse(self, node: Node, why: str) -> ValueError:
        return ValueError(
            f"integer_only: {node.describe()} stays in float: {why}. Give what it reads a grid: an "
            "`output` spec on the module that makes it, such as "
            f"Rule({node.scope or 'head'!r}, output=Spec(8)), or train with the preset "
            "'w8a8:integer', which puts grids there."
        )

    def quantize(self, step: Quantize) -> None:
        spec, quantizer = step.spec, QUANTIZERS[step.spec.quantizer]
        params = {name: self.given[key] for name, key in step.params}
        grid = known_grid(params, spec)
        assert grid is not None  # `convert` refuses what has no codes
        scale, zero_point, format = np.asarray(grid.scale), np.asarray(grid.zero_point), grid.format
        if scale.size != 1:
            raise ValueError(
                f"integer_only: {step.name} has a scale per channel; use granularity='tensor'."
            )
        scale, zero = scale.reshape(()), np.asarray(zero_point, np.int64).reshape(())
        ends = int(format.qmin - zero), int(format.qmax - zero)
        plain = not hasattr(quantizer, "pre_affine") and spec.rounding != "floor"
        x = self.env[step.input]
        offset = self.store(f"{step.name}/zero_point", zero)
        if isinstance(x, Raw):
            if not plain:
                raise ValueError(
                    f"integer_only: {step.name} reads the net's input with quantizer "
                    f"{spec.quantizer!r}; use 'uniform' or 'lsq' there."
                )
            key = self.store(f"{step.name}/scale", scale, np.float32)
            self.steps.append(Encode(step.name, key, offset, *ends, x.value, step.codes))
        elif isinstance(x, Linear):
            single = len(x.terms) == 1
            if single and (not plain or ends[1] - ends[0] < TABLE_CODES):
                self.table(step, x, params, scale, ends, offset)
            elif plain:
                self.rescale(step.name, x, float(scale), ends, offset, step.codes)
            else:
                raise ValueError(
                    f"integer_only: {step.name} quantizes a sum of two tensors with quantizer "
                    f"{spec.quantizer!r}, which bends what it reads; use 'uniform' or 'lsq'."
                )
        else:
            raise ValueError(f"integer_only: {step.name} quantizes a constant; leave it in float.")
        largest = max(-ends[0], ends[1])
        self.env[step.codes] = Linear.of(step.codes, 1.0, largest, x.shape)
        self.env[step.hat] = Linear.of(step.codes, scale, largest, x.shape)

    def rescale(
        self, name: str, x: Linear, scale: float, ends: tuple[int, int], offset: str, codes: int
    ) -> None:
        """Adds the step that takes a value to its nearest multiple of a scale."""
        reach = x.reach(scale)
        shift = HEADROOM - 1 - math.ceil(math.log2(max(reach, 1e-30)))
        shift = max(min(shift, 24), 0)
        if reach * 2.0**shift >= 2.0**HEADROOM:
            raise ValueError(
                f"integer_only: what {name} reads reaches {reach:.3g} of its steps, beyond "
                "30 bits; its scale is far too small for the layer. Calibrate it again."
            )
        terms = []
        for value, multiplier, _ in x.terms:
            m0, exponent = decompose(multiplier / scale * 2.0**shift)
            key = self.store(f"{name}/multiplier", m0)
            terms.append((value, key, self.store(f"{name}/multiplier_exponent", exponent)))
        bias = self.store(f"{name}/bias", np.rint(x.bias / scale * 2.0**shift))
        low, high = ends
        if x.low > -math.inf:
            low = max(low, min(round(x.low / scale), high))
        if x.high < math.inf:
            high = min(high, max(round(x.high / scale), low))
        self.steps.append(Rescale(name, tuple(terms), bias, offset, shift, low, high, codes))

    def table(
        self,
        step: Quantize,
        x: Linear,
        params: Mapping[str, Any],
        scale: np.ndarray,
        ends: tuple[int, int],
        offset: str,
    ) -> None:
        """Adds the step that looks the code of a sum up among thresholds."""
        high, sign = search_thresholds(x, params, step.spec, scale, ends)
        key = self.store(f"{step.name}/thresholds", high)
        flipped = self.store(f"{step.name}/sign", sign) if np.any(sign < 0) else None
        value = x.terms[0][0]
        self.steps.append(Table(step.name, value, key, flipped, offset, ends[0], step.codes))

    def weight(self, step: Unpack) -> None:
        assert isinstance(step.format, IntFormat)
        for key in (step.key, step.zero_point):
            if key is not None:
                self.arrays[key] = self.given[key]
        self.steps.append(dataclasses.replace(step, scale=""))
        largest = step.format.qmax - step.format.qmin
        self.env[step.codes] = Linear.of(step.codes, 1.0, largest, step.shape)
        if step.scale:
            self.env[step.hat] = None  # no float value is available

    def multiply(self, step: Multiply) -> None:
        if step.dtype.name in COARSE:
            raise self.refuse(step.node, f"it rounds to {step.dtype.name}")
        inputs = []
        for value in step.inputs:
            x = self.env[value]
            assert isinstance(x, Linear) and x.is_codes
            inputs.append(x.terms[0][0])
        self.steps.append(dataclasses.replace(step, inputs=(inputs[0], inputs[1]), multiplier=""))
        multiplier, shape = self.given[step.multiplier], self.shape(step.node.outputs[0])
        self.env[step.output] = Linear.of(step.output, multiplier, step.bound, shape)

    def decode(self, value: int) -> int:
        x = self.env[value]
        if not isinstance(x, Linear) or not x.is_codes:
            raise ValueError(
                "integer_only: the net's output is not on a grid, so its last sums would be scaled "
                "in float. Give the last layer an output spec, such as Rule('head', ..., "
                "output=Spec(8)), or train with the preset 'w8a8:integer'."
            )
        ((codes, multiplier, _),) = x.terms
        key = self.store("output/scale", multiplier, np.float32)
        output = self.new()
        self.steps.append(Decode(codes, key, output))
        return output

    def node(self, node: Node) -> None:
        values = []
        for v in node.inputs:
            if v not in self.env:
                raise self.refuse(node, "it reads what is known at run time only")
            if self.env[v] is None:
                raise ValueError(
                    f"integer_only: {node.describe()} stays in float: its weight has codes and its "
                    "input has none. Give the layer's rule an `input` spec, or the module that "
                    "makes its input an `output` spec."
                )
            values.append(self.env[v])
        if node.outputs[0] not in self.graph.avals:
            self.env[node.outputs[0]] = self.moved_codes(node, values[0])
            return
        if all(isinstance(v, np.ndarray) for v in values):
            inputs = [
                a.astype(self.graph.dtype(v)) for v, a in zip(node.inputs, values, strict=True)
            ]
            results = graphs.execute(node, inputs, self.batch, 1)
            self.env.update(
                (v, np.asarray(r, np.float64)) for v, r in zip(node.outputs, results, strict=True)
            )
            return
        dtype = self.graph.dtype(node.outputs[0])
        rounds = dtype.name in COARSE and not isinstance(values[0], Raw)
        result = None if rounds else self.applied(node, values)
        if result is None:
            reads = "it is no sum, scaling, clipping, pooling or move of numbers on grids"
            if rounds or node.op == "convert_element_type":
                reads = f"it rounds to {dtype.name}"
            raise self.refuse(node, reads)
        self.env[node.outputs[0]] = result

    def applied(self, node: Node, values: list[Any]) -> Any:
        op, x = node.op, values[0]
        if op in IDENTITY:
            before, after = (self.graph.dtype(v) for v in (node.inputs[0], node.outputs[0]))
            wider = not isinstance(x, Raw) and _holds(after, before)
            return x if before == after or wider else None
        if any(isinstance(v, Raw) for v in values):
            if op not in MOVES:
                return None
            self.steps.append(dataclasses.replace(node, inputs=(x.value,)))
            return Raw(node.outputs[0], self.shape(node.outputs[0]))
        if len(values) == 1:
            if op == "neg":
                return x.negated()
            if op in MOVES:
                return self.moved(node, x)
            if op in ("reduce_sum", "reduce_window_sum"):
                return self.summed(node, x)
            if op in ("reduce_max", "reduce_window_max"):
                return self.moved(node, self.grounded(node, x))
            return None
        if op == "pad" and isinstance(x, Linear) and isinstance(values[1], np.ndarray):
            inside = all(step == 0 for _, _, step in node.params["padding_config"])
            if inside and not values[1].any():
                return self.moved(node, self.grounded(node, x), self.zero())
            return None
        if op == "concatenate" and all(isinstance(v, Linear) for v in values):
            return self.joined(node, [self.grounded(node, v) for v in values])
        if op == "clamp" and isinstance(values[1], Linear):
            low, high = values[0], values[2]
            if isinstance(low, np.ndarray) and isinstance(high, np.ndarray):
                if low.max() == low.min() and high.max() == high.min():
                    return values[1].clipped(float(low.max()), float(high.max()))
            return None
        if len(values) != 2:
            return None
        if op == "max" and isinstance(x, Linear) and x.is_positive:
            if isinstance(values[1], np.ndarray) and not values[1].any():
                return self.moved(node, x, self.zero())  # ReLU of codes: codes
        if all(isinstance(v, Linear) for v in values):
            values = [self.grounded(node, v) if v.is_clipped else v for v in values]
        return self.binary(op, *values)

    def binary(self, op: str, x: Any, y: Any) -> Any:
        if isinstance(x, np.ndarray):
            if op == "sub":
                x, y, op = y.negated(), x, "add"
            elif op in ("add", "add_any", "mul", "max", "min"):
                x, y = y, x
            else:
                return None
        if isinstance(y, np.ndarray):
            y = compressed(y)
            if op in ("mul", "div"):
                return x.scaled(y if op == "mul" else 1 / y)
            if op in ("add", "add_any", "sub"):
                return x.shifted(y if op != "sub" else -y)
            if op in ("max", "min") and y.size == 1:
                end = float(y.reshape(()))
                return x.clipped(*((end, math.inf) if op == "max" else (-math.inf, end)))
            return None
        if op not in ("add", "add_any", "sub") or x.is_clipped or y.is_clipped:
            return None
        y = y.negated() if op == "sub" else y
        shape = np.broadcast_shapes(x.shape, y.shape)
        return Linear((*x.terms, *y.terms), x.bias + y.bias, shape)

    def grounded(self, node: Node, x: Linear) -> Linear:
        """Returns x as integers times one positive number: x itself, or in fixed point."""
        if x.is_positive:
            return x
        unit, codes = max(float(x.reach()), 1e-30) / 2.0 ** (GROUND - 1), self.new()
        ends = -(2 ** (GROUND - 1)), 2 ** (GROUND - 1)
        self.rescale(f"{node.scope}/fixed_point", x, unit, ends, "", codes)
        return Linear.of(codes, unit, ends[1], x.shape)

    def step(self, node: Node, *inputs: int) -> int:
        """Adds an operation of the graph on integers; returns its result."""
        out = self.new()
        self.steps.append(dataclasses.replace(node, inputs=inputs, outputs=(out,)))
        return out

    def moved(self, node: Node, x: Linear, *others: int) -> Linear:
        """Moves numbers, or chooses among them; constants move along."""
        terms = tuple(
            (self.step(node, v, *others), self.constant(node, m, x), largest)
            for v, m, largest in x.terms
        )
        bias = self.constant(node, x.bias, x)
        return dataclasses.replace(x, terms=terms, bias=bias, shape=self.shape(node.outputs[0]))

    def moved_codes(self, node: Node, codes: Linear) -> Linear:
        """Moves the codes of an operand between its grid and its product."""
        ((value, multiplier, largest),) = codes.terms
        zeros = np.broadcast_to(np.int32(0), codes.shape)
        (moved,) = graphs.execute(node, [zeros], self.batch, 1)
        return Linear.of(self.step(node, value), multiplier, largest, np.shape(moved))

    def constant(self, node: Node, array: np.ndarray, x: Linear) -> np.ndarray:
        if array.size == 1:
            return array.reshape(())
        whole = np.broadcast_to(array, x.shape)
        (result,) = graphs.execute(node, [whole], self.batch, 1)
        return compressed(result)

    def summed(self, node: Node, x: Linear) -> Linear | None:
        """Adds a sum of integers that share a multiplier."""
        x = self.grounded(node, x)
        ((value, multiplier, largest),) = x.terms
        if node.op == "reduce_sum":
            axes = node.params["axes"]
            if 0 in axes and self.batch:
                return None
            largest *= math.prod(x.shape[a] for a in axes)
        else:
            largest *= math.prod(node.params["window_dimensions"])
        if largest >= LIMIT:
            raise ValueError(
                f"integer_only: a sum in {node.scope or 'the root module'!r} can reach "
                f"{largest:,}, beyond int32; pool fewer values or use fewer bits."
            )
        shape = self.shape(node.outputs[0])
        return Linear.of(self.step(node, value), multiplier, largest, shape)

    def joined(self, node: Node, values: list[Linear]) -> Linear | None:
        """Adds a concatenation of codes, whose scales become one multiplier for each entry."""
        axis, shape = node.params["dimension"], self.shape(node.outputs[0])
        out = self.step(node, *(v.terms[0][0] for v in values))
        parts = [np.full(v.shape[axis], float(v.terms[0][1].reshape(()))) for v in values]
        along = [-1 if a == axis else 1 for a in range(len(shape))]
        multiplier = compressed(np.concatenate(parts).reshape(along))
        bound = max(v.terms[0][2] for v in values)
        return Linear.of(out, multiplier, bound, shape)


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Returns whether every number of one float type is one of another."""
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (wide, narrow)):
        return False
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp


def _has_codes(step: Quantize | Unpack) -> bool:
    if isinstance(step, Quantize):
        return step.codes >= 0
    return isinstance(step.format, IntFormat) and step.group is None


def _written(step: Any) -> tuple[int, ...]:
    if isinstance(step, Quantize | Unpack):
        return step.hat, step.codes
    return (step.output,) if isinstance(step, Multiply) else step.outputs
