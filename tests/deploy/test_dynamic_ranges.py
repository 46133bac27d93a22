"""Dynamic ranges: the integer net has the codes of the fake-quantized one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import convert, integer_apply, load, onnx_session, save, to_onnx
from qkd_jax.numerics import Spec
from qkd_jax.ptq import fold_bn
from qkd_jax.quantize import Rule
from qkd_jax.quantizers import QUANTIZERS

WEIGHT = Spec(8, granularity="channel")


def found(granularity, bits=8, **more):
    """Returns a spec with a dynamic range."""
    return Spec(bits, dynamic=True, granularity=granularity, **more)


def affine(granularity):
    return found(granularity, signed=False, symmetric=False)


class Attention(nn.Module):
    """Tokens, attention with both products quantized, and a convolution over them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(5, name="head")(x.mean(1))


class Sequence(nn.Module):
    """Causal convolutions and causal attention over a sequence."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1, 27)
        x = nn.relu(nn.Conv(8, (3,), padding="CAUSAL", name="causal")(x))
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1])))
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x, mask=mask)
        x = nn.gelu(nn.Conv(8, (1,), use_bias=False, name="point")(x))
        return nn.Dense(5, name="head")(x[:, -1])


NETS = {
    "affine rows": (small_nets.Mixed(), (Rule(".*", weight=WEIGHT, input=affine("token")),)),
    "one range": (small_nets.Mixed(), (Rule(".*", weight=WEIGHT, input=affine("tensor")),)),
    "symmetric": (
        small_nets.Mixed(),
        # The weights in front stay float, those of the head share one scale.
        (
            Rule("stem"),
            Rule("head", weight=Spec(8), input=found("token")),
            Rule(".*", weight=WEIGHT, input=found("example")),
        ),
    ),
    "attention": (
        Attention(),
        # The second operand of a product of activations has rows of its own.
        (Rule(".*", weight=WEIGHT, input=found("token"), other=found("token")),),
    ),
    "sequence": (Sequence(), (Rule(".*", weight=WEIGHT, input=affine("token")),)),
    "mixed": (
        Attention(),
        (
            Rule("conv", weight=Spec(3, granularity="channel"), input=found("token", bits=4)),
            Rule(".*", weight=WEIGHT, input=Spec(8), other=found("example")),
        ),
    ),
}


def codes_of(net, variables, images):
    """Logits and codes of every activation, as the net itself computes them."""
    seen = {}

    def watch(path, operand, x, x_hat, spec, params):
        if operand != "weight":
            scale, zero_point, _ = QUANTIZERS[spec.quantizer].integer_view(params, spec)
            seen[f"{path}/{operand}"] = (jnp.round(x_hat * (1 / scale)) + zero_point).astype(int)

    return jax.jit(lambda v, x: (net.apply(v, x, watch=watch), seen))(variables, images)


FAST = "one range"


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n == FAST else pytest.mark.slow) for n in NETS],
)
def case(request):
    model, rules = NETS[request.param]
    images = small_nets.images(6)
    net, variables = small_nets.calibrated(model, rules, images)
    # Float layers have their BatchNorm folded by `convert`: as the others do, beforehand.
    variables = fold_bn(net, variables, images)
    return request.param, net, variables, images * jnp.arange(1, 7).reshape(6, 1, 1, 1)


def test_codes_and_logits_are_those_of_the_net(case, tmp_path):
    name, net, variables, images = case
    integer = convert(net, variables, images[:2])
    wanted, codes = codes_of(net, variables, images)
    logits, captured = integer_apply(integer, images, capture=True)
    assert set(captured) == set(codes)
    for key in codes:
        np.testing.assert_array_equal(captured[key], codes[key], err_msg=key)
    np.testing.assert_array_equal(logits, wanted)
    if name == "mixed":
        for other in (integer, load(saved(integer, tmp_path))):
            found = integer_apply(other, images, formulation="int32")
            np.testing.assert_array_equal(found, wanted)


def saved(integer, folder):
    save(integer, folder)
    return folder


KINDS = {
    "affine rows": {"MatMulInteger": 2, "Conv": 4},  # one zero point an example: on codes in float
    "one range": {"MatMulInteger": 2, "ConvInteger": 4},
    "symmetric": {"MatMulInteger": 2, "ConvInteger": 3, "Conv": 1},  # the stem is float
    "attention": {"MatMulInteger": 5, "ConvInteger": 1, "MatMul": 2},
    # Each position has a range of its own: convolutions, and the product with the values, in float.
    "sequence": {"MatMulInteger": 5, "Conv": 2, "MatMul": 2},
    "mixed": {"ConvInteger": 1, "MatMul": 7},
}


@pytest.mark.parametrize("opset", [17, 21])
def test_onnx_runtime_gives_the_nets_logits(case, tmp_path, opset):
    """Ranges, codes and sums are the net's own: what differs are float operations between."""
    pytest.importorskip("onnxruntime")
    name, net, variables, images = case
    written = to_onnx(net, variables, images[:2], tmp_path / "m.onnx", opset=opset)
    wanted = np.asarray(jax.jit(net.apply)(variables, images))
    found = onnx_session(written.path).run(
        None, {"images": np.moveaxis(np.asarray(images), -1, 1)}
    )[0]
    products = {k: n for k, n in written.operations.items() if "Conv" in k or "MatMul" in k}
    assert products | {k: n for k, n in written.operations.items() if k == "Gemm"} == KINDS[name]
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(nn.relu(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_a_range_are_unsigned_in_products(symmetric, tmp_path):
    """ONNX Runtime has no fused product of int8 codes with weights that it made uint8."""
    onnx = pytest.importorskip("onnx")
    x = jax.random.normal(jax.random.key(0), (4, 6)) - 1
    rule = Rule(".*", weight=WEIGHT, input=found("token", symmetric=symmetric))
    net, variables = small_nets.calibrated(SignedDense(), (rule,), x)
    file = to_onnx(net, variables, x, tmp_path / "m.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(file.path), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    products = [n for n in model.graph.node if n.op_type == "MatMulInteger"]
    assert [types[n.input[0]] for n in products] == [onnx.TensorProto.UINT8] * 2
    found_logits = onnx_session(file.path).run(None, {"images": np.asarray(x)})[0]
    np.testing.assert_allclose(found_logits, jax.jit(net.apply)(variables, x), atol=1e-5)


class SignedDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(8, name="hidden")(x)))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Rule(".*", weight=WEIGHT, input=affine("token")), dict(integer_only=True), "run time, w"),
        (
            Rule(".*", weight=WEIGHT, input=found("tensor", quantizer="lsq_plus", symmetric=False)),
            {},
            "zero points have no bound",
        ),
    ],
)
def test_what_has_no_integers_says_why(rule, options, message):
    x = jax.random.normal(jax.random.key(0), (4, 6))
    net, variables = small_nets.calibrated(Dense(), (rule,), x)
    with pytest.raises(ValueError, match=message):
        convert(net, variables, x, **options)


@pytest.mark.parametrize(
    "weight",
    [
        Spec(2, quantizer="ternary", granularity="channel"),
        Spec(1, quantizer="binary"),
        Spec(4, quantizer="dorefa", granularity="channel"),
    ],
    ids=lambda spec: spec.quantizer,
)
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_weights_that_find_their_own_magnitude_agree_to_the_bit(weight, granularity):
    """Compiled as a net and as integers: each magnitude is the same mean."""
    x = jax.random.normal(jax.random.key(1), (16, 9, 11, 3))
    rules = (Rule(".*", weight=weight, input=affine(granularity)),)
    net, variables = small_nets.calibrated(Plain(), rules, x)
    integer = integer_apply(convert(net, variables, x), x)
    np.testing.assert_array_equal(jax.jit(net.apply)(variables, x), integer)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (16, 24):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(5)(nn.relu(nn.Dense(40)(x.reshape(x.shape[0], -1))))
