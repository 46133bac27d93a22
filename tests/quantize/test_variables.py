"""The keys of the `quant` collection are read as keys, whatever a model calls its layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax import weights
from qkd_jax.data_free.batch_norm import batch_norm_inputs
from qkd_jax.quantize.variables import (
    OPERANDS,
    folded_entries,
    folded_path,
    is_calibrated,
    is_folded,
    is_own_key,
    is_quantizer_key,
    parameter_owner,
    quantizer_key,
    quantizer_params,
    quantizer_path,
    quantizers,
    split_multipliers,
    split_states,
    state_key,
    states,
    unfolded,
    without_quantizers,
)


class Unfolded(nn.Module):
    """Layers with names that contain the words of the `quant` collection."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="unfolded")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="my_weight_quantizer")(nn.relu(x))


@pytest.fixture(scope="module")
def net():
    return qk.quantize(Unfolded(), [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(8))])


@pytest.fixture(scope="module")
def floats(net):
    return net.init(jax.random.key(0), jnp.ones((2, 3)))


@pytest.fixture(scope="module")
def calibrated(net, floats):
    images = np.asarray(jax.random.normal(jax.random.key(1), (8, 3)))
    return qk.calibrate(net, floats, [images])


def test_keys_of_each_operand():
    for operand in OPERANDS:
        key = quantizer_key(operand)
        assert is_quantizer_key(key) and is_own_key(key)
        assert quantizer_path("a/b", operand, "scale") == f"quant/a/b/{key}/scale"
        assert parameter_owner(f"a/b/{key}/scale") == ("a/b", operand)
        assert parameter_owner(f"{key}/scale") == ("", operand)
    assert is_own_key("folded") and not is_quantizer_key("folded")
    assert not any(map(is_own_key, ("unfolded", "my_weight_quantizer", "quantizer", "kernel")))
    assert parameter_owner("conv/folded/bias") is None
    assert folded_path("conv", "bias") == "quant/conv/folded/bias"
    assert folded_path("", "bias") == "quant/folded/bias"


def test_a_layer_called_unfolded_is_not_folded(calibrated):
    assert not is_folded(calibrated)
    assert not list(folded_entries(calibrated))


def test_a_layer_called_like_a_quantizer_is_a_layer(floats, calibrated):
    assert not is_calibrated(floats) and is_calibrated(calibrated)
    found = {(path, operand) for path, operand, _ in quantizers(calibrated)}
    layers = ("unfolded", "my_weight_quantizer")
    assert found == {(path, operand) for path in layers for operand in ("weight", "input")}
    assert set(quantizer_params(calibrated, "unfolded", "input")) == {"scale", "zero_point"}
    assert quantizer_params(floats, "unfolded", "input") is None
    assert set(without_quantizers(calibrated, ["input"])["quant"]["my_weight_quantizer"]) == {
        "weight_quantizer"
    }
    assert "quant" not in without_quantizers(calibrated)


def test_readers_of_a_net_with_a_layer_called_unfolded(net, calibrated):
    # Neither a PyTorch state dict nor images from statistics are refused as those of a folded net.
    with pytest.raises(ValueError, match="ResNets of torchvision") as refused:
        weights.to_torch(calibrated)
    assert "folded into multipliers" not in str(refused.value)
    measures = {"mean": lambda x, mean, var, axes: jnp.mean(x, axes)}
    _, found = batch_norm_inputs(net, calibrated, jnp.ones((4, 3)), measures)
    assert [value.shape for value in found["mean"]] == [(4,)]


def test_folded_entries_come_out_and_go_back():
    stored = {"multiplier": np.float32(2), "bias": np.float32(1)}
    variables = {
        "params": {},
        "quant": {
            "conv": {"weight_quantizer": {"scale": np.float32(3)}, "folded": stored},
            "norm": {"folded": {"identity": np.float32(0)}},
        },
    }
    assert dict(folded_entries(variables)) == {
        "conv": stored,
        "norm": {"identity": np.float32(0)},
    }
    rest, multipliers = split_multipliers(variables)
    assert multipliers == {"conv": 2}
    assert rest["quant"]["conv"]["folded"] == {"bias": 1}
    assert rest["quant"]["norm"] == variables["quant"]["norm"]
    running = unfolded(variables)["quant"]
    assert running == {"conv": {**variables["quant"]["conv"], "folded": {"bias": 1}}}
    assert set(without_quantizers(variables)["quant"]["conv"]) == {"folded"}


def test_states_lie_next_to_their_quantizers():
    params = {"a": {"kernel": 1, state_key("weight", "observed"): {"sums": 2}}, "b": {"kernel": 3}}
    taken = split_states(params, "observed")
    assert taken == {"a": {"weight_observed": {"sums": 2}}}
    assert list(states(taken, "observed")) == [("a", "weight", {"sums": 2})]
    assert split_states(params, "diagnosed") == {}
