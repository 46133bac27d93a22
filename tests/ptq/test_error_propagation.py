"""Error propagation: qwix's corrected weights, the least-squares optimum, and nets that gain."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import lifted_nets
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax import data
from qkd_jax.ptq import gptq, propagate_errors
from qkd_jax.ptq.error_propagation import corrected_weight

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "weight_only.npz")


def moments():
    weight, x, noisy = (
        GOLDEN[f"qep/{k}"].astype(np.float64) for k in ("weight", "inputs", "noisy")
    )
    return weight, x, noisy, noisy.T @ noisy, (x - noisy).T @ noisy


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_corrected_weights_are_those_of_qwix(strength):
    weight, _, _, hessian, change = moments()
    found = corrected_weight(weight, hessian, change, strength=strength)
    want = GOLDEN[f"qep/corrected_{strength}"]
    assert np.abs(want - weight).max() > 0.05
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_in_full_strength_it_is_the_least_squares_solution():
    weight, x, noisy, hessian, change = moments()
    found = corrected_weight(weight, hessian, change, strength=1.0, percdamp=1e-12)
    want, *_ = np.linalg.lstsq(noisy, x @ weight.T, rcond=None)
    np.testing.assert_allclose(found, want.T, rtol=1e-8, atol=1e-10)


def test_channels_that_are_never_seen_get_zero_weights():
    hessian, change = np.diag([4.0, 0.0]), np.diag([1.0, 0.0])
    found = corrected_weight(np.ones((1, 2)), hessian, change, strength=1.0, percdamp=1e-9)
    np.testing.assert_allclose(found, [[1.25, 0]], rtol=1e-6)


class Net(nn.Module):
    """A convolution and three dense layers, wide enough to be quantized in groups."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv")(x))
        x = nn.relu(nn.Dense(32, name="first")(x.reshape(x.shape[0], -1)))
        x = nn.relu(nn.Dense(32, name="second")(x))
        return nn.Dense(10, name="head")(x)


@pytest.fixture(scope="module")
def digits():
    source = data.load("digits")
    images = np.concatenate([source.train_images, source.test_images])
    return source.normalize(images).astype(np.float32)


@pytest.fixture(scope="module")
def floats(digits):
    # A random net is one whose errors do not happen to cancel.
    return Net().init(jax.random.key(0), digits[:1])


@pytest.mark.parametrize(
    "spec",
    [
        qk.Spec(2, granularity=16),
        pytest.param(qk.Spec(2, granularity="channel"), marks=pytest.mark.slow),
        pytest.param(
            qk.Spec(2, granularity=16, signed=False, symmetric=False), marks=pytest.mark.slow
        ),
    ],
)
def test_logits_of_images_that_were_not_shown_lose_less(digits, floats, spec):
    net = qk.quantize(Net(), [qk.Rule("conv", weight=qk.Spec(2)), qk.Rule(".*", weight=spec)])
    shown, others = digits[:600], digits[600:1000]
    variables = qk.calibrate(net, floats, [shown[:300], shown[300:]])
    error = lambda v: float(jnp.mean((net.apply(v, others) - net.apply(floats, others)) ** 2))
    nearest = error(variables)
    lines = []
    found = propagate_errors(net, variables, [shown[:300], shown[300:]], report=lines.append)
    assert error(found) < 0.8 * nearest
    # Nothing is in front of the first layer.
    assert [line.split()[1] for line in lines] == ["first:", "second:", "head:"]
    jax.tree.map(np.testing.assert_array_equal, found["params"]["conv"], floats["params"]["conv"])
    rounded = gptq(net, variables, [shown])
    both = gptq(net, variables, [shown], propagation=0.5)
    assert error(both) < error(rounded) < nearest


def test_the_second_layer_by_its_own_definition(digits, floats):
    net = qk.quantize(
        Net(), [qk.Rule("conv|first", weight=qk.Spec(3, granularity="channel")), qk.Rule(".*")]
    )
    x = digits[:500]
    variables = qk.calibrate(net, floats, [x])
    found = propagate_errors(net, variables, [x[:200], x[200:]], strength=0.7)

    def inputs(tree):
        _, state = net.apply(tree, x, capture_intermediates=True, mutable=["intermediates"])
        out = np.asarray(state["intermediates"]["conv"]["__call__"][0], np.float64)
        return np.maximum(out, 0).reshape(len(x), -1)

    plain, quantized = inputs(floats), inputs(variables)
    hessian = quantized.T @ quantized
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian)) + np.diag(
        np.diag(hessian) == 0
    )
    kernel = np.asarray(floats["params"]["first"]["kernel"], np.float64)
    kernel = np.where((quantized**2).sum(0)[:, None] == 0, 0, kernel)
    want = kernel + 0.7 * np.linalg.solve(hessian, quantized.T @ (plain - quantized)) @ kernel
    got = np.asarray(found["params"]["first"]["kernel"])
    np.testing.assert_allclose(got, want, atol=2e-4)
    scale = found["quant"]["first"]["weight_quantizer"]["scale"]
    top = np.maximum(want.max(0) / 3, want.min(0) / -4)
    np.testing.assert_allclose(np.ravel(scale), top, rtol=1e-3)  # measured again


@pytest.mark.parametrize(("kind", "granularity"), [("scan", 2), ("own", "channel")])
def test_steps_and_members_are_layers_of_their_own(kind, granularity):
    x = (3 + np.random.default_rng(3).normal(size=(64, 4))).astype(np.float32)
    rules = [
        qk.Rule("head", weight=qk.Spec(3)),
        qk.Rule(
            ".*", weight=qk.Spec(3, granularity=granularity), input=qk.Spec(4, symmetric=False)
        ),
    ]
    net, twin = (qk.quantize(lifted_nets.Net(kind, 0, apart), rules) for apart in (False, True))
    variables = qk.calibrate(net, net.init(jax.random.key(1), x), [x])
    apart = {k: lifted_nets.written_out(tree, kind, 0) for k, tree in variables.items()}
    found, wanted = (propagate_errors(n, v, [x]) for n, v in ((net, variables), (twin, apart)))
    found = {k: lifted_nets.written_out(tree, kind, 0) for k, tree in found.items()}
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, wanted)
    kernels = [v["params"]["head"]["kernel"] for v in (found, variables)]
    assert np.any(kernels[0] != kernels[1])


def test_what_is_refused():
    x = np.ones((4, 8), np.float32)
    net, variables = small_nets.float_net(nn.Dense(4), x, [qk.Rule("", weight=qk.Spec(4))])
    with pytest.raises(ValueError, match="no weight quantizers"):
        propagate_errors(net, variables, [x])
    calibrated = qk.calibrate(net, variables, [x])
    with pytest.raises(ValueError, match=r"strength is 1\.5"):
        propagate_errors(net, calibrated, [x], strength=1.5)
    with pytest.raises(ValueError, match="percdamp"):
        propagate_errors(net, calibrated, [x], percdamp=0)
    with pytest.raises(ValueError, match="batches is empty"):
        propagate_errors(net, calibrated, [])
