"""Equalization: the function stays, the ranges meet, and what has other readers is untouched."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.numerics import Spec
from qkd_jax.ptq import equalization_pairs, equalize, fold_bn
from qkd_jax.quantize import Rule


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def out_range(variables, layer):
    kernel = np.asarray(variables["params"][layer]["kernel"])
    return np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))


def in_range(variables, layer):
    kernel = np.asarray(variables["params"][layer]["kernel"])
    return np.abs(kernel).max(axis=tuple(i for i in range(kernel.ndim) if i != kernel.ndim - 2))


@pytest.fixture(scope="module")
def mixed():
    x = small_nets.images()
    net, variables = small_nets.float_net(small_nets.Mixed(), x)
    return net, fold_bn(net, variables, x), x


def test_pairs_of_a_net_with_residual_depthwise_and_pooled_layers(mixed):
    # The stem is read by the add too, `dilated` runs into it, and the pools behind it read the sum.
    assert equalization_pairs(*mixed) == [
        ("depthwise", "grouped"),
        ("grouped", "dilated"),
        ("hidden", "head"),
    ]


def test_the_function_stays_and_the_ranges_meet(mixed):
    net, folded, x = mixed
    found = equalize(net, folded, x, sweeps=50, tolerance=1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(folded)
    assert relative(net.apply(found, x), net.apply(folded, x)) < 1e-5
    np.testing.assert_allclose(out_range(found, "hidden"), in_range(found, "head"), rtol=1e-4)
    assert relative(out_range(folded, "hidden"), in_range(folded, "head")) > 0.1
    # `grouped` has two groups of four: its input ranges, by group.
    kernel = np.abs(np.asarray(found["params"]["grouped"]["kernel"]))
    inputs = np.concatenate([kernel[..., :4].max((0, 1, 3)), kernel[..., 4:].max((0, 1, 3))])
    np.testing.assert_allclose(out_range(found, "depthwise"), inputs, rtol=1e-4)
    for layer in ("stem",):
        np.testing.assert_array_equal(
            found["params"][layer]["kernel"], folded["params"][layer]["kernel"]
        )


def test_folded_norms_go_on_saying_what_comes_out(mixed):
    net, folded, x = mixed
    found = equalize(net, folded, x)
    factor = np.asarray(folded["params"]["hidden"]["bias"]) / np.asarray(
        found["params"]["hidden"]["bias"]
    )
    for name in ("scale", "bias"):
        np.testing.assert_allclose(
            np.asarray(folded["params"]["hidden_bn"][name])
            / np.asarray(found["params"]["hidden_bn"][name]),
            factor,
            rtol=1e-5,
        )


class Separable(nn.Module):
    """Pointwise, depthwise, pointwise without biases of their own, pooled and flattened."""

    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        act = {"relu": nn.relu, "relu6": nn.relu6, "silu": nn.silu, "none": lambda x: x}
        act = act[self.activation]
        x = act(nn.Conv(6, (1, 1), name="expand")(x))
        x = act(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depth")(x))
        x = act(nn.Conv(5, (1, 1), use_bias=False, name="project")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.avg_pool(x, (2, 2), (1, 1))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_depthwise_triple_is_solved_in_one_step(activation):
    x = small_nets.images()
    net, variables = small_nets.float_net(Separable(activation), x)
    assert equalization_pairs(net, variables, x) == [
        ("expand", "depth", "project"),
        ("project", "head"),
    ]
    found = equalize(net, variables, x, sweeps=1)
    assert relative(net.apply(found, x), net.apply(variables, x)) < 1e-5
    r1, r2 = out_range(variables, "expand"), out_range(variables, "depth")
    mean = np.cbrt(r1 * r2 * in_range(variables, "project"))
    # S1 = r1 / (r1 r2 r3)^(1/3): what remains is the mean.
    np.testing.assert_allclose(out_range(found, "expand"), mean, rtol=1e-5)
    np.testing.assert_allclose(out_range(found, "depth"), mean, rtol=1e-5)
    # The head reads five channels at each of its positions; both share a factor.
    kernel = np.abs(np.asarray(found["params"]["head"]["kernel"])).reshape(-1, 5, 4)
    found = equalize(net, variables, x)
    kernel = np.abs(np.asarray(found["params"]["head"]["kernel"])).reshape(-1, 5, 4)
    np.testing.assert_allclose(out_range(found, "project"), kernel.max((0, 2)), rtol=2e-3)


@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_activations_that_are_not_homogeneous_part_no_pairs(activation):
    x = small_nets.images()
    net, variables = small_nets.float_net(Separable(activation), x)
    assert equalization_pairs(net, variables, x) == []
    jax.tree.map(np.testing.assert_array_equal, equalize(net, variables, x), variables)


def test_dead_channels_keep_their_factor():
    x = small_nets.images()
    net, variables = small_nets.float_net(Separable(), x)
    kernel = variables["params"]["expand"]["kernel"]
    variables["params"]["expand"]["kernel"] = kernel.at[..., 2].set(0)
    found = equalize(net, variables, x, sweeps=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert relative(net.apply(found, x), net.apply(variables, x)) < 1e-5
    np.testing.assert_array_equal(
        found["params"]["depth"]["kernel"][..., 2], variables["params"]["depth"]["kernel"][..., 2]
    )
    assert found["params"]["expand"]["bias"][2] == variables["params"]["expand"]["bias"][2]


class Readers(nn.Module):
    """What has another reader, is shared, or is shifted by a constant without a variable."""

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Dense(4, name="read_by_two")(x))
        b = nn.relu(nn.Dense(4, name="b")(a))
        c = nn.relu(nn.Dense(4, name="c")(a) + 1.0)
        d = nn.Dense(4, name="shared")
        e = nn.Dense(4, name="summed")(b) + d(b) + d(c)
        f = jax.nn.leaky_relu(nn.Dense(4, name="out")(nn.relu(e)), 0.2)
        return nn.Dense(4, name="last")(f)


def test_other_readers_shared_layers_and_constants_part_no_pairs():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    net, variables = small_nets.float_net(Readers(), x)
    assert equalization_pairs(net, variables, x) == []


class Result(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(4, name="hidden")(x))
        return hidden, nn.Dense(4, name="head")(hidden)


def test_what_the_net_returns_is_not_rescaled():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    net, variables = small_nets.float_net(Result(), x)
    assert equalization_pairs(net, variables, x) == []


def test_report_names_the_chains(mixed):
    lines = []
    equalize(*mixed, report=lines.append)
    assert len(lines) == 3 and "depthwise -> grouped" in lines[0]


def test_what_is_refused(mixed):
    net, folded, x = mixed
    _, unfolded = small_nets.float_net(small_nets.Mixed(), x)
    with pytest.raises(ValueError, match=r"'depthwise_bn' stands between.*`fold_bn` first"):
        equalize(net, unfolded, x)
    with pytest.raises(ValueError, match="sweeps"):
        equalize(net, folded, x, sweeps=0)
    with pytest.raises(ValueError, match="tolerance"):
        equalize(net, folded, x, tolerance=-1.0)
    quantizer = {"weight_quantizer": {"scale": jnp.ones(())}}
    with pytest.raises(ValueError, match=r"variables are calibrated.*equalize first"):
        equalize(net, {**folded, "quant": {"stem": quantizer}}, x)
    kept = {"stem": {"folded": {"multiplier": jnp.ones(8)}}}
    with pytest.raises(ValueError, match="equalize before `fold_bn`"):
        equalize(net, {**folded, "quant": kept}, x)


def test_rules_make_no_difference_before_calibration(mixed):
    net, folded, x = mixed
    rules = [Rule(".*", weight=Spec(4), input=Spec(8, symmetric=False), output=None)]
    other, _ = small_nets.float_net(small_nets.Mixed(), x, rules)
    jax.tree.map(
        np.testing.assert_array_equal, equalize(other, folded, x), equalize(net, folded, x)
    )
