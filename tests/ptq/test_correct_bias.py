"""Bias correction: the means of the quantized net's layers are those of the float net."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets
from scipy import integrate, stats

from qkd_jax.numerics import Spec
from qkd_jax.ptq import correct_bias, equalize, fold_bn
from qkd_jax.ptq.moments import rectified_mean
from qkd_jax.quantize import Rule
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.stored_weights import quantized_weights, rounded, with_weight

RULES = [Rule(".*", weight=Spec(3, granularity="channel"), input=Spec(8, symmetric=False))]


def outputs(net, variables, x):
    """What each layer and each BatchNorm returns."""
    options = dict(capture_intermediates=True, mutable=["intermediates"])
    _, state = jax.jit(lambda v: net.apply(v, x, **options))(variables)
    flat = jax.tree_util.tree_flatten_with_path(state["intermediates"])[0]
    return {path[0].key: np.asarray(leaf, np.float64) for path, leaf in flat if len(path) == 3}


@pytest.fixture(scope="module")
def setup():
    x = np.asarray(small_nets.images(12))
    net, variables = small_nets.float_net(small_nets.Mixed(), x, RULES)
    return net, variables, x


# What each layer writes, behind its BatchNorm where that holds the correction.
PLACES = {
    False: ("stem", "depthwise_bn", "grouped", "dilated_bn", "hidden", "head"),
    True: ("stem", "depthwise", "grouped", "dilated", "hidden", "head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_the_means_of_every_layer_are_the_float_ones(setup, folded):
    net, variables, x = setup
    start = fold_bn(net, variables, x) if folded else variables
    quantized = calibrate(net, start, [x])
    # Batches of uneven size count by what they hold; padding does not count.
    padded = {"image": np.concatenate([x[5:], x[:2] + 50]), "mask": np.arange(9) < 7}
    found = correct_bias(net, quantized, [x[:5], padded])
    want, before, after = (outputs(net, v, x) for v in (start, quantized, found))
    for layer in PLACES[folded]:
        axes = tuple(range(want[layer].ndim - 1))
        wrong, right = (
            np.abs(o[layer].mean(axes) - want[layer].mean(axes)).max() for o in (before, after)
        )
        # A sum that lies on the border of two codes may fall to either side; few do.
        assert wrong > 1e-3 and right < 0.05 * wrong
    kernels = jax.tree.map(np.array_equal, found["params"], quantized["params"])
    assert all(layer.get("kernel", True) for layer in kernels.values())
    if not folded:
        assert jax.tree.structure(found) == jax.tree.structure(quantized)
        assert (
            found["batch_stats"]["dilated_bn"]["mean"]
            != variables["batch_stats"]["dilated_bn"]["mean"]
        ).all()


@pytest.mark.slow
def test_a_reference_makes_it_repeatable_and_serves_weights_on_the_grid(setup):
    net, variables, x = setup
    start = fold_bn(net, variables, x)
    quantized = calibrate(net, start, [x])
    once = correct_bias(net, quantized, [x])
    again = correct_bias(net, once, [x], reference=start)
    for layer in ("stem", "grouped", "hidden", "head"):
        np.testing.assert_allclose(
            again["params"][layer]["bias"], once["params"][layer]["bias"], atol=1e-5
        )
    np.testing.assert_allclose(
        again["quant"]["dilated"]["folded"]["bias"],
        once["quant"]["dilated"]["folded"]["bias"],
        atol=1e-5,
    )


class Plain(nn.Module):
    """Layers without biases, without BatchNorm: the correction needs a place of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (2, 2), use_bias=False, padding="VALID", name="conv")(x))
        x = nn.DenseGeneral((2, 3), axis=-1, name="heads")(x.mean((1, 2)))
        return nn.DenseGeneral(3, axis=(-2, -1), use_bias=False, name="join")(x)


def test_layers_without_a_bias_get_one_and_wide_biases_keep_their_shape():
    x = np.asarray(small_nets.images(12))
    net, variables = small_nets.float_net(Plain(), x, RULES)
    quantized = calibrate(net, variables, [x])
    found = correct_bias(net, quantized, [x])
    assert set(found["quant"]["conv"]["folded"]) == {"bias"}
    assert found["params"]["heads"]["bias"].shape == (2, 3)
    want, after = (outputs(net, v, x) for v in (variables, found))
    for layer in ("conv", "heads", "join"):
        axes = (0, 1, 2) if layer == "conv" else 0
        np.testing.assert_allclose(after[layer].mean(axes), want[layer].mean(axes), atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 1.2), (-2.0, 0.7), (3.0, 0.5), (0.4, 0.0)])
def test_the_mean_behind_a_relu(mean, std):
    if std:
        density = lambda t: t * stats.norm.pdf(t, mean, std)
        want = integrate.quad(density, 0, mean + 12 * std, epsabs=1e-12)[0]
    else:
        want = max(mean, 0)
    found = rectified_mean(np.asarray([mean]), np.asarray([std]))
    np.testing.assert_allclose(found, [want], rtol=1e-8, atol=1e-10)


class Chain(nn.Module):
    """Convolutions with a BatchNorm and a ReLU between; the first has another input."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (1, 1), use_bias=False, name="first")(x)
        x = nn.relu(nn.BatchNorm(True, name="bn1")(x))
        x = nn.Conv(4, (3, 3), feature_group_count=2, padding="VALID", name="second")(x)
        x = nn.BatchNorm(True, name="bn2")(x)
        x = nn.Dense(5, name="third")(x)
        return nn.Dense(2, name="last")(jnp.maximum(x, 0).mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_analytic_by_its_formula_also_after_equalization(folded):
    x = np.asarray(small_nets.images(4))
    net, variables = small_nets.float_net(Chain(), x, RULES)
    start = variables
    if folded:
        start = equalize(net, fold_bn(net, variables, x), x)
    quantized = calibrate(net, start, [x])
    lines = []
    found = correct_bias(net, quantized, [x], how="analytic", report=lines.append)
    hats = {}
    net.apply(
        quantized,
        x,
        watch=lambda path, operand, x, x_hat, spec, params: hats.update(
            {path: np.asarray(x_hat, np.float64)} if operand == "weight" else {}
        ),
    )
    old, new = start["params"], found["params"]
    mean, std = (np.asarray(old["bn1"][k], np.float64) for k in ("bias", "scale"))
    means = [
        integrate.quad(lambda t, m=m, s=s: t * stats.norm.pdf(t, m, s), 0, m + 12 * s)[0]
        for m, s in zip(mean, np.abs(std), strict=True)
    ]
    change = hats["second"] - np.asarray(old["second"]["kernel"], np.float64)
    for out in range(4):
        inputs = means[:3] if out < 2 else means[3:]
        want = np.einsum("hwi,i->", change[..., out], inputs)
        moved = new["second"]["bias"][out] - old["second"]["bias"][out]
        np.testing.assert_allclose(moved, -want, rtol=1e-3, atol=1e-6)
    change = hats["third"] - np.asarray(old["third"]["kernel"], np.float64)
    np.testing.assert_allclose(
        new["third"]["bias"] - old["third"]["bias"],
        -np.asarray(old["bn2"]["bias"], np.float64) @ change,
        rtol=1e-3,
        atol=1e-6,
    )
    assert [line.split(":")[0] for line in lines] == [
        "left first",
        "corrected second",
        "corrected third",
        "left last",
    ]


def test_what_is_refused(setup):
    net, variables, x = setup
    with pytest.raises(ValueError, match="Call `calibrate` first"):
        correct_bias(net, variables, [x])
    scale = {"scale": jnp.ones(()), "zero_point": jnp.zeros(())}
    quantized = {**variables, "quant": {"head": {"weight_quantizer": scale}}}
    with pytest.raises(ValueError, match="how is 'data'"):
        correct_bias(net, quantized, [x], how="data")
    with pytest.raises(ValueError, match="batches is empty"):
        correct_bias(net, quantized, [])
    with pytest.raises(ValueError, match="give a list of batches"):
        correct_bias(net, quantized, {"image": x})
    with pytest.raises(ValueError, match=r"other BatchNorms folded.*depthwise_bn"):
        correct_bias(net, quantized, [x], reference=fold_bn(net, variables, x))
    quantized["quant"]["stem"] = {"folded": {"multiplier": jnp.ones(8)}}
    with pytest.raises(ValueError, match="correct_bias before `fold_bn`"):
        correct_bias(net, quantized, [x])


def test_weights_that_are_rounded_already_need_a_reference():
    x = small_nets.images()
    net, variables = small_nets.calibrated(small_nets.Mixed(), small_nets.rules(4, 8), x)
    params = {**variables["params"]}
    for weight in quantized_weights(net, variables):
        params = with_weight(
            {**variables, "params": params}, weight, rounded(variables, weight).on_grid
        )["params"]
    moved = {**variables, "params": params}
    with pytest.raises(ValueError, match=r"on their grid already.*reference="):
        correct_bias(net, moved, [x])
    correct_bias(net, moved, [x], reference=variables)
