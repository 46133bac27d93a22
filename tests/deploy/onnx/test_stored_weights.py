"""Weights with groups, or on no uniform grid, in the files of ONNX Runtime and OpenVINO.

What is right is the fake-quantized net in JAX, and codes as `stored_tensor` takes them off a grid.
"""

import dataclasses
import functools
import math
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax.deploy import has_vnni, kernel_report, open_onnx, save, to_onnx, to_openvino
from qkd_jax.deploy.onnx.stored_weight import laid_out
from qkd_jax.numerics import FLOAT_FORMATS, IntFormat, Spec
from qkd_jax.numerics.scale_formats import SCALE_BITS
from qkd_jax.quantize import Rule
from qkd_jax.quantize.stored_tensor import stored_tensor
from qkd_jax.quantize.traced import contractions, trace_net

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ORT, OPENVINO = "onnxruntime-x86-vnni", "openvino-cpu-vnni"
ENGINES = {ORT: "onnxruntime", OPENVINO: "openvino"}
group = functools.partial(Spec, granularity=32)
FORMATS = {
    "int2": group(2),
    "int3": group(3),
    "int4": group(4),
    "int4 affine": group(4, signed=False, symmetric=False),
    "int8": group(8),
    "nf4": group(4, quantizer="codebook"),
    "float4": group(4, quantizer="float"),
    "float6": group(6, quantizer="float"),
    "float8": Spec(8, quantizer="float", granularity="channel"),
    "e5m2": group(8, quantizer="float", options={"format": "e5m2"}),
    "mxfp4": group(4, quantizer="float", options={"scale_format": "e8m0"}),
    "mxfp8": group(8, quantizer="float", options={"scale_format": "e8m0"}),
    "mxint8": group(8, options={"scale_format": "e8m0"}),
    "nvfp4": Spec(4, quantizer="float", granularity=16, options={"scale_format": "e4m3fn"}),
    "half scales": group(4, options={"scale_format": "float16"}),
}
WIDER = ("int3", "float6")  # ONNX holds these in 4 and 8 bits
# Bits that the engine's kernels read without unpacking them, or None: float weights in memory.
INT4 = dict.fromkeys(("int3", "int4", "int4 affine", "half scales"), 4)
FLOAT4 = dict.fromkeys(("float4", "mxfp4", "nvfp4"), 4)
PACKED = {ORT: INT4, OPENVINO: INT4 | FLOAT4 | {"int2": 2, "int8": 8, "mxint8": 8}}


class Dense(nn.Module):
    """Dense layers with and without a bias, whose numbers of outputs divide by nothing much."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(96, name="first")(x))
        x = nn.gelu(nn.Dense(64, use_bias=False, name="second")(x))
        return nn.Dense(9, name="head")(x)


class Convolutions(nn.Module):
    """Convolutions, a transposed one, and a dense layer that reads a flattened map."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
        x = nn.relu(nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="second")(x))
        x = nn.max_pool(x, (4, 4), (4, 4))
        return nn.Dense(9, name="head")(x.reshape(x.shape[0], -1))


class Attention(nn.Module):
    """One block of attention, whose output layer sums over two axes of its kernel."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(9, name="head")(x.mean(1))


MODELS = {
    "dense": (Dense(), (64,)),
    "conv": (Convolutions(), (8, 8, 16)),
    "attention": (Attention(), (5, 32)),
}


class Lookup(nn.Module):
    """A table that is looked up and, transposed, the last layer."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(50, 32, name="first")
        return table.attend(nn.Dense(32, name="second")(table(tokens)).mean(1))


def some(names, *fast):
    """Formats as parameters of a test, those that are not fast marked slow."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@functools.lru_cache
def case(model, name, count=1000, **options):
    """Returns (net, variables, inputs, logits in JAX) of a model with all weights in a format."""
    model, shape = MODELS[model]
    inputs = np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)
    spec = dataclasses.replace(FORMATS[name], **options)
    net, variables = small_nets.calibrated(model, (Rule(".*", weight=spec),), inputs[:4])
    return net, variables, inputs, np.asarray(jax.jit(net.apply)(variables, inputs))


def agrees(path, engine, inputs, logits):
    """Checks that an engine's logits are those of JAX but for float rounding."""
    found = open_onnx(path, engine)(inputs)[0]
    assert np.abs(found - logits).max() <= 2e-6 * np.abs(logits).max()
    assert np.array_equal(found.argmax(-1), logits.argmax(-1))


def trained(net, variables, inputs):
    """Returns {layer: StoredTensor} of the net."""
    traced = trace_net(net, variables, inputs[:2])
    weights = [product.weight.marker for product in contractions(traced.graph)]
    return {marker.params["path"]: stored_tensor(traced, marker) for marker in weights}


def codes_in(path, layer, tensor):
    """Reads the codes of a dense layer from a file, [inputs, outputs], as the net has them."""
    model = onnx.load(path)
    (stored,) = (i for i in model.graph.initializer if i.name == f"{layer}/weight")
    array = onnx.numpy_helper.to_array(stored)
    node = next(n for n in model.graph.node if stored.name in n.input)
    if node.op_type != "MatMulNBits":
        if array.dtype.kind not in "iu" and array.dtype.name.startswith("float"):
            bits = array.view(np.uint8)
            return bits.reshape(tensor.codes.shape).astype(np.int32)
        return array.astype(np.int32).reshape(tensor.codes.shape)
    width = next(a.i for a in node.attribute if a.name == "bits")
    parts = [(array >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    codes = np.stack(parts, -1).reshape(len(array), -1).T.astype(np.int32)
    return codes - (2 ** (width - 1) if tensor.format.signed else 0)


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("name", some(FORMATS, "int2", "int4 affine", "float4"))
def test_files_hold_the_codes_and_engines_compute_the_logits(tmp_path, name, target):
    net, variables, inputs, logits = case("dense", name)
    written = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", target=target)
    assert written.rounded_inputs == ()
    agrees(written.path, ENGINES[target], inputs, logits)
    for layer, tensor in trained(net, variables, inputs).items():
        assert written.stored[layer][0] == tensor.format.name
        if name != "float6":  # held in float8, as values: its bit patterns are others
            assert np.array_equal(codes_in(written.path, layer, tensor), tensor.codes)
    report, bits = kernel_report(written.path, ENGINES[target]), PACKED[target].get(name)
    assert report.integer == () and len(report.floating) + len(report.packed) == 3
    if has_vnni():  # what was measured; OpenVINO on older processors may unpack more
        assert set(report.packed.values()) == ({bits} if bits else set())


@pytest.mark.parametrize("name", some(FORMATS, "int4 affine"))
def test_files_without_a_target_are_right_on_both_engines(tmp_path, name):
    net, variables, inputs, logits = case("dense", name)
    for weights in (None, "blocks", "nbits"):
        written = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", weights=weights)
        for engine in ENGINES.values():
            agrees(written.path, engine, inputs, logits)


@pytest.mark.parametrize("name", some(FORMATS, "int4 affine"))
def test_convolutions(tmp_path, name):
    size = {} if name == "float8" else {"granularity": 4}
    net, variables, inputs, logits = case("conv", name, 200, **size)
    for target, engine in ENGINES.items():
        written = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", target=target)
        agrees(written.path, engine, inputs, logits)


@pytest.mark.parametrize("name", some(["int4", "nf4"]))
def test_attention(tmp_path, name):
    net, variables, inputs, logits = case("attention", name, granularity=8)
    for target, engine in ENGINES.items():
        written = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", target=target)
        agrees(written.path, engine, inputs, logits)


@pytest.mark.parametrize("name", some(["int4", "nf4", "float8"], "nf4"))
def test_tables_that_are_looked_up(tmp_path, name):
    tokens = np.random.default_rng(1).integers(0, 50, (200, 5)).astype(np.int32)
    spec = dataclasses.replace(FORMATS[name], granularity="channel")
    net, variables = small_nets.calibrated(Lookup(), (Rule(".*", weight=spec),), tokens)
    logits = np.asarray(jax.jit(net.apply)(variables, tokens))
    for target, engine in ENGINES.items():
        written = to_onnx(net, variables, tokens[:2], tmp_path / "m.onnx", target=target)
        agrees(written.path, engine, tokens, logits)
        stored = onnx.load(written.path).graph.initializer
        assert not any(list(i.dims) == [50, 32] and i.data_type == 1 for i in stored)


@pytest.mark.parametrize("format", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_activations_in_floats_are_written_out(tmp_path, format):
    """The values of a format, the middles between them, and their neighbours are rounded alike."""
    spec = Spec(FLOAT_FORMATS[format].bits, quantizer="float", options={"format": format})
    values = FLOAT_FORMATS[format].values().astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    exact = np.concatenate([values, middles, values * 2, values / 3])
    near = [np.nextafter(exact, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.stack([*near, exact, exact * 0], 1)
    net, variables = small_nets.calibrated(nn.Dense(4), (Rule(".*", input=spec),), x)
    layer = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    quant = jax.tree.map(lambda scale: jnp.full_like(scale, 0.25), variables["quant"])
    variables = {**variables, "params": layer, "quant": quant}
    right = np.asarray(jax.jit(net.apply)(variables, x / 4))
    for target, engine in ENGINES.items():
        path = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target).path
        assert np.array_equal(open_onnx(path, engine)(x / 4)[0], right)


@pytest.mark.parametrize("name", some(["mxfp4", "mxfp8", "mxint8", "nvfp4"], "mxfp4", "nvfp4"))
def test_inputs_in_blocks_are_written_out(tmp_path, name):
    x = np.random.default_rng(1).normal(size=(1000, 64)).astype(np.float32)
    x *= 2 ** np.random.default_rng(2).uniform(-9, 9, (1000, 1)).astype(np.float32)
    x[5, :32], x[6] = 0, 0  # a block without a value, and a row
    weight = FORMATS[name]
    rule = Rule(".*", weight=weight, input=dataclasses.replace(weight, dynamic=True))
    net, variables = small_nets.calibrated(Dense(), (rule,), x[:40])
    logits = np.asarray(jax.jit(net.apply)(variables, x))
    for target, engine in ENGINES.items():
        path = to_onnx(net, variables, x[:2], tmp_path / "m.onnx", target=target).path
        found = open_onnx(path, engine)(x)[0]
        # GELU's last bits move some value over a border between two codes; rows in units of theirs.
        assert np.quantile(np.abs(found - logits).max(1) / np.abs(logits).max(1), 0.95) < 1e-6
        assert (found.argmax(-1) == logits.argmax(-1)).mean() > 0.998


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 23, 25])
@pytest.mark.parametrize("name", some(["int2", "nf4", "float4", "float8"], "int2"))
def test_any_opset_holds_any_format(tmp_path, name, opset):
    net, variables, inputs, logits = case("dense", name)
    written = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", opset=opset)
    agrees(written.path, "onnxruntime", inputs, logits)
    types = {dtype for _, dtype in written.stored.values()}
    assert any("8" in t for t in types) == (opset < 21 or name == "float8")
    assert any("int2" in t for t in types) == (opset == 25 and name == "int2")


@pytest.mark.parametrize("name", some(FORMATS, "int2", "nf4"))
def test_openvino_files(tmp_path, name):
    net, variables, inputs, logits = case("dense", name)
    written = to_openvino(net, variables, inputs[:2], tmp_path / "m.xml", target=OPENVINO)
    agrees(written.path, "openvino", inputs, logits)
    bits = {"nf4": 4}.get(name, PACKED[OPENVINO].get(name))
    report = kernel_report(written.path, "openvino")
    if has_vnni():
        assert sorted(report.packed.values()) == ([bits] * 3 if bits else [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == written.bytes
    # The codes stand in the .bin as they are: those of the first layer, by output or by input.
    codes = trained(net, variables, inputs)["first"].codes
    held = (tmp_path / "m.bin").read_bytes()
    width = 8 if bits is None else bits
    integers = isinstance(FORMATS[name].format, IntFormat) and FORMATS[name].quantizer == "uniform"
    shift = 2 ** (width - 1) if integers and "affine" not in name else 0
    if name == "float6":
        return  # held in float8, as values
    layouts = [c.reshape(-1) + shift for c in (codes.T, codes)]
    packed = [sum(c[i :: 8 // width] << (width * i) for i in range(8 // width)) for c in layouts]
    assert any(p.astype(np.uint8).tobytes() in held for p in packed)


def test_rounded_inputs_are_an_option_that_is_stated(tmp_path):
    net, variables, inputs, logits = case("dense", "int4")
    written = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", weights="nbits_int8")
    made = to_openvino(net, variables, inputs[:2], tmp_path / "m.xml", weights="nbits_int8")
    for file, engine in ((written, "onnxruntime"), (made, "openvino")):
        assert file.rounded_inputs == ("first", "second", "head")
        away = np.abs(open_onnx(file.path, engine)(inputs)[0] - logits).max()
        assert 1e-4 < away / np.abs(logits).max() < 0.03
        assert kernel_report(file.path, engine).share == 1 or not has_vnni()


def test_scales_per_channel_can_be_packed_by_name(tmp_path):
    net, variables, inputs, logits = case("dense", "int4", granularity="channel")
    kept = to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", target=ORT)
    assert "MatMulNBits" not in kept.operations
    written = to_onnx(net, variables, inputs[:2], tmp_path / "n.onnx", target=ORT, weights="nbits")
    assert written.operations["MatMulNBits"] == 3
    agrees(written.path, "onnxruntime", inputs, logits)


@pytest.mark.parametrize("name", some([n for n in FORMATS if n not in WIDER], "int4"))
def test_files_are_as_small_as_the_codes(tmp_path, name):
    x = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    net, variables = small_nets.calibrated(nn.Dense(512), (Rule(".*", weight=FORMATS[name]),), x)
    (tensor,) = trained(net, variables, x).values()
    each = SCALE_BITS[tensor.scale_format] // 8
    size = math.ceil(tensor.codes.size * tensor.format.bits / 8) + each * tensor.scale.size
    size += 4 * 512
    save(qk.convert(net, variables, x), tmp_path / "own")
    own = (tmp_path / "own/model.safetensors").stat().st_size
    for target in ENGINES:
        written = to_onnx(net, variables, x, tmp_path / "m.onnx", target=target)
        assert written.bytes <= 1.05 * min(size, own)
    assert (
        to_openvino(net, variables, x, tmp_path / "m.xml").bytes <= 1.05 * min(size, own) + 10_000
    )


READER = """
import sys
import numpy as np
sys.modules["openvino_telemetry"] = None
import onnxruntime
import openvino
x, logits = np.load("x.npy"), {}
for path in sys.argv[1:]:
    if not path.endswith("target.onnx"):
        f32 = {"INFERENCE_PRECISION_HINT": "f32"}
        logits[f"{path} openvino"] = openvino.Core().compile_model(path, "CPU", f32)([x])[0]
    if path.endswith(".onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        logits[path] = session.run(None, {"images": x})[0]
assert not any(name.partition(".")[0] in ("qkd_jax", "jax") for name in sys.modules)
np.savez("logits.npz", **logits)
"""


@pytest.mark.parametrize(
    "names", [("int4",), pytest.param(tuple(FORMATS), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_a_process_without_this_package_computes_the_logits(tmp_path, names):
    """Sessions with no option of ours, but for OpenVINO's hint, which is of the processor."""
    expected = {}
    for name in names:
        net, variables, inputs, logits = case("dense", name)
        for label, options in {"target": {"target": ORT}, "plain": {}}.items():
            file = tmp_path / f"{name} {label}.onnx"
            expected[to_onnx(net, variables, inputs[:2], file, **options).path.name] = logits
        file = tmp_path / f"{name}.xml"
        expected[to_openvino(net, variables, inputs[:2], file).path.name] = logits
    np.save(tmp_path / "x.npy", inputs)
    subprocess.run([sys.executable, "-I", "-c", READER, *expected], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "logits.npz")
    assert len(found) == 4 * len(names)
    for read, computed in found.items():
        logits = expected[read.removesuffix(" openvino")]
        assert np.abs(computed - logits).max() <= 2e-6 * np.abs(logits).max(), read
        assert np.array_equal(computed.argmax(-1), logits.argmax(-1)), read


def test_a_layout_keeps_the_values():
    net, variables, inputs, _ = case("conv", "int4 affine", 200, granularity=4)
    for tensor in trained(net, variables, inputs).values():
        values = tensor.values()
        places = np.arange(values.size).reshape(values.shape)
        flipped = np.flip(places, tuple(range(places.ndim)))
        for laid in (places, np.moveaxis(places, -1, 0), flipped):
            array = laid_out(tensor, laid)
            repeated = [array.scale, array.zero_point]
            for axis, block in enumerate(array.blocks):
                repeated = [np.repeat(a, block, axis) for a in repeated]
            found = (array.codes - repeated[1]).astype(np.float32) * repeated[0]
            assert np.array_equal(found, values.reshape(-1)[laid])
            assert 4 in array.blocks and array.scale.size == tensor.scale.size


def test_a_group_that_a_permutation_breaks_is_still_right():
    net, variables, inputs, _ = case("dense", "int4")
    tensor = trained(net, variables, inputs)["first"]
    order = np.random.default_rng(3).permutation(64)
    laid = laid_out(tensor, np.arange(tensor.codes.size).reshape(64, 96)[order])
    assert laid.blocks == (1, 1)
    assert np.array_equal(laid.codes.astype(np.float32) * laid.scale, tensor.values()[order])


@pytest.mark.parametrize("granularity", ["channel", 32])
def test_zero_points_beyond_the_codes(tmp_path, granularity):
    """No quantizer here makes them; packed into few bits they would run into their neighbours."""
    net, variables, inputs, _ = case("dense", "int4 affine", granularity=granularity)
    add = lambda path, leaf: leaf + 300 * (path[-1].key == "zero_point")
    quant = jax.tree_util.tree_map_with_path(add, variables["quant"])
    for write in (qk.convert, functools.partial(to_onnx, path=tmp_path / "m.onnx")):
        with pytest.raises(ValueError, match=r"zero points from 30. to 31., and its codes"):
            write(net, {**variables, "quant": quant}, inputs[:2])


def test_what_is_no_option_is_refused(tmp_path):
    net, variables, inputs, _ = case("dense", "int4")
    with pytest.raises(ValueError, match="weights is 'int4'"):
        to_onnx(net, variables, inputs[:2], tmp_path / "m.onnx", weights="int4")
    with pytest.raises(ValueError, match=r"path is '.*m.onnx'; an OpenVINO file ends in .xml"):
        to_openvino(net, variables, inputs[:2], tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="target is 'xla'"):
        to_openvino(net, variables, inputs[:2], tmp_path / "m.xml", target="xla")
    assert not any(tmp_path.iterdir())
