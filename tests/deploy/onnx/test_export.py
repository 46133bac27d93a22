"""ONNX files: valid, without needless nodes, and the same logits on ONNX Runtime."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import has_vnni, onnx_session, to_onnx
from qkd_jax.models import MODELS
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def run(path, images):
    images = np.asarray(images)
    return onnx_session(path).run(
        None, {"images": np.moveaxis(images, -1, 1) if images.ndim > 3 else images}
    )[0]


def compare(net, variables, images, path, **options):
    """Exports; returns the file, the largest difference over the largest logit, the agreement."""
    written = to_onnx(net, variables, images[:2], path, **options)
    wanted = np.asarray(jax.jit(net.apply)(variables, images))
    found = run(path, images)
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    return written, difference, float((found.argmax(-1) == wanted.argmax(-1)).mean())


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_float_net_with_any_batch_size(tmp_path, opset):
    images = small_nets.images(7)
    net, variables = small_nets.float_net(small_nets.Mixed(), images)
    written, difference, _ = compare(net, variables, images, tmp_path / "m.onnx", opset=opset)
    assert difference < 1e-5
    assert "Transpose" not in written.operations and "Gather" not in written.operations
    assert written.operations["Conv"] == 4 and written.operations["Gemm"] == 2
    model = onnx.load(written.path)
    (given,), (result,) = model.graph.input, model.graph.output
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == [
        "batch",
        3,
        9,
        11,
    ]
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == ["batch", 5]
    assert model.opset_import[0].version == opset


@pytest.mark.parametrize("case", small_nets.ONE_FAST)
def test_quantized_net(tmp_path, case):
    net, variables, images = small_nets.case(case)
    path = tmp_path / "m.onnx"
    written, difference, agreement = compare(net, variables, images, path)
    assert agreement == 1
    # At 8 bits the engine rounds biases and sums; below, no code is near enough to a border.
    assert difference < (0.02 if case == "w8a8" else 1e-5)
    assert "Transpose" not in written.operations
    model = onnx.load(path)
    stored = {i.name: i for i in model.graph.initializer}
    weights = [stored[n.input[0]] for n in model.graph.node if n.input and n.input[0] in stored]
    assert len(weights) == 6 and all(w.data_type == onnx.TensorProto.INT8 for w in weights)
    # Bounds and scales of a whole tensor are scalars: engines of other makers insist on it.
    for node in model.graph.node:
        scalars = {"Clip": node.input[1:], "QuantizeLinear": node.input[1:]}.get(node.op_type, ())
        assert all(list(stored[name].dims) == [] for name in scalars)
    kernels = sum(v["kernel"].size for v in variables["params"].values() if "kernel" in v)
    assert sum(len(w.raw_data) for w in weights) == kernels


@pytest.mark.slow
def test_resnet_has_no_transpose_and_a_small_file(tmp_path):
    images = jax.random.normal(jax.random.key(2), (32, 8, 8, 3))
    model = MODELS["resnet8"](num_classes=10, width=16, shortcut="pad")
    float_file, difference, _ = compare(
        *small_nets.float_net(model, images), images, tmp_path / "f.onnx"
    )
    assert difference < 1e-5
    assert set(float_file.operations) == {
        "Conv", "Relu", "Add", "Slice", "Pad", "GlobalAveragePool", "Squeeze", "Gemm",
    }  # fmt: skip
    net, variables = small_nets.calibrated(model, small_nets.rules(8, 8), images)
    written, difference, agreement = compare(net, variables, images, tmp_path / "q.onnx")
    assert agreement == 1 and difference < 0.02
    assert "Transpose" not in written.operations
    assert written.bytes < 0.40 * float_file.bytes


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


def test_negative_gain_with_the_lowest_code(tmp_path):
    """-128 has no negative in int8: the sign then stays outside, as a Mul."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(True, name="bn")(nn.Conv(3, (1, 1), name="conv")(x))
            return nn.Dense(4, name="head")(x.mean((1, 2)))

    wide = Spec(8, narrow_range=False, granularity="channel")
    rules = [Rule("conv", weight=wide, input=Spec(8)), Rule("head", weight=wide, input=Spec(8))]
    images = small_nets.images(16)
    net, variables = small_nets.calibrated(Net(), rules, images)
    kernel = variables["params"]["conv"]["kernel"]
    lean = -jnp.abs(kernel) / jnp.abs(kernel).max()
    variables["params"]["conv"]["kernel"] = lean
    variables["quant"]["conv"]["weight_quantizer"]["scale"] = (
        jnp.abs(lean).max((0, 1, 2), keepdims=True) / 128
    )
    written, difference, _ = compare(net, variables, images, tmp_path / "m.onnx")
    assert written.operations["Mul"] == 1
    assert difference < 0.02


def test_flatten_permutes_the_rows_of_the_dense_weight(tmp_path):
    images = small_nets.images(8)
    for rules in ((), [Rule(".*", weight=Spec(8, granularity="channel"), input=Spec(8))]):
        if rules:
            net, variables = small_nets.calibrated(Head(), rules, images)
        else:
            net, variables = small_nets.float_net(Head(), images)
        written, difference, _ = compare(net, variables, images, tmp_path / "m.onnx")
        assert difference < (0.01 if rules else 1e-5)
        assert not {"Transpose", "Reshape", "Gather"} & set(written.operations)


class Wild(nn.Module):
    """Operations beyond the usual, and a BatchNorm that nothing can absorb."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2), name="up")(x)
        x = nn.BatchNorm(True, name="bn")(nn.relu6(x))
        squeeze = nn.sigmoid(nn.Dense(4, name="squeeze")(x.mean((1, 2), keepdims=True)))
        x = nn.gelu(x * squeeze) + nn.silu(x) * jnp.exp(-jnp.abs(x)) - jnp.sqrt(jnp.square(x) + 1)
        x = jnp.pad(x[:, ::2, 1:], ((0, 0), (1, 0), (0, 2), (0, 0)))
        x = jnp.concatenate([x, jnp.tanh(x)], axis=-1)
        x = nn.Dense(6, name="pointwise")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = jnp.where(x > 0, x, nn.softplus(x))
        x = nn.DenseGeneral((2, 3), axis=(-3, -2, -1), name="general")(x)
        return nn.log_softmax(x.reshape(x.shape[0], 6) ** 3)


def test_less_usual_operations(tmp_path):
    images = small_nets.images(4)
    net, variables = small_nets.float_net(Wild(), images)
    written, difference, _ = compare(net, variables, images, tmp_path / "m.onnx")
    assert difference < 1e-4
    assert written.operations["ConvTranspose"] == 1


class Moved(nn.Module):
    """Something between a convolution and the head."""

    change: Callable

    @nn.compact
    def __call__(self, x):
        x = self.change(nn.Conv(6, (3, 3), name="conv")(x))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


def thirds(x):
    a, b, c = jnp.split(x, (1, 4), axis=-1)
    return jnp.concatenate([c, 2 * a, -b], -1)


@pytest.mark.parametrize(
    ("change", "operation"),
    [
        (thirds, "Slice"),
        (nn.glu, "Slice"),
        (lambda x: x[:, ::-1, ::-1], "Slice"),
        (lambda x: jnp.pad(x, ((0, 0), (2, 1), (1, 1), (0, 0)), "reflect"), "Slice"),
        (lambda x: jax.image.resize(x, (x.shape[0], 13, 16, 6), "nearest"), "Gather"),
        (lambda x: nn.relu(x).std((1, 2)), "Where"),  # its unused branch is NaN
    ],
)
def test_parts_turns_and_places_of_a_map(tmp_path, change, operation):
    images = small_nets.images(3)
    net, variables = small_nets.float_net(Moved(change), images)
    written, difference, _ = compare(net, variables, images, tmp_path / "m.onnx")
    assert difference < 1e-5
    assert operation in written.operations


def test_a_table_is_read_by_its_rows(tmp_path):
    class Words(nn.Module):
        mode: str = ""

        @nn.compact
        def __call__(self, x):
            if self.mode:
                y = jnp.take(self.param("table", nn.initializers.ones, (11, 6)), x, 0, mode="clip")
            else:
                y = nn.Embed(11, 6, name="table")(x)
            return nn.Dense(4, name="head")(y.mean(1))

    words = np.random.default_rng(0).integers(0, 11, (7, 5)).astype(np.int32)
    rules = [Rule("head", weight=Spec(8), input=Spec(8)), Rule("table", weight=Spec(8))]
    net, variables = small_nets.calibrated(Words(), rules, words)
    written, difference, _ = compare(net, variables, words, tmp_path / "m.onnx")
    assert difference < 1e-5 and written.operations["Gather"] == 1
    net, variables = small_nets.float_net(Words("clip"), words)
    _, difference, _ = compare(net, variables, 3 * words - 9, tmp_path / "m.onnx")
    assert difference < 1e-5  # words from -9 to 21 are those from 0 to 10


def test_the_batch_is_not_cut(tmp_path):
    images = small_nets.images(4)
    net, variables = small_nets.float_net(Moved(lambda x: jnp.split(x, 1)[0]), images)
    with pytest.raises(ValueError, match="'split' in 'the root module': it cuts the batch"):
        to_onnx(net, variables, images, tmp_path / "m.onnx")
    net, variables = small_nets.float_net(Moved(lambda x: x[::-1]), images)
    with pytest.raises(ValueError, match="'rev' in 'the root module': it reverses the batch"):
        to_onnx(net, variables, images, tmp_path / "m.onnx")


def test_unfolded_batch_norm_is_one_mul_and_one_add(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv, norm = nn.Conv(4, (3, 3), name="c"), nn.BatchNorm(True, name="bn")
            return (norm(conv(x)) + norm(conv(x * 2))).mean((1, 2))

    images = small_nets.images(4)
    net, variables = small_nets.float_net(Net(), images)
    written, difference, _ = compare(net, variables, images, tmp_path / "m.onnx")
    assert difference < 1e-5
    assert written.operations["Mul"] == 3 and written.operations["Add"] == 3


def test_mlp_takes_its_features_as_they_are(tmp_path):
    x = jax.random.normal(jax.random.key(0), (5, 12))

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, use_bias=False, name="b")(nn.relu(nn.Dense(8, name="a")(x)))

    rules = [
        Rule("a", weight=Spec(8), input=Spec(8)),
        Rule("b", weight=Spec(4, granularity="channel"), input=Spec(4, signed=False)),
    ]
    net, variables = small_nets.calibrated(Mlp(), rules, x)
    _, difference, agreement = compare(net, variables, x, tmp_path / "m.onnx")
    assert agreement == 1 and difference < 0.05


def test_what_cannot_be_written_is_named(tmp_path):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="inner")(nn.Dense(3, name="head")(x))

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.lax.lgamma(x)

    x = jax.random.normal(jax.random.key(0), (5, 12))
    net, variables = small_nets.float_net(Outer(), x)
    with pytest.raises(ValueError, match="cannot write 'lgamma' in 'inner'"):
        to_onnx(net, variables, x, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="opset is 12"):
        to_onnx(net, variables, x, tmp_path / "m.onnx", opset=12)
    with pytest.raises(ValueError, match="target is 'arm'"):
        to_onnx(net, variables, x, tmp_path / "m.onnx", target="arm")


def test_eight_bit_weights_are_refused_where_they_saturate(tmp_path):
    images = small_nets.images(8)
    for bits, saturates in ((8, True), (7, False)):
        rules = [Rule(".*", weight=Spec(bits), input=Spec(8, symmetric=False))]
        net, variables = small_nets.calibrated(Head(), rules, images)
        path = tmp_path / "m.onnx"
        assert bool(to_onnx(net, variables, images, path).saturating) == saturates
        if saturates:
            with pytest.raises(ValueError, match="saturate on x86 without VNNI in: conv, head"):
                to_onnx(net, variables, images, path, target="onnxruntime-x86")
        else:
            to_onnx(net, variables, images, path, target="onnxruntime-x86")


def test_vnni_is_read_from_the_flags(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags\t\t: fpu avx2 avx512_vnni\n")
    assert has_vnni(info)
    info.write_text("processor: 0\nflags\t\t: fpu avx2\n")
    assert not has_vnni(info)
    assert not has_vnni(tmp_path / "none")


def test_openvino_reads_the_file(tmp_path):
    openvino = pytest.importorskip("openvino")
    net, variables, images = small_nets.case("w2a2")
    path = tmp_path / "m.onnx"
    to_onnx(net, variables, images, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(np.moveaxis(np.asarray(images), -1, 1))[0]
    wanted = np.asarray(net.apply(variables, images))
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_axes_merged_with_the_batch_come_apart_again(tmp_path):
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.softmax(nn.Dense(4, name="a")(x).reshape(-1, 4))
            return nn.Dense(3, name="b")(y.reshape(x.shape[0], 20))

    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    rules = [Rule(".*", weight=Spec(4), input=Spec(8))]
    net, variables = small_nets.calibrated(Tokens(), rules, x)
    _, difference, agreement = compare(net, variables, x, tmp_path / "m.onnx")
    assert agreement == 1 and difference < 0.02


def test_weight_only_layers_run_at_full_accuracy(tmp_path):
    x = jax.random.normal(jax.random.key(0), (16, 32))
    rules = [Rule(".*", weight=Spec(4, granularity="channel"))]
    net, variables = small_nets.calibrated(nn.Dense(8), rules, x)
    _, difference, _ = compare(net, variables, x, tmp_path / "m.onnx")
    assert difference < 1e-5
