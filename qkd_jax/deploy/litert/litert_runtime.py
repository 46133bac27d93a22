"""LiteRT's interpreter on this machine's CPU, and a report of the kernels that it chose."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from qkd_jax.deploy.litert.file_seal import read_sealed
from qkd_jax.deploy.onnx.engines import import_engine


def open_tflite(
    path: str | os.PathLike[str], *, threads: int | None = None, delegate: bool = True
) -> Callable[[Any], list[np.ndarray]]:
    """Opens a file of `to_tflite` as a function of images.

    Args:
        path: the file.
        threads: threads of one inference, or None for LiteRT's choice (one).
        delegate: whether XNNPACK runs what it can, as LiteRT has it by default; False takes
            LiteRT's own kernels throughout.

    Returns:
        images in the model's own order of axes, or a tuple of inputs -> the results. The batch may
        change from call to call; another one than the call before is prepared first.

    Raises:
        ValueError: no such file, or one that is not whole, as `to_tflite` wrote it.
        ImportError: `ai-edge-litert` is not installed.
    """
    interpreter = tflite_interpreter(path, threads=threads, delegate=delegate)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    shapes = [tuple(detail["shape"]) for detail in inputs]

    def run(images: Any) -> list[np.ndarray]:
        arrays = [np.asarray(a) for a in (images if isinstance(images, tuple) else (images,))]
        given = [array.shape for array in arrays]
        if given != shapes:
            # All of them first: inputs of different batches fit no operation.
            for detail, shape in zip(inputs, given, strict=True):
                interpreter.resize_tensor_input(detail["index"], shape, strict=True)
            interpreter.allocate_tensors()
            shapes[:] = given
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in outputs]

    return run


def tflite_interpreter(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    delegate: bool = True,
    preserve: bool = False,
) -> Any:
    """Opens a file of `to_tflite` in LiteRT's interpreter, its tensors allocated.

    Args:
        path: the file.
        threads: as `open_tflite`.
        delegate: as `open_tflite`.
        preserve: keep the numbers of every tensor for `Interpreter.get_tensor`, not the results'
            alone; of what XNNPACK has taken over there are none.
    """
    data = read_sealed(path)
    package = import_engine("ai_edge_litert.interpreter")
    kinds = package.OpResolverType
    kind = kinds.AUTO if delegate else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = package.Interpreter(
        model_content=data,
        num_threads=threads,
        experimental_op_resolver_type=kind,
        experimental_preserve_all_tensors=preserve,
    )
    interpreter.allocate_tensors()
    return interpreter


@dataclasses.dataclass(frozen=True)
class LitertReport:
    """The operations of a file, by the kernels that they run on.

    Conversions between codes and floats, and what computes sizes, count as neither.

    Attributes:
        integer: names of the results that are computed on codes.
        floating: those that are computed in float.
        own: those of both that LiteRT's own kernels compute, and not XNNPACK's. Its own integer
            kernels round twice, so that one code in some hundreds is one off, and later layers
            see that; XNNPACK's round once, as the net does.
        conversions: number of QUANTIZE and DEQUANTIZE that run at every call.
    """

    integer: tuple[str, ...]
    floating: tuple[str, ...]
    own: tuple[str, ...]
    conversions: int

    @property
    def share(self) -> float:
        """The share that runs on integers."""
        return len(self.integer) / max(len(self.integer) + len(self.floating), 1)


def litert_report(path: str | os.PathLike[str]) -> LitertReport:
    """Asks LiteRT which operations of a file run on integers, and which XNNPACK takes over.

    Raises:
        ValueError: no such file, or one that is not whole, as `to_tflite` wrote it.
        ImportError: `ai-edge-litert` is not installed.
    """
    interpreter = tflite_interpreter(path)
    tensors = {d["index"]: d for d in interpreter.get_tensor_details()}
    operations = interpreter._get_ops_details()
    producer = {o: op for op in operations if op["op_name"] != "DELEGATE" for o in op["outputs"]}
    computed = {*producer, *(d["index"] for d in interpreter.get_input_details())}
    taken: set[int] = set()
    for delegate in operations:
        if delegate["op_name"] == "DELEGATE":
            taken |= _between(producer, set(delegate["inputs"]), list(delegate["outputs"]))
    integer, floating, own, conversions = [], [], [], 0
    for op in operations:
        if op["op_name"] == "DELEGATE":
            continue
        out = tensors[op["outputs"][0]]
        if op["op_name"] in ("QUANTIZE", "DEQUANTIZE"):
            conversions += int(op["inputs"][0] in computed)
            continue
        on_codes = out["quantization_parameters"]["scales"].size > 0
        if not on_codes and out["dtype"] != np.float32:
            continue
        (integer if on_codes else floating).append(out["name"])
        if op["index"] not in taken:
            own.append(out["name"])
    return LitertReport(tuple(integer), tuple(floating), tuple(own), conversions)


def _between(producer: dict[int, Any], inputs: set[int], outputs: list[int]) -> set[int]:
    """Returns the operations that compute some tensors from others."""
    found: set[int] = set()
    while outputs:
        tensor = outputs.pop()
        op = producer.get(tensor)
        if tensor in inputs or op is None or op["index"] in found:
            continue
        found.add(op["index"])
        outputs += list(op["inputs"])
    return found
