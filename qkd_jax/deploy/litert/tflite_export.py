"""LiteRT files (.tflite), written from the graph of the folded net.

The file computes what the net computes: weights are the trained codes, with one scale per output
channel into which BatchNorm is folded, and activations are codes where the net has grids. Where
LiteRT has an integer kernel between the codes it reads and the codes it writes, the file has that
kernel; all else computes in float between DEQUANTIZE and QUANTIZE, right and slower, and
`kernel_report` names it. Images keep the model's own order of axes, which is LiteRT's.

Integer kernels round once per operation, as the net does, with their own multipliers: a value near
the middle between two codes may fall to the other side.
"""

import collections
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.deploy.description import Description
from qkd_jax.deploy.litert.file_seal import sealed
from qkd_jax.deploy.litert.flat_file import Program
from qkd_jax.deploy.litert.integer_kernels import with_integer_kernels
from qkd_jax.deploy.litert.lowering import Lowering
from qkd_jax.deploy.litert.real_walk import write
from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.ptq.integer_bias import integer_bias
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calls import split_arrays
from qkd_jax.quantize.traced import refuse_uncalibrated, trace_net
from qkd_jax.whole_files import replace_file

ACTIVATIONS = ("int8", "int16")
INPUTS = frozenset({"float32", "int32", "int64", "bool", "uint8"})


@dataclasses.dataclass(frozen=True)
class TfliteFile:
    """A file that `to_tflite` wrote.

    Attributes:
        path: the file.
        operations: operation -> number of them.
        bytes: size of the file.
        stored: layer -> (format of its weight's codes, type they are stored in).
        integer: the operations that compute on codes, by the name of their result.
        floating: those that compute in float.
    """

    path: Path
    operations: dict[str, int]
    bytes: int
    stored: dict[str, tuple[str, str]]
    integer: tuple[str, ...]
    floating: tuple[str, ...]


def to_tflite(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    path: str | os.PathLike[str],
    *,
    activations: str | None = None,
    int4: bool | None = None,
    integer_io: bool = False,
    capture: bool = False,
    description: Description | None = None,
    any_batch: bool = True,
    **kwargs: Any,
) -> TfliteFile:
    """Writes a net, float or quantized, as a LiteRT file.

    The input is "images", in the model's own order of axes, and the output "logits"; several are
    "input0", "input1", ... and "output0", ... The file is written for a batch of 1, and
    `Interpreter.resize_tensor_input` gives it another one, as `open_tflite` does.

    Args:
        net: the net.
        variables: float or calibrated, folded or not (BatchNorm is folded where it can be). Biases
            of quantized layers are rounded to the unit of their sums, as LiteRT adds them: the
            file is the net `ptq.integer_bias(net, variables, images)`.
        images: example input, [batch, height, width, channels], or what else `convert` takes; only
            shapes and types count.
        path: the file to write.
        activations: "int8" or "int16" refuses activations whose codes have another type; None
            takes each grid's own: int8 up to 8 bits, int16 above, which has the zero point 0.
        int4: whether weights of up to 4 bits are stored in 4, two to a byte. None does so for
            weights that are unpacked when the file is loaded, and stores those of integer kernels
            as int8, for these would unpack them at every call.
        integer_io: whether the input and the results are codes, where the net's are on grids;
            `Interpreter.get_input_details()` has their scale and zero point.
        capture: whether the codes of every grid are results as well, behind the net's own and under
            the names that `integer_apply(capture=True)` gives them: to compare kernels with the
            net, code by code.
        description: how an image becomes the input, and the classes; kept in the file's metadata.
        any_batch: False keeps the batch size of `images`, for a net that has no batch.
        **kwargs: further arguments of the model's call, as for `convert`.

    Returns:
        A `TfliteFile`.

    Raises:
        ImportError: `ai-edge-litert`, of the `export` extra, is not installed.
        ValueError: an operation that cannot be written (named with its module), images of a type
            that a file cannot take, a grid that LiteRT has no type for, dynamic ranges, a
            calibrated net of which a part is not. Nothing is written then.
    """
    checks.one_of("activations", activations, (None, *ACTIVATIONS))
    checks.one_of("int4", int4, (None, True, False))
    for name, flag in (("integer_io", integer_io), ("capture", capture)):
        checks.one_of(name, flag, (True, False))
    for leaf in split_arrays(images)[0]:
        if str(leaf.dtype) not in INPUTS:
            raise ValueError(
                f"images have dtype {leaf.dtype}; a .tflite file takes "
                f"{', '.join(sorted(INPUTS))}. Cast the example."
            )
    fold = integer_bias if variables.get("quant") else fold_bn
    folded = fold(net, variables, images, any_batch=any_batch, **kwargs)
    traced = trace_net(net, folded, images, any_batch=any_batch, **kwargs)
    refuse_uncalibrated(traced, float_passes=True)
    lowering = Lowering(traced, int4=int4 is not False)
    write(lowering)
    program = with_integer_kernels(lowering.program, int4=int4)
    if integer_io:
        program = _integer_ends(program)
    if capture:
        codes = [t for t in program.tensors() if t.grid is not None and t.data is None]
        ends = {*program.inputs, *program.outputs}
        program.captured = [t for t in codes if t not in ends]
    _check_activations(program, activations)
    data = sealed(program, description)
    path = replace_file(path, data)
    counts = collections.Counter(operation.op for operation in program.operations)
    integer, floating = kernels(program)
    stored = _stored(lowering, program)
    return TfliteFile(path, dict(counts), len(data), stored, integer, floating)


def kernels(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of what computes on codes, and of what computes in float.

    Conversions between the two, and what computes sizes, count as neither.
    """
    integer, floating = [], []
    for operation in program.operations:
        if operation.op in ("QUANTIZE", "DEQUANTIZE"):
            continue
        result = operation.outputs[0]
        if result.grid is not None:
            integer.append(result.name)
        elif result.dtype == "float32":
            floating.append(result.name)
    return tuple(integer), tuple(floating)


def _check_activations(program: Program, activations: str | None) -> None:
    for tensor in program.tensors():
        grid = tensor.grid is not None and tensor.data is None
        if activations and grid and tensor.dtype != activations:
            raise ValueError(
                f"activations is {activations!r}, and {tensor.name} has codes of {tensor.dtype}; "
                f"give it a spec of {16 if activations == 'int16' else 8} bits, or leave "
                "`activations` out, so that each grid has its own type."
            )


def _integer_ends(program: Program) -> Program:
    """Takes the QUANTIZE of an input, and the DEQUANTIZE of a result, out of a program."""
    inputs, operations = list(program.inputs), list(program.operations)
    outputs = list(program.outputs)
    for index, tensor in enumerate(inputs):
        readers = [o for o in operations if tensor in o.inputs]
        if len(readers) == 1 and readers[0].op == "QUANTIZE" and tensor not in outputs:
            codes = readers[0].outputs[0]
            codes.name = tensor.name
            inputs[index] = codes
            operations.remove(readers[0])
    for index, tensor in enumerate(outputs):
        writer = next((o for o in operations if tensor in o.outputs), None)
        if writer is not None and writer.op == "DEQUANTIZE" and writer.inputs[0] not in inputs:
            outputs[index] = writer.inputs[0]
            if not any(tensor in o.inputs for o in operations):
                operations.remove(writer)
    return Program(inputs, outputs, operations)


def _stored(lowering: Lowering, program: Program) -> dict[str, tuple[str, str]]:
    """Returns what `lowering.stored` says, with the types that integer kernels read."""
    kept = {t.name: t.dtype for t in program.tensors() if t.data is not None}
    return {
        path: (name, kept.get(tensor, dtype))
        for path, (name, dtype, tensor) in lowering.stored.items()
    }
