"""Folded rotations: exact in float64, through norms and scans, and better codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rotated_nets import IMAGES, RULES, check_exact, in_float64, relative, vit, wide_channels

import qkd_jax as qk
from qkd_jax.ptq import rotate, rotate_inputs


@pytest.mark.parametrize("pool", ["class", pytest.param("mean", marks=pytest.mark.slow)])
def test_a_transformer_computes_what_it_did_in_float64(pool):
    turned, variables = check_exact(rotate, pool)
    assert jax.tree.structure(turned) == jax.tree.structure(variables)
    np.testing.assert_array_equal(turned["params"]["norm"]["scale"], 1)
    np.testing.assert_array_equal(turned["params"]["norm"]["bias"], 0)


class Block(nn.Module):
    """A residual block behind an RMSNorm, as a step of a scan."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(20, use_bias=False, name="up")(nn.RMSNorm(name="norm")(x))
        return x + nn.Dense(10, use_bias=False, name="down")(nn.silu(y)), None


class Scanned(nn.Module):
    """A table, scanned blocks of a width that has no Hadamard matrix, a norm, a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Dense(10, use_bias=False, name="embed")(jax.nn.one_hot(tokens, 7))
        blocks = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(7, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def test_scanned_blocks_and_widths_without_a_hadamard_matrix():
    tokens = np.arange(15).reshape(3, 5) % 7
    with jax.enable_x64(True):
        net = qk.quantize(Scanned())
        variables = net.init(jax.random.key(0), tokens)
        variables = in_float64(variables, np.random.default_rng(1))
        lines = []
        turned = rotate(net, variables, tokens, report=lines.append)
        assert relative(net.apply(turned, tokens), net.apply(variables, tokens)) < 1e-10
        assert len(lines) == 1 and "read by blocks/up, head" in lines[0]
        np.testing.assert_array_equal(turned["params"]["blocks"]["norm"]["scale"], 1)
        kernels = [t["params"]["blocks"]["down"]["kernel"] for t in (turned, variables)]
        assert all(relative(*(k[:, step] for k in kernels)) > 0.1 for step in range(3))


class PostNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(8, name="first")(x))
        return nn.Dense(8, name="second")(x + nn.relu(x))


class Summed(nn.Module):
    """The bias of the norm reaches the head once for each position."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(8, name="first")(x))
        return nn.Dense(8, name="head")(x.sum(1))


def test_what_cannot_be_rotated_says_why():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    for model, why in ((PostNorm(), "max in .* reads it"), (Summed(), "its bias finds no place")):
        net = qk.quantize(model)
        with pytest.raises(ValueError, match=f"norm 'norm' is not followed by layers: .*{why}"):
            rotate(net, net.init(jax.random.key(0), x), x)
    plain = qk.quantize(nn.Sequential((nn.Dense(4), nn.relu, nn.Dense(2))))
    with pytest.raises(ValueError, match="rotate_inputs"):
        rotate(plain, plain.init(jax.random.key(0), x), x)
    net = qk.quantize(nn.Dense(4), [qk.Rule("", input=qk.Spec(4))])
    variables = net.init(jax.random.key(0), x)
    calibrated = qk.calibrate(net, variables, [x])
    for method in (rotate, rotate_inputs):
        with pytest.raises(ValueError, match="calibrated"):
            method(net, calibrated, x)
        with pytest.raises(ValueError, match="seed is -1"):
            method(net, variables, x, seed=-1)
    with pytest.raises(ValueError, match="layers is 'mlp', which matches no layer"):
        rotate_inputs(net, variables, x, layers="mlp")


def test_four_bit_activations_lose_less_where_channels_are_wide():
    images = np.asarray(IMAGES, np.float32)
    net = qk.quantize(vit(width=64), RULES)
    variables = wide_channels(net.init(jax.random.key(0), images)["params"])
    want = net.apply(variables, images)
    error = lambda v: float(
        jnp.mean((net.apply(qk.calibrate(net, v, [images]), images) - want) ** 2)
    )
    folded = rotate(net, variables, images)
    both = rotate_inputs(net, folded, images, layers=".*(out|mlp2)")
    nearest, turned, all_turned = error(variables), error(folded), error(both)
    assert turned < 0.6 * nearest and all_turned < 0.3 * nearest


def test_a_tensor_that_is_multiplied_by_itself_stays():
    class Gram(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="embed")(x)
            gram = jnp.einsum("bic,bid->bdc", x, x).swapaxes(1, 2)
            return nn.Dense(4, name="head")(gram)

    x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
    net = qk.quantize(Gram(), [qk.Rule(".*", weight=qk.Spec(4))])
    with pytest.raises(ValueError, match="no tensor of this net can be rotated"):
        rotate(net, net.init(jax.random.key(0), x), x)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_kernels_of_half_precision_are_cast_after_their_marker(dtype):
    """The cast kernel that the product reads is no second reader of the variable."""
    options = dict(param_dtype=jnp.bfloat16, dtype=dtype)
    model = nn.Sequential((nn.Dense(8, **options), nn.RMSNorm(**options), nn.Dense(4, **options)))
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(8, granularity="channel"))])
    variables = net.init(jax.random.key(0), x)
    turned = rotate(net, variables, x)
    kernels = [v["params"]["layers_0"]["kernel"] for v in (turned, variables)]
    assert kernels[0].dtype == jnp.bfloat16 and relative(*kernels) > 0.1
    assert relative(net.apply(turned, x), net.apply(variables, x)) < 0.03
    lines = []
    qk.ptq.awq(net, variables, [x], clip=False, steps=2, report=lines.append)
    assert any(line.startswith("scaled layers_2 by layers_1") for line in lines)


def test_the_order_of_rotations_and_patterns_are_said():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    model = nn.Sequential((nn.Dense(8), nn.RMSNorm(), nn.Dense(4)))
    net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4), input=qk.Spec(4))])
    variables = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"layers is '\(', which is no regular expression"):
        rotate_inputs(net, variables, x, layers="(")
    with pytest.raises(ValueError, match="unclipped is 3, which is no regular expression"):
        qk.ptq.awq(net, variables, [x], unclipped=3)
    with pytest.raises(ValueError, match="call `rotate` before `rotate_inputs`"):
        rotate(net, rotate_inputs(net, variables, x), x)
