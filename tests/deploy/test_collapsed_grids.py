"""A grid whose learned size is not above 0 is refused by every export, and reported."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import qkd_jax as qk
from qkd_jax.quantize.variables import quantizer_params
from qkd_jax.training.clamping import collapsed

X = jnp.abs(jax.random.normal(jax.random.key(0), (8, 16)))
UNSIGNED = dict(signed=False)
# quantizer: (fields of its spec, operand, what training makes of a parameter)
COLLAPSED = {
    "uniform": ({}, "weight", {"scale": -1.0}),
    "lsq": ({}, "weight", {"step": -1.0}),
    "lsq of inputs": (UNSIGNED, "input", {"step": 0.0}),
    "lsq_plus": ({"signed": False, "symmetric": False}, "input", {"step": -1.0}),
    "dsq": ({}, "weight", {"step": -1.0}),
    "sigmoid": ({}, "weight", {"step": -1.0}),
    "tqt": ({}, "weight", {"log2_threshold": -jnp.inf}),
    "pact": (UNSIGNED, "input", {"alpha": -1.0}),
    "dorefa": (UNSIGNED, "input", {"bound": -1.0}),
    "qil": ({}, "weight", {"half_width": -1.0}),
    "qil below zero": (UNSIGNED, "input", {"center": -9.0}),
    "ewgs": (UNSIGNED, "input", {"upper": -1.0}),
    "ewgs of no size": ({}, "weight", {"gain": 0.0}),
    "binary": ({"bits": 1, "options": {"static": True}}, "weight", {"alpha": -1.0}),
}


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="d")(x)


def calibrated(case):
    fields, operand, changed = COLLAPSED[case]
    spec = qk.Spec(**{"bits": 4, "quantizer": case.split()[0]} | fields)
    specs = {"weight": qk.Spec(4), "input": qk.Spec(4, signed=False)} | {operand: spec}
    net = qk.quantize(Dense(), [qk.Rule("d", **specs)])
    kernel = jax.random.normal(jax.random.key(1), (16, 3))
    variables = qk.calibrate(net, {"params": {"d": {"kernel": kernel}}}, [X])
    return net, variables, operand, changed


@pytest.mark.parametrize("case", COLLAPSED)
def test_a_grid_whose_size_is_not_above_zero_is_refused_by_layer(case, tmp_path):
    net, variables, operand, changed = calibrated(case)
    assert not collapsed(net, variables)
    params = quantizer_params(variables, "d", operand)
    params |= {name: jnp.full_like(params[name], value) for name, value in changed.items()}
    (reported,) = collapsed(net, variables)
    assert reported.startswith(f"d/{operand}_quantizer/")
    with pytest.raises(ValueError, match=f"of the {operand} of layer 'd' .*greater than 0"):
        qk.convert(net, variables, X)
    with pytest.raises(ValueError, match=f"of the {operand} of layer 'd' .*greater than 0"):
        qk.deploy.to_onnx(net, variables, X, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(("quantizer", "bits"), [("float", 8), ("codebook", 4), ("apot", 4)])
def test_collapsed_grids_without_codes_are_reported(quantizer, bits):
    spec = qk.Spec(bits, quantizer=quantizer)
    net = qk.quantize(Dense(), [qk.Rule("d", weight=spec)])
    variables = qk.calibrate(net, net.init(jax.random.key(0), X), [X])
    assert not collapsed(net, variables)
    params = quantizer_params(variables, "d", "weight")
    (name,) = params
    params[name] = -params[name]
    assert collapsed(net, variables) == {f"d/weight_quantizer/{name}": float(params[name])}
