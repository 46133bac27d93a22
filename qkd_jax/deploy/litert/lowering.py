"""The state of one .tflite export: which tensor of the file holds which value of the graph."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qkd_jax.deploy.graph_values import Values, unsupported
from qkd_jax.deploy.litert.flat_file import FileTensor, Operation, Program, TensorGrid
from qkd_jax.graph import Node
from qkd_jax.quantize.traced import TracedNet, contractions

TYPES = {"float32": "float32", "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8"}
Dims = tuple[int, ...]


class Lowering:
    """The state of an export, and the steps that all writers of operations share.

    Operations are written on real numbers first, with QUANTIZE and DEQUANTIZE where the net has
    grids; `integer_kernels` then makes operations on codes of them.

    Attributes:
        traced: the net; `graph` and `values` are its graph.
        int4: store weights of up to 4 bits in types of 4 bits.
        products: node -> its product.
        program: what is written.
        tensors: value -> the tensor that holds it.
        absorbed: node that is already computed -> the value whose tensor holds its result.
        grids: tensor and grid -> its dequantized form.
        stored: layer -> format of its weight's codes, the type that holds them, and their tensor.
    """

    def __init__(self, traced: TracedNet, *, int4: bool):
        self.traced, self.graph, self.values = traced, traced.graph, Values(traced.graph)
        self.int4 = int4
        self.products = {p.node: p for p in contractions(traced.graph)}
        self.program = Program([], [], [])
        self.tensors: dict[int, FileTensor] = {}
        self.absorbed: dict[Node, int] = {}
        self.grids: dict[Any, FileTensor] = {}
        self.stored: dict[str, tuple[str, str, str]] = {}
        self._constants: dict[Any, FileTensor] = {}
        self._names: dict[str, int] = {}

    def name(self, hint: str) -> str:
        """Returns a name that no other tensor has."""
        count = self._names[hint] = self._names.get(hint, -1) + 1
        return f"{hint}_{count}" if count else hint

    def dims(self, value: int) -> Dims:
        """Returns a value's shape; an axis that is k times the batch is -k."""
        batch = self.graph.batch or 0
        shape = self.graph.shape(value)
        return tuple(-(n // batch) if batch and n and n % batch == 0 else n for n in shape)

    def dtype(self, value: int, node: Node) -> str:
        """Returns the type that a value has in the file.

        Raises:
            ValueError: a type that the file has no kernels for.
        """
        name = self.graph.dtype(value).name
        if name not in TYPES:
            raise unsupported(node, f"it computes in {name}")
        return TYPES[name]

    def add(
        self,
        op: str,
        inputs: Sequence[FileTensor],
        shape: Dims,
        node: Node,
        *,
        dtype: str = "float32",
        grid: TensorGrid | None = None,
        name: str = "",
        **options: Any,
    ) -> FileTensor:
        """Adds an operation, named after the module of a graph node; returns its result."""
        name = name or (f"{node.scope}/{op.lower()}" if node.scope else op.lower())
        out = FileTensor(self.name(name), tuple(shape), dtype, grid)
        self.program.operations.append(Operation(op, list(inputs), [out], options, node.scope))
        return out

    def add_result(
        self, op: str, inputs: Sequence[FileTensor], node: Node, **options: Any
    ) -> FileTensor:
        """Adds an operation that writes a graph node's result."""
        value = node.outputs[0]
        return self.add(
            op, inputs, self.dims(value), node, dtype=self.dtype(value, node), **options
        )

    def constant(self, array: Any, name: str, grid: TensorGrid | None = None) -> FileTensor:
        """Returns a constant; equal numbers without a grid are stored once."""
        array = np.asarray(array)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        key = array.dtype.name, array.shape, array.tobytes()
        if grid is None and key in self._constants:
            return self._constants[key]
        tensor = FileTensor(self.name(name), array.shape, array.dtype.name, grid, array)
        if grid is None:
            self._constants[key] = tensor
        return tensor

    def number(self, value: Any, name: str = "number") -> FileTensor:
        """Returns a float32 scalar."""
        return self.constant(np.float32(value), name)

    def integers(self, values: Sequence[int], name: str = "shape") -> FileTensor:
        """Returns a vector of int32, which kernels take axes and sizes in."""
        return self.constant(np.asarray(values, np.int32), name)

    def operand(self, value: int) -> Any:
        """Returns a value as a tensor, or as an array where the input does not reach it."""
        return self.tensors[value] if value in self.values.dynamic else self.values.fixed(value)

    def stored_operand(self, value: int, node: Node) -> FileTensor:
        """Returns a value as a tensor of the file; a constant has a batch of 1, which repeats."""
        if value in self.values.dynamic:
            return self.tensors[value]
        array = np.asarray(self.values.fixed(value))
        if array.dtype.name not in TYPES:
            raise unsupported(node, f"it reads a constant of type {array.dtype.name}")
        # What is the same along an axis is repeated by the kernels.
        for axis in range(array.ndim):
            one = array.take([0], axis) if array.shape[axis] > 1 else array
            if one.size < array.size and np.array_equal(np.broadcast_to(one, array.shape), array):
                array = one
        return self.constant(array, f"{node.scope}/constant" if node.scope else "constant")

    def whole_operand(self, value: int, node: Node) -> FileTensor:
        """Returns a value as a tensor of its whole shape, constants repeated along the batch."""
        if value in self.values.dynamic:
            return self.tensors[value]
        array, dims = np.asarray(self.values.fixed(value)), self.dims(value)
        if array.dtype.name not in TYPES:
            raise unsupported(node, f"it reads a constant of type {array.dtype.name}")
        row = array[tuple(slice(0, 1 if n < 0 else None) for n in dims)]
        if not np.array_equal(np.broadcast_to(row, array.shape), array):
            raise unsupported(node, "its values differ along the batch")
        stored = self.constant(row, f"{node.scope}/constant" if node.scope else "constant")
        return self.broadcast(stored, dims, node) if any(n < 0 for n in dims) else stored

    def broadcast(self, x: FileTensor, dims: Dims, node: Node) -> FileTensor:
        """Repeats a tensor along axes of size 1, the batch among them."""
        if x.shape == tuple(dims):
            return x
        shape = self.run_time_shape(dims, node)
        return self.add("BROADCAST_TO", [x, shape], dims, node, dtype=x.dtype, grid=x.grid)

    def run_time_shape(self, dims: Dims, node: Node) -> FileTensor:
        """Returns a vector of sizes, with those of the batch computed from the first input's."""
        if all(n >= 0 for n in dims):
            return self.integers(dims)
        images = self.program.inputs[0]
        rank = len(images.shape)
        shape = self.add("SHAPE", [images], (rank,), node, dtype="int32", outType="int32")
        ends = [self.integers([n]) for n in (0, 1, 1)]
        batch = self.add("STRIDED_SLICE", [shape, *ends], (), node, dtype="int32", shrinkAxisMask=1)
        parts = []
        for n in dims:
            if n >= 0:
                parts.append(self.constant(np.int32(n), "size"))
            elif n == -1:
                parts.append(batch)
            else:
                times = self.constant(np.int32(-n), "batches")
                parts.append(self.add("MUL", [batch, times], (), node, dtype="int32"))
        return self.add(
            "PACK", parts, (len(dims),), node, dtype="int32", valuesCount=len(dims), axis=0
        )

    def reshaped(self, x: FileTensor, dims: Sequence[int], node: Node) -> FileTensor:
        """Reshapes a tensor; at most one axis of the result may have the batch."""
        dims = tuple(dims)
        if x.shape == dims:
            return x
        if sum(n < 0 for n in dims) > 1 or 0 in dims:
            raise unsupported(node, f"the batch is in several axes of {dims}, or an axis is empty")
        wanted = [-1 if n < 0 else n for n in dims]
        stored = self.integers(wanted)
        return self.add(
            "RESHAPE", [x, stored], dims, node, dtype=x.dtype, grid=x.grid, newShape=wanted
        )

    def transposed(self, x: FileTensor, perm: Sequence[int], node: Node) -> FileTensor:
        """Transposes a tensor."""
        perm = list(perm)
        if perm == list(range(len(perm))):
            return x
        dims = tuple(x.shape[a] for a in perm)
        stored = self.integers(perm, "perm")
        return self.add("TRANSPOSE", [x, stored], dims, node, dtype=x.dtype, grid=x.grid)
