"""SmoothQuant: qwix's factors, an unchanged function, and activations that quantize better."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.numerics import Spec
from qkd_jax.ptq import fold_bn, smooth
from qkd_jax.ptq.smooth import smoothing_scale
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ptq.npz")
INPUT = Spec(8, symmetric=False)
ALL = [Rule(".*", weight=Spec(8), input=INPUT)]


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_factors_are_those_of_qwix(alpha):
    x, w = GOLDEN["smooth/activations"], GOLDEN["smooth/weights"]
    want = GOLDEN[f"smooth/scale_{alpha}"]
    np.testing.assert_allclose(smoothing_scale(x, w, alpha), want, rtol=1e-6)


def test_dead_channels_and_tiny_ones():
    x, w = np.asarray([0.0, 2.0, 1e-30]), np.asarray([1.0, 0.0, 1.0])
    np.testing.assert_array_equal(smoothing_scale(x, w, 0.5), [1, 1, 1e-5])


class Block(nn.Module):
    """A transformer block: one LayerNorm feeds three projections, another one the MLP."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="before_attention")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
        y = nn.RMSNorm(name="before_mlp")(x)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(y)))


@pytest.fixture(scope="module")
def block():
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 5, 8)))
    net, variables = small_nets.float_net(Block(), x, ALL)
    return net, variables, x


@pytest.mark.slow
def test_consumers_of_one_tensor_share_a_factor_that_its_norm_takes(block):
    net, variables, x = block
    lines = []
    found = smooth(net, variables, [x[:3], x[3:]], report=lines.append)
    assert relative(net.apply(found, x), net.apply(variables, x)) < 1e-5
    old, new = variables["params"], found["params"]
    y = nn.LayerNorm().apply({"params": old["before_attention"]}, x)
    largest = np.abs(np.asarray(y)).max((0, 1))
    weights = np.max(
        [np.abs(old["attention"][k]["kernel"]).max((1, 2)) for k in ("query", "key", "value")],
        axis=0,
    )
    s = np.sqrt(largest / weights)
    for name in ("scale", "bias"):
        np.testing.assert_allclose(
            new["before_attention"][name], old["before_attention"][name] / s, rtol=1e-5
        )
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(
            new["attention"][name]["kernel"],
            np.asarray(old["attention"][name]["kernel"]) * s[:, None, None],
            rtol=1e-5,
        )
    assert (np.asarray(new["before_mlp"]["scale"]) != old["before_mlp"]["scale"]).any()
    # What GELU or the attention's products write has no factor to take: said, and left alone.
    assert [line for line in lines if line.startswith("left")] == [
        "left attention/out: nothing before its input can take a factor",
        "left down: nothing before its input can take a factor",
    ]
    np.testing.assert_array_equal(new["down"]["kernel"], old["down"]["kernel"])


@pytest.mark.slow
def test_convolutions_by_their_batch_norm_or_folded_by_the_layer_before():
    x = small_nets.images()
    net, variables = small_nets.float_net(small_nets.Mixed(), x, ALL)
    want = net.apply(variables, x)
    found = smooth(net, variables, [x])
    assert relative(net.apply(found, x), want) < 1e-5
    # `grouped` follows a BatchNorm without a gain; a running variance takes no factor.
    changed = {
        layer
        for layer, v in found["params"].items()
        if any((np.asarray(a) != variables["params"][layer][k]).any() for k, a in v.items())
    }
    assert changed == {"grouped_bn", "dilated", "hidden_bn", "head"}
    folded = fold_bn(net, variables, x)
    found = smooth(net, folded, [x], alpha=0.75)
    assert relative(net.apply(found, x), want) < 1e-5
    assert (found["params"]["grouped"]["kernel"] != folded["params"]["grouped"]["kernel"]).any()
    assert (found["quant"]["depthwise"]["folded"]["bias"] != 0).all()


class Outliers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="dense")(nn.LayerNorm(name="norm")(x))


@pytest.mark.slow
def test_outlier_channels_cost_less_behind_it():
    x = np.asarray(jax.random.normal(jax.random.key(0), (64, 16)))
    net, variables = small_nets.float_net(
        Outliers(), x, [Rule("dense", weight=Spec(8), input=INPUT)]
    )
    gain = variables["params"]["norm"]["scale"]
    variables["params"]["norm"]["scale"] = gain.at[3].multiply(100.0)
    want = net.apply(variables, x)
    errors = [
        float(jnp.mean((net.apply(calibrate(net, v, [x]), x) - want) ** 2))
        for v in (variables, smooth(net, variables, [x]))
    ]
    assert errors[1] < 0.1 * errors[0]


def test_layers_whose_input_stays_float_are_not_touched(block):
    _, variables, x = block
    net = quantize(Block(), [Rule(".*", weight=Spec(8))])
    jax.tree.map(np.testing.assert_array_equal, smooth(net, variables, [x]), variables)


def test_what_is_refused(block):
    net, variables, x = block
    for alpha in (-0.1, 1.5, "half"):
        with pytest.raises(ValueError, match="alpha"):
            smooth(net, variables, [x], alpha=alpha)
    with pytest.raises(ValueError, match="batches is empty"):
        smooth(net, variables, [])
    with pytest.raises(ValueError, match="batches is empty"):
        smooth(net, variables, [x[:0]])
    with pytest.raises(ValueError, match="tuple of 2 arrays"):
        smooth(net, variables, [(x, x)])
    quantizer = {"weight_quantizer": {"scale": jnp.ones(())}}
    with pytest.raises(ValueError, match="smooth first"):
        smooth(net, {**variables, "quant": {"up": quantizer}}, [x])
