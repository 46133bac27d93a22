"""What holds for every post-training method: a new one is tested without another line."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax.experiment.stages.post_training import METHODS, OF_FLOAT_NETS


class Net(nn.Module):
    """A folded pair, a normed stream, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv")(x))
        x = nn.Dense(16, name="up")(x.reshape(x.shape[0], -1))
        return nn.Dense(4, name="head")(nn.LayerNorm(name="norm")(x))


# What a method takes so that the test is quick.
QUICK = {name: dict(steps=2, batch_size=8) for name in ("adaround", "brecq", "qdrop")}


@pytest.fixture(scope="module")
def setup():
    x = np.asarray(small_nets.images(8))
    spec, inputs = qk.Spec(4, granularity="channel"), qk.Spec(8, symmetric=False, signed=False)
    rules = [qk.Rule(".*", weight=spec, input=inputs)]
    net, variables = small_nets.float_net(Net(), x, rules)
    folded = qk.ptq.fold_bn(net, variables, x)
    return net, variables, folded, qk.calibrate(net, folded, [x]), x


SLOW = (*QUICK, "awq", "correct_bias")  # each compiles steps of its own


@pytest.mark.parametrize(
    "name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_a_method_leaves_a_net_that_calibrates_and_converts(setup, name):
    net, floats, folded, calibrated, x = setup
    method = getattr(qk.ptq, name)
    takes_images = "images" in inspect.signature(method).parameters
    given = calibrated if name not in OF_FLOAT_NETS else floats if name == "fold_bn" else folded
    before = jax.tree.map(np.array, given)
    found = method(net, given, x if takes_images else [x], **QUICK.get(name, {}))
    jax.tree.map(np.testing.assert_array_equal, given, before)  # the argument stays as it was
    for tree in ("params", "batch_stats"):
        shapes = [jax.tree.map(jnp.shape, dict(v)[tree]) for v in (found, given)]
        assert shapes[0] == shapes[1]
    if name in OF_FLOAT_NETS:
        changed = ("absorb_bias",)  # values below its constant
        if name not in changed and name != "awq":  # which clips
            np.testing.assert_allclose(net.apply(found, x), net.apply(given, x), atol=1e-4)
        found = qk.calibrate(net, found, [x])
    out = net.apply(found, x)
    integers = qk.integer_apply(qk.convert(net, found, x), x)
    np.testing.assert_allclose(integers, out, rtol=1e-4, atol=1e-4)


GROUPS = (
    pytest.param("awq", marks=pytest.mark.slow),
    "rotate",
    "rotate_inputs",
    "hqq",
    "propagate_errors",
    "gptq",
)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("affine", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_methods_for_groups_take_them_symmetric_and_affine(setup, name, affine):
    x = setup[-1]
    spec = qk.Spec(3, granularity=8, symmetric=not affine, signed=not affine)
    rules = [qk.Rule("stem"), qk.Rule(".*", weight=spec, input=qk.Spec(8))]
    net, floats = small_nets.float_net(Net(), x, rules)
    method = getattr(qk.ptq, name)
    given = floats if name in OF_FLOAT_NETS else qk.calibrate(net, floats, [x])
    takes_images = "images" in inspect.signature(method).parameters
    found = method(net, given, x if takes_images else [x])
    if name in OF_FLOAT_NETS:
        found = qk.calibrate(net, found, [x])
    scales = found["quant"]["head"]["weight_quantizer"]
    assert scales["scale"].shape == (2, 1, 4) and np.isfinite(net.apply(found, x)).all()
    assert affine == bool(np.any(scales["zero_point"]))
    assert any(
        np.any(np.asarray(a) != np.asarray(b))
        for key in ("params", "quant")
        for a, b in zip(
            jax.tree.leaves(found.get(key)),
            jax.tree.leaves(qk.calibrate(net, floats, [x]).get(key)),
            strict=False,
        )
    )
