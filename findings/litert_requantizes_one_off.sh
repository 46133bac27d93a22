#!/usr/bin/env bash
# LiteRT's QUANTIZE from int8 codes to int8 codes is one off for up to a quarter of them.
#
# Versions: ai-edge-litert 2.3.0, numpy 2.4.6, CPU (x86-64, XNNPACK).
#
# Guess: QUANTIZE from one int8 grid to another gives the code that is nearest to the number, as
#   DEQUANTIZE and QUANTIZE one after the other do, and does it on integers.
# Truth: XNNPACK, which takes the operation by default, has the ratio of the scales as a number of
#   8 bits behind the point, so that one code in six to twenty is one off. LiteRT's own kernel has 31
#   bits and rounds twice: where the ratio is below 1/2 it rounds at a finer unit first, and near
#   the middle between two codes then once more to the same side. From 1/4 to 1/2 that is one code
#   in four; above 1/2 it is exact. Products are only a little off there (their sums are large), and
#   exact in XNNPACK. What joins branches of different scales needs such an operation: DEQUANTIZE and
#   QUANTIZE are exact in both, and MUL by a constant of scale 1 is in XNNPACK.
#
# Output seen:
#   scale 0.0231 to 0.0817: XNNPACK quantize 17.97 %, pair 0.00 %, mul 0.00 %
#   scale 0.0231 to 0.0817: own     quantize 24.61 %, pair 0.00 %, mul 24.61 %
#   scale 0.0470 to 0.0330: XNNPACK quantize 4.69 %, pair 0.00 %, mul 0.00 %
#   scale 0.0470 to 0.0330: own     quantize 0.00 %, pair 0.00 %, mul 0.00 %
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 ai-edge-litert==2.3.0 flatbuffers==25.12.19
cat > "$folder/requantize.py" <<'PYTHON'
import flatbuffers
import numpy as np
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema

KINDS = litert.OpResolverType
RESOLVERS = {
    "XNNPACK": KINDS.AUTO,
    "own    ": KINDS.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
}
VERSIONS = {"QUANTIZE": 2, "DEQUANTIZE": 2, "MUL": 2}
CODES = np.arange(-128, 128).astype(np.int8).repeat(4).reshape(1, 32, 32, 1)


def model(grids, operations):
    """A file of tensors (shape, scale, zero point, data) and operations (name, inputs, output)."""
    net, graph = schema.ModelT(), schema.SubGraphT()
    net.version, net.buffers, net.operatorCodes = 3, [schema.BufferT()], []
    graph.tensors, graph.operators, graph.inputs = [], [], [0]
    graph.outputs = [operations[-1][2]]
    for index, (shape, scale, zero_point, data) in enumerate(grids):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = f"t{index}", list(shape), 0
        tensor.type = schema.TensorType.INT8 if scale else schema.TensorType.FLOAT32
        if scale:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = [scale]
            tensor.quantization.zeroPoint = [zero_point]
        if data is not None:
            net.buffers.append(schema.BufferT())
            net.buffers[-1].data = data.view(np.uint8)
            tensor.buffer = len(net.buffers) - 1
        graph.tensors.append(tensor)
    for index, (name, inputs, output) in enumerate(operations):
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, name)
        code.version = VERSIONS[name]
        net.operatorCodes.append(code)
        operator.opcodeIndex, operator.inputs, operator.outputs = index, inputs, [output]
        if name == "MUL":
            operator.builtinOptionsType = schema.BuiltinOptions.MulOptions
            operator.builtinOptions = schema.MulOptionsT()
        graph.operators.append(operator)
    net.subgraphs = [graph]
    builder = flatbuffers.Builder(0)
    builder.Finish(net.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def run(file, resolver):
    engine = litert.Interpreter(model_content=file, experimental_op_resolver_type=resolver)
    engine.allocate_tensors()
    engine.set_tensor(engine.get_input_details()[0]["index"], CODES)
    engine.invoke()
    return engine.get_tensor(engine.get_output_details()[0]["index"]).astype(int)


for first, zero, second, other in ((0.0231, -128, 0.0817, 3), (0.047, 5, 0.033, -10)):
    shape, one = CODES.shape, np.ones(1, np.int8)
    ends = [(shape, first, zero, None), (shape, second, other, None)]
    files = {
        "quantize": model(ends, [("QUANTIZE", [0], 1)]),
        "pair": model(
            [*ends, (shape, 0, 0, None)], [("DEQUANTIZE", [0], 2), ("QUANTIZE", [2], 1)]
        ),
        "mul": model([*ends, ((1,), 1.0, 0, one)], [("MUL", [0, 2], 1)]),
    }
    real = (CODES.astype(np.float64) - zero) * np.float64(np.float32(first))
    wanted = np.clip(np.round(real / np.float64(np.float32(second))) + other, -128, 127)
    for engine, resolver in RESOLVERS.items():
        apart = {name: run(file, resolver) - wanted for name, file in files.items()}
        assert all(np.abs(d).max() <= 1 for d in apart.values())
        told = ", ".join(f"{name} {100 * np.mean(d != 0):.2f} %" for name, d in apart.items())
        print(f"scale {first:.4f} to {second:.4f}: {engine} {told}")
PYTHON
"$folder/venv/bin/python" "$folder/requantize.py" 2> /dev/null | tee "$folder/output"
sed -n '/^# Output seen:/,/^set/p' "$0" | sed -n 's/^#   //p' | diff - "$folder/output"
