"""Opens ONNX files in ONNX Runtime, and says what this processor can multiply."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["has_vnni", "import_engine", "is_x86", "onnx_session"]


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
    # removal of one of two neighbouring grids as if they were the same.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return runtime.InferenceSession(
        os.fspath(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["DoubleQDQPairsRemover"],
    )


def has_vnni(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> bool:
    """Whether this processor multiplies 8-bit integers into 32 bits (VNNI or AMX).

    Unknown (no such file, as on macOS or Windows) counts as no.
    """
    try:
        text = Path(cpuinfo).read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags))


def is_x86() -> bool:
    """Whether this processor is an x86."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")


def import_engine(name: str) -> Any:
    """Imports a package of the `export` extra, or says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed; it comes with the `export` extra: "
            "in the checkout, pip install -e '.[export]'."
        ) from error
