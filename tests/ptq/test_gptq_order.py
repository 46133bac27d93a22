"""GPTQ by activation order: numbers of llm-compressor and GPTQModel, and groups that stay whole."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax.ptq import gptq
from qkd_jax.ptq.gptq_core import by_activation, quantize_columns

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "weight_only.npz")
SPEC = qk.Spec(4, granularity=32, narrow_range=False)


def test_static_groups_are_rounded_as_by_llm_compressor():
    weight, x, scale = (GOLDEN[f"gptq/{key}"] for key in ("weight", "inputs", "scale"))
    x = x.astype(np.float64)
    params = {"scale": scale.T[..., None], "zero_point": np.zeros((5, 12, 1))}
    found, kept = quantize_columns(weight, x.T @ x, params, SPEC, order="activation")
    np.testing.assert_allclose(found, GOLDEN["gptq/rounded"], atol=1e-5)
    np.testing.assert_array_equal(kept["scale"], params["scale"].astype(np.float32))
    plain, _ = quantize_columns(weight, x.T @ x, params, SPEC)
    assert (plain != found).mean() > 0.1
    error = lambda w: np.trace((w - weight) @ (x.T @ x) @ (w - weight).T)
    assert error(found) < error(plain)


def test_whole_groups_are_sorted_as_by_gptqmodel():
    x = GOLDEN["gptq/inputs"].astype(np.float64)
    diagonal = np.einsum("ij,ij->j", x, x)[None]
    found, wanted = by_activation(diagonal, 32)[0], GOLDEN["gptq/group_order"]
    # Equal columns come in no order of theirs.
    np.testing.assert_array_equal(diagonal[0, found], diagonal[0, wanted])
    np.testing.assert_array_equal(found // 32, wanted // 32)
    assert sorted(found) == list(range(160)) and (np.diff(found // 32) < 0).any()
    assert (np.diff(diagonal[0, by_activation(diagonal)[0]]) <= 0).all()


def restated(weight, hessian, order, group):
    """Groups take their scales at their turn; one row of weights, in float64."""
    weight, upper = weight.astype(np.float64).copy(), hessian.copy()
    upper += np.diag(0.01 * np.mean(np.diag(hessian)) * np.ones(len(hessian)))
    upper = np.linalg.cholesky(np.linalg.inv(upper[np.ix_(order, order)])).T
    scales = np.zeros(len(weight) // group)
    for turn, column in enumerate(order):
        own = column // group
        if turn % group == 0:
            members = weight[own * group : (own + 1) * group]
            scales[own] = max(members.min() / -8, members.max() / 7)
        code = np.clip(np.rint(weight[column] / scales[own]), -8, 7)
        error = (weight[column] - code * scales[own]) / upper[turn, turn]
        weight[order[turn + 1 :]] -= error * upper[turn, turn + 1 :]
        weight[column] = code * scales[own]
    return weight, scales


def test_groups_get_their_scales_at_their_turn_and_stay_neighbours():
    weight, x = GOLDEN["gptq/weight"][:3], GOLDEN["gptq/inputs"].astype(np.float64)
    given = {"scale": np.full((5, 3, 1), 9.0), "zero_point": np.zeros((5, 3, 1))}
    found, params = quantize_columns(weight, x.T @ x, given, SPEC, group=32, order="activation")
    order = by_activation(np.diag(x.T @ x)[None], 32)[0]
    for row in range(3):
        want, scales = restated(weight[row], x.T @ x, order, 32)
        np.testing.assert_allclose(params["scale"][:, row, 0], scales, rtol=1e-4)
        np.testing.assert_allclose(found[row], want, atol=1e-4)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_weights_of_a_net_lie_on_contiguous_groups(static_groups, affine):
    x = GOLDEN["gptq/inputs"][:, :64].astype(np.float32)
    spec = qk.Spec(3, granularity=16, signed=not affine, symmetric=not affine)
    net = qk.quantize(nn.Dense(6), [qk.Rule("", weight=spec)])
    floats = net.init(jax.random.key(0), x)
    variables = qk.calibrate(net, floats, [x])
    options = dict(order="activation", static_groups=static_groups)
    found = gptq(net, variables, [x], **options)
    old, new = (t["quant"]["weight_quantizer"]["scale"] for t in (variables, found))
    assert np.array_equal(old, new) == static_groups
    kernel = np.asarray(found["params"]["kernel"]).reshape(4, 16, 6)
    codes = kernel / np.asarray(new)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    error = lambda v: float(jnp.mean((net.apply(v, x) - net.apply(floats, x)) ** 2))
    assert error(found) < 0.9 * error(variables)


def test_orders_of_grouped_convolutions_are_their_own():
    # Each group of the convolution sees other channels, so each matrix has an order of its own.
    rng = np.random.default_rng(0)
    sizes = np.array([1, 9, 2, 3, 30, 1, 1, 5], np.float32)
    x = rng.normal(size=(6, 7, 7, 8)).astype(np.float32) * sizes
    spec = qk.Spec(3, granularity="channel")
    model = lambda groups, n: nn.Conv(n, (3, 3), feature_group_count=groups, use_bias=False)
    net, half = (qk.quantize(model(*size), [qk.Rule("", weight=spec)]) for size in ((2, 6), (1, 3)))
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    found = gptq(net, variables, [x], order="activation")["params"]["kernel"]
    for part in (0, 1):
        inputs, outs = x[..., 4 * part : 4 * part + 4], slice(3 * part, 3 * part + 3)
        own = jax.tree.map(lambda a, outs=outs: a[..., outs] if a.ndim else a, variables)
        alone = gptq(half, own, [inputs], order="activation")["params"]["kernel"]
        np.testing.assert_allclose(found[..., outs], alone, atol=1e-5)


def test_what_is_refused():
    x = np.ones((4, 8), np.float32)
    net = qk.quantize(nn.Dense(4), [qk.Rule("", weight=qk.Spec(4))])
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    with pytest.raises(ValueError, match="order is 'act'"):
        gptq(net, variables, [x], order="act")
    with pytest.raises(ValueError, match="propagation is 2"):
        gptq(net, variables, [x], propagation=2)
    with pytest.raises(ValueError, match="sequential=False"):
        gptq(net, variables, [x], propagation=0.5, sequential=False)
