"""AWQ: scales and ranges are those of AutoAWQ, the float net keeps its function, errors shrink."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax.models import MODELS
from qkd_jax.ptq.awq import activation_scales, awq

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "weight_only.npz")
CASES = {
    "int4": qk.Spec(4, scaling="qmax", granularity=32),
    "uint4": qk.Spec(4, signed=False, symmetric=False, granularity=32),
    "uint3": qk.Spec(3, signed=False, symmetric=False, granularity=32),
}


class Scaled(nn.Module):
    """A gain and a dense layer: the gain shows which scale was found."""

    features: int

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],))
        return nn.Dense(self.features, use_bias=False, name="dense")(x * gain[None])


@pytest.mark.parametrize("name", CASES)
def test_scales_and_ranges_are_those_of_autoawq(name):
    # An affine range that is cut at both ends puts them between two codes, where the last bit of a
    # division decides: its weights are skewed, so that one end is cut.
    weight = GOLDEN["awq/weight" if name == "int4" else "awq/skewed"]
    x = GOLDEN["awq/inputs"].astype(np.float32)
    net = qk.quantize(Scaled(64), [qk.Rule("dense", weight=CASES[name])])
    params = {"gain": jnp.ones(96), "dense": {"kernel": jnp.asarray(weight.T)}}
    scaled = awq(net, {"params": params}, [x[:77], x[77:]], clip=False)["params"]
    scale = GOLDEN[f"awq/{name}/scale"]
    assert scale.max() > 1.5 * scale.min()
    np.testing.assert_allclose(1 / scaled["gain"], scale, rtol=1e-4)
    np.testing.assert_allclose(scaled["dense"]["kernel"], weight.T * scale[:, None], rtol=1e-4)

    clipped = awq(net, {"params": params}, [x], scale=False)["params"]
    limit = np.repeat(GOLDEN[f"awq/{name}/clip"], 32, axis=1)
    want = np.clip(weight, -limit, limit)
    assert (want != weight).any()
    np.testing.assert_allclose(clipped["dense"]["kernel"], want.T, rtol=1e-6)
    np.testing.assert_array_equal(clipped["gain"], params["gain"])


def test_scales_of_a_closed_form():
    found = activation_scales(np.array([0.0, 1.0, 4.0]), 0.5)
    raw = np.array([1e-4, 1, 2])
    np.testing.assert_allclose(found, raw / np.sqrt(2e-4))


READING = "block0/(attention/)?(query|key|value|mlp1)"  # behind a norm


def outlier_vit(width=32, spec=None, layers=READING):
    """A vision transformer whose norms have a few wide channels, and images."""
    rng = np.random.default_rng(0)
    model = MODELS["vit"](num_classes=5, width=width, depth=1, heads=2, patch=8)
    images = rng.normal(size=(12, 16, 16, 1)).astype(np.float32)
    spec = spec or qk.Spec(3, granularity=16)
    rules = [qk.Rule(layers, weight=spec), qk.Rule(".*")]
    net = qk.quantize(model, rules)
    variables = jax.device_get(net.init(jax.random.key(0), images))
    for name in ("norm1", "norm2"):
        gain = variables["params"]["block0"][name]["scale"].copy()
        gain[::9] *= 15
        variables["params"]["block0"][name]["scale"] = gain
        variables["params"]["block0"][name]["bias"] = rng.normal(size=width).astype(np.float32)
    return net, variables, images


def errors(net, variables, found, images):
    """Squared error of the logits after calibration: by nearest rounding, and as found."""
    want = net.apply(variables, images)
    error = lambda v: float(
        jnp.mean((net.apply(qk.calibrate(net, v, [images]), images) - want) ** 2)
    )
    return error(variables), error(found)


@pytest.mark.parametrize("granularity", [32, "channel", "tensor"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_layers_own_output_loses_less(affine, granularity):
    spec = qk.Spec(3, granularity=granularity, signed=not affine, symmetric=not affine)
    net = qk.quantize(Scaled(64), [qk.Rule("dense", weight=spec)])
    x = GOLDEN["awq/inputs"].astype(np.float32)
    kernel = jnp.asarray(GOLDEN["awq/weight"].T)
    variables = {"params": {"gain": jnp.ones(96), "dense": {"kernel": kernel}}}
    scaled, clipped = (
        awq(net, variables, [x], **off) for off in (dict(clip=False), dict(scale=False))
    )
    both = awq(net, variables, [x])
    nearest, after = errors(net, variables, scaled, x)
    assert after < 0.8 * nearest
    assert errors(net, variables, clipped, x)[1] < 0.8 * nearest
    assert errors(net, variables, both, x)[1] < 0.6 * nearest


@pytest.mark.slow
def test_a_transformer_with_wide_channels_loses_less():
    net, variables, images = outlier_vit()
    lines = []
    scaled = awq(net, variables, [images], clip=False, report=lines.append)
    np.testing.assert_allclose(net.apply(scaled, images), net.apply(variables, images), atol=2e-5)
    nearest, after = errors(net, variables, scaled, images)
    assert after < 0.5 * nearest
    both = awq(net, variables, [images])
    assert errors(net, variables, both, images)[1] < 0.5 * nearest
    # Queries, keys and values share the norm.
    assert len(lines) == 2 and all(line.startswith("scaled") for line in lines)
    for name in ("query", "key"):  # not clipped: as they were scaled
        np.testing.assert_array_equal(
            both["params"]["block0"]["attention"][name]["kernel"],
            scaled["params"]["block0"]["attention"][name]["kernel"],
        )


def test_layers_behind_a_gelu_are_left_and_said_so():
    net, variables, images = outlier_vit(layers="block0/(attention/out|mlp2)")
    lines = []
    found = awq(net, variables, [images], clip=False, report=lines.append)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert [line.split(":")[0] for line in lines] == [
        "not scaled block0/attention/out",
        "not scaled block0/mlp2",
    ]


def test_convolutions_are_scaled_behind_a_relu_and_clipped():
    x = np.asarray(small_nets.images(4))
    rules = [
        qk.Rule("depthwise|grouped|dilated", weight=qk.Spec(3, granularity="channel")),
        qk.Rule(".*"),
    ]
    net, variables = small_nets.float_net(small_nets.Mixed(), x, rules)
    variables = qk.ptq.fold_bn(net, variables, x)
    lines = []
    found = awq(net, variables, [x], clip=False, report=lines.append)
    np.testing.assert_allclose(net.apply(found, x), net.apply(variables, x), atol=1e-4)
    assert any(line.startswith("scaled grouped by depthwise") for line in lines)
    before = {
        name: np.abs(v["kernel"]).max() for name, v in variables["params"].items() if "kernel" in v
    }
    clipped = awq(net, variables, [x], scale=False)["params"]
    smaller = [name for name in before if np.abs(clipped[name]["kernel"]).max() < before[name]]
    assert smaller and set(smaller) <= {"depthwise", "grouped", "dilated"}


def test_what_is_refused():
    x = np.ones((4, 8), np.float32)
    net, variables = small_nets.float_net(nn.Dense(4), x, [qk.Rule("", weight=qk.Spec(4))])
    with pytest.raises(ValueError, match="steps is 0"):
        awq(net, variables, [x], steps=0)
    with pytest.raises(ValueError, match="calibrated"):
        awq(net, qk.calibrate(net, variables, [x]), [x])
    plain = qk.quantize(nn.Dense(4), [qk.Rule("", input=qk.Spec(4))])
    with pytest.raises(ValueError, match="weight spec"):
        awq(plain, variables, [x])
