"""The inference engines: a table of what each accepts, and a check of rules against it.

    rules = fit(rules, "onnxruntime-x86")    # 8-bit weights get 7 bits, for there they saturate
    check(rules, "onnxruntime-x86")          # an error that names the rule and the repair

A target is a name, not this machine: a file may be made here for hardware that is elsewhere. To add
an engine, add an entry to `TARGETS`.

Saturation: x86 processors without VNNI multiply 8-bit integers with an instruction that adds two
products into 16 bits, and the sum saturates where 255 * |code| * 2 > 32767. Logits go wrong
without a word, and accuracy alone does not show it. Weights of 7 bits are safe.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from qkd_jax import checks
from qkd_jax.numerics import Spec, scale_format
from qkd_jax.quantize.rules import Rule
from qkd_jax.quantize.variables import OPERANDS
from qkd_jax.quantizers import code_format, is_uniform


@dataclasses.dataclass(frozen=True)
class Target:
    """The abilities of an inference engine.

    Attributes:
        file: "onnx", "tflite" or "stablehlo".
        weight_bits: widths of weights that a file for it can hold.
        input_bits: widths of activations (inputs and outputs of layers).
        fast: widths of weight and activation below which its products run in float: codes are
            then stored small, and unpacked to float when the file is loaded. An export says so.
        symmetric_weights: zero points of weights must be 0.
        narrow_weights: their lowest code (-128) must be left out.
        symmetric_inputs: those of activations too, and their codes are signed.
        symmetric_above: activations of more bits than this have zero point 0 and signed codes.
        whole_inputs: whether its kernels clip activations at the ends of their type alone, so that
            `fit` gives signed ones their lowest code; a narrower range costs a pass over the codes.
        weight_granularity: "channel" (one scale per output channel), "tensor", "group" (a number of
            neighbours along the sum).
        code_operands: whether operands may be codes of no uniform grid (small floats, codebooks),
            and inputs such floats, or in blocks with dynamic scales of 8 bits (MX, NVFP4):
            products with them run in float.
        any_grid: whether operands may lie on grids that are not uniform (floats, code books) or
            have scales in groups, weights ranges of every call: products with them run in float.
        reduce_range: 8-bit weights are given 7 bits, because full-range ones saturate.
        dynamic: whether other ranges of activations may be dynamic.
        keeps_sum_grids: whether both sides of a sum are rounded to grids of their own. Where not,
            the sum is added inside a convolution's kernel before anything is rounded: rules
            "w8a8:fused" train nets for that. A net with such grids is written so that its sums
            are not fused, which is right and slow.
        integer_bias: biases are added to the sums as int32, in their unit: `to_onnx` rounds them
            beforehand, so that the file is the net that runs (`ptq.integer_bias`).
        folded_activations: what it computes inside a product's kernel; an export says so.
        offset_before_rounding: its QuantizeLinear computes round(x / scale - lowest code): float32
            has fewer digits left there, and one code in 100,000 comes out one off. `to_onnx` writes
            grids whose lowest code is not 0 as Mul, Round and a QuantizeLinear with scale 1.
        quantizes_inputs: in front of a weight behind DequantizeLinear it quantizes float inputs to
            8 bits by itself. `to_onnx` then writes such weights as Cast, and their scale as a Mul
            behind the product.
        opset: of the ONNX file. 20 has Gelu; ONNX Runtime 1.32 refuses some files of opset 21
            whose codes are int8 (its optimizer writes a QuantizeLinear of two types).
        int4: weights of up to 4 bits are stored in 4.
        weights: form of weights with groups, or on no uniform grid, as `to_onnx` takes it.
        packed_bits: widths of codes that its MatMulNBits multiplies by floats faster than floats by
            floats; ONNX Runtime 1.32 has such kernels for 4 bits alone
            (findings/onnxruntime_slow_nbits.sh).
        int2: it reads ONNX's types of 2 bits.
        float4: it reads ONNX's float4e2m1.
        activations: type that holds the codes of activations, as `to_onnx` takes it.
        engine: what runs the file here, or "" where nothing does.
        stays_float: operations that it has no integer kernel for.
        not_made: what such a target needs that cannot be made here.
        sources: where this was read; "measured" where it was run.
    """

    file: str = "onnx"
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    input_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    fast: int = 8
    symmetric_weights: bool = True
    narrow_weights: bool = False
    symmetric_inputs: bool = False
    symmetric_above: int = 16
    whole_inputs: bool = False
    weight_granularity: tuple[str, ...] = ("tensor", "channel")
    code_operands: bool = False
    any_grid: bool = False
    reduce_range: bool = False
    dynamic: bool = False
    keeps_sum_grids: bool = True
    integer_bias: bool = False
    folded_activations: tuple[str, ...] = ("relu",)
    offset_before_rounding: bool = False
    quantizes_inputs: bool = False
    opset: int = 20
    int4: bool = False
    weights: str = "float"
    packed_bits: tuple[int, ...] = ()
    int2: bool = False
    float4: bool = False
    activations: str = "uint8"
    engine: str = ""
    stays_float: tuple[str, ...] = ()
    not_made: str = ""
    sources: tuple[str, ...] = ()


_ORT = Target(
    weight_bits=(1, 2, 3, 4, 5, 6, 7, 8),
    fast=7,
    weight_granularity=("tensor", "channel", "group"),
    code_operands=True,
    integer_bias=True,
    quantizes_inputs=True,
    dynamic=True,
    weights="nbits",
    packed_bits=(4,),
    int2=True,
    engine="onnxruntime",
    stays_float=("Softmax", "LayerNormalization", "Gelu", "convolutions whose output has no grid"),
    sources=(
        "measured: onnxruntime 1.32, CPU",
        "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
    ),
)
_OPENVINO = Target(
    weight_bits=(1, 2, 3, 4, 5, 6, 7, 8),
    fast=7,
    weight_granularity=("tensor", "channel", "group"),
    code_operands=True,
    folded_activations=("relu", "clip", "add"),
    keeps_sum_grids=False,
    offset_before_rounding=True,
    quantizes_inputs=True,
    weights="nbits",
    packed_bits=(2, 4, 8),
    float4=True,
    engine="openvino",
    stays_float=("Softmax", "LayerNormalization", "Gelu"),
    sources=(
        "measured: openvino 2026.4.1, CPU",
        "https://docs.openvino.ai/2024/documentation/openvino-ir-format/"
        "intermediate-representation-int8-inference.html",
    ),
)

TARGETS: dict[str, Target] = {
    # x86 without VNNI. No sum saturates in a file for it, so that others run it as well.
    "onnxruntime-x86": dataclasses.replace(_ORT, reduce_range=True),
    "openvino-cpu": dataclasses.replace(_OPENVINO, reduce_range=True),
    # Processors with VNNI or AMX (flags avx512_vnni, avx_vnni, amx_int8 in /proc/cpuinfo).
    "onnxruntime-x86-vnni": _ORT,
    "openvino-cpu-vnni": _OPENVINO,
    "litert": Target(
        file="tflite",
        # Below 8 bits weights take 4 bits or 8, and activations 8 with a clip of their codes.
        input_bits=(2, 3, 4, 5, 6, 7, 8, 16),
        fast=2,
        integer_bias=True,
        narrow_weights=True,
        symmetric_above=8,
        whole_inputs=True,
        weight_granularity=("tensor", "channel", "group"),
        folded_activations=("relu", "relu6"),
        engine="litert",
        stays_float=(
            "LayerNormalization",
            "Softmax, except onto the grid of scale 1/256 and zero point -128",
            "products of two activations of 8 bits",
            "products and sums whose output has no grid",
        ),
        sources=(
            "measured: ai-edge-litert 2.3.0, CPU, XNNPACK",
            "https://developers.google.com/edge/litert/quantization/quantization_spec",
        ),
    ),
    "tensorrt": Target(
        weight_bits=(8,),
        input_bits=(8,),
        symmetric_inputs=True,
        opset=17,
        activations="int8",
        folded_activations=("relu", "add"),
        stays_float=("Softmax", "LayerNormalization", "Gelu"),
        not_made="the engine plan: build it from the ONNX file on the GPU, with strong typing",
        sources=(
            "read, not run: https://docs.nvidia.com/deeplearning/tensorrt/latest/"
            "inference-library/work-quantized-types.html",
            "read, not run: https://docs.nvidia.com/deeplearning/tensorrt/latest/"
            "inference-library/quantized-types-explicit-quantization.html",
        ),
    ),
    "xla": Target(
        file="stablehlo",
        weight_bits=tuple(range(1, 17)),
        input_bits=tuple(range(1, 17)),
        fast=1,
        symmetric_weights=False,
        any_grid=True,
        dynamic=True,
        folded_activations=(),
        engine="xla",
        # XLA refuses integer convolutions on CUDA unless both operands are int8.
        stays_float=(
            "everything between products",
            "on CUDA and TPU, products whose codes do not fit int8 (held exactly)",
        ),
        sources=("measured: jax 0.10 on CPU; lowered, not run, for cuda and tpu",),
    ),
}


def fit(rules: Iterable[Rule], target: str) -> tuple[Rule, ...]:
    """Returns rules with the ranges that a target needs.

    8-bit weights that would saturate get 7 bits; weights lose their lowest code, activations become
    signed and symmetric, or get it back, where the target wants that. Widths are never raised:
    `check` names those that the target does not take.

    Raises:
        ValueError: an unknown target.
    """
    takes, rules = lookup(target), tuple(rules)
    reduced = takes.reduce_range and _on_codes(rules)

    def fitted(operand: str, spec: Spec) -> Spec:
        changes: dict[str, Any] = {}
        if operand == "weight":
            if reduced and spec.bits == 8:
                changes["bits"] = 7
            if takes.narrow_weights and spec.signed and spec.symmetric:
                changes["narrow_range"] = True
        elif spec.bits in takes.input_bits:
            if takes.symmetric_inputs or spec.bits > takes.symmetric_above:
                changes.update(signed=True, symmetric=True)
            if takes.whole_inputs and (changes or (spec.signed and spec.symmetric)):
                changes["narrow_range"] = False
        return dataclasses.replace(spec, **changes)

    def specs(rule: Rule) -> dict[str, Any]:
        given = {operand: getattr(rule, operand) for operand in OPERANDS}
        return {operand: spec and fitted(operand, spec) for operand, spec in given.items()}

    return tuple(dataclasses.replace(rule, **specs(rule)) for rule in rules)


def check(rules: Iterable[Rule], target: str) -> None:
    """Checks that a target can run nets with these rules.

    Args:
        rules: of a net.
        target: a key of TARGETS.

    Raises:
        ValueError: naming the rule, what the engine takes, and the repair.
    """
    takes, rules = lookup(target), tuple(rules)
    if not _on_codes(rules):
        takes = dataclasses.replace(takes, reduce_range=False)
    for index, rule in enumerate(rules):
        for operand in OPERANDS:
            spec = getattr(rule, operand)
            if spec is None:
                continue
            where = f"rules[{index}] ({rule.pattern!r}).{operand}"
            _check_spec(where, operand, spec, takes, target)


def lookup(target: str) -> Target:
    """Returns a target by name."""
    if target not in TARGETS:
        raise checks.unknown("target", target, TARGETS)
    return TARGETS[target]


def file_options(target: str) -> Mapping[str, Any]:
    """Returns the options of `to_onnx` that a target wants."""
    takes = lookup(target)
    names = ("opset", "int4", "activations", "weights")
    return {name: getattr(takes, name) for name in names}


def _on_codes(rules: tuple[Rule, ...]) -> bool:
    """Whether any product has activations on a grid; weights alone on one are read as floats."""
    return any(rule.input or rule.output or rule.other for rule in rules)


def _check_spec(where: str, operand: str, spec: Spec, takes: Target, target: str) -> None:
    weight = operand == "weight"
    grouped = weight and isinstance(spec.granularity, int) and "group" in takes.weight_granularity
    allowed = takes.weight_bits if weight else takes.input_bits
    rounded = takes.code_operands and scale_format(spec) in ("e8m0", "e4m3fn")
    known_only = weight or not (takes.dynamic or rounded)
    if not is_uniform(spec) and not takes.any_grid:
        if takes.code_operands and not (known_only and spec.dynamic):
            return
        nearest = min(allowed, key=lambda bits: (abs(bits - spec.bits), -bits))
        raise ValueError(
            f"{where} has quantizer {spec.quantizer!r}, whose grid is not uniform; {target} "
            f"computes with integer codes and one scale. The nearest that it takes is 'lsq' or "
            f"'uniform' with {nearest} bits."
        )
    if spec.bits not in allowed:
        listed = ", ".join(map(str, allowed))
        nearest = min(allowed, key=lambda bits: (abs(bits - spec.bits), -bits))
        raise ValueError(
            f"{where} has {spec.bits} bits; {target} takes {listed}. The nearest is {nearest}."
        )
    if takes.any_grid:
        return
    if known_only and spec.dynamic:
        raise ValueError(
            f"{where} finds its range at run time (dynamic=True); a file for {target} has "
            f"{'weights' if weight else 'ranges'} that are known beforehand. Use dynamic=False and "
            "calibrate."
        )
    if not weight and isinstance(spec.granularity, int) and not rounded:
        raise ValueError(
            f"{where} has blocks of {spec.granularity}, each with a scale of its own; {target} "
            "scales sums once. Use granularity='tensor' or 'token'."
        )
    if weight and not grouped and spec.granularity not in takes.weight_granularity:
        raise ValueError(
            f"{where} has granularity {spec.granularity!r}; {target} takes "
            f"{' or '.join(map(repr, takes.weight_granularity))}. Use 'channel'."
        )
    if weight and not grouped and takes.symmetric_weights and not (spec.symmetric and spec.signed):
        raise ValueError(
            f"{where} is {'unsigned' if spec.symmetric else 'affine'}; {target} takes weights "
            "with zero point 0 alone. Use signed=True, symmetric=True."
        )
    if weight and takes.narrow_weights and not code_format(spec).narrow_range:
        raise ValueError(
            f"{where} has narrow_range=False; {target} takes weights without the lowest code. Use "
            "narrow_range=True."
        )
    centred = takes.symmetric_inputs or spec.bits > takes.symmetric_above
    if not weight and centred and not (spec.symmetric and spec.signed):
        wide = "" if takes.symmetric_inputs else f" of {spec.bits} bits"
        raise ValueError(
            f"{where} is {'unsigned' if spec.symmetric else 'affine'}; {target} takes signed "
            f"activations{wide} with zero point 0 alone. Use signed=True, symmetric=True."
        )
    if weight and takes.reduce_range and spec.bits == 8:
        raise ValueError(
            f"{where} has 8 bits, whose sums saturate on {target} (x86 without VNNI): logits go "
            "wrong there and accuracy may not show it. Use 7 bits (`targets.fit`, or the net's "
            f"reduce_range=true), or the target {target}-vnni for processors that have VNNI."
        )
