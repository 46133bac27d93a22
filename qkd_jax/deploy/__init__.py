"""From a trained net to something that runs elsewhere: integers in JAX, and ONNX files.

`convert` and `integer_apply` are the integer model, `to_onnx` and `onnx_session` the file and the
engine for it, `latency` times engines side by side. A new kind of file is a module here with a
function `(net, variables, images, path, **options)`.
"""

from qkd_jax.deploy.integers import convert, integer_apply
from qkd_jax.deploy.latency import latency
from qkd_jax.deploy.onnx import OnnxFile, has_vnni, onnx_session, to_onnx
from qkd_jax.deploy.program import IntegerModel, LayerSize

__all__ = [
    "IntegerModel",
    "LayerSize",
    "OnnxFile",
    "convert",
    "has_vnni",
    "integer_apply",
    "latency",
    "onnx_session",
    "to_onnx",
]
