"""Post-training methods on scanned and vmapped layers against the net with each written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import lifted_nets
import numpy as np
import pytest

import qkd_jax as qk

# Not around 0, so that the errors of a row add up and its nearest rounding is not the best.
X = (3 + np.random.default_rng(3).normal(size=(16, 4))).astype(np.float32)


def calibrated(kind, axis, granularity="channel", bits=3):
    """Returns (net, variables, twin, its variables)."""
    spec = qk.Spec(bits, granularity=granularity)
    rules = [qk.Rule("head"), qk.Rule(".*", weight=spec, input=qk.Spec(8, symmetric=False))]
    net, twin = (qk.quantize(lifted_nets.Net(kind, axis, apart), rules) for apart in (False, True))
    floats = net.init(jax.random.key(1), X)
    kernel = floats["params"]["layers"]["up"]["kernel"]
    sizes = np.exp(np.random.default_rng(1).normal(size=kernel.shape)).astype(np.float32)
    floats["params"]["layers"]["up"]["kernel"] = kernel * sizes
    variables = qk.calibrate(net, floats, [X])
    apart = {k: lifted_nets.written_out(tree, kind, axis) for k, tree in variables.items()}
    return net, variables, twin, apart


def same(found, wanted, kind, axis):
    found = {k: lifted_nets.written_out(tree, kind, axis) for k, tree in found.items()}
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


@pytest.mark.parametrize(
    ("kind", "axis", "granularity"),
    [
        ("scan", 1, 2),
        ("shared", 0, "tensor"),
        ("own", 0, 2),
        pytest.param("shared", 1, 2, marks=pytest.mark.slow),
        pytest.param("own", -1, "tensor", marks=pytest.mark.slow),
        pytest.param("both", 0, "tensor", marks=pytest.mark.slow),
    ],
)
def test_gptq_rounds_each_step_and_member_as_a_layer_of_its_own(kind, axis, granularity):
    net, variables, twin, apart = calibrated(kind, axis, granularity)
    lines = []
    found = qk.ptq.gptq(net, variables, [X], report=lines.append)
    # A member whose kernel is not stored first is moved for its product and stays, as it says.
    if any("left" in line for line in lines):
        pytest.fail(str(lines))
    same(found, qk.ptq.gptq(twin, apart, [X]), kind, axis)
    assert np.any(
        found["params"]["layers"]["up"]["kernel"] != variables["params"]["layers"]["up"]["kernel"]
    )


@pytest.mark.parametrize(("kind", "axis"), [("shared", 1), ("own", 0)])
def test_biases_are_corrected_at_their_own_member(kind, axis):
    net, variables, twin, apart = calibrated(kind, axis)
    found = qk.ptq.correct_bias(net, variables, [X])
    same(found, qk.ptq.correct_bias(twin, apart, [X]), kind, axis)
    before = variables["params"]["layers"]["up"]["bias"]
    assert np.abs(found["params"]["layers"]["up"]["bias"] - before).max() > 1e-3


@pytest.mark.parametrize(("kind", "axis"), [("scan", 1), ("own", 1)])
def test_learned_rounding_lowers_the_error_of_every_member(kind, axis):
    net, variables, _, _ = calibrated(kind, axis, "tensor")
    target = net.apply({"params": variables["params"]}, X)
    found = qk.ptq.adaround(net, variables, [X], steps=300, lr=0.05, batch_size=16)
    error = lambda v: float(jnp.mean((net.apply(v, X) - target) ** 2))
    assert error(found) < error(variables)
    jax.tree.map(np.testing.assert_array_equal, found["quant"], variables["quant"])
    kernel, old = (v["params"]["layers"]["up"]["kernel"] for v in (found, variables))
    scale = variables["quant"]["layers"]["up"]["weight_quantizer"]["scale"]
    codes = np.asarray(kernel / scale)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    inside = np.clip(old / scale, -4, 3)  # up or down, and nowhere else
    assert np.abs(codes - inside).max() < 1.001


def test_steps_that_are_learned_in_a_scan_stay_those_of_their_step():
    net, variables, _, _ = calibrated("scan", 1)
    found = qk.ptq.qdrop(net, variables, [X], steps=20, step_lr=1e-3)
    old, new = (v["quant"]["layers"]["up"]["input_quantizer"]["scale"] for v in (variables, found))
    assert new.shape == old.shape == (1, 3, 1)
    moved = np.asarray(new / old).ravel()
    assert np.all(np.abs(moved - 1) > 1e-5) and np.all(np.abs(moved - 1) < 0.5)


class Convolutions(nn.Module):
    """Two members of a convolution over inputs of very different size."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Conv,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=-1,
            out_axes=-1,
        )
        x = members(3, (3, 3), name="members")(jnp.stack([x, 50 * x], -1))
        return nn.Dense(2, name="head")(x.mean((1, 2, 4)))


def test_convolutions_of_members_with_scales_of_their_own():
    # JAX runs them as one grouped convolution, whose input's scales lie along its channels.
    x = np.random.default_rng(0).normal(size=(3, 5, 5, 2)).astype(np.float32)
    rules = [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(8, symmetric=False))]
    net = qk.quantize(Convolutions(), rules)
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    scales = np.ravel(variables["quant"]["members"]["input_quantizer"]["scale"])
    np.testing.assert_allclose(scales[1], 50 * scales[0], rtol=1e-5)
    out = qk.integer_apply(qk.convert(net, variables, x), x)
    np.testing.assert_allclose(out, net.apply(variables, x), rtol=1e-5, atol=1e-5)  # of a mean
    with pytest.raises(
        ValueError, match=r"rearranged for its product .*'members'|'members'.*rearr"
    ):
        qk.ptq.adaround(net, variables, [x], steps=1)
    qk.ptq.gptq(net, variables, [x])


@pytest.mark.parametrize(
    ("kind", "axis", "granularity"),
    [
        ("shared", 0, "tensor"),
        ("own", -1, "channel"),
        ("both", 1, "tensor"),
        pytest.param("scan", 1, "tensor", marks=pytest.mark.slow),
        pytest.param("shared", 1, "channel", marks=pytest.mark.slow),
        pytest.param("own", 0, "tensor", marks=pytest.mark.slow),
        pytest.param("both", -1, "channel", marks=pytest.mark.slow),
    ],
)
def test_integers_are_those_of_the_net(kind, axis, granularity):
    net, variables, twin, apart = calibrated(kind, axis, granularity, 8)
    out = net.apply(variables, X)
    np.testing.assert_array_equal(qk.integer_apply(qk.convert(net, variables, X), X), out)
    np.testing.assert_allclose(twin.apply(apart, X), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "granularity"), [("shared", "token"), ("own", "tensor")])
def test_dynamic_ranges_of_members_are_their_own(kind, granularity):
    spec = qk.Spec(8, symmetric=False, dynamic=True, granularity=granularity)
    rules = [qk.Rule(".*", weight=qk.Spec(8, granularity="channel"), input=spec)]
    net, twin = (qk.quantize(lifted_nets.Net(kind, 0, apart), rules) for apart in (False, True))
    variables = qk.calibrate(net, net.init(jax.random.key(1), X), [X])
    apart = {k: lifted_nets.written_out(tree, kind, 0) for k, tree in variables.items()}
    out = net.apply(variables, X)
    np.testing.assert_array_equal(qk.integer_apply(qk.convert(net, variables, X), X), out)
    np.testing.assert_allclose(twin.apply(apart, X), out, rtol=1e-5, atol=1e-5)
