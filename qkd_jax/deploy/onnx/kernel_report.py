"""A report of the kernels that an engine chooses, read from the graph that it has optimized.

An engine falls back to float without a word where it finds no integer kernel: an ONNX file that
looks quantized may run in float from end to end, dequantizing as it goes.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

from qkd_jax import checks
from qkd_jax.deploy.onnx.engines import ONNX_ENGINES, import_engine, onnx_session, openvino_model

# Contractions by the names that ONNX Runtime gives them after its optimizations.
ORT_INTEGER = frozenset(
    "QLinearConv QLinearMatMul QGemm MatMulInteger MatMulIntegerToFloat ConvInteger "
    "DynamicQuantizeMatMul".split()
)
# MatMulNBits has weights of 4 or 8 bits and computes in float, as `onnx_session` sets it.
ORT_FLOAT = frozenset(
    "Conv FusedConv NhwcFusedConv MatMul FusedMatMul Gemm FusedGemm MatMulNBits".split()
)
OPENVINO_CONTRACTIONS = frozenset("Convolution Deconvolution FullyConnected MatMul".split())
OPENVINO_INTEGER = frozenset({"i8", "u8"})


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """The convolutions and matrix products of a file, by the kernels that they run on.

    Attributes:
        engine: "onnxruntime" or "openvino".
        integer: names of those that run on 8-bit integers.
        floating: names of those that run in float.
    """

    engine: str
    integer: tuple[str, ...]
    floating: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share that runs on integers."""
        return len(self.integer) / max(len(self.integer) + len(self.floating), 1)


def kernel_report(path: str | os.PathLike[str], engine: str) -> KernelReport:
    """Asks an engine which convolutions and matrix products of a file it runs on integers.

    Args:
        path: an ONNX file.
        engine: a key of `ONNX_ENGINES`, on this machine's CPU.

    Raises:
        ValueError: an unknown engine.
        ImportError: it is not installed.
    """
    checks.one_of("engine", engine, ONNX_ENGINES)
    integer, floating = (_onnxruntime if engine == "onnxruntime" else _openvino)(path)
    return KernelReport(engine, tuple(integer), tuple(floating))


def _onnxruntime(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    onnx = import_engine("onnx")
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
        if info.get("layerType") in OPENVINO_CONTRACTIONS:
            name = str(info.get("originalLayersNames", "")).partition(",")[0]
            name = name.removesuffix("/WithoutBiases")
            runs = integer if info.get("runtimePrecision") in OPENVINO_INTEGER else floating
            runs.append(name)
    return integer, floating
