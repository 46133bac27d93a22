"""OpenVINO's own files (.xml and .bin), made from `to_onnx`'s, for what ONNX cannot say.

Two things: NF4 codes have a type here, nf4, that the CPU plugin multiplies without unpacking; and
a property of the plugin can stand in the file. DYNAMIC_QUANTIZATION_GROUP_SIZE="0" keeps any code
that opens it from rounding the inputs of products to 8 bits, as the plugin does by default. The
other property that float32 needs, INFERENCE_PRECISION_HINT="f32" on processors with bfloat16, the
plugin does not read from files (findings/openvino_runtime_options.sh): `openvino_model` sets it.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.deploy.description import Description
from qkd_jax.deploy.onnx import openvino_seal
from qkd_jax.deploy.onnx.engines import GROUP_SIZE, import_engine, without_telemetry
from qkd_jax.deploy.onnx.export import to_onnx
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.targets import TARGETS
from qkd_jax.quantizers import codebook
from qkd_jax.whole_files import replace_file

WEIGHTS = ("float", "nbits", "nbits_int8")


@dataclasses.dataclass(frozen=True)
class OpenvinoFile:
    """A file that `to_openvino` wrote.

    Attributes:
        path: the .xml; the weights are in the .bin beside it.
        bytes: size of both.
        stored: layer -> (format of its weight's codes, type they are stored in).
        rounded_inputs: layers whose float inputs the plugin rounds to 8 bits.
    """

    path: Path
    bytes: int
    stored: dict[str, tuple[str, str]]
    rounded_inputs: tuple[str, ...]


def to_openvino(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    path: str | os.PathLike[str],
    *,
    target: str = "openvino-cpu",
    weights: str = "nbits",
    description: Description | None = None,
    **kwargs: Any,
) -> OpenvinoFile:
    """Writes a net, float or quantized, as an OpenVINO file.

    Inputs, outputs and arithmetic are those of `to_onnx`. Weights with groups, or of NF4 or float4,
    stay codes in memory and are unpacked while they are multiplied (`kernel_report`).

    Args:
        net: the net.
        variables: float or calibrated.
        images: example input, as for `to_onnx`.
        path: the .xml to write; the .bin gets the same name.
        target: "openvino-cpu", or "openvino-cpu-vnni" for processors with VNNI.
        weights: "float", "nbits" or "nbits_int8", as for `to_onnx`. With the last one the file
            tells the plugin to round the inputs of such layers to 8 bits, in blocks as large as
            the weights' (`OpenvinoFile.rounded_inputs`): faster, and no longer the net's logits.
        description: how images become the input, which `deploy.predict` reads; it stays in the
            file.
        **kwargs: further arguments of `to_onnx`.

    Returns:
        An `OpenvinoFile`; run it with `open_onnx(path, "openvino")`, which checks the hash that
        the .xml has of both files.

    Raises:
        ImportError: the `export` extra is not installed.
        ValueError: a path that does not end in .xml, another target, or what `to_onnx` refuses.
            Nothing is written then.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"path is {os.fspath(path)!r}; an OpenVINO file ends in .xml.")
    checks.one_of("target", target, [n for n, t in TARGETS.items() if t.engine == "openvino"])
    checks.one_of("weights", weights, WEIGHTS)
    onnx = import_engine("onnx")
    with without_telemetry():
        openvino = import_engine("openvino")
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "net.onnx", Path(folder) / path.name
        chosen = None if weights == "nbits" else weights  # the target's own form
        written = to_onnx(net, variables, images, given, target=target, weights=chosen, **kwargs)
        with without_telemetry():
            model = openvino.Core().read_model(os.fspath(given))
        stored = dict(written.stored)
        if weights != "float" and _with_nf4(openvino, model):
            stored = {
                layer: (name, "nf4" if name == "nf4" else dtype)
                for layer, (name, dtype) in stored.items()
            }
        blocks = [
            attribute.i
            for node in onnx.load(given).graph.node
            for attribute in node.attribute
            if attribute.name == "block_size"
        ]
        rounds = bool(written.rounded_inputs)
        size = str(min(blocks)) if rounds else "0"
        model.set_rt_info(size, ["runtime_options", GROUP_SIZE])
        for name, text in openvino_seal.rt_info(description).items():
            model.set_rt_info(text, [openvino_seal.SECTION, name])
        openvino.save_model(model, os.fspath(made), compress_to_fp16=False)
        weights_data = made.with_suffix(".bin").read_bytes()
        data = openvino_seal.sealed(made.read_bytes(), weights_data)
    replace_file(path.with_suffix(".bin"), weights_data)
    replace_file(path, data)
    return OpenvinoFile(path, len(data) + len(weights_data), stored, written.rounded_inputs)


def _with_nf4(openvino: Any, model: Any) -> bool:
    """Makes nf4 constants of codes that index the NF4 table; returns whether there were any."""
    table = np.asarray(codebook.values(4), np.float32)
    opset = openvino.opset13
    found = False
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gather":
            continue
        entries, cast = (node.input_value(i).get_node() for i in (0, 1))
        if entries.get_type_name() != "Constant" or cast.get_type_name() != "Convert":
            continue
        codes = cast.input_value(0).get_node()
        if (
            codes.get_type_name() != "Constant"
            or codes.get_element_type() != openvino.Type.u4
            or entries.get_element_type() != openvino.Type.f32
            or not np.array_equal(np.ravel(entries.data), table)
        ):
            continue
        tensor = openvino.Tensor(openvino.Type.nf4, codes.get_output_shape(0))
        tensor.data.view(np.uint8).reshape(-1)[:] = codes.data.view(np.uint8).reshape(-1)
        constant = openvino.op.Constant(tensor)
        constant.set_friendly_name(codes.get_friendly_name())
        values = opset.convert(constant, np.float32)
        node.output(0).replace(values.output(0))
        _without_fence(values)
        found = True
    return found


def _without_fence(node: Any) -> None:
    """Takes out the Max behind a dequantized weight: it would have it unpacked."""
    while node.get_type_name() != "Maximum":
        (target,) = node.output(0).get_target_inputs()
        node = target.get_node()
    node.output(0).replace(node.input_value(0))
