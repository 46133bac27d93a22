"""Every quantizer with an integer view converts: the same codes and logits, weights at their bits.

The other quantizers, and scales that vary along a sum, are those of `test_convert_formats`.
"""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax import deploy, models, ptq
from qkd_jax.deploy import convert, integer_apply
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets
from qkd_jax.quantize.inspection import layers
from qkd_jax.quantize.presets import pair
from qkd_jax.quantizers import QUANTIZERS

IMAGES = jax.random.normal(jax.random.key(0), (6, 5, 4, 4))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="conv")(x))
        return nn.DenseGeneral((2, 3), axis=(-3, -2, -1), name="dense")(x)


def codes_of_the_net(net, variables, images):
    """Logits, and the codes of every quantized activation, of the fake-quantized net."""
    found = {}

    def watch(path, operand, x, x_hat, spec, params):
        if operand != "weight":
            scale, zero_point, _ = QUANTIZERS[spec.quantizer].integer_view(params, spec)
            found[f"{path}/{operand}"] = jnp.round(x_hat * (1 / scale)) + zero_point

    def run(variables, images):
        found.clear()
        return net.apply(variables, images, watch=watch), dict(found)

    return jax.jit(run)(variables, images)


def check(net, variables, images):
    integer = convert(net, variables, images)
    wanted, codes = codes_of_the_net(net, variables, images)
    found, captured = integer_apply(integer, images, capture=True)
    assert set(captured) == set(codes)
    for name, array in captured.items():
        np.testing.assert_array_equal(array, codes[name], err_msg=name)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    return integer


NOT_UNIFORM = {"apot", "codebook", "float"}  # their values are no multiples of one scale
CASES = {
    name: (dict(bits=bits, **w), dict(bits=4, signed=False, **x))
    for name in QUANTIZERS
    if name not in NOT_UNIFORM
    for bits in (dict(binary=1, ternary=2).get(name, 3),)
    for w, x in (pair(name, bits, 4),)
}
CASES |= {
    "dorefa of 1 bit": (dict(bits=1, quantizer="dorefa"), dict(bits=2, signed=False)),
    "ewgs of 4 bits": (dict(bits=4, quantizer="ewgs"), dict(bits=4, quantizer="lsq", signed=False)),
    "affine weights": (
        dict(bits=4, symmetric=False, granularity="channel"),
        dict(bits=8, symmetric=False),
    ),
    "lsq_plus, 2 bits": (
        dict(bits=2, quantizer="lsq_plus", granularity="channel"),
        dict(bits=2, quantizer="lsq_plus", symmetric=False, signed=False),
    ),
    "learned bits": (
        dict(bits=4, quantizer="lsq", options={"learn_bits": True}),
        dict(bits=4, signed=False),
    ),
    "power of two": (
        dict(bits=5, power_of_two=True, granularity="channel"),
        dict(bits=6, power_of_two=True, signed=False),
    ),
}
FAST = ("lsq_plus, 2 bits", "binary")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES]
)
def test_codes_and_logits_are_those_of_the_net(case):
    weight, inputs = (Spec(**fields) for fields in CASES[case])
    rules = [
        Rule("conv", weight=weight, input=Spec(8, symmetric=False)),
        Rule("dense", weight=weight, input=inputs),
    ]
    net, variables = small_nets.calibrated(Small(), rules, IMAGES)
    integer = check(net, variables, IMAGES)
    for layer in integer.program.layers:
        count = int(np.prod(layer.shape))
        assert layer.bytes == -(-count * weight.bits // 8)
        assert integer.arrays[f"{layer.path}/weight"].nbytes == layer.bytes
    floats = [a.size for a in integer.arrays.values() if a.dtype == jnp.float32]
    assert max(floats, default=0) <= 8  # scales and biases: no copy of a weight


@pytest.mark.parametrize("learns", ["weight", "input"])
def test_bits_that_training_took_away_are_gone_in_every_export(tmp_path, learns):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(6, name="first")(x))
            return nn.Dense(3, name="last")(x)

    x = IMAGES[:, 0, 0]
    learned = {learns: {"options": {"learn_bits": True}}}
    specs = {
        "weight": Spec(6, quantizer="lsq", **learned.get("weight", {})),
        "input": Spec(6, quantizer="lsq", signed=False, **learned.get("input", {})),
    }
    rules = [Rule("first", weight=Spec(8), input=Spec(8)), Rule("last", **specs, output=Spec(8))]
    net, variables = small_nets.calibrated(Two(), rules, x)
    fresh = copy.deepcopy(variables)
    variables["quant"]["last"][f"{learns}_quantizer"]["bits"] = jnp.float32(2.6)
    wanted = net.apply(variables, x)
    integer = check(net, variables, x)
    bytes_ = {layer.path: layer.bytes for layer in integer.program.layers}
    assert bytes_["last"] == -(-18 * (3 if learns == "weight" else 6) // 8)
    before, after = (layers(net, v, x)[-1].bits for v in (fresh, variables))
    assert before - after == (18 * 3 if learns == "weight" else 0)
    found = integer_apply(convert(net, variables, x, integer_only=True), x)
    step = variables["quant"]["last"]["output_quantizer"]["scale"]
    np.testing.assert_allclose(found, wanted, atol=1.01 * float(step))
    deploy.to_onnx(net, variables, x, tmp_path / "net.onnx")
    session = deploy.onnx_session(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_every_quantizer_is_converted_here_or_with_the_formats():
    tried = {fields.get("quantizer", "uniform") for pair in CASES.values() for fields in pair}
    assert set(QUANTIZERS) - tried == NOT_UNIFORM


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_weights_rounded_after_training_keep_their_codes(method):
    rules = [
        Rule(".*", weight=Spec(3, granularity="channel"), input=Spec(8, symmetric=False)),
    ]
    net, variables = small_nets.calibrated(Small(), rules, IMAGES)
    options = dict(steps=20, lr=0.05) if method == "adaround" else {}
    rounded = getattr(ptq, method)(net, variables, [IMAGES], **options)
    assert np.any(rounded["params"]["dense"]["kernel"] != variables["params"]["dense"]["kernel"])
    check(net, rounded, IMAGES)


@pytest.mark.slow
def test_a_transformer_has_the_codes_that_were_trained():
    """Attention's products on codes; LayerNorm, GELU and softmax in float between them."""
    model = models.create("vit", 3, depth=2, width=16, heads=2)
    images = np.random.default_rng(0).normal(0, 1, (16, 12, 12, 1)).astype(np.float32)
    rules = presets.rules("w4a8", model=model, images=images)
    net, variables = small_nets.calibrated(model, rules, images)
    integer = check(net, variables, images)
    names = {layer.path for layer in integer.program.layers}
    assert {"block0/attention/query", "block1/mlp2", "stem", "head"} <= names
    kernel = integer.arrays["block0/mlp1/weight"]
    assert kernel.nbytes == 16 * 32 // 2
