#!/usr/bin/env bash
# OpenVINO computes a ReduceMax wrongly when it drops its axes and a grid stands behind it.
#
# Versions: openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, on x86-64.
# Guess: ReduceMax(keepdims=0) is ReduceMax(keepdims=1) and a Squeeze.
# Truth: behind a convolution whose channels have scales of their own, and in front of an 8-bit grid
#   and an int8 product, the first gives results that are off by their whole size, and the second is
#   right. ReduceMin and ReduceMean in its place are right. The file is valid and ONNX Runtime
#   computes both. See also openvino issue 20815.
# Output seen (largest difference from ONNX Runtime over the largest result):
#   ReduceMax keepdims=0: 1
#   ReduceMax keepdims=1 and Squeeze: 0
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


def difference(keep):
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(8, 2, 8, 8))).astype(np.float32)
    constants = {
        "s": np.float32(3 / 255),
        "zero": np.uint8(0),
        "kernel": rng.integers(-127, 128, (6, 2, 3, 3)).astype(np.int8),
        "kernel_scale": (rng.uniform(1, 2, 6) / 1270).astype(np.float32),
        "head": rng.integers(-127, 128, (6, 4)).astype(np.int8),
        "head_scale": (rng.uniform(1, 2, 4) / 127).astype(np.float32),
        "axes": np.array([2, 3]),
    }
    reduced = [node("ReduceMax", ["relu", "axes"], ["max"], keepdims=keep)]
    if keep:
        reduced += [node("Squeeze", ["max", "axes"], ["features"])]
    else:
        reduced += [node("Identity", ["max"], ["features"])]
    nodes = [
        node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "s", "zero"], ["d"]),
        node("DequantizeLinear", ["kernel", "kernel_scale"], ["k"], axis=0),
        node("Conv", ["d", "k"], ["map"]),
        node("Relu", ["map"], ["relu"]),
        *reduced,
        node("QuantizeLinear", ["features", "s", "zero"], ["fq"]),
        node("DequantizeLinear", ["fq", "s", "zero"], ["fd"]),
        node("DequantizeLinear", ["head", "head_scale"], ["w"], axis=1),
        node("MatMul", ["fd", "w"], ["y"]),
    ]
    value = lambda name, shape: helper.make_tensor_value_info(name, 1, shape)
    stored = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    shapes = ["batch", 2, 8, 8], ["batch", 4]
    graph = helper.make_graph(nodes, "net", [value("x", shapes[0])], [value("y", shapes[1])], stored)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    data = file.SerializeToString()
    core = openvino.Core()
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    found = core.compile_model(core.read_model(data), "CPU", properties)([x])[0]
    right = onnxruntime.InferenceSession(data).run(None, {"x": x})[0]
    return float(np.abs(found - right).max() / np.abs(right).max())


dropped, kept = difference(0), difference(1)
print(f"ReduceMax keepdims=0: {dropped:.2g}")
print(f"ReduceMax keepdims=1 and Squeeze: {kept:.2g}")
assert dropped > 0.5 and kept < 1e-5
PYTHON
