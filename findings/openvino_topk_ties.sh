#!/usr/bin/env bash
# OpenVINO's TopK of an ONNX file takes equal numbers in an order of its own.
#
# Versions: openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, on x86-64.
# Guess: of two equal numbers the one with the lower index comes first, as ONNX prescribes for TopK
#   (and as jax.lax.top_k does), so that two engines give the same indices.
# Truth: ONNX Runtime does so; OpenVINO gives the right values with other indices, in rows of 8 numbers
#   already. k = 1 is right. Logits on a grid of few bits are full of ties: the top 5 classes
#   of one file are then others on the two engines, and a sort applied to a second array by its
#   indices (arg sort and gather) permutes it otherwise.
# Output seen (share of the indices that are not ONNX's, of 3 different numbers):
#   8 numbers, top 8: onnxruntime 0.00, openvino 0.81
#   100 numbers, top 1: onnxruntime 0.00, openvino 0.00
#   100 numbers, top 10: onnxruntime 0.00, openvino 0.90
#   1000 numbers, top 5: onnxruntime 0.00, openvino 0.70
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
from onnx import helper

for width, k in ((8, 8), (100, 1), (100, 10), (1000, 5)):
    x = np.random.default_rng(0).integers(0, 3, (2, width)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=-1)],
        "top",
        [value("x", 1, ["batch", width])],
        [value("values", 1, ["batch", k]), value("indices", 7, ["batch", k])],
        [helper.make_tensor("k", 7, [1], [k])],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    data = file.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    net = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    right = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    wrong = {}
    for engine, (values, indices) in (
        ("onnxruntime", session.run(None, {"x": x})),
        ("openvino", (net([x])[0], net([x])[1])),
    ):
        assert np.array_equal(values, np.take_along_axis(x, right, -1)), "the values are right"
        wrong[engine] = float(np.mean(indices != right))
    shares = ", ".join(f"{engine} {share:.2f}" for engine, share in wrong.items())
    print(f"{width} numbers, top {k}: {shares}")
    assert wrong["onnxruntime"] == 0
    assert (wrong["openvino"] > 0.3) if k > 1 else wrong["openvino"] == 0
PYTHON
