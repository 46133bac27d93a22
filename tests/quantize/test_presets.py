"""The names that a config may give its rules."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax import models
from qkd_jax.quantize import presets
from qkd_jax.quantize.presets import PRESETS, pair
from qkd_jax.quantizers import QUANTIZERS

IMAGES = np.random.default_rng(0).normal(0, 1, (16, 8, 8, 1)).astype(np.float32)


class Net(nn.Module):
    """Two convolutions and a linear head."""

    stem: str = "stem"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name=self.stem)(x))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


BLOCKS = ("nf4", "mxfp8", "mxfp6", "mxint8")
ONE_END = Net(stem="conv1")  # has the usual name


@pytest.mark.parametrize("name", [*PRESETS, "w5a3", "w4a8:static:tensor", "int4_weight_only:4"])
def test_a_preset_is_a_set_of_rules(name):
    rules = presets.rules(name)
    assert bool(rules) == (name != "float")
    assert all(isinstance(rule, qk.Rule) for rule in rules)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_pair_trains_the_inner_layers_with_its_quantizer(quantizer):
    widths = {"binary": "w1a4", "ternary": "w2a4", "float": "w4a6"}.get(quantizer, "w3a3")
    name = f"{widths}:{quantizer}"
    stem, head, inner = presets.rules(name)
    weight, inputs = pair(quantizer, int(name[1]), int(name[3]))
    assert inner.weight.quantizer == weight["quantizer"]
    assert inner.input.quantizer == inputs["quantizer"]
    assert (stem.weight.bits, head.weight.bits, inner.weight.bits) == (8, 8, int(name[1]))

    net = qk.quantize(Net(), presets.rules(name))
    variables = net.init(jax.random.key(0), IMAGES)
    calibrated = qk.calibrate(net, variables, [IMAGES])
    found = net.apply(calibrated, IMAGES)
    assert np.isfinite(found).all() and np.any(found != net.apply(variables, IMAGES))


def test_every_quantizer_that_trains_has_a_pair():
    used = {fields["quantizer"] for name in QUANTIZERS for fields in pair(name, 4, 4)}
    assert used == set(QUANTIZERS)


def test_static_and_dynamic_differ_in_when_ranges_are_found():
    logits = {}
    for kind in ("static", "dynamic"):
        net = qk.quantize(Net(), presets.rules(kind))
        variables = net.init(jax.random.key(0), IMAGES)
        logits["float"] = net.apply(variables, IMAGES)
        variables = qk.calibrate(net, variables, [IMAGES])
        logits[kind] = net.apply(variables, IMAGES)
        params = variables["quant"]["head"]
        assert params["weight_quantizer"]["scale"].shape == (1, 10)  # one an output channel
        assert set(params["input_quantizer"]) == (
            {"dynamic"} if kind == "dynamic" else {"scale", "zero_point"}
        )
        # Far outside the calibrated range: dynamic ranges follow, static ones clip.
        large = np.asarray(net.apply(variables, 100 * IMAGES))
        wanted = np.asarray(net.apply({**variables, "quant": {}}, 100 * IMAGES))
        error = np.linalg.norm(large - wanted) / np.linalg.norm(wanted)
        assert error < 0.05 if kind == "dynamic" else error > 0.5
    for kind in ("static", "dynamic"):
        gap = np.linalg.norm(logits[kind] - logits["float"]) / np.linalg.norm(logits["float"])
        assert 0 < gap < 0.05


def test_fp8_keeps_a_net_and_converts():
    net = qk.quantize(Net(), presets.rules("fp8"))
    floats = net.init(jax.random.key(0), IMAGES)
    variables = qk.calibrate(net, floats, [IMAGES])
    found, wanted = net.apply(variables, IMAGES), net.apply(floats, IMAGES)
    assert 0 < np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
    assert {p.status for p in qk.coverage(net, variables, IMAGES).products} == {"quantized"}
    assert qk.size(net, variables, IMAGES).bytes < 0.4 * qk.size(net, variables, IMAGES).float_bytes
    integer = qk.convert(net, variables, IMAGES)
    np.testing.assert_array_equal(
        qk.integer_apply(integer, IMAGES), jax.jit(net.apply)(variables, IMAGES)
    )


@pytest.mark.parametrize(
    "name", ["mxfp4", "nvfp4", *(pytest.param(n, marks=pytest.mark.slow) for n in BLOCKS)]
)
def test_blocks_fit_a_model_and_are_converted(name):
    """A patch of 12 pixels has no blocks of 16; attention's products stay in float."""
    model = models.create("vit", 3, depth=1, width=32, heads=2)
    images = np.random.default_rng(0).normal(0, 1, (16, 12, 12, 1)).astype(np.float32)
    net = qk.quantize(model, presets.rules(name, model=model, images=images))
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    variables = qk.calibrate(net, small_nets.trained_like(shapes), [images])
    size = {"nvfp4": 16, "nf4": 64}.get(name, 32)
    weight, inputs = (net.spec_of("block0/mlp2", operand) for operand in ("weight", "input"))
    assert weight.granularity == size and (inputs is None or inputs.granularity == size)
    stem = net.spec_of("stem", "weight")
    assert stem.granularity == "channel"
    assert net.spec_of("block0/attention/query_key", "input") is None
    integer = qk.convert(net, variables, images)
    np.testing.assert_array_equal(
        qk.integer_apply(integer, images), jax.jit(net.apply)(variables, images)
    )
    floats = net.apply({**variables, "quant": {}}, images)
    gap = np.linalg.norm(net.apply(variables, images) - floats) / np.linalg.norm(floats)
    assert 0 < gap < 0.5


def test_weight_only_leaves_every_product_in_float():
    net = qk.quantize(Net(), presets.rules("int8_weight_only"))
    variables = net.init(jax.random.key(0), IMAGES)
    variables = qk.calibrate(net, variables, [IMAGES])
    covered = qk.coverage(net, variables, IMAGES)
    assert {p.status for p in covered.products} == {"weight only"}
    assert qk.size(net, variables, IMAGES).bytes < 0.4 * qk.size(net, variables, IMAGES).float_bytes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a4:lqs", "quantizer of a rules preset 'lqs'.*Did you mean 'lsq'"),
        ("w1a4", "weight bits of rules 'w1a4' is 1.*at least 2"),
        ("w4a9", "input bits of rules 'w4a9' is 9.*at most 8"),
        ("statik", "unknown rules preset 'statik'.*Did you mean 'static'"),
        ("w4a8:static:row", "granularity of rules.*'row'.*channel"),
        ("w4a8:lsq:tensor", "unknown rules preset"),
        ("int9_weight_only:8", "bits of rules 'int9_weight_only:8' is 9"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        presets.rules(name)


@pytest.mark.parametrize("name", ["w4a4", "w4a4:static", "w4a4:dynamic"])
def test_each_end_is_found_by_itself(name):
    net = qk.quantize(ONE_END, presets.rules(name, model=ONE_END, images=IMAGES))
    bits = [net.spec_of(path, "weight").bits for path in ("conv1", "conv2", "head")]
    assert bits == [8, 4, 8]
    net.init(jax.random.key(0), IMAGES)


def test_groups_that_do_not_fit_become_channels():
    rules = presets.rules("int4_weight_only", model=ONE_END, images=IMAGES)
    net = qk.quantize(ONE_END, rules)
    kinds = [net.spec_of(path, "weight").granularity for path in ("conv1", "conv2", "head")]
    assert kinds == ["channel", "channel", 32]
    qk.calibrate(net, net.init(jax.random.key(0), IMAGES), [IMAGES])


def test_a_preset_without_its_model_says_what_is_missing():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    net = qk.quantize(Plain(), presets.rules("static"))
    with pytest.raises(
        ValueError, match=r"matches no layer.*presets.rules\(name, model=, images=\)"
    ):
        net.init(jax.random.key(0), IMAGES)


def test_floats_of_8_bits_keep_their_scale():
    _, _, inner = presets.rules("w8a6:float")
    assert not inner.weight.option("learned", False) and inner.input.option("learned", False)
