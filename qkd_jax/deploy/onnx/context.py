"""The state of one ONNX export: which tensor holds which value of the graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qkd_jax.deploy.graph_values import Values, unsupported
from qkd_jax.deploy.onnx.engines import import_engine
from qkd_jax.deploy.onnx.writer import Tensor, Writer
from qkd_jax.graph import Node
from qkd_jax.numerics import Grid, IntFormat
from qkd_jax.quantize.stored_tensor import StoredTensor
from qkd_jax.quantize.traced import TracedNet, contractions

# Operations that ONNX Runtime and OpenVINO take codes through to an integer kernel.
PASSES_CODES = frozenset("Flatten MaxPool Reshape Squeeze Transpose Unsqueeze".split())


@dataclasses.dataclass(frozen=True, eq=False)
class DynamicRange:
    """A tensor of codes whose range is computed at run time.

    Attributes:
        codes: the codes as uint8; "" for those of more bits. Signed ones are shifted by `offset`:
            with session.x64quantprecision ONNX Runtime makes uint8 of int8 weights, and lacks the
            product of those (findings/onnxruntime_mixed_matmul_integer.sh).
        centred: the codes less the zero point, as floats.
        scale: of each entry along `axes`; as many axes as the tensor, or none.
        zero_point: as scale, float; "" where it is 0.
        axes: of the model's value, with ranges of their own.
        format: of the codes.
    """

    codes: str
    centred: str
    scale: str
    zero_point: str
    axes: tuple[int, ...]
    format: IntFormat

    @property
    def offset(self) -> int:
        """What is added to signed codes, to hold them unsigned."""
        return 128 if self.format.signed else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Dequantized:
    """The codes behind a tensor of real numbers.

    Attributes:
        format: of the codes.
        grid: of a static range.
        range: of a dynamic range.
    """

    format: IntFormat
    grid: Grid | None = None
    range: DynamicRange | None = None

    @property
    def largest(self) -> int:
        """The largest code as kernels see it, signed codes shifted by 128."""
        return self.format.qmax + (128 if self.format.signed else 0)


@dataclasses.dataclass(frozen=True)
class WeightForms:
    """The ways in which weights with groups, or on no uniform grid, may be written.

    Attributes:
        form: "float", "blocks", "nbits" or "nbits_int8", as `to_onnx` takes it.
        chosen: whether the caller named it, and no target.
        packed_bits: widths of MatMulNBits whose kernels are faster than float.
        pack: types of 4 bits and less may be used, where the opset has them.
        int2: the engine reads types of 2 bits.
        float4: it reads float4 (e2m1).
        fenced: whether dequantized weights stand behind a Max, which keeps OpenVINO from rounding
            the inputs of their product.
    """

    form: str = "float"
    chosen: bool = False
    packed_bits: tuple[int, ...] = ()
    pack: bool = True
    int2: bool = False
    float4: bool = False
    fenced: bool = True


class Export:
    """The state of an export, and the steps that all writers of operations share.

    Attributes:
        traced: the net; `graph` and `values` are its graph.
        int4: store weights of up to 4 bits in types of 4 bits.
        activations: the type of activations' codes: "uint8", "int8" or "own".
        offset_before_rounding: the engine adds a grid's lowest code before it rounds.
        onnxruntime: ONNX Runtime may run the file, whose optimizer takes floats near a grid for
            codes: they are written out of its reach.
        quantizes_inputs: the engine quantizes float inputs of a weight that is behind
            DequantizeLinear.
        forms: how weights with groups, or on no uniform grid, are written.
        stored_tensors: marker -> codes and grid of a weight that has no Grid.
        writer: nodes and constants that are written.
        products: node -> its product.
        tensors: value -> the tensor that holds it.
        absorbed: node that is already computed -> the value whose tensor holds its result.
        grids: tensor and grid -> name of its dequantized form.
        dequantized: name of a dequantized form -> its codes.
        stored: layer -> format of its weight's codes, and the type that holds them.
        saturating: layers whose sums exceed 16 bits.
        rounded_inputs: layers whose float inputs a kernel rounds to 8 bits.
    """

    def __init__(
        self,
        traced: TracedNet,
        opset: int,
        *,
        int4: bool = False,
        activations: str = "uint8",
        offset_before_rounding: bool = False,
        onnxruntime: bool = True,
        quantizes_inputs: bool = True,
        forms: WeightForms = WeightForms(),
        stored_tensors: Mapping[Node, StoredTensor] | None = None,
    ):
        self.traced, self.graph, self.values = traced, traced.graph, Values(traced.graph)
        self.int4, self.activations = int4, activations
        self.offset_before_rounding = offset_before_rounding
        self.onnxruntime = onnxruntime
        self.quantizes_inputs = quantizes_inputs
        self.forms, self.stored_tensors = forms, stored_tensors or {}
        self.writer = Writer(opset)
        self.products = {p.node: p for p in contractions(traced.graph)}
        self.tensors: dict[int, Tensor] = {}
        self.absorbed: dict[Node, int] = {}
        self.grids: dict[Any, str] = {}
        self.dequantized: dict[str, Dequantized] = {}
        self.stored: dict[str, tuple[str, str]] = {}
        self.saturating: list[str] = []
        self.rounded_inputs: list[str] = []

    def add(self, op: str, inputs: list[str], node: Node, **attributes: Any) -> str:
        """Adds an ONNX node named after the module of a graph node."""
        return self.writer.add(op, inputs, node.scope, **attributes)

    def add_like(self, x: Tensor, op: str, inputs: list[str], node: Node, **options: Any) -> Tensor:
        """Adds an ONNX node whose result has the shape and order of a tensor."""
        return dataclasses.replace(x, name=self.add(op, inputs, node, **options))

    def add_result(
        self, x: Tensor, op: str, inputs: list[str], node: Node, **options: Any
    ) -> Tensor:
        """Adds an ONNX node that writes a graph node's result, ordered like one of its operands."""
        return dataclasses.replace(
            self.add_like(x, op, inputs, node, **options), shape=self.shape(node)
        )

    def cast(self, name: str, dtype: Any, node: Node) -> str:
        """Adds a Cast to a NumPy type."""
        return self.add("Cast", [name], node, to=self.element_type(dtype))

    def number(self, x: Any, value: int, node: Node) -> Any:
        """Returns a graph node's operand as numbers, for ONNX orders no truths."""
        if self.graph.dtype(value) != np.bool_:
            return x
        if not isinstance(x, Tensor):
            return np.asarray(x, np.float32)
        return dataclasses.replace(x, name=self.cast(x.name, np.float32, node))

    def fenced(self, name: str, node: Node) -> str:
        """Adds max(x, lowest number), a change of nothing that ONNX Runtime does not look through.

        A sum with the number 0, or a product with 1, its optimizer would take out.
        """
        lowest = self.writer.constant(np.finfo(np.float32).min, "lowest")
        return self.add("Max", [name, lowest], node)

    def add_reduced(self, op: str, name: str, axes: list[int], node: Node) -> str:
        """Adds a reduction over axes of an ONNX tensor, which stay with size 1.

        A Squeeze takes them away: OpenVINO moves the grid behind a ReduceMax to its front, and
        without the axes lays it out wrong (findings/openvino_reduce_axes.sh).
        """
        # The axes are an input of ReduceSum since opset 13 and of its siblings since 18.
        if self.writer.opset >= 18 or op == "ReduceSum":
            inputs = [name, self.writer.shape_constant(axes, "axes")]
            return self.add(op, inputs, node, keepdims=1)
        return self.add(op, [name], node, axes=axes, keepdims=1)

    def shape(self, node: Node) -> tuple[int, ...]:
        """Returns the shape of a node's result, with -1 for the batch."""
        return self.values.shape(node.outputs[0])

    def operand(self, value: int) -> Any:
        """Returns a value as a Tensor, or as an array where the input does not reach it."""
        return self.tensors[value] if value in self.values.dynamic else self.values.fixed(value)

    def tensor(self, value: int) -> Tensor:
        """Returns a value as a Tensor; one that no input reaches is repeated along the batch."""
        if value in self.values.dynamic:
            return self.tensors[value]
        shape, sizes = self.values.shape(value), self.graph.shape(value)
        node = self.graph.producer(value)
        scope = "" if node is None else node.scope
        array = self.values.fixed(value)
        # Where several batches lie in one axis, their entries are equal or they have no order.
        row = array[tuple(slice(0, 1 if n == -1 else None) for n in shape)]
        if not np.array_equal(np.broadcast_to(row, array.shape), array):
            assert node is not None
            raise unsupported(node, "its values differ along the batch")
        name = self.writer.constant(row, f"{scope}/constant" if scope else "constant")
        if -1 in shape:
            name = self.writer.add("Expand", [name, self.run_time_shape(sizes, scope)], scope)
        return Tensor(name, shape, tuple(range(len(shape))))

    def run_time_shape(self, sizes: Sequence[int], scope: str) -> str:
        """Returns an int64 vector of sizes as they were traced, with those of the batch computed.

        An axis of several batches has their number times the size of the first input's batch.
        """
        batch, writer = self.graph.batch, self.writer
        pieces: list[Any] = []
        for size in sizes:
            if batch and size and size % batch == 0:
                images = self.tensors[self.graph.inputs[0]]
                # Shape has had bounds of its own since opset 15 only.
                one = writer.add("Shape", [images.name], scope)
                one = writer.add(
                    "Gather", [one, writer.shape_constant([images.perm.index(0)])], scope
                )
                if size != batch:
                    times = writer.shape_constant([size // batch], "batches")
                    one = writer.add("Mul", [one, times], scope)
                pieces.append(one)
            elif pieces and isinstance(pieces[-1], list):
                pieces[-1].append(size)
            else:
                pieces.append([size])
        names = [p if isinstance(p, str) else writer.shape_constant(p) for p in pieces]
        if not names:
            return writer.shape_constant([])
        return names[0] if len(names) == 1 else writer.add("Concat", names, scope, axis=0)

    def storage(self, path: str, format: IntFormat) -> np.dtype:
        """Returns the type that holds the codes of a layer's weight."""
        dtype = np.dtype(format.storage)
        if self.int4 and format.bits <= 4:
            dtype = np.dtype(jax.numpy.int4 if format.signed else jax.numpy.uint4)
        self.stored[path] = (format.name, dtype.name)
        return dtype

    def static_codes(self, name: str) -> Dequantized | None:
        """Returns the codes of at most 8 bits that a tensor holds, moved or not, or None."""
        while name not in self.dequantized:
            node = self.writer.producer(name)
            if node is None or node.op not in PASSES_CODES:
                return None
            name = node.inputs[0]
        codes = self.dequantized[name]
        return codes if codes.grid is not None and codes.format.bits <= 8 else None

    def element_type(self, dtype: Any) -> int:
        """Returns ONNX's number for a NumPy type."""
        return int(import_engine("onnx").helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def aligned(self, node: Node, *operands: Any) -> tuple[list[str], Tensor]:
        """Brings operands of an elementwise operation to one order; returns names and order."""
        tensors = [o for o in operands if isinstance(o, Tensor) and o.perm]
        if not tensors:
            tensors = [o for o in operands if isinstance(o, Tensor)]
        # A channels-first map decides, so that the other one moves and not the map.
        guide = max(tensors, key=lambda t: t.perm != tuple(range(len(t.perm))))
        if any(not _same_order(t, guide) for t in tensors):
            tensors = [self.writer.ordered(t, node.scope) for t in tensors]
            guide = dataclasses.replace(guide, order=None)
        names = []
        for operand in operands:
            if not isinstance(operand, Tensor):
                array = self.writer.like(np.asarray(operand), guide)
                hint = f"{node.op}_constant"
                names.append(
                    self.writer.constant(array, f"{node.scope}/{hint}" if node.scope else hint)
                )
            elif operand.perm:
                if not _same_order(operand, guide):
                    operand = self.writer.ordered(operand, node.scope)
                names.append(self.writer.arranged(operand, guide.perm, node.scope).name)
            else:
                names.append(operand.name)
        return names, guide


def _same_order(a: Tensor, b: Tensor) -> bool:
    if a.order is None or b.order is None:
        return a.order is b.order
    return a.order[0] == b.order[0] and np.array_equal(a.order[1], b.order[1])
