#!/usr/bin/env bash
# ONNX Runtime quantizes a float weight to int8, one scale for the tensor, if it stands between two grids.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, CPU.
#
# Guess: a QDQ file says what is quantized: a Conv or Gemm with a float weight stays one of floats,
#   whatever lies in front of it and behind.
# Truth: with DequantizeLinear in front and QuantizeLinear behind (a ReLU between) the optimizer
#   WeightBiasQuantization, on by default, rounds the float weight to 8 bits with one scale for all
#   channels: small channels lose most of their digits. So for Conv, ConvTranspose and Gemm, with a bias
#   and without, and with an Add behind, which is fused. Not for a MatMul, nor with an operation behind
#   that is not fused: a Sub (of zeros, one for each channel, for a Sub of the number 0 is removed), or
#   the Max with the lowest number.
#
# Output seen:
#   weights 0.3 (summed three times) and 30; true results 0.9 and 90
#   Conv: [0.9, 90.0] without a grid behind, [1.06, 90.0] with one
#   Conv, Add zeros: [0.9, 90.0] without a grid behind, [1.06, 90.0] with one
#   Conv, Sub zeros: [0.9, 90.0] without a grid behind, [0.9, 90.0] with one
#   Conv, Sub number 0: [0.9, 90.0] without a grid behind, [1.06, 90.0] with one
#   Conv, Max lowest: [0.9, 90.0] without a grid behind, [0.9, 90.0] with one
#   Gemm: [0.9, 90.0] without a grid behind, [1.06, 90.0] with one
#   MatMul: [0.9, 90.0] without a grid behind, [0.9, 90.0] with one
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


def result(product, after, grid):
    conv = product == "Conv"
    shape, out = ((1, 3, 4, 4), (1, 2, 4, 4)) if conv else ((1, 3), (1, 2))
    weight = np.full((3, 2), (0.3, 30), np.float32)
    constants = {
        "one": np.float32(1),
        "hundredth": np.float32(0.01),
        "zero": np.uint16(0),
        "weight": weight.T.reshape(2, 3, 1, 1) if conv else weight,
        "zeros": np.zeros((2, 1, 1) if conv else 2, np.float32),
        "number 0": np.float32(0),
        "lowest": np.finfo(np.float32).min,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x_hat"]),
        helper.make_node(product, ["x_hat", "weight"], ["0"]),
    ]
    if after:
        op, constant = after.split(" ", 1)
        nodes.append(helper.make_node(op, ["0", constant], ["1"]))
    if grid:
        name = nodes[-1].output[0]
        nodes.append(helper.make_node("QuantizeLinear", [name, "hundredth", "zero"], ["2"]))
        nodes.append(helper.make_node("DequantizeLinear", ["2", "hundredth", "zero"], ["3"]))
    graph = helper.make_graph(
        nodes,
        "weight",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of constants that this case leaves unused
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"x": np.ones(shape, np.float32)})[0].reshape(2, -1)[:, 0]
    return [round(float(v), 2) for v in found]


print("weights 0.3 (summed three times) and 30; true results 0.9 and 90")
ENDS = ("", "Add zeros", "Sub zeros", "Sub number 0", "Max lowest")
for product, after in (*(("Conv", end) for end in ENDS), ("Gemm", ""), ("MatMul", "")):
    name = f"{product}, {after}" if after else product
    print(
        f"{name}: {result(product, after, False)} without a grid behind, "
        f"{result(product, after, True)} with one"
    )
PYTHON
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
