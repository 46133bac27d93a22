"""Makes operations on codes of DEQUANTIZE, an operation on real numbers, and QUANTIZE.

A QUANTIZE is taken up through what only moves numbers, or clips them, to the operation that
computes them; where that one has an integer kernel for such codes, it becomes one. What stays
between a DEQUANTIZE and a QUANTIZE computes in float, which is right, and slower.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from qkd_jax.deploy.litert.activation_grids import LIMITS
from qkd_jax.deploy.litert.flat_file import FileTensor, Operation, Program, TensorGrid

# Their result holds numbers of their first input, and padding.
MOVES = frozenset("RESHAPE TRANSPOSE STRIDED_SLICE REVERSE_V2 MAX_POOL_2D PAD PADV2".split())
CLIPS = frozenset({"RELU", "RELU6"})
PRODUCTS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})
SUMS = frozenset({"ADD", "SUB", "MUL"})
FUSES = PRODUCTS | SUMS | {"AVERAGE_POOL_2D"}
# The one grid that the kernels of some functions write: (scale, zero point) by type.
FIXED_GRIDS = {
    "SOFTMAX": {"int8": (1 / 256, -128), "int16": (1 / 32768, 0)},
    "LOGISTIC": {"int8": (1 / 256, -128), "int16": (1 / 32768, 0)},
    "TANH": {"int8": (1 / 128, 0), "int16": (1 / 32768, 0)},
}
ANY_GRID = SUMS | {"MEAN", "GELU"}
NO_INT16 = frozenset({"GELU"})
# Least and greatest ratio of the unit of a sum to that of its result. Outside of these XNNPACK does
# not open the file (products), and LiteRT's own kernels overflow and say nothing (ADD, MUL).
RATIOS = {"products": (2.0**-32, 2.0**8), "ADD": (2.0**-10, 2.0**8), "MUL": (2.0**-16, 2.0**8)}
WEIGHT_BITS = 8


def with_integer_kernels(program: Program, *, int4: bool | None) -> Program:
    """Returns a program that computes on codes wherever LiteRT has a kernel for it.

    Args:
        program: as `Lowering` wrote it.
        int4: whether integer kernels too read weights of 4 bits; None stores those as int8, which
            the kernels need not unpack at every call.
    """
    rewriter = _Rewriter(program, int4=bool(int4))
    rewriter.rewrite()
    return Program(program.inputs, program.outputs, _live(rewriter.operations, program.outputs))


def _live(operations: list[Operation], outputs: list[FileTensor]) -> list[Operation]:
    needed, kept = set(outputs), []
    for operation in reversed(operations):
        if not needed.isdisjoint(operation.outputs):
            kept.append(operation)
            needed.update(operation.inputs)
    return kept[::-1]


class _Rewriter:
    def __init__(self, program: Program, *, int4: bool):
        self.outputs, self.int4 = set(program.outputs), int4
        self.operations: list[Operation] = []
        self.source = program.operations
        self.producer: dict[FileTensor, Operation] = {}
        self.readers: dict[FileTensor, int] = {}
        self.replaced: dict[FileTensor, FileTensor] = {}

    def rewrite(self) -> None:
        for operation in _live(self.source, list(self.outputs)):
            for tensor in operation.inputs:
                self.readers[tensor] = self.readers.get(tensor, 0) + 1
            self.producer[operation.outputs[0]] = operation
        for operation in _live(self.source, list(self.outputs)):
            operation.inputs = [self.replaced.get(t, t) for t in operation.inputs]
            if operation.op in CLIPS and self.fused(operation):
                continue
            if operation.op == "QUANTIZE" and operation.inputs[0].dtype == "float32":
                codes = operation.outputs[0]
                assert codes.grid is not None
                found = self.codes_of(operation.inputs[0], codes.dtype, codes.grid, codes.name)
                if found is not None:
                    self.replaced[codes] = found
                    continue
            self.append(operation)
            if operation.op in MOVES | {"RELU", "CONCATENATION"}:  # 0 is on every grid, 6 is not
                self.forward(operation)

    def append(self, operation: Operation, at: Operation | None = None) -> None:
        """Adds an operation, before another one where given."""
        index = len(self.operations) if at is None else self.operations.index(at)
        self.operations.insert(index, operation)
        self.producer[operation.outputs[0]] = operation

    def swap(self, old: Operation, *new: Operation) -> None:
        """Puts operations into the place of another one."""
        for operation in new:
            self.append(operation, old)
        self.operations.remove(old)

    def alone(self, tensor: FileTensor) -> bool:
        """Whether a tensor has one reader, and is no result."""
        return self.readers.get(tensor, 0) == 1 and tensor not in self.outputs

    def source_codes(self, tensor: FileTensor) -> FileTensor | None:
        """Returns the codes behind a dequantized activation."""
        operation = self.producer.get(tensor)
        if operation is None or operation.op != "DEQUANTIZE":
            return None
        codes = operation.inputs[0]
        return None if codes.data is not None else codes

    def fused(self, clip: Operation) -> bool:
        """Takes a ReLU into the kernel before it, which clips its own sums."""
        x = clip.inputs[0]
        before = self.producer.get(x)
        if before is None or before.op not in FUSES or not self.alone(x):
            return False
        if before.options.get("fusedActivationFunction", "NONE") != "NONE":
            return False
        before.options = {**before.options, "fusedActivationFunction": clip.op}
        before.outputs = clip.outputs
        self.producer[clip.outputs[0]] = before
        return True

    def forward(self, operation: Operation) -> None:
        """Lets an operation that moves numbers move codes instead, if it reads some."""
        data = operation.inputs if operation.op == "CONCATENATION" else operation.inputs[:1]
        codes = [self.source_codes(t) for t in data]
        first = codes[0]
        if first is None or first.grid is None:
            return
        if operation.op == "PADV2" and not operation.options.get("lowest"):
            return  # its number may lie between codes
        if any(c is None or c.dtype != first.dtype or not first.grid.same(c.grid) for c in codes):
            return
        (real,) = operation.outputs
        moved = FileTensor(f"{real.name}_codes", real.shape, first.dtype, first.grid)
        on_codes = self.on_codes(operation, [c for c in codes if c is not None], moved)
        if on_codes is not None:
            dequantize = Operation("DEQUANTIZE", [moved], [real], {}, operation.scope)
            self.swap(operation, on_codes, dequantize)

    def on_codes(
        self, operation: Operation, codes: list[FileTensor], moved: FileTensor
    ) -> Operation | None:
        """Returns an operation that moves numbers as one that moves codes of one grid."""
        others = operation.inputs[len(codes) :]
        if operation.op == "PADV2":
            (pads, number), grid = others, moved.grid
            lowest, highest = LIMITS[moved.dtype]
            assert number.data is not None and grid is not None
            code = float(number.data) / float(grid.scale) + float(grid.zero_point)
            code = min(max(round(code), lowest), highest)
            data = np.asarray(code, moved.dtype)
            stored = FileTensor(f"{moved.name}_pad", (), moved.dtype, grid, data)
            others = [pads, stored]
        return Operation(
            operation.op, [*codes, *others], [moved], operation.options, operation.scope
        )

    def codes_of(
        self, real: FileTensor, dtype: str, grid: TensorGrid, name: str
    ) -> FileTensor | None:
        """Returns a real tensor's codes on a grid; None where floats have to be quantized."""
        operation = self.producer.get(real)
        if operation is None:
            return None
        codes = self.source_codes(real)
        if codes is not None:
            # From codes to codes QUANTIZE is one off for up to a quarter of them; from the numbers
            # it is exact (findings/litert_requantizes_one_off.sh).
            return codes if codes.dtype == dtype and grid.same(codes.grid) else None
        if not self.alone(real):
            return None
        if operation.op in MOVES | CLIPS | {"CONCATENATION"}:
            return self.moved_up(operation, dtype, grid, name)
        out = FileTensor(name, real.shape, dtype, grid)
        kernel = self.kernel(operation, out)
        if kernel is None:
            return None
        self.swap(operation, kernel)
        return out

    def moved_up(
        self, operation: Operation, dtype: str, grid: TensorGrid, name: str
    ) -> FileTensor | None:
        """Quantizes what an operation reads, and lets it move the codes."""
        (real,) = operation.outputs
        count = len(operation.inputs) if operation.op == "CONCATENATION" else 1
        if any(t.data is not None for t in operation.inputs[:count]):
            return None
        if operation.op == "RELU6" and dtype != "int8":
            return None
        place = self.operations.index(operation)
        tail, self.operations = self.operations[place:], self.operations[:place]
        codes = []
        for index, tensor in enumerate(operation.inputs[:count]):
            hint = f"{name}_{operation.op.lower()}_{index}"
            found = self.codes_of(tensor, dtype, grid, hint)
            if found is None:
                found = FileTensor(hint, tensor.shape, dtype, grid)
                self.append(Operation("QUANTIZE", [tensor], [found], {}, operation.scope))
            codes.append(found)
        self.operations += tail
        moved = FileTensor(name, real.shape, dtype, grid)
        if operation.op == "RELU" and int(grid.zero_point) == LIMITS[dtype][0]:
            self.operations.remove(operation)  # no code is below zero
            return codes[0]
        on_codes = self.on_codes(operation, codes, moved)
        assert on_codes is not None
        self.swap(operation, on_codes)
        return moved

    def kernel(self, operation: Operation, out: FileTensor) -> Operation | None:
        """Returns an operation on real numbers as its integer kernel, or None without one."""
        op = operation.op
        if op in PRODUCTS:
            return self.product_kernel(operation, out)
        if op in FIXED_GRIDS:
            scale, zero_point = FIXED_GRIDS[op][out.dtype]
            assert out.grid is not None
            if (float(out.grid.scale), int(out.grid.zero_point)) != (scale, zero_point):
                return None
        elif op == "AVERAGE_POOL_2D":
            return self.average_kernel(operation, out)
        elif op not in ANY_GRID:
            return None
        if out.dtype == "int16" and op in NO_INT16:
            return None
        count = 2 if op in SUMS | {"BATCH_MATMUL"} else 1
        codes = [self.source_codes(t) for t in operation.inputs[:count]]
        if any(c is None or c.dtype != out.dtype for c in codes):
            return None
        if op in SUMS and not _in_reach(op, [t for t in codes if t is not None], out):
            return None
        options = operation.options
        if op in ("ADD", "SUB") and out.dtype == "int16":
            options = {**options, "potScaleInt16": False}
        inputs = [c for c in codes if c is not None] + operation.inputs[count:]
        return Operation(op, inputs, [out], options, operation.scope)

    def average_kernel(self, operation: Operation, out: FileTensor) -> Operation | None:
        """Returns an average as the product with a window of equal weights.

        The kernel of averages writes the grid that it reads, and so would round twice.
        """
        codes, options = self.source_codes(operation.inputs[0]), operation.options
        if codes is None or codes.dtype != out.dtype or codes.grid is None or out.grid is None:
            return None
        if out.grid.same(codes.grid):
            return Operation(operation.op, [codes], [out], options, operation.scope)
        if options["padding"] != "VALID":
            return None  # it leaves the padding out of its count
        channels, window = out.sizes[3], (options["filterHeight"], options["filterWidth"])
        size = math.prod(window)
        grid = TensorGrid(np.full(channels, 1 / size, np.float32), np.zeros(channels, np.int64), 3)
        ones = np.ones((1, *window, channels), np.int8)
        kernel = FileTensor(f"{out.name}_window", ones.shape, "int8", grid, ones)
        bias = FileTensor(f"{out.name}_none", (channels,), "float32", None, np.zeros(channels))
        kept = ("padding", "strideH", "strideW", "fusedActivationFunction")
        options = {k: options[k] for k in kept if k in options}
        options |= dict(depthMultiplier=1, dilationHFactor=1, dilationWFactor=1)
        return _product("DEPTHWISE_CONV_2D", codes, kernel, bias, out, options, operation.scope)

    def product_kernel(self, operation: Operation, out: FileTensor) -> Operation | None:
        x, weight, bias = operation.inputs
        codes, stored = self.source_codes(x), self.producer.get(weight)
        if codes is None or codes.dtype != out.dtype or codes.grid is None:
            return None
        if stored is None or stored.op != "DEQUANTIZE":
            return None
        kernel = stored.inputs[0]
        if kernel.data is None or kernel.grid is None or bias.data is None:
            return None
        if kernel.dtype == "int4" and not self.int4:
            kernel = widened(kernel)
        return _product(operation.op, codes, kernel, bias, out, operation.options, operation.scope)


def _product(
    op: str,
    codes: FileTensor,
    kernel: FileTensor,
    bias: FileTensor,
    out: FileTensor,
    options: dict[str, Any],
    scope: str,
) -> Operation | None:
    """Returns a product on codes, its bias in the unit of the sums; None where that overflows."""
    assert codes.grid is not None and kernel.grid is not None and bias.data is not None
    unit = np.float64(codes.grid.scale) * kernel.grid.scale.astype(np.float64)
    whole = np.round(bias.data.astype(np.float64) / unit)
    kind = "int64" if out.dtype == "int16" else "int32"
    assert kernel.data is not None
    others = tuple(a for a in range(kernel.data.ndim) if a != kernel.grid.axis)
    widest = max(abs(end - int(codes.grid.zero_point)) for end in LIMITS[codes.dtype])
    sums = widest * np.abs(kernel.data.astype(np.float64)).sum(others) + np.abs(whole)
    if sums.max(initial=0) > np.iinfo(kind).max:
        return None
    if not _between("products", unit, out):
        return None
    grid = TensorGrid(unit.astype(np.float32), np.zeros(len(unit), np.int64), 0)
    vector = FileTensor(f"{kernel.name}_bias", whole.shape, kind, grid, whole.astype(kind))
    return Operation(op, [codes, kernel, vector], [out], options, scope)


def _between(kind: str, unit: np.ndarray, out: FileTensor) -> bool:
    """Whether a kernel multiplies sums in these units for its result's grid."""
    assert out.grid is not None
    (least, greatest), ratio = RATIOS[kind], unit / np.float64(out.grid.scale)
    return bool(np.all((ratio >= least) & (ratio < greatest)))


def _in_reach(op: str, codes: list[FileTensor], out: FileTensor) -> bool:
    """Whether the kernel of a sum, or of a product of two values, reaches its result's grid."""
    units = np.array([t.grid.scale for t in codes if t.grid is not None], np.float64)
    return _between("MUL", units.prod(), out) if op == "MUL" else _between("ADD", units, out)


def widened(kernel: FileTensor) -> FileTensor:
    """Returns codes of 4 bits as int8, 16 times as large.

    The bias is added in the unit of the sums, which is then 16 times as fine.
    """
    assert kernel.data is not None and kernel.grid is not None
    times = 2 ** (WEIGHT_BITS - 4)
    grid = dataclasses.replace(kernel.grid, scale=kernel.grid.scale / np.float32(times))
    return dataclasses.replace(kernel, dtype="int8", grid=grid, data=kernel.data * times)
