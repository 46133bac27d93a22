"""Layers, sizes and coverage of a quantized net, before anything is trained.

Nothing here computes: shapes come from `jax.eval_shape`, contractions from the traced graph.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from qkd_jax.graph import CONTRACTIONS, LAYOUT, MARKERS, Graph, Node, bodies, trace
from qkd_jax.numerics import SCALE_BITS, Spec, scale_format
from qkd_jax.quantize.calls import (
    call_arguments,
    explaining_failures,
    own_arguments,
    split_arrays,
)
from qkd_jax.quantize.interception import Frame, LayerUse
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.operands import mark_unquantized
from qkd_jax.quantize.variables import TABLES, is_calibrated, quantizer_key
from qkd_jax.quantizers import code_grid, in_use
from qkd_jax.trees import find


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer of a net.

    Attributes:
        path: "stage1_block0/conv1".
        kind: "conv", "dense", "einsum", "embed", "conv_transpose" or "attention".
        weight_shape: shape of the kernel or table as the layer sees it; () for attention's
            products.
        params: number of parameters of the layer, bias included.
        weight: spec of the weight, or None for float; its bits, if they are learned, are those in
            use. Likewise the others.
        input: spec of the input, or None.
        output: spec of the output, or None.
        bits: storage of the layer's parameters in bits (kernel at its width, its scales in their
            format, the rest float32), as its rule plans it before calibration, afterwards as its
            quantizers are.
        uncalibrated: operands that have a spec and no quantizer in the variables: they run in
            float.
    """

    path: str
    kind: str
    weight_shape: tuple[int, ...]
    params: int
    weight: Spec | None
    input: Spec | None
    output: Spec | None
    bits: int
    uncalibrated: tuple[str, ...]

    @property
    def calibrated(self) -> bool:
        """Whether every operand with a spec has its quantizer."""
        return not self.uncalibrated

    def width(self, operand: str) -> int:
        """Bits with which "weight", "input" or "output" runs: 32 in float."""
        spec = getattr(self, operand)
        return 32 if spec is None or operand in self.uncalibrated else spec.bits


@dataclasses.dataclass(frozen=True)
class Size:
    """Storage of a net's parameters.

    Attributes:
        params: number of parameters.
        float_bytes: bytes of all parameters in float32.
        bytes: bytes with every quantized kernel at its width and its scales in their format
            (float32 unless the spec says otherwise); biases, batch normalization's scale and offset
            in float32. Running statistics are not counted: an exported net has folded them away.
    """

    params: int
    float_bytes: int
    bytes: int


def _seen(net: QuantizedModel, variables: Any, images: Any, **kwargs: Any) -> Frame:
    frame = Frame(net.spec_of)
    arrays, joined = _given(net, images, kwargs)
    forward = lambda v, a: net.apply_in(frame, v, *joined(a), **kwargs)
    with explaining_failures(images):
        jax.eval_shape(forward, variables, arrays)
    return frame


def _given(net: QuantizedModel, images: Any, kwargs: Mapping[str, Any]) -> Any:
    """Returns the arrays of a net's call, and a function from such to its positional arguments."""
    arguments = call_arguments(net.model, kwargs.get("method"), images, own_arguments(kwargs))
    return split_arrays(arguments)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _spec(net: QuantizedModel, path: str, operand: str, quant: Any) -> Spec | None:
    """The spec of an operand, with the bits in use; `quant` is what the layer's quantizers own."""
    spec = net.spec_of(path, operand)
    return None if spec is None else in_use(spec, quant.get(quantizer_key(operand)))


def _scale_bits(spec: Spec, params: Any, use: LayerUse, layers: int) -> int:
    """Counts the bits of a weight's scales and zero points, as stored or as planned.

    Scales are in their format, float32 unless the spec says so; a zero point takes as many bits as
    a code, up to whole bytes; the second level of a scale is one float32 number.

    A scanned or vmapped layer is several `layers`, with scales of their own.
    """
    second = 32 * layers if scale_format(spec) == "e4m3fn" else 0
    if params is not None and not spec.dynamic:
        grid = jax.eval_shape(lambda p: (code_grid(p, spec) or (None,))[0], params)
        if grid is None:
            return 32 * _count(params)
        count = math.prod(grid.shape)
    elif spec.granularity == "tensor":
        count = layers
    else:
        shape = use.shapes["weight"]
        count = layers * math.prod(shape[axis] for axis in use.weight_channels)
        if isinstance(spec.granularity, int):
            count *= shape[use.group_axis] // spec.granularity
    zero_point = 0 if spec.symmetric else 8 * spec.format.storage.itemsize
    return count * (SCALE_BITS[scale_format(spec)] + zero_point) + second


def layers(
    net: QuantizedModel, variables: Mapping[str, Any], images: Any, **kwargs: Any
) -> list[LayerInfo]:
    """Lists the layers that quantization can reach, in the order in which they run.

    Args:
        net: the net.
        variables: its variables, or their shapes.
        images: example input, or its shape: the model's one input, a tuple of its positional
            arguments, or None.
        **kwargs: further arguments of the model's call.

    Returns:
        One `LayerInfo` a layer. A net without any quantizer lists what its rules plan.
    """
    found, planned = [], not is_calibrated(variables)
    for path, use in _seen(net, variables, images, **kwargs).seen.items():
        params = find(variables.get("params", {}), path, {})
        quant = find(variables.get("quant", {}), path, {})
        weight = _spec(net, path, "weight", quant) if "weight" in use.shapes else None
        params = {k: v for k, v in params.items() if not isinstance(v, Mapping)}
        table = _count({k: v for k, v in params.items() if k in TABLES})
        bits = 32 * _count(params)
        uncalibrated = tuple(
            operand
            for operand in use.shapes
            if net.spec_of(path, operand) is not None and quantizer_key(operand) not in quant
        )
        if weight is not None and (planned or "weight" not in uncalibrated):
            stacked = max(table // max(math.prod(use.shapes["weight"]), 1), 1)
            scales = _scale_bits(weight, quant.get(quantizer_key("weight")), use, stacked)
            bits += table * (weight.bits - 32) + scales
        found.append(
            LayerInfo(
                path=path,
                kind=use.kind,
                weight_shape=use.shapes.get("weight", ()),
                params=_count(params),
                weight=weight,
                input=_spec(net, path, "input", quant) if "input" in use.shapes else None,
                output=_spec(net, path, "output", quant),
                bits=bits,
                uncalibrated=uncalibrated,
            )
        )
    return found


def size(net: QuantizedModel, variables: Mapping[str, Any], images: Any, **kwargs: Any) -> Size:
    """Counts a net's parameters and their bytes; weights that have a quantizer count as codes."""
    total = _count(variables.get("params", {}))
    bits = 32 * total
    if is_calibrated(variables):
        for layer in layers(net, variables, images, **kwargs):
            bits += layer.bits - 32 * layer.params
    return Size(params=total, float_bytes=4 * total, bytes=math.ceil(bits / 8))


@dataclasses.dataclass(frozen=True)
class Covered:
    """One product of the forward pass.

    Attributes:
        path: the layer's path; for a product of no known layer the scope in which it stands (a
            module's path, the equation of an einsum).
        op: the jaxpr's operation, "dot_general" or "conv_general_dilated".
        macs: multiply-accumulates for one example.
        status: "quantized", "weight only", "input only", "skipped" (a rule leaves it in float, or
            no rule speaks of the layer), "NOT CALIBRATED" (a rule quantizes an operand that has no
            quantizer, while others of the net have theirs: it runs in float) or "MISSED" (a product
            that no rule can reach).
        bits: (weight bits, input bits); 32 is float, and learned bits are those in use.
    """

    path: str
    op: str
    macs: int
    status: str
    bits: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Every product of a net, and what quantization does to it; prints as a table."""

    products: tuple[Covered, ...]
    calibrated: bool

    @property
    def missed(self) -> tuple[Covered, ...]:
        """Products that no rule can reach: `x @ w`, `jnp.dot`, custom code."""
        return tuple(p for p in self.products if p.status == "MISSED")

    @property
    def uncalibrated(self) -> tuple[Covered, ...]:
        """Products that a rule quantizes and that have not been calibrated with the others."""
        return tuple(p for p in self.products if p.status == "NOT CALIBRATED")

    @property
    def bit_operations(self) -> int:
        """BOPs of one example: sum over the products of MACs x weight bits x input bits.

        As the net runs now: a product in float counts 32 x 32, and so does every product of a net
        that is not calibrated yet.

        Reference:
            van Baalen et al., 2020, arXiv 2005.07093 (its BOP count).
        """
        bits = lambda p: p.bits[0] * p.bits[1] if self.calibrated else 32 * 32
        return sum(p.macs * bits(p) for p in self.products)

    def share(self, status: str) -> float:
        """The share of multiply-accumulates with a status, 0 to 1."""
        total = sum(p.macs for p in self.products) or 1
        return sum(p.macs for p in self.products if p.status == status) / total

    def __str__(self) -> str:
        width = max([len(p.path) for p in self.products] + [4])
        lines = [f"{'path':{width}}  {'op':20}  {'weight':>6}  {'input':>5}  {'MACs':>12}  status"]
        for p in self.products:
            weight, inputs = ("float" if b == 32 else str(b) for b in p.bits)
            lines.append(
                f"{p.path:{width}}  {p.op:20}  {weight:>6}  {inputs:>5}  {p.macs:12,}  {p.status}"
            )
        state = "" if self.calibrated else " (planned: the net is float until it is calibrated)"
        parts = [f"{self.share('quantized'):.1%} of multiply-accumulates quantized"]
        partly = [s for s in ("weight only", "input only") if self.share(s)]
        parts += [f"{self.share(status):.1%} {status}" for status in partly]
        parts[-1] += state
        if self.uncalibrated:
            parts.append(f"{len(self.uncalibrated)} NOT CALIBRATED")
        lines.append(
            ", ".join([f"{len(self.products)} products", *parts, f"{len(self.missed)} MISSED"])
        )
        return "\n".join(lines)


# What may lie between a marker and its contraction: a reduction here sums over an axis of size 1.
_BETWEEN = LAYOUT | {"broadcast_in_dim", "convert_element_type", "reduce_sum"}


def coverage(
    net: QuantizedModel, variables: Mapping[str, Any], images: Any, **kwargs: Any
) -> Coverage:
    """Reports every matmul and convolution: quantized, skipped, NOT CALIBRATED or MISSED.

    The products are read from the jaxpr, not from the list of layers, so `x @ w`, `jnp.dot`,
    `jnp.einsum` and `lax.dot_general` in a model's own code are found too, inside `jit`, `remat`,
    `scan`, `vmap`, every branch of a `cond` and the body of a `while` (counted once, for the number
    of its rounds is not known). Products of the code's own numbers (sines of positions) are none.

    Args:
        net: the net.
        variables: its variables, or their shapes.
        images: example input, or its shape: the model's one input, a tuple of its positional
            arguments, or None.
        **kwargs: further arguments of the model's call.

    Returns:
        A `Coverage`; `print` it, or ask for `.missed`.
    """
    arrays, joined = _given(net, images, kwargs)

    def marked(variables: Any, arrays: Any) -> Any:
        # Nothing is asked of the quantizers but where they stand.
        frame = Frame(net.spec_of, mark_unquantized, traced=True)
        return net.apply_in(frame, variables, *joined(arrays), **kwargs)

    with explaining_failures(images):
        traced = trace(marked, variables, arrays, evaluate=False)
    examples = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
    calibrated = is_calibrated(variables)
    quant = variables.get("quant", {}) if calibrated else None
    covered = (
        _covered(net, quant, inside, node, examples) for inside, node in _contractions(traced)
    )
    return Coverage(tuple(covered), calibrated)


def _contractions(traced: Graph) -> Iterator[tuple[Graph, Node]]:
    for node in traced.nodes:
        if node.op in CONTRACTIONS:
            if not all(_of_code(traced, value) for value in node.inputs[:2]):
                yield traced, node
        else:
            for inside in bodies(node):
                yield from _contractions(inside)


def _of_code(traced: Graph, value: int) -> bool:
    """Whether a value is the code's own, as positions are: no input or variable reaches it."""
    return value in traced.constants or traced.sources.get(value) == frozenset()


def _mark(traced: Graph, value: int) -> Node | None:
    """The quantizer (or mark of a skipped one) an operand comes from, behind layout ops."""
    while (node := traced.producer(value)) is not None:
        if node.op in MARKERS:
            return node
        if node.op not in _BETWEEN:
            return None
        value = node.inputs[0]
    return None


def _covered(
    net: QuantizedModel,
    quant: Mapping[str, Any] | None,
    traced: Graph,
    node: Node,
    examples: int,
) -> Covered:
    """What is done to a product; `quant` is None where rules only plan it."""
    bits, uncalibrated = {"input": 32, "weight": 32}, False
    path = node.scope
    marks = [_mark(traced, value) for value in node.inputs[:2]]
    for mark in marks:
        if mark is None:
            continue
        path, operand = mark.params["path"], mark.params["operand"]
        if mark.op == "quantizer":
            own = find(quant or {}, path, {})
            if quant is not None and quantizer_key(operand) not in own:
                uncalibrated = True
                continue
            spec = _spec(net, path, operand, own)
            assert spec is not None
            bits["weight" if operand in ("weight", "other") else "input"] = spec.bits
    quantized = [b < 32 for b in bits.values()]
    if uncalibrated:
        status = "NOT CALIBRATED"
    elif all(quantized):
        status = "quantized"
    elif any(quantized):
        status = "input only" if bits["weight"] == 32 else "weight only"
    else:
        status = "MISSED" if any(m is None for m in marks) else "skipped"
    return Covered(
        path, node.op, _macs(traced, node, examples), status, (bits["weight"], bits["input"])
    )


def _macs(traced: Graph, node: Node, examples: int) -> int:
    out = math.prod(traced.shape(node.outputs[0]))
    lhs, rhs = (traced.shape(v) for v in node.inputs[:2])
    if node.op == "dot_general":
        (summed, _), _ = node.params["dimension_numbers"]
        return out * math.prod(lhs[i] for i in summed) // examples
    numbers = node.params["dimension_numbers"]
    return out * math.prod(rhs) // rhs[numbers.rhs_spec[0]] // examples
