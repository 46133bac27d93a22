"""Deployment: from a trained net to integers in JAX, and to files of other engines.

`convert` and `integer_apply` are the integer model, `save` and `load` its files, `save_stablehlo`
and `load_stablehlo` the same for XLA without `qkd_jax`. `to_onnx` writes an ONNX file and
`to_openvino` one of OpenVINO's own, `open_onnx` runs both, `kernel_report` lists what an engine
runs on integers; `to_tflite`, `open_tflite` and `litert_report` are the same for LiteRT. `latency`
times engines side by side, and `targets` holds the rules that each engine takes. A new kind of file
is a module here.
"""

from qkd_jax.deploy.description import Description
from qkd_jax.deploy.integer.convert import convert, integer_apply
from qkd_jax.deploy.integer.program import IntegerModel, LayerSize
from qkd_jax.deploy.integer.saved_model import describe, load, save
from qkd_jax.deploy.latency import latency
from qkd_jax.deploy.litert.file_seal import read_description
from qkd_jax.deploy.litert.litert_runtime import (
    LitertReport,
    litert_report,
    open_tflite,
    tflite_interpreter,
)
from qkd_jax.deploy.litert.tflite_export import TfliteFile, to_tflite
from qkd_jax.deploy.onnx.engines import (
    ONNX_ENGINES,
    has_vnni,
    onnx_session,
    open_onnx,
    openvino_model,
)
from qkd_jax.deploy.onnx.export import OnnxFile, to_onnx
from qkd_jax.deploy.onnx.kernel_report import KernelReport, kernel_report
from qkd_jax.deploy.onnx.openvino_file import OpenvinoFile, to_openvino
from qkd_jax.deploy.onnx.stamp import read_stamp, stamp_onnx
from qkd_jax.deploy.stablehlo import load_stablehlo, save_stablehlo
from qkd_jax.quantize import targets

__all__ = [
    "ONNX_ENGINES",
    "Description",
    "IntegerModel",
    "KernelReport",
    "LayerSize",
    "LitertReport",
    "OnnxFile",
    "OpenvinoFile",
    "TfliteFile",
    "convert",
    "describe",
    "has_vnni",
    "integer_apply",
    "kernel_report",
    "latency",
    "litert_report",
    "load",
    "load_stablehlo",
    "onnx_session",
    "open_onnx",
    "open_tflite",
    "openvino_model",
    "read_description",
    "read_stamp",
    "save",
    "save_stablehlo",
    "stamp_onnx",
    "targets",
    "tflite_interpreter",
    "to_onnx",
    "to_openvino",
    "to_tflite",
]
