"""A report of the kernels that an engine chooses, read from the graph that it has optimized.

An engine falls back to float without a word where it finds no integer kernel: an ONNX file that
looks quantized may run in float from end to end, dequantizing as it goes.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qkd_jax import checks
from qkd_jax.deploy.onnx.engines import (
    GROUP_SIZE,
    ONNX_ENGINES,
    import_engine,
    onnx_session,
    openvino_model,
)

# Contractions by the names that ONNX Runtime gives them after its optimizations.
ORT_INTEGER = frozenset(
    "QLinearConv QLinearMatMul QGemm MatMulInteger MatMulIntegerToFloat ConvInteger "
    "DynamicQuantizeMatMul".split()
)
ORT_FLOAT = frozenset("Conv FusedConv NhwcFusedConv MatMul FusedMatMul Gemm FusedGemm".split())
# Codes of 2 to 8 bits as weights; with this accuracy level its inputs become 8-bit codes, else not.
ORT_PACKED, INT8_LEVEL = "MatMulNBits", 4
OPENVINO_CONTRACTIONS = frozenset("Convolution Deconvolution FullyConnected MatMul".split())
# Precisions of weights that a kernel unpacks while it multiplies; 8-bit ones are integers' too.
OPENVINO_PACKED = {"u2": 2, "u4": 4, "i4": 4, "nf4": 4, "f4e2m1": 4, "i8": 8, "u8": 8}


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """The convolutions and matrix products of a file, by the kernels that they run on.

    Attributes:
        engine: "onnxruntime" or "openvino".
        integer: names of those that run on 8-bit integers.
        floating: names of those that run in float on weights in float.
        packed: name -> bits, of those that run in float on weights that stay codes in memory and
            are unpacked while they are multiplied: less memory traffic, float arithmetic.
    """

    engine: str
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    packed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share that runs on integers."""
        count = len(self.integer) + len(self.floating) + len(self.packed)
        return len(self.integer) / max(count, 1)


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
    integer, floating, packed = (_onnxruntime if engine == "onnxruntime" else _openvino)(path)
    return KernelReport(engine, tuple(integer), tuple(floating), packed)


def _onnxruntime(path: str | os.PathLike[str]) -> tuple[list[str], list[str], dict[str, int]]:
    onnx = import_engine("onnx")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        onnx_session(path, optimized=optimized)
        nodes = list(onnx.load(optimized).graph.node)
    integer = [n.name for n in nodes if n.op_type in ORT_INTEGER]
    floating = [n.name for n in nodes if n.op_type in ORT_FLOAT]
    packed = {}
    for node in nodes:
        if node.op_type == ORT_PACKED:
            numbers = {a.name: a.i for a in node.attribute}
            if numbers.get("accuracy_level", 0) == INT8_LEVEL:
                integer.append(node.name)
            else:
                packed[node.name] = numbers["bits"]
    return integer, floating, packed


def _openvino(path: str | os.PathLike[str]) -> tuple[list[str], list[str], dict[str, int]]:
    integer: list[str] = []
    floating: list[str] = []
    packed: dict[str, int] = {}
    compiled = openvino_model(path)
    rounds = int(compiled.get_property(GROUP_SIZE)) > 0  # inputs of products with integer weights
    for node in compiled.get_runtime_model().get_ops():
        info = {k: getattr(v, "value", v) for k, v in node.get_rt_info().items()}
        if info.get("layerType") in OPENVINO_CONTRACTIONS:
            name = str(info.get("originalLayersNames", "")).partition(",")[0]
            name = name.removesuffix("/WithoutBiases")
            precision = info.get("runtimePrecision")
            dense = info["layerType"] == "FullyConnected"
            in_float = dense and str(info.get("primitiveType", "")).endswith("_f32")
            if precision in OPENVINO_PACKED and in_float and not (rounds and "f" not in precision):
                packed[name] = OPENVINO_PACKED[precision]
            else:
                on_integers = precision in OPENVINO_PACKED
                (integer if on_integers else floating).append(name)
    return integer, floating, packed
