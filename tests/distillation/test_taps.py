"""Taps by name, in the order of execution, for nets that sow features and nets that do not."""

import distill_nets as tiny
import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_nets

from qkd_jax.distillation.forward import forward, forward_taps
from qkd_jax.distillation.taps import features_of, resolve_taps
from qkd_jax.models import MODELS, create
from qkd_jax.models.features import sow_feature
from qkd_jax.quantize import quantize


@pytest.mark.parametrize(
    "name", ["resnet8", "mobilenet", "mobilenet_v2", "mlp", "vit", "convnext_tiny"]
)
def test_every_family_sows_stages_and_pooled(name):
    assert name in MODELS
    found = features_of(quantize(create(name, 10)), (28, 28, 1))
    stages = found.stages()
    assert len(stages) >= 2 and "pooled" in found.sown
    assert resolve_taps("taps", found, "last") == (stages[-1],)
    # The second of three or four, the first of two: as many before it as behind it, or one less.
    (middle,) = resolve_taps("taps", found, "middle")
    assert len(stages) - 2 * stages.index(middle) in (1, 2)
    before = resolve_taps("taps", found, "pre")
    assert [n.removesuffix("_pre") for n in before] == stages
    assert all(found.shape(n).shape[0] == 2 for n in found.sown)
    both = resolve_taps("taps", found, ["stages", "pooled"])
    assert both == (*stages, "pooled")


def test_features_are_what_the_net_computes():
    modules, variables = tiny.nets()
    net, own, images = modules["student"], variables["student"], tiny.batch()["image"]
    taps = ("stage2", "c1", "pooled")
    logits, carried, found = forward_taps(net, own, images, taps=taps, train=True)
    assert list(found) == list(taps) and set(carried) == {"batch_stats"}
    plain, plain_carried = forward(net, own, images, train=True)
    np.testing.assert_array_equal(logits, plain)
    jax.tree.map(np.testing.assert_array_equal, carried, plain_carried)
    np.testing.assert_allclose(found["stage2"].mean((1, 2)), found["pooled"], rtol=1e-5)
    kernel = own["params"]["c1"]["kernel"]
    want = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(found["c1"], want, rtol=1e-5, atol=1e-6)


def test_a_quantized_net_is_tapped_behind_its_quantizers():
    modules, variables = tiny_nets.conv_nets()
    net, images = modules["student"], tiny_nets.batch()["image"]
    _, _, found = forward_taps(net, variables["student"], images, taps=("conv", "stem"))
    floats = {k: v for k, v in variables["student"].items() if k != "quant"}
    _, _, plain = forward_taps(net, floats, images, taps=("conv", "stem"))
    assert found["stem"].shape == plain["stem"].shape
    assert np.any(found["stem"] != plain["stem"])


class NoPre(nn.Module):
    """Sows what is behind its activation alone."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="low")(x.reshape(x.shape[0], -1)))
        sow_feature(self, "hidden1", x)
        return nn.Dense(3, name="head")(x)


def test_what_is_behind_an_activation_is_not_taken_for_what_is_before():
    found = features_of(quantize(NoPre()), (6, 6, 1))
    with pytest.raises(ValueError, match=r"without a 'hidden1_pre'.*Sow that too.*'low'"):
        resolve_taps("taps", found, "pre")
    assert resolve_taps("taps", found, "low") == ("low",)


def test_a_net_that_sows_nothing_has_its_modules():
    found = features_of(tiny_nets.conv_nets()[0]["teacher"], (6, 6, 1))
    assert not found.sown and list(found.modules) == ["stem", "bn1", "conv", "bn2", "head"]
    assert resolve_taps("taps", found, "conv") == ("conv",)
    with pytest.raises(ValueError, match=r"sows no feature. Name modules.*'stem'"):
        resolve_taps("taps", found, "stages")
    with pytest.raises(ValueError, match=r"unknown tap 'convs' in taps.*Did you mean 'conv'"):
        resolve_taps("taps", found, ("stem", "convs"))
    with pytest.raises(ValueError, match="taps is empty"):
        resolve_taps("taps", found, ())
