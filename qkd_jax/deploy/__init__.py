"""From a trained net to something that runs elsewhere: integers in JAX, and ONNX files.

`convert` and `integer_apply` are the integer model, `save` and `load` its files, `save_stablehlo`
the same for XLA without `qkd_jax`, `to_onnx` and `onnx_session` the ONNX file and its engine,
`latency` times engines side by side, `placed` says which products an engine runs on integers, and
`targets` which rules an engine takes. A new kind of file is a module here.
"""

from qkd_jax.deploy.description import Description
from qkd_jax.deploy.integer.convert import convert, integer_apply
from qkd_jax.deploy.integer.program import IntegerModel, LayerSize
from qkd_jax.deploy.integer.saved_model import describe, load, save
from qkd_jax.deploy.latency import latency
from qkd_jax.deploy.onnx.engines import Placed, openvino_model, placed
from qkd_jax.deploy.onnx.export import OnnxFile, to_onnx
from qkd_jax.deploy.onnx.session import has_vnni, onnx_session
from qkd_jax.deploy.onnx.stamp import read_stamp, stamp_onnx
from qkd_jax.deploy.stablehlo import load_stablehlo, save_stablehlo
from qkd_jax.quantize import targets

__all__ = [
    "Description",
    "IntegerModel",
    "LayerSize",
    "OnnxFile",
    "Placed",
    "convert",
    "describe",
    "has_vnni",
    "integer_apply",
    "latency",
    "load",
    "load_stablehlo",
    "onnx_session",
    "openvino_model",
    "placed",
    "read_stamp",
    "save",
    "save_stablehlo",
    "stamp_onnx",
    "targets",
    "to_onnx",
]
