"""The table of formats and engines in the pages says of each what `targets.check` does."""

import dataclasses
import pathlib

import pytest

from qkd_jax.numerics import Spec
from qkd_jax.quantize import presets, targets
from qkd_jax.quantize.rules import Rule

PAGE = pathlib.Path(__file__).parents[2] / "docs/deployment.md"
ENGINES = {
    "XLA": "xla",
    "ONNX Runtime": "onnxruntime-x86-vnni",
    "OpenVINO": "openvino-cpu-vnni",
    "LiteRT": "litert",
    "TensorRT": "tensorrt",
}
AFFINE = Spec(8, signed=False, symmetric=False)


def inner(weight, given=None):
    return (Rule(".*", weight=weight, input=given),)


def weights_of(name):
    return [dataclasses.replace(rule, input=None) for rule in presets.rules(name)]


def group(bits, **fields):
    return inner(Spec(bits, granularity=32, **fields))


FORMATS = {
    "W8A8": [inner(Spec(8, granularity="channel"), AFFINE)],
    "W8A8, dynamic ranges": [presets.rules("dynamic")],
    "W8A16": [inner(Spec(8, granularity="channel"), Spec(16))],
    "W4A8": [inner(Spec(4, granularity="channel"), AFFINE)],
    "W4A4, W3A3, W2A2": [presets.rules(name) for name in ("w4a4", "w3a3", "w2a2")],
    "ternary, 8-bit inputs": [inner(Spec(2, quantizer="ternary"), AFFINE)],
    "binary, 8-bit inputs": [inner(Spec(1, quantizer="binary"), AFFINE)],
    "int8 weights": [presets.rules("int8_weight_only")],
    "int8 groups": [presets.rules("int8_weight_only:32")],
    "int4 groups": [presets.rules("int4_weight_only")],
    "int4 groups with zero points": [group(4, signed=False, symmetric=False)],
    "int3 groups": [presets.rules("int3_weight_only:32")],
    "int2 groups": [presets.rules("int2_weight_only:32")],
    "NF4, other code books": [presets.rules("nf4"), group(3, quantizer="codebook")],
    "APoT": [inner(Spec(4, quantizer="apot"))],
    "fp8, weights and inputs": [presets.rules("fp8")],
    "fp6, fp4 groups": [group(bits, quantizer="float") for bits in (6, 4)],
    "MXINT8 weights": [weights_of("mxint8")],
    "MXFP8, MXFP6, MXFP4 weights": [weights_of(name) for name in ("mxfp8", "mxfp6", "mxfp4")],
    "NVFP4 weights": [weights_of("nvfp4")],
    "MX and NVFP4, inputs too": [
        presets.rules(name) for name in ("mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4")
    ],
}


def rows():
    """{format: {engine: what the page says}}."""
    _, _, section = PAGE.read_text().partition("## Formats and engines\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    header, _, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[2:], row[2:], strict=True)) for row in rest}


def takes(rules, target):
    try:
        targets.check(targets.fit(rules, target), target)
    except ValueError:
        return False
    return True


def test_the_page_has_every_format_and_engine():
    assert list(rows()) == list(FORMATS)
    assert all(list(row) == list(ENGINES) for row in rows().values())


@pytest.mark.parametrize("name", FORMATS)
def test_the_page_says_what_each_target_takes(name):
    said = {engine: cell != "-" for engine, cell in rows()[name].items()}
    for rules in FORMATS[name]:
        assert {engine: takes(rules, target) for engine, target in ENGINES.items()} == said
