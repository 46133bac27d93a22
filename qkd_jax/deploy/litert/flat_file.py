"""The operations and tensors of a .tflite file, and their flatbuffer.

The schema comes from `ai-edge-litert`, LiteRT's own package; nothing of TensorFlow is needed.
"""

import dataclasses
from typing import Any

import numpy as np

from qkd_jax.deploy.litert.op_table import OPTIONS, ops_version
from qkd_jax.deploy.onnx.engines import import_engine

SCHEMA_VERSION = 3
ALIGNMENT = 16  # of a buffer's data, as the schema asks
PACKED = {"int4": 4, "int2": 2}
SIGNATURE = "serving_default"


@dataclasses.dataclass(frozen=True, eq=False)
class TensorGrid:
    """What the codes of a tensor mean: real = (code - zero_point) * scale.

    Attributes:
        scale: float32, one number or one per entry of `axis`.
        zero_point: as scale.
        axis: of the tensor, for one scale per entry.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 0

    def same(self, other: "TensorGrid | None") -> bool:
        """Whether two grids give every code the same meaning."""
        return other is not None and all(
            np.array_equal(a, b)
            for a, b in ((self.scale, other.scale), (self.zero_point, other.zero_point))
        )


@dataclasses.dataclass(eq=False)
class FileTensor:
    """A tensor of the file.

    Attributes:
        name: its name.
        shape: an axis that is k times the batch is -k.
        dtype: a name of NumPy's, or "int4" or "int2".
        grid: of codes; None for numbers.
        data: of a constant; codes of few bits one a number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    grid: TensorGrid | None = None
    data: np.ndarray | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape at a batch of 1."""
        return tuple(abs(n) for n in self.shape)


@dataclasses.dataclass(eq=False)
class Operation:
    """An operation of the file.

    Attributes:
        op: its name in the schema, such as "CONV_2D".
        inputs: in the kernel's order.
        outputs: likewise.
        options: fields of the operation's options, in the schema's own names.
        scope: path of the module that it comes from.
    """

    op: str
    inputs: list[FileTensor]
    outputs: list[FileTensor]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    scope: str = ""


@dataclasses.dataclass(eq=False)
class Program:
    """What a file computes.

    Attributes:
        inputs: its inputs.
        outputs: its results.
        operations: in an order in which they can run.
        captured: codes that are results beside the net's own.
    """

    inputs: list[FileTensor]
    outputs: list[FileTensor]
    operations: list[Operation]
    captured: list[FileTensor] = dataclasses.field(default_factory=list)

    def output_names(self) -> list[str]:
        """Returns the names of all results: "logits", or "output0" and so on, and the captured."""
        count = len(self.outputs)
        own = ["logits"] if count == 1 else [f"output{index}" for index in range(count)]
        return own + [t.name for t in self.captured]

    def tensors(self) -> list[FileTensor]:
        """Lists every tensor that the program reads or writes, once."""
        found = dict.fromkeys(self.inputs)
        for operation in self.operations:
            found.update(dict.fromkeys([*operation.inputs, *operation.outputs]))
        found.update(dict.fromkeys(self.outputs))
        return list(found)


def packed(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns a constant's bytes; codes of few bits share a byte, the first one lowest."""
    if dtype not in PACKED:
        return np.frombuffer(np.ascontiguousarray(data, np.dtype(dtype)).tobytes(), np.uint8)
    bits = PACKED[dtype]
    each = 8 // bits
    flat = np.asarray(data, np.int8).reshape(-1).view(np.uint8) & (2**bits - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    shifted = flat << (bits * np.arange(each, dtype=np.uint8))
    return np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8)


def flat_bytes(program: Program, metadata: dict[str, bytes]) -> bytes:
    """Returns the flatbuffer of a program.

    Args:
        program: what it computes.
        metadata: name -> content, which interpreters leave alone.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    schema = import_engine("ai_edge_litert.schema_py_generated")
    buffer_class = _aligned_buffer(schema)
    buffers = [schema.BufferT()]  # the empty one, of what is computed

    def buffer(data: np.ndarray) -> int:
        buffers.append(buffer_class())
        buffers[-1].data = data
        return len(buffers) - 1

    tensors = program.tensors()
    numbers = {tensor: index for index, tensor in enumerate(tensors)}
    model, graph = schema.ModelT(), schema.SubGraphT()
    graph.name = "main"
    graph.tensors = [_tensor(schema, tensor, buffer) for tensor in tensors]
    results = program.outputs + program.captured
    graph.inputs, graph.outputs = ([numbers[t] for t in ends] for ends in (program.inputs, results))
    codes: dict[tuple[str, int], int] = {}
    graph.operators = []
    for operation in program.operations:
        key = operation.op, ops_version(operation)
        entry = schema.OperatorT()
        entry.opcodeIndex = codes.setdefault(key, len(codes))
        entry.inputs = [numbers[t] for t in operation.inputs]
        entry.outputs = [numbers[t] for t in operation.outputs]
        _set_options(schema, entry, operation)
        graph.operators.append(entry)
    model.version, model.description = SCHEMA_VERSION, "qkd_jax"
    model.operatorCodes = [_operator_code(schema, *key) for key in codes]
    model.subgraphs, model.buffers = [graph], buffers
    model.signatureDefs = [_signature(schema, program, numbers)]
    model.metadata = []
    for name, content in metadata.items():
        entry = schema.MetadataT()
        entry.name, entry.buffer = name, buffer(np.frombuffer(content, np.uint8))
        model.metadata.append(entry)
    builder = import_engine("flatbuffers").Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _aligned_buffer(schema: Any) -> Any:
    """Returns the class of a buffer whose data lie at a multiple of `ALIGNMENT`."""

    class Aligned(schema.BufferT):
        def Pack(self, builder: Any) -> Any:
            builder.StartVector(1, len(self.data), ALIGNMENT)
            head = builder.head - len(self.data)
            builder.head = head
            builder.Bytes[head : head + len(self.data)] = self.data.tobytes()
            data = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    return Aligned


def _tensor(schema: Any, tensor: FileTensor, buffer: Any) -> Any:
    entry = schema.TensorT()
    entry.name, entry.shape = tensor.name, list(tensor.sizes)
    entry.type, entry.hasRank = getattr(schema.TensorType, tensor.dtype.upper()), True
    entry.buffer = 0
    if tensor.data is not None:
        entry.buffer = buffer(packed(tensor.data, tensor.dtype))
    elif any(n < 0 for n in tensor.shape):
        entry.shapeSignature = [-1 if n < 0 else n for n in tensor.shape]
    if tensor.grid is not None:
        entry.quantization = schema.QuantizationParametersT()
        entry.quantization.scale = tensor.grid.scale.reshape(-1).astype(np.float32)
        entry.quantization.zeroPoint = tensor.grid.zero_point.reshape(-1).astype(np.int64)
        entry.quantization.quantizedDimension = tensor.grid.axis
    return entry


def _set_options(schema: Any, entry: Any, operation: Operation) -> None:
    name = OPTIONS.get(operation.op)
    if name is None:
        return
    options = getattr(schema, f"{name}T")()
    for key, value in operation.options.items():
        if key == "padding":
            value = getattr(schema.Padding, value)
        elif key == "fusedActivationFunction":
            value = getattr(schema.ActivationFunctionType, value)
        elif key in ("inDataType", "outDataType", "outType", "outputType"):
            value = getattr(schema.TensorType, value.upper())
        assert hasattr(options, key), (operation.op, key)
        setattr(options, key, value)
    entry.builtinOptionsType = getattr(schema.BuiltinOptions, name)
    entry.builtinOptions = options


def _operator_code(schema: Any, op: str, version: int) -> Any:
    entry, code = schema.OperatorCodeT(), getattr(schema.BuiltinOperator, op)
    # Readers of before there were codes above 127 look at the old field, and refuse it.
    entry.deprecatedBuiltinCode, entry.builtinCode, entry.version = min(code, 127), code, version
    return entry


def _signature(schema: Any, program: Program, numbers: dict[FileTensor, int]) -> Any:
    entry = schema.SignatureDefT()
    entry.signatureKey, entry.subgraphIndex = SIGNATURE, 0

    def named(tensors: list[FileTensor], names: list[str]) -> list[Any]:
        maps = []
        for tensor, name in zip(tensors, names, strict=True):
            maps.append(schema.TensorMapT())
            maps[-1].name, maps[-1].tensorIndex = name, numbers[tensor]
        return maps

    entry.inputs = named(program.inputs, [t.name for t in program.inputs])
    entry.outputs = named(program.outputs + program.captured, program.output_names())
    return entry
