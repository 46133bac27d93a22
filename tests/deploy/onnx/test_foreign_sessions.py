"""Files computed by engines as a user opens them, without this package's session options.

What is right is computed here in float64 from the net's own numbers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import kernel_report, openvino_model, to_onnx
from qkd_jax.deploy.onnx.engines import channels_first
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

TARGETS = (None, "openvino-cpu-vnni", "onnxruntime-x86-vnni")
key = jax.random.key


def on_engines(path, x):
    """A file's results on ONNX Runtime without an option, and on OpenVINO in float32."""
    x, options = channels_first(x), runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {
        "onnxruntime": session.run(None, {"images": x})[0],
        "openvino": compiled([x])[0],
    }


def assert_right(path, x, right, accuracy=1e-5):
    for engine, found in on_engines(path, x).items():
        assert np.abs(found - right).max() <= accuracy * np.abs(right).max(), engine


class Rounded(nn.Module):
    """A ReLU and a sum of one number."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, name="one")(nn.relu(x))


@pytest.mark.parametrize("bits, signed", [(9, False), (12, True), (16, False), (16, True)])
def test_grids_of_more_than_8_bits_are_rounded_and_clipped(tmp_path, bits, signed):
    top = 2 ** (bits - signed) - 1
    step = 2.0 ** -(bits - 1)
    x = np.random.default_rng(bits).uniform(-3, 3, (1024, 1)).astype(np.float32)
    rules = [Rule("one", weight=Spec(8), input=Spec(bits, signed=signed))]
    net, variables = small_nets.calibrated(Rounded(), rules, x)
    variables["params"]["one"]["kernel"] = jnp.ones((1, 1))
    variables["quant"]["one"]["weight_quantizer"]["scale"] = jnp.asarray(1 / 64)
    variables["quant"]["one"]["input_quantizer"]["scale"] = jnp.asarray(step)
    right = np.clip(np.rint(np.maximum(x.astype(np.float64), 0) / step), 0, top) * step
    assert len(np.unique(right)) > 80 and right.max() < x.max()
    # No type of 16 bits is written, which QuantizeLinear has since opset 21.
    for target in TARGETS:
        path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
        for engine, found in on_engines(path, x).items():
            assert np.array_equal(found, right), (target, engine)
        assert onnx.load(path).opset_import[0].version < 21


def test_a_wide_grid_behind_a_layer_keeps_its_relu(tmp_path):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="b")(nn.relu(nn.Dense(16, name="a")(x)))

    weight = Spec(8, granularity="channel")
    rules = [
        Rule("a", weight=weight, input=Spec(16)),
        Rule("b", weight=weight, input=Spec(16, signed=False)),
    ]
    x = jax.random.normal(key(0), (64, 48))
    net, variables = small_nets.calibrated(Two(), rules, x)
    for target in TARGETS:
        path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
        assert_right(path, x, np.asarray(jax.jit(net.apply)(variables, x)), 1e-4)


class Layers(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "dense":
            return nn.Dense(8, name="layer")(x)
        if self.kind == "conv":
            return nn.Conv(8, (1, 1), name="layer")(x)
        return nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="layer")(x)


WEIGHTS = {
    "int8": Spec(8, granularity="channel"),
    "int8 per tensor": Spec(8),
    "uint8 affine": Spec(8, signed=False, symmetric=False, granularity="channel"),
    "int4": Spec(4, granularity="channel"),
    "int12": Spec(12, granularity="channel"),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["dense", "conv", "transposed"])
def test_float_inputs_of_a_quantized_weight_stay_float(tmp_path, kind, weight):
    spec = WEIGHTS[weight]
    x = jax.random.normal(key(0), (32, 49) if kind == "dense" else (4, 3, 3, 49))
    net, variables = small_nets.calibrated(Layers(kind), [Rule("layer", weight=spec)], x)
    kernel = np.asarray(variables["params"]["layer"]["kernel"], np.float64)
    params = variables["quant"]["layer"]["weight_quantizer"]
    scale, zero = (np.asarray(params.get(n, 0), np.float64) for n in ("scale", "zero_point"))
    low, high = (0, 255) if not spec.signed else (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
    hat = (np.clip(np.rint(kernel / scale) + zero, low, high) - zero) * scale
    float64 = np.asarray(x, np.float64)
    bias = np.asarray(variables["params"]["layer"]["bias"], np.float64)
    if kind == "transposed":  # window and stride are equal: each output has one input
        right = np.einsum("bhwi,klio->bhkwlo", float64, hat[::-1, ::-1]).reshape(4, 6, 6, 8) + bias
    else:
        right = float64 @ hat.reshape(-1, 8) + bias
    for target in TARGETS:
        for int4 in (False, True) if spec.bits == 4 else (False,):
            options = {"opset": 21, "int4": True} if int4 else {}
            written = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target, **options)
            assert written.stored["layer"][1] == ("int4" if int4 else spec_storage(spec))
            assert_right(written.path, x, right)


def spec_storage(spec):
    return ("u" if not spec.signed else "") + ("int16" if spec.bits > 8 else "int8")


@pytest.mark.parametrize("inputs", [16, 17, 31, 33])
@pytest.mark.parametrize("grid", [None, Spec(8, signed=False)], ids=["float", "codes"])
def test_int4_of_any_number_of_inputs(tmp_path, inputs, grid):
    x = jax.random.uniform(key(0), (32, inputs))
    rules = [Rule("layer", weight=Spec(4, granularity="channel"), input=grid)]
    net, variables = small_nets.calibrated(Layers("dense"), rules, x)
    right = np.asarray(jax.jit(net.apply)(variables, x))
    for target in TARGETS:
        path = to_onnx(
            net, variables, x, tmp_path / "m.onnx", target=target, int4=True, opset=21
        ).path
        assert_right(path, x, right)


@pytest.mark.parametrize("spec", [Spec(8), Spec(8, symmetric=False, signed=False), Spec(4)])
def test_nets_whose_inputs_are_all_signed_or_affine_run_on_integers(tmp_path, spec):
    x = jax.random.normal(key(0), (32, 64))
    rules = [Rule(".*", weight=Spec(7, granularity="channel"), input=spec)]
    net, variables = small_nets.calibrated(Layers("dense"), rules, x)
    path = to_onnx(net, variables, x, tmp_path / "m.onnx", target="openvino-cpu-vnni").path
    assert_right(path, x, np.asarray(jax.jit(net.apply)(variables, x)))
    assert kernel_report(path, "openvino").share == 1


def test_codes_that_a_slice_moves_do_not_make_inputs_codes(tmp_path):
    """ONNX Runtime takes no codes through a Slice: the layer behind it has float inputs."""

    class Sliced(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(64, name="a")(x))
            return nn.Dense(4, name="b")(x[:, 16:])

    weight = Spec(7, granularity="channel")
    rules = [
        Rule("a", weight=weight, input=Spec(8), output=None),
        Rule("b", weight=weight),
    ]
    x = jax.random.normal(key(0), (32, 48))
    net, variables = small_nets.calibrated(Sliced(), rules, x)
    path = to_onnx(net, variables, x, tmp_path / "m.onnx").path
    assert_right(path, x, np.asarray(jax.jit(net.apply)(variables, x)))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_ranges_on_both_engines(tmp_path, granularity, symmetric):
    spec = Spec(8, dynamic=True, granularity=granularity, symmetric=symmetric, signed=symmetric)
    x = jax.random.normal(key(0), (32, 64))
    rules = [Rule("layer", weight=Spec(7, granularity="channel"), input=spec)]
    net, variables = small_nets.calibrated(Layers("dense"), rules, x)
    path = to_onnx(net, variables, x, tmp_path / "m.onnx").path
    assert_right(path, x, np.asarray(jax.jit(net.apply)(variables, x)))


class Experts(nn.Module):
    """A matrix for each expert, between two grids."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], 2, -1)
        x = nn.Einsum((2, x.shape[-1], 33), "bei,eio->beo", name="experts")(x)
        return nn.Dense(2, name="head")(nn.relu(x).reshape(x.shape[0], -1))


@pytest.mark.parametrize("grid", [None, Spec(8, symmetric=False)], ids=["float", "codes"])
@pytest.mark.parametrize("weight", [*WEIGHTS, None])
def test_a_matrix_for_each_expert(tmp_path, weight, grid):
    weight = None if weight is None else WEIGHTS[weight]
    if weight and grid and weight.bits == 8:
        weight = dataclasses.replace(weight, bits=small_nets.PRODUCT_BITS)
    rules = [
        Rule("experts", weight=weight, input=grid),
        Rule("head", weight=Spec(7), input=Spec(12)),
    ]
    x = jax.random.normal(key(0), (16, 98))
    net, variables = small_nets.calibrated(Experts(), rules, x)
    right = np.asarray(jax.jit(net.apply)(variables, x))
    for target in (None, "openvino-cpu-vnni"):
        path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
        assert_right(path, x, right, 1e-4)  # one code of 12 bits may be another


class Reduced(nn.Module):
    rank: int
    reduce: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3,) * (self.rank - 2), name="conv")(x))
        x = getattr(jnp, self.reduce)(x, tuple(range(1, self.rank - 1)))
        return nn.Dense(4, name="head")(x)


@pytest.mark.parametrize("reduce", ["max", "min", "sum", "mean"])
@pytest.mark.parametrize("rank", [3, 4])
def test_reductions_between_grids(tmp_path, rank, reduce):
    x = jnp.abs(jax.random.normal(key(0), (16, *(8,) * (rank - 2), 2)))
    weight = Spec(small_nets.PRODUCT_BITS, granularity="channel")
    rules = [Rule(".*", weight=weight, input=Spec(8, signed=False))]
    net, variables = small_nets.calibrated(Reduced(rank, reduce), rules, x)
    right = np.asarray(jax.jit(net.apply)(variables, x))
    for target in TARGETS:
        written = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target)
        kept = [
            attribute.i
            for node in onnx.load(written.path).graph.node
            if node.op_type.startswith("Reduce")
            for attribute in node.attribute
            if attribute.name == "keepdims"
        ]
        assert all(kept) and (kept or reduce == "mean")
        # One code of the head's input may differ where an engine adds in another order.
        found = on_engines(written.path, x)["openvino"]
        assert np.abs(found - right).max() < 0.01 * np.abs(right).max()


def test_the_door_to_openvino_leaves_float_inputs_of_other_makers_files(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 64)).astype(np.float32)
    codes = rng.integers(-127, 128, (64, 32)).astype(np.int8)
    scale = np.float32(rng.uniform(1, 2, 32) / 127)
    node = onnx.helper.make_node
    value = lambda name, width: onnx.helper.make_tensor_value_info(name, 1, ["batch", width])
    graph = onnx.helper.make_graph(
        [
            node("DequantizeLinear", ["codes", "scale"], ["w"], axis=1),
            node("MatMul", ["images", "w"], ["y"]),
        ],
        "dense",
        [value("images", 64)],
        [value("y", 32)],
        [onnx.numpy_helper.from_array(a, n) for a, n in ((codes, "codes"), (scale, "scale"))],
    )
    file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    path = tmp_path / "m.onnx"
    onnx.save(file, path)
    right = x.astype(np.float64) @ (codes * scale.astype(np.float64))
    assert np.abs(openvino_model(path)(x)[0] - right).max() < 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("bits, quantizer", [(4, "uniform"), (8, "uniform"), (4, "codebook")])
def test_groups_are_computed_in_float(tmp_path, bits, quantizer):
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    rules = (Rule(".*", weight=Spec(bits, quantizer=quantizer, granularity=32)),)
    net, variables = small_nets.calibrated(nn.Dense(9, use_bias=False), rules, x)
    right = np.asarray(net.apply(variables, x), np.float64)
    for file, options in {"m": {}, "n": {"int4": False}}.items():
        path = to_onnx(net, variables, x, tmp_path / f"{file}.onnx", **options).path
        assert_right(path, x, right)
