"""A quantized net as integers: packed weight codes, multipliers, and a program that runs them.

`convert` folds BatchNorm, takes each weight's codes once and keeps nothing else of it. What is left
of the graph is a `Program`: quantizers turn activations into codes, products run on codes and are
scaled by one multiplier per output channel, everything between (bias, ReLU, sums, pooling) is
float32. The order of float operations is the trained net's, so activations get the same codes.

    y = product(codes_x - z_x, codes_w - z_w) * multiplier + bias

Codes are centred before the product, so zero padding pads with the zero point. `sum_bounds` proves
where sums are exact in int32 and in float32.
"""

import dataclasses
import functools
import posixpath
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax import graph as graphs
from qkd_jax.deploy.integer.integer_only import rewrite as integer_only_program
from qkd_jax.deploy.integer.pack import pack
from qkd_jax.deploy.integer.program import (
    IntegerModel,
    LayerSize,
    Multiply,
    Program,
    Quantize,
    Unpack,
    run,
    unique_name,
)
from qkd_jax.deploy.integer.sum_bounds import code_range, sum_bound, sums_codes
from qkd_jax.graph import Node
from qkd_jax.numerics import TENSOR_SCALE, scale_codes
from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calls import split_arrays
from qkd_jax.quantize.stored_tensor import stored_tensor
from qkd_jax.quantize.traced import (
    Operand,
    TracedContraction,
    TracedNet,
    contractions,
    grid_of,
    has_integer_codes,
    is_dynamic,
    is_quantizer,
    own_axes,
    quantizer_params,
    refuse_uncalibrated,
    scale_in_output,
    trace_net,
)
from qkd_jax.quantize.variables import FOLDED, quantizer_key

FORMULATIONS = ("auto", "int32", "float32")
INT32_LIMIT = 2**31


def convert(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    integer_only: bool = False,
    any_batch: bool = True,
    **kwargs: Any,
) -> IntegerModel:
    """Turns a calibrated net into integers.

    Products whose operands both are integer codes with scales that are constant along each sum run
    on codes. The others (weights with groups, of floats or from a table; inputs in blocks or in
    float) run on what the codes stand for, in the layer's own float type, as in the trained net:
    weights are stored as codes all the same. A compiler may add such a float product in another
    order than in the trained net: XLA does for one example on a CPU, and the last bits differ.

    Args:
        net: the net.
        variables: calibrated; folded or not (BatchNorm is folded here where it can be).
        images: example input: the model's one input (any pytree of arrays), a tuple of its
            positional arguments, or None. The shapes of its arrays count alone; flags among the
            arguments are part of the result.
        integer_only: no floats between the codes of the input and those of the output: fixed-point
            multipliers, tables of thresholds up to 4 bits, sums and pools on integers. The net's
            sums, pools and logits must lie on grids (the preset "w8a8:integer" puts them there).
            A value near the boundary between two codes may get the other one. Fixed point
            resolves 2^-24 steps of its grid, or R 2^-28 where that is more: R is the largest sum
            that the codes allow, in those steps. A net is refused where R reaches 2^30.
        any_batch: False keeps the batch size of `images`, for a net that has no batch: a graph of
            nodes and edges, a step of a decoder with its cache, examples that see each other.
        **kwargs: further arguments of the model's call; arrays among them are constants of the
            result. With mutable=["cache"] the cache in `variables` is an input and a result:
            `integer_apply(integer, (images, {"cache": cache}))` is (output, {"cache": new}).

    Returns:
        An `IntegerModel` for `integer_apply`, at any batch size.

    Raises:
        ValueError: the net is not calibrated, or a part of it is not; a learned step or level at
            or below 0; the sums of a layer could exceed int32; an operand
            has no codes; with `integer_only`, an operation that needs floats, such as computing a
            dynamic range.
    """
    if not variables.get("quant"):
        raise ValueError(
            "variables has no 'quant' collection, so this net is float; calibrate it first."
        )
    folded = fold_bn(net, variables, images, any_batch=any_batch, **kwargs)
    traced = trace_net(net, folded, images, any_batch=any_batch, **kwargs)
    refuse_uncalibrated(traced)
    model = _Converter(traced).model()
    return integer_only_program(model, traced.graph) if integer_only else model


def integer_apply(
    integer: IntegerModel, images: Any, *, capture: bool = False, formulation: str = "auto"
) -> Any:
    """Runs a converted net.

    Args:
        integer: from `convert`.
        images: as `convert` took them; any batch size, unless the net was converted with
            any_batch=False.
        capture: also return the codes of every quantized activation.
        formulation: how products run. "int32": on integers, accumulated in int32. "float32": the
            same integers held in float32, exact where a layer's sums, or those of the pieces that
            it is cut into, stay within 2^24; pieces are added in int32. "auto": the second where it
            is exact and the back-end is a CPU, whose integer convolutions are several times slower,
            or codes do not fit int8 (XLA refuses such convolutions on CUDA), else the first. All
            give the same bits.

    Returns:
        The net's output; with `capture`, (output, {"<layer>/<operand>": codes}), int32. A layer
        that runs again has "#2" and so on appended.

    Raises:
        ValueError: an unknown formulation, "float32" for a layer whose sums are too large, or
            images of other shapes than the net was converted for.
    """
    checks.one_of("formulation", formulation, FORMULATIONS)
    images, _ = split_arrays(images)  # flags are in the program
    shapes = [tuple(a.shape) for a in images]
    expected = [tuple(a.shape) for a in integer.program.signature]
    if integer.program.batch is None and shapes != expected:
        raise ValueError(
            f"images is of shapes {shapes}, and the net was converted with any_batch=False, for "
            f"{expected}; give these, or convert it for any batch size."
        )
    own = [("batch", *shape[1:]) for shape in expected]
    if integer.program.batch is not None and [("batch", *shape[1:]) for shape in shapes] != own:
        raise ValueError(
            f"images is of shapes {shapes}, and the net was converted for {own}; only the batch "
            "size may differ from that of `convert`'s example."
        )
    return run(integer, images, capture, formulation)


class _Converter:
    """Builds a program from a traced net; stores constants as steps need them."""

    def __init__(self, traced: TracedNet):
        self.traced, self.graph = traced, traced.graph
        self.products = {p.node: p for p in contractions(traced.graph)}
        self.steps: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.keys: dict[int, str] = {}
        self.numbers: dict[int, np.ndarray] = {}
        self.alias: dict[int, int] = {}  # markers that do nothing, and values already emitted
        self.codes: dict[int, int] = {}  # value on a grid -> value of its centred codes
        self.scales: dict[int, int] = {}  # value on a dynamic grid -> value of its scales
        self.weights: dict[tuple[int, ...], Unpack] = {}
        self.layers: list[LayerSize] = []
        self.next = max(self.graph.avals) + 1

    def model(self) -> IntegerModel:
        for node in self.graph.nodes:
            if node.op in graphs.MARKERS:
                if not is_quantizer(node):
                    self.alias[node.outputs[0]] = node.inputs[0]
                elif node.outputs[0] not in self.graph.constants:
                    self.quantize(node)
            elif node in self.products and sums_codes(self.traced, self.products[node]):
                self.multiply(self.products[node])
            else:
                self.operation(node)
        outputs = tuple(self.value(v) for v in self.graph.outputs)
        program = Program(
            steps=tuple(self.steps),
            inputs=self.graph.inputs,
            signature=tuple(self.graph.avals[v] for v in self.graph.inputs),
            outputs=outputs,
            arrays=self.keys,
            numbers=self.numbers,
            batch=self.graph.batch,
            out_tree=self.graph.out_tree,
            layers=tuple(self.layers),
        )
        return IntegerModel({k: jnp.asarray(a) for k, a in self.arrays.items()}, program)

    def new(self) -> int:
        self.next += 1
        return self.next - 1

    def operation(self, node: Node) -> None:
        inputs = tuple(self.value(v) for v in node.inputs)
        self.steps.append(dataclasses.replace(node, inputs=inputs))

    def value(self, value: int) -> int:
        """Returns the program's value for one of the graph; emits the steps that compute it."""
        if value in self.alias:
            return self.value(self.alias[value])
        if value not in self.graph.constants or value in self.keys or value in self.numbers:
            return value
        node = self.graph.producer(value)
        if node is not None and self.has_codes(value):
            if is_quantizer(node):
                self.alias[value] = self.weight(node, as_float=True).hat
                return self.alias[value]
            outputs = tuple(self.new() for _ in node.outputs)
            inputs = tuple(self.value(v) for v in node.inputs)
            self.steps.append(dataclasses.replace(node, inputs=inputs, outputs=outputs))
            self.alias.update(zip(node.outputs, outputs, strict=True))
            return self.alias[value]
        array = self.graph.constants[value]
        sources = self.graph.sources.get(value, frozenset())
        if array.ndim == 0 and not sources:
            self.numbers[value] = array
        else:
            self.keys[value] = self.store(_name(sources), array)
        return value

    def has_codes(self, value: int) -> bool:
        """Returns whether a constant depends on a quantized weight, which has no float copy."""
        node = self.graph.producer(value)
        return node is not None and (is_quantizer(node) or any(map(self.has_codes, node.inputs)))

    def store(self, name: str, array: np.ndarray) -> str:
        same = self.arrays.get(name)
        if same is not None and same.dtype == array.dtype and np.array_equal(same, array):
            return name
        name = unique_name(self.arrays, name)
        self.arrays[name] = np.asarray(array)
        return name

    def quantize(self, node: Node) -> None:
        path, operand = node.params["path"], node.params["operand"]
        (hat,) = node.outputs
        spec, name = self.traced.spec(node), f"{path}/{operand}"
        params = quantizer_params(self.traced, node)
        kept = {k: v for k, v in params.items() if not spec.dynamic or k == TENSOR_SCALE}
        keys = tuple(
            (key, self.store(f"{path}/{quantizer_key(operand)}/{key}", array))
            for key, array in kept.items()
        )
        x, group, axes = self.value(node.inputs[0]), node.params["group"], own_axes(node)
        if not has_integer_codes(self.traced, node):
            self.steps.append(Quantize(name, spec, keys, x, hat, axes=axes, group=group))
            return
        self.codes[hat] = codes = self.new()
        if not is_dynamic(self.traced, node):
            self.steps.append(Quantize(name, spec, keys, x, hat, codes))
            return
        self.scales[hat] = scale = self.new()
        self.steps.append(Quantize(name, spec, keys, x, hat, codes, axes, scale))

    def weight(self, node: Node, *, as_float: bool) -> Unpack:
        """Packs a weight's codes once; a second reader of the same weight shares them."""
        identity = (*node.inputs, int(as_float))
        if identity in self.weights:
            return self.weights[identity]
        path, operand = node.params["path"], node.params["operand"]
        name = path if operand == "weight" else f"{path}/{operand}"
        weight = stored_tensor(self.traced, node)
        beside: dict[str, np.ndarray] = {}
        if weight.zero_point.any():
            beside["zero_point"] = weight.zero_point.astype(weight.format.storage)
        if as_float:
            scales = scale_codes(jnp.asarray(weight.block_scale), weight.scale_format)
            beside["scale"] = np.asarray(scales)
            if weight.tensor_scale is not None:
                beside["tensor_scale"] = weight.tensor_scale
        packed = pack(weight.codes, weight.format, weight.stride)
        key = self.store(f"{name}/weight", packed)
        keys = {what: self.store(f"{name}/{what}", array) for what, array in beside.items()}
        step = Unpack(
            key=key,
            shape=weight.codes.shape,
            format=weight.format,
            zero_point=keys.get("zero_point"),
            scale=keys.get("scale", ""),
            hat=self.new(),
            codes=self.new(),
            dtype=self.graph.dtype(node.outputs[0]),
            stride=weight.stride,
            group=weight.group,
            scale_format=weight.scale_format if as_float else "float32",
            tensor_scale=keys.get("tensor_scale", ""),
        )
        self.weights[identity] = step
        self.steps.append(step)
        layer = step.key.removesuffix("/weight")
        if all(size.path != layer for size in self.layers):
            self.layers.append(
                LayerSize(
                    layer,
                    weight.format.name,
                    step.shape,
                    packed.nbytes,
                    4 * weight.codes.size,
                    sum(array.nbytes for array in beside.values()) if as_float else 0,
                )
            )
        return step

    def multiply(self, product: TracedContraction) -> None:
        ranges, inputs = [], []
        for operand in product.operands:
            assert operand.marker is not None
            ranges.append(code_range(self.traced, operand.marker))
            inputs.append(self.operand_codes(operand))
        bound, pieces = sum_bound(self.traced, product, ranges)
        if bound >= INT32_LIMIT:
            raise ValueError(
                f"the sums of layer {product.path!r} can reach {bound:,}, beyond int32; give its "
                "weight or its input fewer bits."
            )
        dynamic_scales = tuple(
            (self.operand_scale(operand), operand.output_axes)
            for operand in product.operands
            if is_dynamic(self.traced, operand.marker)
        )
        if product.path in self.traced.multipliers:
            multiplier = self.traced.multipliers[product.path]
        else:
            scales = [np.asarray(1, np.float32)]
            scales += (
                scale_in_output(product, side, grid_of(self.traced, operand.marker).scale)
                for side, operand in enumerate(product.operands)
                if operand.marker is not None and not is_dynamic(self.traced, operand.marker)
            )
            multiplier = functools.reduce(np.multiply, scales)
        if multiplier.ndim not in (0, product.rank):
            multiplier = multiplier.reshape((1,) * (product.rank - 1) + (-1,))
        self.steps.append(
            Multiply(
                path=product.path,
                node=product.node,
                inputs=(inputs[0], inputs[1]),
                narrow=all(-128 <= lo and hi <= 127 for lo, hi in ranges),
                bound=bound,
                multiplier=self.store(f"{product.path}/multiplier", np.asarray(multiplier)),
                output=product.node.outputs[0],
                dtype=self.graph.dtype(product.node.outputs[0]),
                scales=dynamic_scales,
                pieces=pieces,
            )
        )

    def operand_codes(self, operand: Operand) -> int:
        """Returns the value of an operand's codes, moved as its floats are."""
        assert operand.marker is not None
        (origin,) = operand.marker.outputs
        if origin not in self.codes:
            self.codes[origin] = self.weight(operand.marker, as_float=False).codes
        return self.moved(self.codes, origin, operand)

    def operand_scale(self, operand: Operand) -> int:
        """Returns the value of an operand's dynamic scales, moved as its floats are."""
        assert operand.marker is not None
        return self.moved(self.scales, operand.marker.outputs[0], operand)

    def moved(self, known: dict[int, int], origin: int, operand: Operand) -> int:
        """Returns what belongs to an operand's grid after the moves between grid and product."""
        at = known[origin]
        for node in operand.moves:
            if node.outputs[0] not in known:
                moved = self.new()
                self.steps.append(dataclasses.replace(node, inputs=(at,), outputs=(moved,)))
                known[node.outputs[0]] = moved
            at = known[node.outputs[0]]
        return at


def _name(sources: frozenset[str]) -> str:
    """Names an array after the variables that it comes from."""
    parts = [source.split("/")[1:] for source in sources]
    names = sorted("/".join(part for part in path if part != FOLDED) for path in parts)
    if len(names) <= 1:
        return names[0] if names else "constant"
    common = posixpath.commonpath([name.rpartition("/")[0] for name in names])
    return f"{common}/constant" if common else "constant"
