"""ONNX files with QuantizeLinear / DequantizeLinear, written from the graph of the folded net.

The file computes what the net computes: weights are the trained codes (int8) with one scale per
output channel, into which BatchNorm is folded; activations are quantized where the net quantizes
them. A weight whose input is float multiplies as codes held in float, and its scale multiplies the
sums. A float net gives a float file, so that both can be timed on one engine.

Three things differ from the net's own arithmetic, each by rounding only: engines divide by a scale
where the net multiplies by its reciprocal, they add in another order, and a fused kernel applies
its multiplier once where the file has several operations. A value near the middle between two codes
may fall to the other side. So does one that lies exactly there where a spec has rounding="away":
QuantizeLinear rounds half to even.
"""

import collections
import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.deploy.onnx.assemble import onnx_model
from qkd_jax.deploy.onnx.context import Export, WeightForms
from qkd_jax.deploy.onnx.engines import has_vnni, import_engine, is_x86
from qkd_jax.deploy.onnx.stored_weight import opset_for, stored_weights
from qkd_jax.deploy.onnx.walk import write
from qkd_jax.deploy.onnx.writer import Writer
from qkd_jax.graph import Graph
from qkd_jax.ptq.fold_bn import fold_bn
from qkd_jax.ptq.integer_bias import integer_bias
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calls import split_arrays
from qkd_jax.quantize.targets import TARGETS, file_options
from qkd_jax.quantize.traced import refuse_uncalibrated, trace_net
from qkd_jax.whole_files import replace_file

OPSETS = (13, 25)
ACTIVATIONS = ("uint8", "int8", "own")
WEIGHTS = ("float", "blocks", "nbits", "nbits_int8")
DEFAULTS = {"opset": 17, "int4": False, "activations": "uint8", "weights": "float"}
INT4_OPSET = 21
HOST = "host"
HALF = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """A file that `to_onnx` wrote.

    Attributes:
        path: the file.
        operations: operation -> number of nodes.
        bytes: size of the file.
        saturating: layers whose codes go wrong on x86 without VNNI (see `to_onnx`).
        stored: layer -> (format of its weight's codes, type they are stored in); ONNX has none of
            1, 2 or 3 bits before opset 25, so that such codes take an int4 or an int8 each.
        rounded_inputs: layers whose kernel rounds its float inputs to 8 bits (`weights`
            "nbits_int8").
    """

    path: Path
    operations: dict[str, int]
    bytes: int
    saturating: tuple[str, ...]
    stored: dict[str, tuple[str, str]]
    rounded_inputs: tuple[str, ...] = ()


def to_onnx(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    target: str | None = None,
    int4: bool | None = None,
    activations: str | None = None,
    weights: str | None = None,
    any_batch: bool = True,
    **kwargs: Any,
) -> OnnxFile:
    """Writes a net, float or quantized, as an ONNX file.

    The input is "images", channels first ([batch, channels, height, width]) for images and as the
    model has it otherwise; the output is "logits". The batch axis is dynamic. Several inputs are
    "input0", "input1", ... in the order of the call, and several outputs likewise.

    Args:
        net: the net.
        variables: float or calibrated, folded or not (BatchNorm is folded where it can be).
        images: example input, [batch, height, width, channels], or what else `convert` takes; only
            shapes and types count.
        path: the file to write.
        opset: ONNX operator set, 13 to 25. int4 needs 21; a target's own opset is raised to it.
            Where it is not given, weights with groups or on no uniform grid raise it to what their
            types need; at one that lacks them, codes take a byte each, and stand in tables.
        target: what will run the file, a key of `targets.TARGETS`, which decides the options that
            are not given (else opset 17, int4 off, "uint8") and refuses layers whose sums
            would saturate there: on x86 without VNNI, 8-bit weights on 8-bit inputs give wrong
            logits, and accuracy alone does not show it. "host" warns if this machine is such one;
            None does neither. 7-bit weights are safe everywhere, and so is ONNX Runtime with the
            session of `onnx_session`. Where the engine adds biases as integers, they are rounded
            as it would: the file is then the net `ptq.integer_bias(net, variables, images)`.
        int4: store weights of up to 4 bits as int4 or uint4, two to a byte, which needs opset 21.
            Engines for CPUs have no products of them: they unpack such weights when they load the
            file, and run those layers in float.
        activations: the type that holds the codes of static grids: "uint8" or "int8" for all, where
            the zero point of a grid of the other kind moves by 128, or "own", each grid's own.
            Codes of dynamic ranges are uint8.
        weights: the form of weights with groups, or on no uniform grid (codebooks, small floats).
            "float" (without a target): dequantized in front of their product, in a way that every
            session of both engines computes in float; they unpack such weights when they load the
            file. "blocks": DequantizeLinear with a block size, whose inputs a session of ONNX
            Runtime or OpenVINO rounds to 8 bits unless it is opened as `open_onnx` does. "nbits"
            (the targets of both engines): MatMulNBits where the engine's kernels read integer codes
            packed, in float arithmetic; "nbits_int8" lets them round the inputs to 8 bits, faster
            and no longer the net's logits (`OnnxFile.rounded_inputs`; OpenVINO goes by its own
            property, which a file of `to_openvino` holds). Given by name, the last two take
            per-channel weights in front of float inputs as well, and ONNX Runtime's file holds
            codes of 2 bits in 4, for which alone it has a fast kernel. Convolutions and what else a
            form cannot hold are written as "float".
        any_batch: False keeps the batch size of `images`, for a net that has no batch, as
            `convert` says.
        **kwargs: further arguments of the model's call, as for `convert`; a cache is written in
            the model's own order of axes.

    Returns:
        An `OnnxFile`.

    Raises:
        ImportError: the `export` extra is not installed.
        ValueError: an operation that cannot be written (named with its module), one that computes
            in bfloat16 or float16, images of such a type, an `opset` or `target` out of range,
            layers that saturate on the target, a calibrated net of which a part is not (with a
            target, any that is not), or a learned step or level at or below 0. Nothing is written
            then.
    """
    onnx = import_engine("onnx")
    checks.one_of("target", target, (None, HOST, *TARGETS))
    defaults: Mapping[str, Any] = file_options(target) if target in TARGETS else DEFAULTS
    pack = int4 is not False
    int4 = bool(defaults["int4"] if int4 is None else int4)
    given_opset = opset
    if opset is None:
        opset = defaults["opset"]
        if target in TARGETS and int4:
            opset = max(opset, INT4_OPSET)
    chosen, activations = activations, activations or defaults["activations"]
    checks.one_of("activations", activations, ACTIVATIONS)
    checks.one_of("weights", weights, (None, *WEIGHTS))
    checks.integer_in("opset", opset, *OPSETS)
    if target in TARGETS and TARGETS[target].file != "onnx":
        raise ValueError(
            f"target is {target!r}, which takes {TARGETS[target].file} and no ONNX file."
        )
    if int4 and opset < INT4_OPSET:
        raise ValueError(f"opset is {opset}, and ONNX has int4 since {INT4_OPSET}; give opset=21.")
    _check_inputs(images)
    engine = TARGETS.get(target or "")
    rounds = engine is not None and engine.integer_bias and bool(variables.get("quant"))
    folded = (integer_bias if rounds else fold_bn)(
        net, variables, images, any_batch=any_batch, **kwargs
    )
    traced = trace_net(net, folded, images, any_batch=any_batch, **kwargs)
    refuse_uncalibrated(traced, float_passes=engine is None)
    _check_types(traced.graph)
    forms = WeightForms(
        form=weights or defaults["weights"],
        chosen=weights is not None,
        packed_bits=(4,) if engine is None else engine.packed_bits,
        pack=pack,
        int2=engine.int2 if engine is not None else given_opset is not None,
        float4=engine is not None and engine.float4,
    )
    stored = stored_weights(traced, forms)
    if given_opset is None:
        opset = max([opset, *(opset_for(tensor, forms) for tensor in stored.values())])
    options: dict[str, Any] = {"opset": opset, "int4": int4, "forms": forms}
    options["stored_tensors"] = stored
    options["offset_before_rounding"] = engine is not None and engine.offset_before_rounding
    options["onnxruntime"] = engine is None or engine.engine == "onnxruntime"
    options["quantizes_inputs"] = engine is None or engine.quantizes_inputs
    export = Export(traced, activations=activations, **options)
    outputs = write(export)
    if engine and not engine.keeps_sum_grids and chosen is None and _sums_grids(export.writer):
        # In int8 no sum is fused with the convolution before it; uint8 came out one code off,
        # one sum in four.
        export = Export(traced, activations="int8", **options)
        outputs = write(export)
    saturating = tuple(export.saturating)
    _check_target(target, saturating)
    model = onnx_model(export, outputs)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    path = replace_file(path, data)
    counts = collections.Counter(node.op_type for node in model.graph.node)
    return OnnxFile(
        path, dict(counts), len(data), saturating, export.stored, tuple(export.rounded_inputs)
    )


def _check_inputs(images: Any) -> None:
    for leaf in split_arrays(images)[0]:
        if str(leaf.dtype) in HALF:
            raise ValueError(
                f"images have dtype {leaf.dtype}; a file takes float32 images. Cast the example."
            )


def _check_types(graph: Graph) -> None:
    """Raises ValueError for a net that computes in half precision."""
    for node in graph.nodes:
        for value in node.outputs:
            if graph.dtype(value).name in HALF:
                raise ValueError(
                    f"operation {node.describe()} computes in {graph.dtype(value).name}; to_onnx "
                    "writes float32 nets, for engines round half precision elsewhere than the net "
                    "or not at all. Build the model with dtype=jnp.float32 and give it the same "
                    "variables; compare its logits, which lack the roundings."
                )


def _sums_grids(writer: Writer) -> bool:
    """Returns whether a sum is written whose two sides are on grids."""
    ops = {name: node.op for node in writer.nodes for name in node.outputs}
    return any(
        node.op == "Add" and all(ops.get(name) == "DequantizeLinear" for name in node.inputs)
        for node in writer.nodes
    )


def _check_target(target: str | None, saturating: tuple[str, ...]) -> None:
    if not saturating or target is None:
        return
    message = (
        f"8-bit weights on 8-bit inputs saturate on x86 without VNNI in: {', '.join(saturating)}. "
        "Give these weights 7 bits (`targets.fit(rules, target)`, or reduce_range=True of "
        "`presets.rules`) and calibrate again; or leave the target out and run ONNX Runtime "
        "through `onnx_session`, which sets session.x64quantprecision=1."
    )
    if target in TARGETS and TARGETS[target].reduce_range:
        raise ValueError(message)
    if target == HOST and is_x86() and not has_vnni():
        warnings.warn(message, stacklevel=3)
