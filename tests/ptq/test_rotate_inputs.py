"""Rotations at run time: exact in float64, in every file, of convolutions and lifted layers."""

import flax.linen as nn
import jax
import lifted_nets
import numpy as np
import pytest
import small_nets
from rotated_nets import IMAGES, RULES, check_exact, relative, vit

import qkd_jax as qk
from qkd_jax.ptq import rotate_inputs
from qkd_jax.quantize.variables import unfolded


@pytest.mark.parametrize("pool", ["class", pytest.param("mean", marks=pytest.mark.slow)])
def test_a_transformer_computes_what_it_did_in_float64(pool):
    check_exact(rotate_inputs, pool)


@pytest.fixture(scope="module")
def rotated():
    """(net, calibrated variables with rotations, images)."""
    images = np.asarray(IMAGES, np.float32)
    net = qk.quantize(vit(depth=1), RULES)
    variables = rotate_inputs(net, net.init(jax.random.key(0), images), images)
    return net, qk.calibrate(net, variables, [images]), images


def test_rotations_are_part_of_integers_and_of_onnx(rotated, tmp_path):
    net, variables, images = rotated
    want = net.apply(variables, images)
    integer = qk.convert(net, variables, images)
    np.testing.assert_allclose(qk.integer_apply(integer, images), want, atol=1e-5)
    runtime = pytest.importorskip("onnxruntime")
    qk.deploy.to_onnx(net, variables, images, tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.transpose(0, 3, 1, 2)}
    np.testing.assert_allclose(session.run(None, feed)[0], want, atol=1e-4)


def test_rotations_are_no_missed_products_and_gptq_sees_them(rotated):
    net, variables, images = rotated
    covered = qk.coverage(net, variables, images)
    assert not covered.missed
    own = [p for p in covered.products if p.path.endswith("/rotation")]
    assert len(own) >= 6 and all(p.status == "skipped" for p in own)
    found = qk.ptq.gptq(net, variables, [images])
    kernel = found["params"]["block0"]["mlp2"]["kernel"]
    assert np.any(kernel != variables["params"]["block0"]["mlp2"]["kernel"])
    assert relative(net.apply(found, images), net.apply(variables, images)) < 0.5
    signs = variables["quant"]["block0"]["mlp2"]["folded"]["rotation"]
    np.testing.assert_array_equal(found["quant"]["block0"]["mlp2"]["folded"]["rotation"], signs)


class Convolutions(nn.Module):
    """Padded, strided and grouped convolutions, a BatchNorm, an odd number of channels."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(12, (3, 3), name="odd")(x))
        x = nn.Conv(8, (3, 3), strides=2, name="padded")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
        return nn.DenseGeneral(5, axis=(1, 2, 3), name="head")(x)


def test_convolutions_and_folded_batch_norms():
    x = np.asarray(small_nets.images(3))
    rules = [qk.Rule(".*", weight=qk.Spec(8, granularity="channel"), input=qk.Spec(8))]
    net, variables = small_nets.float_net(Convolutions(), x, rules)
    lines = []
    turned = rotate_inputs(net, variables, x, report=lines.append)
    left = {line.split(":")[0].removeprefix("left "): line for line in lines if "left" in line}
    assert set(left) == {"odd", "grouped"} and "3 channels have no Hadamard" in left["odd"]
    assert set(turned["quant"]) == {"padded", "head"}
    np.testing.assert_allclose(net.apply(turned, x), net.apply(variables, x), atol=1e-4)
    folded = qk.ptq.fold_bn(net, turned, x)
    np.testing.assert_allclose(net.apply(folded, x), net.apply(variables, x), atol=1e-4)
    again = unfolded(folded)  # BatchNorms run, rotations stay
    assert list(again["quant"]["padded"]["folded"]) == ["bias", "rotation"] or (
        list(again["quant"]["padded"]["folded"]) == ["rotation"]
    )
    calibrated = qk.calibrate(net, turned, [x])
    integer = qk.convert(net, calibrated, x)
    np.testing.assert_allclose(qk.integer_apply(integer, x), net.apply(calibrated, x), atol=1e-4)


@pytest.mark.parametrize("kind", ["scan", "shared", "own", "both"])
def test_steps_and_members_have_rotations_of_their_own(kind):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    rules = [qk.Rule("head"), qk.Rule(".*", weight=qk.Spec(4), input=qk.Spec(4))]
    net = qk.quantize(lifted_nets.Net(kind), rules)
    variables = net.init(jax.random.key(1), x)
    turned = rotate_inputs(net, variables, x)
    signs = turned["quant"]["layers"]["up"]["folded"]["rotation"]
    assert signs.shape == (*variables["params"]["layers"]["up"]["bias"].shape[:-1], 4)
    np.testing.assert_allclose(net.apply(turned, x), net.apply(variables, x), atol=1e-5)
    assert relative(*(v["params"]["layers"]["up"]["kernel"] for v in (turned, variables))) > 0.1


def test_layers_that_run_twice_are_left():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="twice")
            return layer(nn.relu(layer(x)))

    x = np.ones((2, 4), np.float32)
    net = qk.quantize(Twice(), [qk.Rule("twice", weight=qk.Spec(4), input=qk.Spec(4))])
    variables = net.init(jax.random.key(0), x)
    lines = []
    found = rotate_inputs(net, variables, x, report=lines.append)
    assert lines == ["left twice: its weight is shared or rearranged"]
    jax.tree.map(np.testing.assert_array_equal, found, variables)
