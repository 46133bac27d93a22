#!/usr/bin/env bash
# ONNX Runtime fuses a MatMulInteger of int8 activations and uint8 weights into an operator that it lacks.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, CPU.
#
# Guess: MatMulInteger takes int8 and uint8 on either side, and an optimizer fuses only what there is a
#   kernel for: a file that runs without optimizations runs with them.
# Truth: behind MatMulInteger, Cast and a product with x_scale * w_scale (a dynamic range, scaled once)
#   it makes MatMulIntegerToFloat of every pair of types, and has no kernel of int8 with uint8: the
#   session is refused. Each half alone is fine: without optimizations, with one constant scale, or
#   with uint8 activations. On x86 without VNNI session.x64quantprecision=1 makes uint8 of int8
#   weights beyond 64, so a file of int8 with int8 comes to the same end there.
#
# Output seen:
#   uint8 @ uint8: one scale 0.0; x_scale * w_scale 0.0, not optimized 0.0
#   uint8 @ int8: one scale 0.0; x_scale * w_scale 0.0, not optimized 0.0
#   int8 @ uint8: one scale 0.0; x_scale * w_scale no kernel of MatMulIntegerToFloat, not optimized 0.0
#   int8 @ int8: one scale 0.0; x_scale * w_scale 0.0, not optimized 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/output"
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

TYPES = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
x = np.random.default_rng(0).integers(0, 30, (3, 8))
w = np.random.default_rng(1).integers(0, 30, (8, 4))  # no sum of 16 bits overflows


def error(left, right, two_scales, optimized):
    """Returns the largest error, the scales being powers of two: 0 is right."""
    scale = ["x_scale", "w_scale"] if two_scales else ["w_scale", "one"]
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["float_sums"], to=TensorProto.FLOAT),
        helper.make_node("Mul", scale, ["scale"]),
        helper.make_node("Mul", ["float_sums", "scale"], ["y"]),
    ]
    constants = {"w": w.astype(right), "w_scale": np.float32(0.5), "one": np.float32(1)}
    graph = helper.make_graph(
        nodes,
        "product",
        [
            helper.make_tensor_value_info("x", TYPES[left], ["batch", 8]),
            helper.make_tensor_value_info("x_scale", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as failure:
        assert "kernel for com.microsoft.MatMulIntegerToFloat" in str(failure), failure
        return "no kernel of MatMulIntegerToFloat"
    inputs = {"x": x.astype(left), "x_scale": np.array(0.25, np.float32)}
    y = session.run(None, inputs)[0]
    return float(np.abs(y - (x @ w) * (0.125 if two_scales else 0.5)).max())


for left in ("uint8", "int8"):
    for right in ("uint8", "int8"):
        print(
            f"{left} @ {right}: one scale {error(left, right, False, True)}; "
            f"x_scale * w_scale {error(left, right, True, True)}, "
            f"not optimized {error(left, right, True, False)}"
        )
PYTHON
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
