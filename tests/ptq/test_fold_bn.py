"""Folding: what is folded, what is left alone, and that the function stays the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.numerics import Spec
from qkd_jax.ptq import fold_bn
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate


def folded_norms(variables):
    quant = variables.get("quant", {})
    return {path for path, value in quant.items() if "identity" in value.get("folded", {})}


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def test_float_net_is_folded_exactly():
    x = small_nets.images()
    net, variables = small_nets.float_net(small_nets.Mixed(), x)
    folded = fold_bn(net, variables, x)
    assert folded_norms(folded) == set(small_nets.NORMS)
    assert relative(net.apply(folded, x), net.apply(variables, x)) < 1e-5
    # A layer with a bias of its own keeps it; one without gets one beside the quantizers.
    assert "bias" not in folded["quant"].get("stem", {}).get("folded", {})
    assert set(folded["quant"]["depthwise"]["folded"]) == {"bias"}


@pytest.mark.parametrize("kind", ["conv", "depthwise", "dense"])
def test_gradients_through_a_folded_product_are_those_of_the_net(kind):
    x = jax.random.normal(jax.random.key(3), (5, 7, 6, 6))
    rule = Rule("layer", weight=Spec(4, granularity="channel"), input=Spec(6))
    net, variables = small_nets.float_net(OneLayer(kind, False), x, [rule])
    variables = calibrate(net, variables, [x])
    folded = fold_bn(net, variables, x)
    assert "multiplier" in folded["quant"]["layer"]["folded"]

    def gradients(variables):
        def total(x, kernel):
            params = variables["params"]
            params = {**params, "layer": {**params["layer"], "kernel": kernel}}
            return jnp.sum(jnp.sin(net.apply({**variables, "params": params}, x)))

        return jax.grad(total, (0, 1))(x, variables["params"]["layer"]["kernel"])

    for found, wanted in zip(gradients(folded), gradients(variables), strict=True):
        assert relative(found, wanted) < 1e-4


class OneLayer(nn.Module):
    kind: str
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        layer = {
            "conv": lambda: nn.Conv(8, (3, 2), strides=2, use_bias=self.use_bias, name="layer"),
            "depthwise": lambda: nn.Conv(
                12, (3, 3), feature_group_count=6, use_bias=self.use_bias, name="layer"
            ),
            "dense": lambda: nn.Dense(7, use_bias=self.use_bias, name="layer"),
        }[self.kind]()
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(layer(x))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "dense"])
def test_one_float_layer_is_folded_by_the_formula(kind, use_bias):
    x = jax.random.normal(jax.random.key(3), (5, 7, 6, 6))
    net, variables = small_nets.float_net(OneLayer(kind, use_bias), x)
    params, stats = variables["params"], variables["batch_stats"]["bn"]
    assert (params["bn"]["scale"] < 0).any() and (params["bn"]["scale"] > 0).any()
    folded = fold_bn(net, variables, x)
    assert relative(net.apply(folded, x), net.apply(variables, x)) < 1e-6
    in_64 = lambda a: np.asarray(a, np.float64)
    k = in_64(params["bn"]["scale"]) / np.sqrt(in_64(stats["var"]) + 1e-3)
    own = in_64(params["layer"]["bias"]) if use_bias else 0.0
    want = in_64(params["bn"]["bias"]) + (own - in_64(stats["mean"])) * k
    kernel = in_64(params["layer"]["kernel"]) * k
    np.testing.assert_allclose(folded["params"]["layer"]["kernel"], kernel, rtol=1e-6)
    place = folded["params"]["layer"] if use_bias else folded["quant"]["layer"]["folded"]
    np.testing.assert_allclose(place["bias"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", small_nets.ONE_FAST)
def test_quantized_net_keeps_its_codes(case):
    net, variables, x = small_nets.case(case)
    folded = fold_bn(net, variables, x)
    assert folded_norms(folded) == set(small_nets.NORMS)
    for layer in ("stem", "depthwise", "grouped", "dilated", "hidden"):
        np.testing.assert_array_equal(
            folded["params"][layer]["kernel"], variables["params"][layer]["kernel"]
        )
        assert folded["quant"][layer]["folded"]["multiplier"].shape == (
            12 if layer == "hidden" else 8,
        )
    assert (folded["quant"]["stem"]["folded"]["multiplier"] < 0).any()
    # Codes can flip where a sum lies on the border of two; none does here.
    assert relative(jax.jit(net.apply)(folded, x), jax.jit(net.apply)(variables, x)) < 1e-5


def test_folding_twice_changes_nothing_more():
    net, variables, x = small_nets.case("w4a4")
    once = fold_bn(net, variables, x)
    twice = fold_bn(net, once, x)
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_an_input_only_rule_folds_into_the_float_kernel_and_weight_only_is_left():
    x = small_nets.images()
    for rule, count in (
        (Rule("dilated|hidden", input=Spec(8, signed=False)), 5),
        (Rule("dilated|hidden", weight=Spec(8)), 3),
    ):
        net, variables = small_nets.calibrated(small_nets.Mixed(), [rule], x)
        folded = fold_bn(net, variables, x)
        assert len(folded_norms(folded)) == count
        assert relative(net.apply(folded, x), net.apply(variables, x)) < 1e-4


class Shared(nn.Module):
    """One convolution for two inputs, one BatchNorm for two convolutions, one behind a sum."""

    @nn.compact
    def __call__(self, x):
        conv, norm = nn.Conv(4, (1, 1), name="twice"), nn.BatchNorm(True, name="shared_bn")
        a = nn.BatchNorm(True, name="a_bn")(conv(x))
        b = conv(x * 2)
        c = norm(nn.Conv(4, (1, 1), name="c")(x)) + norm(nn.Conv(4, (1, 1), name="d")(x))
        e = nn.Conv(4, (1, 1), name="read_twice")(x)
        e = nn.BatchNorm(True, name="e_bn")(e) + e
        return nn.BatchNorm(True, name="sum_bn")(a + b + c + e)


def test_shared_layers_and_norms_are_left_alone():
    x = small_nets.images()
    net, variables = small_nets.float_net(Shared(), x)
    folded = fold_bn(net, variables, x)
    assert folded_norms(folded) == set()
    jax.tree.map(np.testing.assert_array_equal, folded, variables)


class Own(nn.Module):
    """A norm that is not flax's: the graph looks the same, but nothing can switch it off."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", lambda: np.zeros(x.shape[-1], np.float32)).value
        return x - mean.reshape((1,) * (x.ndim - 1) + (-1,))


class WithOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Own(name="own")(nn.Conv(4, (1, 1), name="conv")(x))


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2), name="up")(x)
        x = nn.relu(nn.BatchNorm(True, name="up_bn")(x))
        x = nn.DenseGeneral((2, 6), axis=(-2, -1), name="general")(x)
        return nn.BatchNorm(True, name="general_bn")(x)


def test_a_norm_of_another_class_is_left_alone():
    x = small_nets.images()
    net, variables = small_nets.float_net(WithOwn(), x)
    assert folded_norms(fold_bn(net, variables, x)) == set()


def test_layers_that_do_not_honour_folding_are_left_and_several_feature_axes_work():
    x = small_nets.images()
    net, variables = small_nets.float_net(Transposed(), x)
    folded = fold_bn(net, variables, x)
    assert folded_norms(folded) == {"general_bn"}
    assert relative(net.apply(folded, x), net.apply(variables, x)) < 1e-5
    rules = [Rule("general", weight=Spec(8, granularity="channel"), input=Spec(8, signed=False))]
    net, variables = small_nets.calibrated(Transposed(), rules, x)
    folded = fold_bn(net, variables, x)
    assert folded_norms(folded) == {"general_bn"}
    assert relative(net.apply(folded, x), net.apply(variables, x)) < 1e-5


def test_two_norms_behind_a_biased_layer_keep_both_gains_whenever_folded():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="dense")(x)
            x = nn.BatchNorm(use_running_average=True, name="bn1")(x)
            return nn.BatchNorm(use_running_average=True, name="bn2")(x)

    x = jax.random.normal(jax.random.key(0), (8, 5))
    net = quantize(Net(), [Rule("dense", weight=Spec(4), input=Spec(8))])
    variables = calibrate(net, net.init(jax.random.key(1), x), [x])
    variables["params"]["dense"]["bias"] = jnp.arange(4.0)
    for i, name in enumerate(("bn1", "bn2")):
        variables["batch_stats"][name] = {"mean": jnp.arange(4.0), "var": jnp.arange(4.0) + 2 + i}
    want = net.apply(variables, x)
    once = fold_bn(net, variables, x)
    for folded in (once, fold_bn(net, once, x)):
        np.testing.assert_allclose(net.apply(folded, x), want, rtol=1e-5, atol=1e-5)
