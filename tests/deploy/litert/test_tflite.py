"""LiteRT files against the nets that they hold: codes, logits, types, refusals."""

import dataclasses
import json
import pathlib
import random
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax import ptq
from qkd_jax.deploy import (
    Description,
    convert,
    integer_apply,
    litert_report,
    open_tflite,
    read_description,
    tflite_interpreter,
    to_tflite,
)
from qkd_jax.models import create
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets, targets

schema = pytest.importorskip(
    "ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed"
)

ROOT = pathlib.Path(__file__).parents[3]


def net_of(model, rules, images, seed=0):
    """A net with BatchNorm statistics and gains of both signs, calibrated."""
    if isinstance(rules, str):
        rules = presets.rules(rules, model=model, images=images)
        rules = targets.fit(rules, "litert")
    net = qk.quantize(model, rules)
    floats = qk.quantize(model, []).init(jax.random.key(seed), images)
    variables = small_nets.trained_like(floats, seed)
    return net, qk.calibrate(net, variables, [images]) if rules else variables


def differences(net, variables, images, path):
    """Runs the file's captured codes beside those of the net; name -> steps apart, absolute."""
    given = ptq.integer_bias(net, variables, images)
    _, wanted = integer_apply(convert(net, given, images), images, capture=True)
    interpreter = tflite_interpreter(path)
    (detail,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(detail["index"], images.shape, strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], np.asarray(images))
    interpreter.invoke()
    found = {}
    for output in interpreter.get_output_details():
        if output["name"] not in wanted:
            continue
        codes = interpreter.get_tensor(output["index"]).astype(np.int64)
        path, _, operand = output["name"].rpartition("/")
        unsigned = not net.spec_of(path, operand).signed
        own = np.asarray(wanted[output["name"]], np.int64) - (128 if unsigned else 0)
        found[output["name"]] = np.abs(codes - own)
    return found


NETS = {
    "resnet8": dict(width=8),
    "mobilenet": dict(),
    "mobilenet_v2": dict(),
    "mlp": dict(),
    "vit": dict(depth=2, width=16, heads=2),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "resnet8" else pytest.param(name, marks=pytest.mark.slow) for name in NETS],
)
def test_every_code_is_that_of_the_net(tmp_path, name):
    images = np.asarray(jax.random.normal(jax.random.key(1), (4, 16, 16, 3)))
    model = create(name, 5, **NETS[name])
    net, variables = net_of(model, "w8a8:integer", images)
    targets.check(net.rules, "litert")
    path = to_tflite(net, variables, images, tmp_path / "m.tflite", capture=True).path
    found = differences(net, variables, images, path)
    assert len(found) >= 4
    apart = np.concatenate([d.reshape(-1) for d in found.values()])
    assert apart.max() <= 1 and np.mean(apart > 0) <= 2e-4, np.mean(apart > 0)

    written = to_tflite(net, variables, images, path)
    report = litert_report(path)
    if name in ("resnet8", "mobilenet", "mlp"):
        assert report.share == 1 and report.conversions == 2 and not written.floating
        assert not report.own  # XNNPACK takes all of it, and rounds once
    elif name == "mobilenet_v2":  # its last map is no module's output, and has no grid
        assert report.floating == written.floating and len(report.floating) == 2
    assert set(report.integer) == set(written.integer)
    wanted = np.asarray(net.apply(ptq.integer_bias(net, variables, images), images))
    logits = open_tflite(path)(images)[0]
    assert (logits.argmax(-1) == wanted.argmax(-1)).all()


def numbers_of(path):
    """The file's constants: name -> (real numbers, tensor)."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(path.read_bytes()), 0)
    found = {}
    for tensor in model.subgraphs[0].tensors:
        data, grid = model.buffers[tensor.buffer].data, tensor.quantization
        if data is None or grid is None or grid.scale is None or not len(tensor.shape):
            continue
        raw = np.frombuffer(bytes(data), np.uint8)
        if tensor.type == schema.TensorType.INT4:
            nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[: np.prod(tensor.shape)]
            codes = np.where(nibbles > 7, nibbles.astype(int) - 16, nibbles)
        elif tensor.type == schema.TensorType.INT32:
            codes = raw.view(np.int32)
        else:
            codes = raw.view(np.int8)
        codes = codes.reshape(tensor.shape).astype(np.float64)
        along = [1] * codes.ndim
        along[grid.quantizedDimension] = -1
        zero_point = np.resize(grid.zeroPoint, len(grid.scale))
        real = (codes - zero_point.reshape(along)) * np.float64(grid.scale).reshape(along)
        found[tensor.name.decode()] = real, tensor
    return found


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))


NORM_RULES = [
    Rule("conv", weight=Spec(8), input=Spec(8, narrow_range=False)),
    Rule("", output=Spec(8, signed=False)),
]


def test_the_weights_of_a_file_are_those_of_the_net_with_batch_norm_inside(tmp_path):
    images = np.asarray(small_nets.images())
    net, variables = net_of(Norm(), NORM_RULES, images)
    path = to_tflite(net, variables, images, tmp_path / "m.tflite").path
    constants = numbers_of(path)
    kernel, stored = constants["conv/weight_codes"]
    quantizer = variables["quant"]["conv"]["weight_quantizer"]
    step = np.float64(quantizer["scale"])
    codes = np.round(np.float64(variables["params"]["conv"]["kernel"]) / step)
    norm, statistics = variables["params"]["norm"], variables["batch_stats"]["norm"]
    gain = np.float64(norm["scale"]) / np.sqrt(np.float64(statistics["var"]) + 1e-5)
    wanted = (np.clip(codes, -127, 127) * step * gain).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(kernel, wanted, rtol=2e-6)
    assert (np.asarray(stored.quantization.scale) > 0).all() and (gain < 0).any()
    bias, _ = constants["conv/weight_codes_bias"]
    shift = np.float64(norm["bias"]) - np.float64(statistics["mean"]) * gain
    unit = np.float64(stored.quantization.scale) * np.float64(
        variables["quant"]["conv"]["input_quantizer"]["scale"]
    )
    assert np.all(np.abs(bias - shift) <= 0.5001 * unit)


@pytest.mark.parametrize(
    "name", ["mixed", "vit", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)]
)
def test_float_nets_keep_their_numbers_at_any_batch(tmp_path, name):
    if name == "mixed":
        model, images = small_nets.Mixed(), np.asarray(small_nets.images())
    else:
        sizes = dict(depth=1, width=16, heads=2) if name == "vit" else {}
        model = create(name, 5, **sizes)
        images = np.asarray(jax.random.normal(jax.random.key(1), (3, 32, 32, 3)))
    net, variables = net_of(model, [], images)
    written = to_tflite(net, variables, images, tmp_path / "m.tflite")
    assert not written.integer and not written.stored
    wanted = np.asarray(net.apply(variables, images))
    size = np.abs(wanted).max()
    for delegate in (True, False):
        run = open_tflite(written.path, delegate=delegate)
        for batch in (len(images), 1, 2):
            logits = run(images[:batch])[0]
            assert np.abs(logits - wanted[:batch]).max() <= 1e-5 * size


@pytest.mark.parametrize(("bits", "granularity"), [(8, "channel"), (4, 8)])
def test_weights_alone_are_stored_small_and_multiply_in_float(tmp_path, bits, granularity):
    model = create("vit", 5, depth=1, width=16, heads=2)
    images = np.asarray(jax.random.normal(jax.random.key(1), (3, 16, 16, 3)))
    preset = f"int{bits}_weight_only:{granularity}"
    rules = presets.rules(preset, model=model, images=images)
    net, variables = net_of(model, rules, images)
    written = to_tflite(net, variables, images, tmp_path / "m.tflite")
    assert {kind for _, kind in written.stored.values()} == {"int8" if bits == 8 else "int4"}
    wanted = np.asarray(net.apply(variables, images))
    for delegate in (True, False):
        logits = open_tflite(written.path, delegate=delegate)(images)[0]
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()
    unpacked = to_tflite(net, variables, images, tmp_path / "b.tflite", int4=False)
    assert {kind for _, kind in unpacked.stored.values()} == {"int8"}
    assert (unpacked.bytes > written.bytes) == (bits < 8)


@pytest.mark.slow
def test_codes_of_four_bits_on_integer_kernels(tmp_path):
    """Stored as int8 they are 16 times as large, so that biases keep a fine unit."""
    images = np.asarray(jax.random.normal(jax.random.key(1), (4, 16, 16, 3)))
    net, variables = net_of(create("resnet8", 5, width=8), "w4a8:integer", images)
    for int4, kind in ((None, "int8"), (True, "int4")):
        written = to_tflite(net, variables, images, tmp_path / "m.tflite", int4=int4, capture=True)
        kinds = {kind for name, kind in written.stored.values() if name == "int4"}
        assert kinds == {kind} and not written.floating
        if int4 is None:
            found = differences(net, variables, images, written.path)
            first = found["stage1_block0/conv2/input"]  # what the first 4-bit weights write
            assert first.max() <= 1 and np.mean(first > 0) < 1e-2


def wide(spec):
    """A spec of 16 bits in the place of another one."""
    return spec and Spec(16, quantizer="uniform", narrow_range=False)


@pytest.mark.slow
def test_activations_of_16_bits(tmp_path):
    model, images = small_nets.Mixed(), np.asarray(small_nets.images())
    rules = presets.rules("w8a8:integer", model=model, images=images)
    rules = [dataclasses.replace(r, input=wide(r.input), output=wide(r.output)) for r in rules]
    rules = targets.fit(rules, "litert")
    targets.check(rules, "litert")
    net, variables = net_of(model, rules, images)
    path = tmp_path / "m.tflite"
    written = to_tflite(net, variables, images, path, activations="int16")
    assert sum(name.endswith(("/input", "/output")) for name in written.integer) >= 5
    wanted = np.asarray(net.apply(ptq.integer_bias(net, variables, images), images))
    logits = open_tflite(path)(images)[0]
    assert np.abs(logits - wanted).max() <= 2e-4 * np.abs(wanted).max()
    with pytest.raises(ValueError, match=r"activations is 'int8', and .* has codes of int16"):
        to_tflite(net, variables, images, path, activations="int8")


class HardSwish(nn.Module):
    """Hard swish, squeeze and excite, branches that are joined, 1-d and strided convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.hard_swish(nn.Conv(8, (3, 3), (2, 2), name="first")(x))
        gate = x.mean((1, 2), keepdims=True)
        gate = nn.relu(nn.Conv(4, (1, 1), name="squeeze")(gate))
        x = x * nn.hard_sigmoid(nn.Conv(8, (1, 1), name="excite")(gate))
        left = nn.max_pool(x, (2, 2), (1, 1), "SAME")
        right = nn.avg_pool(x, (3, 3), (1, 1), "SAME")
        x = jnp.concatenate([left, jnp.pad(right, ((0, 0),) * 3 + ((0, 2),))], -1)
        x = nn.swish(nn.Conv(8, (3, 3), padding=2, kernel_dilation=(2, 1), name="dilated")(x))
        x = x.reshape(x.shape[0], -1, 8)[:, ::2]
        x = jnp.tanh(nn.Conv(6, (3,), padding="VALID", name="along")(x))
        return nn.log_softmax(nn.Dense(5, name="head")(x.max(1)))


@pytest.mark.parametrize("rules", ["float", "w8a8:integer", "w8a8:static"])
@pytest.mark.slow
def test_a_net_of_other_operations(tmp_path, rules):
    images = np.asarray(jax.random.normal(jax.random.key(2), (3, 11, 12, 3)))
    net, variables = net_of(HardSwish(), rules, images)
    path = to_tflite(net, variables, images, tmp_path / "m.tflite").path
    if rules != "float":
        variables = ptq.integer_bias(net, variables, images)
    wanted = np.asarray(net.apply(variables, images))
    logits = open_tflite(path)(images)[0]
    assert np.abs(logits - wanted).max() <= (1e-5 if rules == "float" else 2e-2)


class Encoder(nn.Module):
    """Attention with a mask, an input of its own, and two results."""

    @nn.compact
    def __call__(self, x, mask):
        seen = nn.MultiHeadDotProductAttention(2, name="attention")(x, x, mask=mask[:, None, None])
        x = nn.LayerNorm(name="norm")(x + seen)
        return nn.Dense(3, name="head")(x[:, 0]), nn.gelu(nn.Dense(5, name="up")(x))


@pytest.mark.parametrize("rules", [[], "w8a8:integer"])
def test_two_inputs_and_two_results_at_any_batch(tmp_path, rules):
    x = np.asarray(jax.random.normal(jax.random.key(1), (4, 6, 8)))
    given = x, np.arange(6) < np.asarray([[6], [4], [2], [1]])
    net = qk.quantize(Encoder(), [])
    variables = small_nets.trained_like(net.init(jax.random.key(0), *given))
    if rules:
        rules = targets.fit(presets.rules(rules, model=Encoder(), images=given), "litert")
        net = qk.quantize(Encoder(), rules)
        variables = qk.calibrate(net, variables, [given])
    path = to_tflite(net, variables, given, tmp_path / "m.tflite").path
    if rules:
        variables = ptq.integer_bias(net, variables, given)
    wanted = net.apply(variables, *given)
    run = open_tflite(path)
    for batch in (4, 1, 3):
        found = run(tuple(a[:batch] for a in given))
        for ours, theirs in zip(wanted, found, strict=True):
            np.testing.assert_allclose(theirs, np.asarray(ours)[:batch], rtol=1e-4, atol=1e-5)


class Lowered(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.lax.lgamma(nn.Dense(2, name="dense")(x))


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Lowered(name="inner")(x)


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (Outer(), None, "to_tflite cannot write 'lgamma' in 'inner'"),
        (nn.Dense(2), Spec(8, dynamic=True, granularity="token"), "finds its range at run time"),
        (nn.Dense(2), Spec(16, symmetric=False), "16 bits and is affine; LiteRT's int16"),
        (nn.Dense(2), Spec(8, quantizer="float"), "grid that is not uniform"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_written(tmp_path, model, spec, message):
    images = np.asarray(jax.random.normal(jax.random.key(0), (4, 3)))
    rules = [Rule(".*", weight=Spec(8), input=spec)] if spec else []
    net, variables = net_of(model, rules, images)
    with pytest.raises(ValueError, match=message):
        to_tflite(net, variables, images, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(tmp_path):
    net, variables = net_of(nn.Dense(2), [], np.ones((2, 3), np.float32))
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match=r"images have dtype float16; a .tflite file takes bool"):
        to_tflite(net, variables, np.ones((2, 3), np.float16), path)
    for name in ("activations", "int4", "integer_io", "capture"):
        with pytest.raises(ValueError, match=f"{name} is 'uint4'"):
            to_tflite(net, variables, np.ones((2, 3), np.float32), path, **{name: "uint4"})


def test_narrow_and_low_bit_activations_are_clipped(tmp_path):
    """LiteRT's kernels clip at the ends of int8 alone."""
    images = 3 * np.asarray(jax.random.normal(jax.random.key(0), (64, 3)))
    for spec in (Spec(4, signed=False, symmetric=False), Spec(8), Spec(5)):
        net, variables = net_of(nn.Dense(4), [Rule("", weight=Spec(8), input=spec)], images[:4])
        written = to_tflite(net, variables, images, tmp_path / "m.tflite")
        assert "MINIMUM" in written.operations or "MAXIMUM" in written.operations
        wanted = np.asarray(net.apply(ptq.integer_bias(net, variables, images), images))
        logits = open_tflite(written.path)(images)[0]
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    images = np.asarray(jax.random.normal(jax.random.key(1), (4, 8, 8, 1)))
    net, variables = net_of(Norm(), NORM_RULES, images)
    folder = tmp_path_factory.mktemp("tflite")
    description = Description((8, 8, 1), (0.0,), (1.0,), tuple("abcde"))
    written = to_tflite(net, variables, images, folder / "m.tflite", description=description)
    codes = to_tflite(net, variables, images, folder / "codes.tflite", integer_io=True)
    return written.path, codes.path, images


ALONE = """
import json, sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
results = []
for path in sys.argv[2:]:
    images = np.load(sys.argv[1])
    interpreter = Interpreter(model_path=path)
    runner = interpreter.get_signature_runner()
    (given,) = interpreter.get_input_details()
    (result,) = interpreter.get_output_details()
    if given["dtype"] == np.int8:
        scale, zero_point = given["quantization"]
        images = np.clip(np.round(images * (1 / np.float32(scale))) + zero_point, -128, 127)
        images = images.astype(np.int8)
    logits = runner(images=images)["logits"]
    if logits.dtype == np.int8:
        scale, zero_point = result["quantization"]
        logits = (logits.astype(np.float32) - zero_point) * np.float32(scale)
    results.append(logits.tolist())
assert not any(name.startswith(("jax", "qkd_jax", "flax")) for name in sys.modules)
print(json.dumps(results))
"""


def test_a_process_without_qkd_jax_reads_the_same_logits(tmp_path, deployed):
    path, codes, images = deployed
    np.save(tmp_path / "images.npy", images)
    files = [str(tmp_path / "images.npy"), str(path), str(codes)]
    command = [sys.executable, "-c", ALONE, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    first, second = json.loads(done.stdout)
    wanted = open_tflite(path)(images)[0]
    assert np.array_equal(np.float32(first), wanted)
    assert np.array_equal(np.float32(second), wanted)


def test_the_description_travels_in_the_file(deployed):
    path, codes, _ = deployed
    assert read_description(path).classes == tuple("abcde")
    with pytest.raises(ValueError, match="does not say how images become its input"):
        read_description(codes)


def test_damaged_files_are_refused_before_the_interpreter_reads_them(tmp_path, deployed):
    """Every one of 1,000 mutations: none has the SHA-256 that it says it has."""
    path, _, images = deployed
    data, rng = path.read_bytes(), random.Random(0)
    changed = tmp_path / "changed.tflite"
    for index in range(1000):
        mutant = bytearray(data)
        kind = index % 4
        at = rng.randrange(len(mutant))
        if kind == 0:
            mutant[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del mutant[at:]
        elif kind == 2:
            mutant[at:at] = rng.randbytes(rng.randrange(1, 40))
        else:
            end = min(at + rng.randrange(1, 64), len(mutant))
            mutant[at:end] = rng.randbytes(end - at)
        if bytes(mutant) == data:
            continue
        changed.write_bytes(mutant)
        for read in (open_tflite, read_description):
            with pytest.raises(ValueError, match="is no file to rely on"):
                read(changed)
    with pytest.raises(ValueError, match="is no file to rely on: it has no seal of to_tflite"):
        foreign = tmp_path / "foreign.tflite"
        foreign.write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(100))
        open_tflite(foreign)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        open_tflite(tmp_path / "none.tflite")
    assert open_tflite(path)(images)[0].shape == (4, 8, 8, 6)
