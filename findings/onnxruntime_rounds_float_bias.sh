#!/usr/bin/env bash
# ONNX Runtime rounds the float bias of a product between two grids to the unit of the sums, s_x * s_w.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, CPU.
#
# Guess: a QDQ file is exact where it holds floats: a Conv whose input and weight come from
#   DequantizeLinear, with a float bias, adds that bias, and a quantizing engine that wants an int32 bias
#   leaves such a product in float.
# Truth: where QuantizeLinear follows (behind a ReLU too), the optimizer WeightBiasQuantization, on by
#   default, makes an int32 of the bias, with scale s_x * s_w: off by up to half of that unit. So for
#   Conv, ConvTranspose and Gemm, and for a MatMul with an Add, which is fused into a Gemm before. Not
#   for an Add behind a Conv, a Sub behind a MatMul, behind which nothing is quantized, nor with
#   disabled_optimizers=["WeightBiasQuantization"].
#
# Output seen:
#   unit of the sums 0.25, bias 0.1; in brackets with WeightBiasQuantization off
#   Conv: 0.1 (0.1); then QuantizeLinear: 0.0 (0.1); then Relu, QuantizeLinear: 0.0 (0.1)
#   Gemm: 0.1 (0.1); then QuantizeLinear: 0.0 (0.1); then Relu, QuantizeLinear: 0.0 (0.1)
#   Conv, Add: 0.1 (0.1); then QuantizeLinear: 0.1 (0.1); then Relu, QuantizeLinear: 0.1 (0.1)
#   MatMul, Add: 0.1 (0.1); then QuantizeLinear: 0.0 (0.1); then Relu, QuantizeLinear: 0.0 (0.1)
#   MatMul, Sub: 0.1 (0.1); then QuantizeLinear: 0.1 (0.1); then Relu, QuantizeLinear: 0.1 (0.1)
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


def result(product, after, behind, off):
    conv = product == "Conv"
    shape, weight = ((1, 3, 4, 4), np.ones((2, 3, 1, 1))) if conv else ((1, 3), np.ones((3, 2)))
    bias = np.full((2, 1, 1) if conv and after else (2,), -0.1 if after == "Sub" else 0.1, np.float32)
    constants = {
        "half": np.float32(0.5),
        "hundredth": np.float32(0.01),
        "zero": np.uint8(0),
        "codes": weight.astype(np.int8),
        "weight_zero": np.int8(0),
        "bias": bias,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "half", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "half", "zero"], ["x_hat"]),
        helper.make_node("DequantizeLinear", ["codes", "half", "weight_zero"], ["w_hat"]),
        helper.make_node(product, ["x_hat", "w_hat", *([] if after else ["bias"])], ["0"]),
    ]
    if after:
        nodes.append(helper.make_node(after, ["0", "bias"], ["1"]))
    for op in behind:
        grid = ["hundredth", "zero"] if "Linear" in op else []
        name = nodes[-1].output[0]
        nodes.append(helper.make_node(op, [name, *grid], [f"{op}:0"]))
    out = (1, 2, 4, 4) if conv else (1, 2)
    graph = helper.make_graph(
        nodes,
        "bias",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of constants that this case leaves unused
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"] if off else [],
    )
    return round(float(session.run(None, {"x": np.zeros(shape, np.float32)})[0].max()), 4)


PAIR = ("QuantizeLinear", "DequantizeLinear")
ENDS = {"": (), "then QuantizeLinear": PAIR, "then Relu, QuantizeLinear": ("Relu", *PAIR)}
print("unit of the sums 0.25, bias 0.1; in brackets with WeightBiasQuantization off")
for ops in (("Conv", ""), ("Gemm", ""), ("Conv", "Add"), ("MatMul", "Add"), ("MatMul", "Sub")):
    cells = []
    for name, behind in ENDS.items():
        plain, off = (result(*ops, behind, o) for o in (False, True))
        cells.append(f"{name or ', '.join(filter(None, ops))}: {plain} ({off})")
    print("; ".join(cells))
PYTHON
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
