#!/usr/bin/env bash
# OpenVINO leaves out QuantizeLinear / DequantizeLinear pairs of 16 bits, clipping included.
#
# Versions: openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, on x86-64.
# Guess: since opset 21 QuantizeLinear writes uint16, so x / s is rounded and clipped to [0, 65535] as
#   it is to [0, 255] in uint8; an engine without 16-bit kernels computes it in float.
# Truth: OpenVINO removes the uint16 pair as if it were the identity. Codes below 0 pass, so a ReLU
#   that the pair has made superfluous is gone with it. A pair behind a Clip (a grid of 9 to 15 bits)
#   keeps the Clip and loses the rounding. uint8 is right, and so are Mul, Round, Clip, Mul.
#   ONNX Runtime computes all of them.
# Output seen (largest error in steps of the grid, inputs within 1.5 times its range):
#   8 bits:  QuantizeLinear  OpenVINO 0.0        ONNX Runtime 0.0
#   12 bits: QuantizeLinear  OpenVINO 0.5        ONNX Runtime 0.0
#   16 bits: QuantizeLinear  OpenVINO 98266.6    ONNX Runtime 0.0
#   16 bits: Mul Round Clip  OpenVINO 0.0        ONNX Runtime 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

sys.modules["openvino_telemetry"] = None
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import helper, numpy_helper

node = helper.make_node


def errors(bits, nodes):
    top = 2**bits - 1
    stored = np.uint8 if bits == 8 else np.uint16
    s = np.float32(2.0**-bits)  # a power of two: x / s and x * (1 / s) are exact
    constants = dict(s=s, inverse=1 / s, zero=stored(0), low=np.float32(0), top=np.float32(top))
    constants["high"] = np.float32(top * s)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (64, 48)).astype(np.float32)
    value = lambda name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, 48])
    read = {name for n in nodes for name in n.input}
    stored = [
        numpy_helper.from_array(np.asarray(a), name)
        for name, a in constants.items()
        if name in read
    ]
    graph = helper.make_graph(nodes, "grid", [value("x")], [value("y")], stored)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(file, full_check=True)
    data = file.SerializeToString()
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    found = {
        "OpenVINO": core.compile_model(core.read_model(data), "CPU", hint)([x])[0],
        "ONNX Runtime": onnxruntime.InferenceSession(data).run(None, {"x": x})[0],
    }
    right = np.clip(np.rint(x.astype(np.float64) / s), 0, top) * s
    return {engine: float(np.abs(y - right).max() / s) for engine, y in found.items()}


pair = [
    node("QuantizeLinear", ["in", "s", "zero"], ["q"]),
    node("DequantizeLinear", ["q", "s", "zero"], ["y"]),
]
clip, same = node("Clip", ["x", "low", "high"], ["in"]), node("Identity", ["x"], ["in"])
written = [
    node("Mul", ["x", "inverse"], ["m"]),
    node("Round", ["m"], ["r"]),
    node("Clip", ["r", "low", "top"], ["c"]),
    node("Mul", ["c", "s"], ["y"]),
]
results = {}
for bits, name, nodes in (
    (8, "QuantizeLinear", [same, *pair]),
    (12, "QuantizeLinear", [clip, *pair]),
    (16, "QuantizeLinear", [same, *pair]),
    (16, "Mul Round Clip", written),
):
    results[bits, name] = found = errors(bits, nodes)
    print(f"{bits} bits: {name}  " + "  ".join(f"{e} {error:.1f}" for e, error in found.items()))
assert all(found["ONNX Runtime"] == 0 for found in results.values())
assert results[8, "QuantizeLinear"]["OpenVINO"] == results[16, "Mul Round Clip"]["OpenVINO"] == 0
assert 0.4 < results[12, "QuantizeLinear"]["OpenVINO"] <= 0.5
assert results[16, "QuantizeLinear"]["OpenVINO"] > 30000
PYTHON
