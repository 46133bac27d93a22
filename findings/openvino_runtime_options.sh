#!/usr/bin/env bash
# OpenVINO's CPU plugin reads one of two accuracy options from a file, and ignores an operator's own.
#
# Versions: openvino 2026.4.1, onnx 1.23.2, on x86-64 with AVX-512 (and bfloat16 for the last line).
# Guess: an IR's `runtime_options` are options, so INFERENCE_PRECISION_HINT stands there as well as
#   DYNAMIC_QUANTIZATION_GROUP_SIZE; and MatMulNBits with accuracy_level=1, "float32 inputs", has
#   float32 inputs.
# Truth: DYNAMIC_QUANTIZATION_GROUP_SIZE is read from the file; INFERENCE_PRECISION_HINT beside it is
#   not, without a word, so that processors with bfloat16 compute in it unless the program that opens
#   the file says "f32". Of MatMulNBits' accuracy_level the ONNX frontend takes no notice: inputs are
#   rounded to 8 bits by default.
# Output seen (largest error over the largest result):
#   MatMulNBits, accuracy_level=1, opened with f32:       rounded
#   the same, as IR:                                      rounded
#   IR with DYNAMIC_QUANTIZATION_GROUP_SIZE=0, with f32:  exact
#   that and INFERENCE_PRECISION_HINT=f32 in the file:    hint bfloat16, or float32 without AVX512_BF16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

sys.modules["openvino_telemetry"] = None
import numpy as np
import onnx
import openvino
from onnx import helper, numpy_helper

path = f"{sys.argv[1]}/net.xml"
INPUTS, OUTPUTS, BLOCK = 128, 32, 32
rng = np.random.default_rng(0)
codes = rng.integers(0, 16, (OUTPUTS, INPUTS // BLOCK, BLOCK))
scale = rng.uniform(0.5, 1, (OUTPUTS, INPUTS // BLOCK)).astype(np.float32)
x = rng.normal(size=(16, INPUTS)).astype(np.float32)
weight = ((codes - 8) * scale.astype(np.float64)[..., None]).reshape(OUTPUTS, INPUTS)
right = x.astype(np.float64) @ weight.T
packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
value = lambda name, width: helper.make_tensor_value_info(name, 1, ["batch", width])
node = helper.make_node(
    "MatMulNBits",
    ["x", "codes", "scale"],
    ["y"],
    domain="com.microsoft",
    K=INPUTS,
    N=OUTPUTS,
    bits=4,
    block_size=BLOCK,
    accuracy_level=1,
)
stored = [numpy_helper.from_array(a, n) for n, a in (("codes", packed), ("scale", scale))]
graph = helper.make_graph([node], "dense", [value("x", INPUTS)], [value("y", OUTPUTS)], stored)
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
file = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
core = openvino.Core()
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def kind(compiled):
    error = np.abs(compiled([x])[0] - right).max() / np.abs(right).max()
    assert error < 1e-5 or 1e-3 < error < 0.03, error
    return "exact" if error < 1e-5 else "rounded"


def saved(**options):
    model = core.read_model(file)
    for name, text in options.items():
        model.set_rt_info(text, ["runtime_options", name])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


found = [
    kind(core.compile_model(core.read_model(file), "CPU", F32)),
    kind(core.compile_model(saved(), "CPU", F32)),
    kind(core.compile_model(saved(DYNAMIC_QUANTIZATION_GROUP_SIZE="0"), "CPU", F32)),
]
both = saved(DYNAMIC_QUANTIZATION_GROUP_SIZE="0", INFERENCE_PRECISION_HINT="f32")
hint = core.compile_model(both, "CPU").get_property("INFERENCE_PRECISION_HINT")
default = core.compile_model(saved(), "CPU").get_property("INFERENCE_PRECISION_HINT")
print(f"MatMulNBits, accuracy_level=1, opened with f32: {found[0]}")
print(f"the same, as IR: {found[1]}")
print(f"IR with DYNAMIC_QUANTIZATION_GROUP_SIZE=0, with f32: {found[2]}")
print(f"that and INFERENCE_PRECISION_HINT=f32 in the file: hint {hint.to_string()}")
assert found == ["rounded", "rounded", "exact"], found
assert hint == default, (hint, default)  # the file's word changes nothing
PYTHON
