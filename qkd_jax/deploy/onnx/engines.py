"""The engines that run ONNX files on this machine's CPU: ONNX Runtime and OpenVINO."""

import contextlib
import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.deploy.onnx.openvino_seal import read_sealed_xml

GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
ONNX_ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def open_onnx(
    path: str | os.PathLike[str], engine: str, *, threads: int | None = None
) -> Callable[[Any], list[np.ndarray]]:
    """Opens a file of `to_onnx` or `to_openvino` as a function of images.

    Args:
        path: an ONNX file, or one of OpenVINO (.xml) for that engine.
        engine: a key of `ONNX_ENGINES`.
        threads: threads of one inference, or None for the engine's choice.

    Returns:
        images, in the model's own order of axes, or a tuple of inputs -> the model's results.

    Raises:
        ValueError: an unknown engine; an .xml for ONNX Runtime, or one that `to_openvino` has not
            written, or that was changed since (`openvino_model` opens files of others).
        ImportError: the engine is not installed.
    """
    checks.one_of("engine", engine, ONNX_ENGINES)
    if Path(path).suffix == ".xml":
        if engine != "openvino":
            raise ValueError(
                f"{os.fspath(path)} is an OpenVINO file; give engine='openvino', or write one with "
                "to_onnx."
            )
        read_sealed_xml(path)  # before the engine follows any offset in it
    if engine == "onnxruntime":
        session = onnx_session(path, threads=threads)
        names = [given.name for given in session.get_inputs()]
        return lambda images: session.run(None, dict(zip(names, _inputs(images), strict=True)))
    request = openvino_model(path, threads=threads).create_infer_request()
    return lambda images: [a.copy() for a in request.infer(_inputs(images)).values()]


def _inputs(images: Any) -> list[np.ndarray]:
    return [channels_first(a) for a in (images if isinstance(images, tuple) else (images,))]


def channels_first(images: Any) -> np.ndarray:
    """Returns images in the order of axes that `to_onnx` gives a file's input."""
    array = np.asarray(images)
    return np.ascontiguousarray(np.moveaxis(array, -1, 1) if array.ndim >= 4 else array)


def onnx_session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    optimized: str | os.PathLike[str] | None = None,
) -> Any:
    """Opens a file in ONNX Runtime on the CPU, with exact 8-bit products on every x86 processor.

    `session.x64quantprecision` is set on x86 without VNNI: it costs some speed there and avoids the
    16-bit saturation that `to_onnx` describes.

    Args:
        path: an ONNX file.
        threads: threads per operation, or None for the engine's choice.
        optimized: where to write the graph as the engine has optimized it, or None.

    Returns:
        An `onnxruntime.InferenceSession`; run it as `session.run(None, {"images": nchw})`.
    """
    runtime = import_engine("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # warnings about missing GPUs say nothing here
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    if is_x86() and not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Two optimizations that change numbers: a fused 4- or 8-bit MatMul of lower accuracy, and the
    # removal of one of two neighbouring grids as if they were the same. A third one,
    # WeightBiasQuantization, finds nothing to round in files of `to_onnx` (`ConstantOperand`).
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return runtime.InferenceSession(
        os.fspath(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["DoubleQDQPairsRemover"],
    )


def openvino_model(
    path: str | os.PathLike[str], *, threads: int | None = None, batch: int | None = None
) -> Any:
    """Compiles a file for OpenVINO's CPU plugin, float operations in float32.

    Two properties: without INFERENCE_PRECISION_HINT="f32" the plugin computes in bfloat16 on
    processors that have it, and logits differ in the third digit. With
    DYNAMIC_QUANTIZATION_GROUP_SIZE="0" it does not quantize float inputs of layers by itself, which
    the hint does not prevent. It does that to weights behind DequantizeLinear, which `to_onnx`
    writes in front of codes alone, and to those of MatMulNBits; files of others have them elsewhere
    too. A file of `to_openvino` has the second property in itself, and it stays as it is there.

    Args:
        path: an ONNX file, or an OpenVINO one (.xml).
        threads: threads of one inference, or None for the engine's choice.
        batch: compile for this batch size alone, which is faster; None leaves it open.

    Returns:
        An `openvino.CompiledModel`; call it with the input, channels first.
    """
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    with without_telemetry():
        core = import_engine("openvino").Core()
    model = core.read_model(os.fspath(path))
    if not model.has_rt_info(["runtime_options", GROUP_SIZE]):
        config[GROUP_SIZE] = "0"
    if batch is not None:
        checks.integer_in("batch", batch, 1)
        model.reshape({i.any_name: [batch, *list(i.partial_shape)[1:]] for i in model.inputs})
    return core.compile_model(model, "CPU", config)


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Keeps OpenVINO from loading its telemetry, which forks; JAX's threads may not survive it."""
    name = "openvino_telemetry"
    known = name in sys.modules
    if not known:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not known:
            del sys.modules[name]


def has_vnni(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> bool:
    """Returns whether this processor multiplies 8-bit integers into 32 bits (VNNI or AMX).

    Unknown (no such file, as on macOS or Windows) counts as no.
    """
    try:
        text = Path(cpuinfo).read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags))


def is_x86() -> bool:
    """Returns whether this processor is an x86."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")


def import_engine(name: str) -> Any:
    """Imports a package of the `export` extra.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed; it comes with the `export` extra: "
            "in the checkout, pip install -e '.[export]'."
        ) from error
