"""The options of LiteRT's operations, and the versions of their kernels.

A version is that of the kernel which first took such types and options, as LiteRT's own converter
counts them (`op_version.cc`): an older runtime refuses the file instead of misreading it.
"""

from typing import Any

# Operation -> its table of options in the schema. The others have none that a kernel reads.
OPTIONS = {
    "ADD": "AddOptions",
    "ARG_MAX": "ArgMaxOptions",
    "ARG_MIN": "ArgMinOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "BROADCAST_TO": "BroadcastToOptions",
    "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DIV": "DivOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PACK": "PackOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "SHAPE": "ShapeOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
}
# Operation -> {type of its data: version}; other types have version 1.
VERSIONS = {
    "ADD": {"int8": 2, "int16": 3, "int64": 4},
    "ARG_MAX": {"int8": 2},
    "AVERAGE_POOL_2D": {"int8": 2, "int16": 3},
    "BATCH_MATMUL": {"int8": 2, "int16": 3},
    "BROADCAST_TO": {"int16": 3},
    "CONCATENATION": {"int8": 2, "int16": 3},
    "CONV_2D": {"int8": 3, "int16": 4},
    "DEPTHWISE_CONV_2D": {"int8": 3, "int16": 5},
    "FULLY_CONNECTED": {"int8": 4, "int16": 7},
    "GATHER": {"int8": 2, "int16": 4},
    "GELU": {"int8": 2},
    "LOGISTIC": {"int8": 2, "int16": 3},
    "MAXIMUM": {"int8": 2, "int16": 4},
    "MAX_POOL_2D": {"int8": 2, "int16": 3},
    "MEAN": {"int8": 2, "int16": 3},
    "MINIMUM": {"int8": 2, "int16": 4},
    "MUL": {"int8": 2, "int16": 4, "int64": 5},
    "PAD": {"int8": 2, "int16": 3},
    "PADV2": {"int8": 2, "int16": 3},
    "REDUCE_MAX": {"int8": 2, "int16": 3},
    "REDUCE_MIN": {"int8": 2, "int16": 3},
    "RELU": {"int8": 2, "int16": 3},
    "RELU6": {"int8": 2, "int16": 3},
    "REVERSE_V2": {"int8": 3},
    "SOFTMAX": {"int8": 2, "int16": 3},
    "STRIDED_SLICE": {"int8": 2, "int16": 4},
    "SUB": {"int8": 2, "int16": 5},
    "SUM": {"int8": 2},
    "TANH": {"int8": 2, "int16": 3},
    "TRANSPOSE": {"int8": 2, "int16": 5},
}
# Operations whose kernels have no version 1: LiteRT does not load a file that asks for it.
_LOWEST = {"BROADCAST_TO": 2}


def ops_version(operation: Any) -> int:
    """Returns the version of the kernel that an operation needs (an `Operation`)."""
    op, data = operation.op, operation.inputs[0]
    version = VERSIONS.get(op, {}).get(data.dtype, _LOWEST.get(op, 1))
    rank = max(len(t.shape) for t in operation.inputs)
    if op == "DEQUANTIZE":
        assert data.grid is not None
        version = {"int2": 7, "int4": 6, "int16": 3}.get(data.dtype, 2)
        return 5 if data.dtype == "int8" and data.grid.scale.size > 1 else version
    if op == "QUANTIZE":
        return 2 if operation.outputs[0].dtype == "int16" else 1
    if op in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
        return max(version, _of_products(operation))
    if op in ("PAD", "PADV2", "STRIDED_SLICE", "TRANSPOSE") and rank > 4:
        return max(version, 6 if op == "TRANSPOSE" and rank > 5 else 4)
    broadcast = len({t.shape for t in operation.inputs}) > 1
    if op in ("MAXIMUM", "MINIMUM", "SUB") and broadcast and rank > 4:
        return max(version, 3)
    if op == "DIV" and broadcast and rank > 4:
        return 2
    if op == "MUL" and data.grid is not None and data.dtype == "int8":
        scales = [t.grid.scale.reshape(()) for t in (*operation.inputs, *operation.outputs)]
        return 3 if scales[0] * scales[1] / scales[2] >= 1 else version
    return version


def _of_products(operation: Any) -> int:
    op, options = operation.op, operation.options
    data, weight = operation.inputs[:2]
    if weight.dtype == "int4":
        if op == "FULLY_CONNECTED":
            return 13 if data.dtype == "int16" else 10
        return 7
    if op == "FULLY_CONNECTED":
        return 5 if options.get("keepNumDims") else 1
    if op == "CONV_2D" and data.shape[-1] != weight.shape[-1]:
        return 6
    if op == "DEPTHWISE_CONV_2D":
        dilated = any(options.get(f"dilation{side}Factor", 1) != 1 for side in "HW")
        return 2 if dilated else 1
    return 1
