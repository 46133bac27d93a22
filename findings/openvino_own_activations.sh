#!/usr/bin/env bash
# OpenVINO quantizes float activations to 8 bits by itself, against INFERENCE_PRECISION_HINT="f32".
#
# Versions: openvino 2026.4.1, onnx 1.23.2, on x86-64 with VNNI.
# Guess: a float input times an int8 weight behind DequantizeLinear is float arithmetic. If an engine
#   took a liberty, INFERENCE_PRECISION_HINT="f32" would forbid it.
# Truth: from 32 inputs on the CPU plugin rounds the input, row by row, to 8 bits. The hint does not
#   prevent it; DYNAMIC_QUANTIZATION_GROUP_SIZE="0" does, and so does a file in which the weight is a
#   Cast of the codes and its scale a Mul behind the product. Layers
#   whose input has no grid are concerned in files with 8-bit activations elsewhere, too.
# Output seen (largest error of products of the order of 10):
#   31 inputs, DequantizeLinear:                                   0.0000
#   64 inputs, DequantizeLinear:                                   0.17
#   64 inputs, DequantizeLinear, DYNAMIC_QUANTIZATION_GROUP_SIZE=0 0.0000
#   64 inputs, Cast and Mul:                                       0.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

sys.modules["openvino_telemetry"] = None
import numpy as np
import onnx
import openvino
from onnx import helper, numpy_helper

node = helper.make_node


def error(inputs, nodes, **properties):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, inputs)).astype(np.float32)
    codes = rng.integers(-127, 128, (inputs, 32)).astype(np.int8)
    scale = (rng.uniform(1, 2, 32) / 127).astype(np.float32)
    value = lambda name, width: helper.make_tensor_value_info(name, 1, ["batch", width])
    stored = [numpy_helper.from_array(a, name) for name, a in (("codes", codes), ("scale", scale))]
    graph = helper.make_graph(nodes, "dense", [value("x", inputs)], [value("y", 32)], stored)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    core = openvino.Core()
    properties = {"INFERENCE_PRECISION_HINT": "f32", **properties}
    net = core.compile_model(core.read_model(file.SerializeToString()), "CPU", properties)
    right = x.astype(np.float64) @ (codes * scale.astype(np.float64))
    return float(np.abs(net([x])[0] - right).max())


behind = [
    node("DequantizeLinear", ["codes", "scale"], ["w"], axis=1),
    node("MatMul", ["x", "w"], ["y"]),
]
cast = [
    node("Cast", ["codes"], ["w"], to=1),
    node("MatMul", ["x", "w"], ["sums"]),
    node("Mul", ["sums", "scale"], ["y"]),
]
off = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
found = {
    "31 inputs, DequantizeLinear": error(31, behind),
    "64 inputs, DequantizeLinear": error(64, behind),
    "64 inputs, DequantizeLinear, DYNAMIC_QUANTIZATION_GROUP_SIZE=0": error(64, behind, **off),
    "64 inputs, Cast and Mul": error(64, cast),
}
for name, size in found.items():
    print(f"{name}: {size:.2g}")
small = [size < 1e-4 for size in found.values()]
assert small == [True, False, True, True], found
assert found["64 inputs, DequantizeLinear"] > 0.02
PYTHON
