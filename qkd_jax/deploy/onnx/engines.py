"""Which products of a file an engine runs on integers, read from the graph that it has optimized.

An engine falls back to float without a word where it finds no integer kernel: an ONNX file that
looks quantized may run in float from end to end, dequantizing as it goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qkd_jax import checks

__all__ = ["Placed", "openvino_model", "placed", "without_telemetry"]

# Products by the names that ONNX Runtime gives them after its optimizations.
ORT_INTEGER = frozenset(
    "QLinearConv QLinearMatMul QGemm MatMulInteger MatMulIntegerToFloat ConvInteger "
    "DynamicQuantizeMatMul".split()
)
ORT_FLOAT = frozenset("Conv FusedConv NhwcFusedConv MatMul FusedMatMul Gemm FusedGemm".split())
OPENVINO_PRODUCTS = frozenset("Convolution Deconvolution FullyConnected MatMul".split())
OPENVINO_INTEGER = frozenset({"i8", "u8"})


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the products of a file run.

    Attributes:
        engine: "onnxruntime" or "openvino".
        integer: names of the products that run on 8-bit integers.
        floating: names of those that run in float.
    """

    engine: str
    integer: tuple[str, ...]
    floating: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the products that run on integers."""
        return len(self.integer) / max(len(self.integer) + len(self.floating), 1)


def placed(path: str | os.PathLike[str], engine: str) -> Placed:
    """Reads from an engine which products of an ONNX file it runs on integers.

    Args:
        path: an ONNX file.
        engine: "onnxruntime" or "openvino", on this machine's CPU.

    Raises:
        ValueError: an unknown engine.
        ImportError: it is not installed.
    """
    checks.one_of("engine", engine, ("onnxruntime", "openvino"))
    integer, floating = (_onnxruntime if engine == "onnxruntime" else _openvino)(path)
    return Placed(engine, tuple(integer), tuple(floating))


def openvino_model(
    path: str | os.PathLike[str], *, threads: int | None = None, batch: int | None = None
) -> Any:
    """Compiles a file for OpenVINO's CPU plugin, float operations in float32.

    Without that hint the plugin computes in bfloat16 on processors that have it, and logits differ
    in the third digit.

    Args:
        path: an ONNX file.
        threads: threads of one inference, or None for the engine's choice.
        batch: compile for this batch size alone, which is faster; None leaves it open.

    Returns:
        An `openvino.CompiledModel`; call it with the input, channels first.
    """
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    with without_telemetry():
        core = importlib.import_module("openvino").Core()
    model = core.read_model(os.fspath(path))
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


def _onnxruntime(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    onnx = importlib.import_module("onnx")
    from qkd_jax.deploy.onnx.session import onnx_session

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        onnx_session(path, optimized=optimized)
        nodes = list(onnx.load(optimized).graph.node)
    integer = [n.name for n in nodes if n.op_type in ORT_INTEGER]
    floating = [n.name for n in nodes if n.op_type in ORT_FLOAT]
    return integer, floating


def _openvino(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    integer, floating = [], []
    for node in openvino_model(path).get_runtime_model().get_ops():
        info = {k: getattr(v, "value", v) for k, v in node.get_rt_info().items()}
        if info.get("layerType") in OPENVINO_PRODUCTS:
            name = str(info.get("originalLayersNames", "")).partition(",")[0]
            name = name.removesuffix("/WithoutBiases")
            runs = integer if info.get("runtimePrecision") in OPENVINO_INTEGER else floating
            runs.append(name)
    return integer, floating
