#!/usr/bin/env bash
# ONNX Runtime multiplies int2 weights wrongly where the number of outputs is not a multiple of 4.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, ml_dtypes 0.6.0, CPU.
# Guess: a DequantizeLinear of int2 with a block size computes the same as the MatMulNBits that the
#   optimizer makes of it and the MatMul behind it, for any size.
# Truth: with 8 or 12 outputs all is right; with 9 or 10 the result is as large as it should be and has
#   nothing to do with it, whether the session's accuracy level is 1 or 4. int4 of an odd number of
#   outputs is right; so are int2 without optimizations, and behind a Cast in place of the
#   DequantizeLinear. Four codes are a byte: the repacking goes wrong where rows do not end with one.
# Output seen (largest error over the largest result):
#   int2, 8 outputs: optimized right, not optimized right
#   int2, 9 outputs: optimized WRONG, not optimized right
#   int2, 10 outputs: optimized WRONG, not optimized right
#   int2, 12 outputs: optimized right, not optimized right
#   int4, 9 outputs: optimized right, not optimized right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/output"
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

INPUTS, BLOCK = 64, 32


def error(dtype, outputs, optimized):
    """Returns the largest error over the largest result, inputs not rounded by the engine."""
    rng = np.random.default_rng(0)
    limits = ml_dtypes.iinfo(dtype)
    codes = rng.integers(limits.min, int(limits.max) + 1, (INPUTS, outputs))
    scale = rng.uniform(0.5, 1, (INPUTS // BLOCK, outputs)).astype(np.float32)
    x = rng.normal(size=(4, INPUTS)).astype(np.float32)
    value = lambda name, width: helper.make_tensor_value_info(name, 1, ["batch", width])
    stored = [
        numpy_helper.from_array(codes.astype(dtype), "codes"),
        numpy_helper.from_array(scale, "scale"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "dense", [value("x", INPUTS)], [value("y", outputs)], stored)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    onnx.checker.check_model(file, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        file.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    right = x.astype(np.float64) @ (codes * np.repeat(scale.astype(np.float64), BLOCK, 0))
    return np.abs(session.run(None, {"x": x})[0] - right).max() / np.abs(right).max()


for dtype, outputs in (
    (ml_dtypes.int2, 8),
    (ml_dtypes.int2, 9),
    (ml_dtypes.int2, 10),
    (ml_dtypes.int2, 12),
    (ml_dtypes.int4, 9),
):
    sizes = [error(dtype, outputs, optimized) for optimized in (True, False)]
    assert all(size < 1e-5 or size > 0.3 for size in sizes), sizes
    optimized, plain = ("right" if size < 1e-5 else "WRONG" for size in sizes)
    name = np.dtype(dtype).name
    print(f"{name}, {outputs} outputs: optimized {optimized}, not optimized {plain}")
PYTHON
sed -n '/^# Output seen/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
