"""HQQ: zero points are those of the `hqq` package, and the p-norm of the error falls."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import lifted_nets
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax.numerics import IntFormat
from qkd_jax.ptq.hqq import fitted_codes, half_quadratic, hqq, shrink, updated_zero_point

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "weight_only.npz")


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_steps_with_free_zero_points_are_those_of_the_package(bits):
    weight = GOLDEN["hqq/weight"].astype(np.float64)
    low, high = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    scale, format = (high - low) / (2**bits - 1), IntFormat(bits, signed=False)
    zero, beta = -low / scale, 10.0
    for step in range(1, 21):
        fitted = fitted_codes(weight, scale, zero, format)
        zero = updated_zero_point(weight, fitted, shrink(weight - fitted.values, beta, 0.7))
        beta *= 1.01
        if step in (2, 20):
            want = GOLDEN[f"hqq/uint{bits}/zero_{step}"]
            np.testing.assert_allclose(zero, want, rtol=1e-4, atol=1e-4)
            codes = fitted_codes(weight, scale, zero, format).codes
            wrong = np.mean(codes != GOLDEN[f"hqq/uint{bits}/codes_{step}"])
            assert wrong < 1e-3  # float32 beside a boundary


def test_the_proximal_step_minimises_its_function():
    # shrink is one step towards argmin |e|^p + beta/2 |e - x|^2 (their equation 4), p = 1 exactly.
    x = np.array([-3.0, -0.05, 0.0, 0.2, 2.0])
    np.testing.assert_allclose(shrink(x, 10.0, 1.0), [-2.9, 0, 0, 0.1, 1.9], atol=1e-12)
    assert shrink(np.array([1e-3]), 10.0, 0.5) == 0


def norm(weight, scale, zero, bits, affine, p=0.7):
    qmin, qmax = (0, 2**bits - 1) if affine else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = np.clip(np.rint(weight / scale) + zero, qmin, qmax)
    return (np.abs(weight - (codes - zero) * scale) ** p).sum(-1)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("granularity", [32, "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_grid_is_at_least_as_good_and_outliers_count_less(affine, granularity, bits):
    rng = np.random.default_rng(0)
    kernel = rng.standard_t(3, size=(64, 6)).astype(np.float32)
    spec = qk.Spec(bits, signed=not affine, symmetric=not affine, granularity=granularity)
    net = qk.quantize(nn.Dense(6, use_bias=False), [qk.Rule("", weight=spec)])
    x = np.ones((2, 64), np.float32)
    variables = qk.calibrate(net, {"params": {"kernel": jnp.asarray(kernel)}}, [x])
    found = hqq(net, variables, x)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_array_equal(found["params"]["kernel"], kernel)
    rows = {"tensor": kernel.reshape(1, -1), "channel": kernel.T}.get(
        granularity, kernel.reshape(2, 32, 6).transpose(0, 2, 1)
    )
    norms = []
    for tree in (variables, found):
        own = tree["quant"]["weight_quantizer"]
        scale, zero = (
            np.asarray(own[k], np.float64).reshape(*rows.shape[:-1], 1)
            for k in ("scale", "zero_point")
        )
        assert np.array_equal(zero, np.rint(zero))
        norms.append(norm(rows.astype(np.float64), scale, zero, bits, affine))
    assert (norms[1] <= norms[0] * (1 + 1e-6)).all()
    assert norms[1].sum() < {2: 0.9, 4: 0.99}[bits] * norms[0].sum()


def test_beta_does_not_depend_on_the_weights_unit():
    rng = np.random.default_rng(1)
    weight, format = rng.standard_t(3, size=(5, 40)), IntFormat(3, signed=True)
    scale, zero = np.abs(weight).max(-1, keepdims=True) / 4, np.zeros((5, 1))
    one = half_quadratic(weight, scale, zero, format, affine=False)
    other = half_quadratic(weight * 1e-3, scale * 1e-3, zero, format, affine=False)
    np.testing.assert_allclose(other.scale, one.scale * 1e-3)


@pytest.mark.parametrize("kind", ["scan", "own"])
def test_steps_and_members_are_layers_of_their_own(kind):
    x = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    rules = [qk.Rule("head"), qk.Rule(".*", weight=qk.Spec(3, granularity=2, symmetric=False))]
    net, twin = (qk.quantize(lifted_nets.Net(kind, 0, apart), rules) for apart in (False, True))
    variables = qk.calibrate(net, net.init(jax.random.key(1), x), [x])
    apart = {k: lifted_nets.written_out(tree, kind, 0) for k, tree in variables.items()}
    found, wanted = hqq(net, variables, x), hqq(twin, apart, x)
    found = {k: lifted_nets.written_out(tree, kind, 0) for k, tree in found.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)
    old, new = (v["quant"]["layers"] for v in (variables, hqq(net, variables, x)))
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    )


class Tables(nn.Module):
    """A table that is looked up, a convolution, and a dense layer that runs twice."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 8, name="table")(tokens)
        x = nn.Conv(8, (3,), name="conv")(x)
        twice = nn.Dense(8, name="twice")
        return twice(nn.relu(twice(x)))


def test_tables_convolutions_and_shared_layers():
    tokens = np.arange(12).reshape(2, 6) % 7
    spec = qk.Spec(2, quantizer="lsq", granularity="channel")
    net = qk.quantize(Tables(), [qk.Rule(".*", weight=spec)])
    variables = qk.calibrate(net, net.init(jax.random.key(0), tokens), [tokens], observer="minmax")
    lines = []
    found = hqq(net, variables, tokens, report=lines.append)
    assert [line.split()[1] for line in lines] == ["table:", "conv:", "twice:"]
    for name in ("table", "conv", "twice"):
        steps = [t["quant"][name]["weight_quantizer"]["step"] for t in (variables, found)]
        assert steps[0].shape == steps[1].shape and np.any(steps[0] != steps[1])


def test_what_is_refused():
    x = np.ones((4, 8), np.float32)
    net, variables = small_nets.float_net(nn.Dense(4), x, [qk.Rule("", weight=qk.Spec(4))])
    with pytest.raises(ValueError, match="no weight quantizers"):
        hqq(net, variables, x)
    calibrated = qk.calibrate(net, variables, [x])
    for field, value in (("p", 0), ("p", 1.5), ("beta", 0), ("kappa", 0.5), ("steps", 0)):
        with pytest.raises(ValueError, match=f"{field} is"):
            hqq(net, calibrated, x, **{field: value})
    for spec in (qk.Spec(3, quantizer="codebook"), qk.Spec(4, power_of_two=True)):
        other, marked = small_nets.calibrated(nn.Dense(4), [qk.Rule("", weight=spec)], x)
        with pytest.raises(ValueError, match="hqq fits static scales"):
            hqq(other, marked, x)
