"""Bias absorption: exact where the ReLU is always on and nothing is padded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.ptq import absorb_bias, equalize, fold_bn


class Net(nn.Module):
    """Two unpadded convolutions and a dense layer, normalised or not."""

    norm: bool = True
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=not self.norm, padding="VALID", name="first")(x)
        x = nn.BatchNorm(True, name="bn")(x) if self.norm else x
        x = nn.relu(x)
        x = nn.relu(nn.Conv(4, (2, 2), use_bias=False, padding=self.padding, name="second")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def setup():
    """Three of six channels lie far above zero; the rest cross it."""
    x = small_nets.images(16)
    net, variables = small_nets.float_net(Net(), x)
    raw = nn.Conv(6, (3, 3), use_bias=False, padding="VALID").apply(
        {"params": variables["params"]["first"]}, x
    )
    variables["batch_stats"]["bn"] = {"mean": raw.mean((0, 1, 2)), "var": raw.var((0, 1, 2))}
    variables["params"]["bn"] = {
        "scale": jnp.asarray([0.1, 0.2, 1.0, 1.0, -0.1, 1.0]),
        "bias": jnp.asarray([2.0, 3.0, 0.5, -1.0, 1.5, 0.0]),
    }
    return net, variables, x


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("how", ["analytic", "empirical"])
def test_what_is_always_passed_on_moves_into_the_next_bias(setup, folded, how):
    net, variables, x = setup
    start = fold_bn(net, variables, x) if folded else variables
    found = absorb_bias(net, start, [x[:7], x[7:]], how=how)
    c = np.asarray([1.7, 2.4, 0, 0, 1.2, 0])  # max(0, bias - 3 |scale|)
    shift = np.asarray(start["params"]["bn"]["bias"] - found["params"]["bn"]["bias"])
    # Measured moments are those that BatchNorm states, up to its epsilon.
    np.testing.assert_allclose(shift, c, atol=1e-6 if how == "analytic" else 1e-4)
    if folded:
        moved = (
            start["quant"]["first"]["folded"]["bias"] - found["quant"]["first"]["folded"]["bias"]
        )
        np.testing.assert_allclose(moved, shift, atol=1e-6)
    kernel = np.asarray(start["params"]["second"]["kernel"], np.float64)
    np.testing.assert_allclose(
        found["quant"]["second"]["folded"]["bias"],
        np.einsum("hwio,i->o", kernel, shift),
        rtol=1e-5,
        atol=1e-6,
    )
    # 3 deviations of a bounded sample: some values of channels 0, 1 and 4 may lie below c. Here
    # the function is compared where none does.
    raw = nn.Conv(6, (3, 3), use_bias=False, padding="VALID").apply(
        {"params": variables["params"]["first"]}, x
    )
    pre = nn.BatchNorm(True).apply(
        {"params": variables["params"]["bn"], "batch_stats": variables["batch_stats"]["bn"]}, raw
    )
    safe = np.asarray((np.maximum(np.asarray(pre), 0) >= shift - 1e-6).all((1, 2, 3)))
    assert safe.sum() >= 3
    want, got = net.apply(start, x[safe]), net.apply(found, x[safe])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_result_differs_next_to_padding_alone(setup):
    _, variables, x = setup
    net, _ = small_nets.float_net(Net(padding="SAME"), x)
    variables = {**variables, "params": {k: v for k, v in variables["params"].items()}}
    seen = []

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name == "second":
            seen.append(np.asarray(out))
        return out

    found = absorb_bias(net, with_head(variables, 4 * 7 * 9), [x], how="analytic", deviations=20.0)
    jax.tree.map(
        np.testing.assert_array_equal, found["params"], with_head(variables, 252)["params"]
    )
    found = absorb_bias(net, with_head(variables, 252), [x], how="analytic", deviations=6.0)
    with nn.intercept_methods(note):
        for v in (with_head(variables, 252), found):
            net.apply(v, x)
    # (2, 2) under SAME pads one row and one column at the end.
    np.testing.assert_allclose(seen[1][:, :-1, :-1], seen[0][:, :-1, :-1], rtol=1e-4, atol=1e-5)
    assert np.abs(seen[1][:, -1] - seen[0][:, -1]).max() > 0.1


def with_head(variables, size):
    head = {"kernel": jnp.ones((size, 3)) / size, "bias": jnp.zeros(3)}
    return {**variables, "params": {**variables["params"], "head": head}}


def test_after_equalization_the_statistics_still_hold(setup):
    net, variables, x = setup
    equalized = equalize(net, fold_bn(net, variables, x), x)
    how = [absorb_bias(net, equalized, [x], how=h) for h in ("analytic", "empirical")]
    for layer in ("first", "second"):
        a, b = (v["quant"][layer]["folded"]["bias"] for v in how)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert np.abs(how[0]["quant"]["second"]["folded"]["bias"]).max() > 0.1


def test_without_statistics_only_data_tell():
    x = small_nets.images(16)
    net, variables = small_nets.float_net(Net(norm=False), x)
    variables["params"]["first"]["bias"] = jnp.asarray([9.0, 0, 0, 12.0, 0, 0])
    lines = []
    found = absorb_bias(net, variables, [x], how="analytic", report=lines.append)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    # The second convolution's map is flattened behind its ReLU: no candidate.
    assert lines == ["left first: there are no statistics"]
    found = absorb_bias(net, variables, [{"image": x, "mask": np.arange(16) < 12}])
    pre = np.asarray(
        nn.Conv(6, (3, 3), padding="VALID").apply({"params": variables["params"]["first"]}, x[:12]),
        np.float64,
    ).reshape(-1, 6)
    c = np.maximum(0, pre.mean(0) - 3 * pre.std(0))
    assert (c > 0).sum() == 2
    np.testing.assert_allclose(
        variables["params"]["first"]["bias"] - found["params"]["first"]["bias"], c, atol=1e-5
    )


def test_what_is_refused(setup):
    net, variables, x = setup
    with pytest.raises(ValueError, match="how is 'data'"):
        absorb_bias(net, variables, [x], how="data")
    with pytest.raises(ValueError, match="deviations"):
        absorb_bias(net, variables, [x], deviations=-1.0)
    with pytest.raises(ValueError, match="batches is empty"):
        absorb_bias(net, variables, [])
    with pytest.raises(ValueError, match="needs 'image'"):
        absorb_bias(net, variables, [{"label": x}])
    quantizer = {"weight_quantizer": {"scale": jnp.ones(())}}
    with pytest.raises(ValueError, match="absorb_bias first"):
        absorb_bias(net, {**variables, "quant": {"first": quantizer}}, [x])
