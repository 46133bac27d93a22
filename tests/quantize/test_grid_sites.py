"""Signs of operands and places for quantizers, found in models; and the presets that use them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax.models import create
from qkd_jax.quantize import presets
from qkd_jax.quantize.grid_sites import find_grid_sites

IMAGES = np.random.default_rng(0).normal(0, 1, (8, 8, 8, 1)).astype(np.float32)


class Signs(nn.Module):
    """One dense layer for each way of making a number; its name says the sign of its input."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="signed_input")(x)
        positive = nn.relu(x)
        made = dict(
            relu=positive, relu6=jnp.minimum(nn.relu(x), 6), softmax=nn.softmax(x), square=x * x,
            sigmoid=nn.sigmoid(x), sum=positive + jnp.abs(x), mean=positive.mean(-1, keepdims=True),
            padded=jnp.pad(positive, ((0, 0), (1, 1))), part=positive.reshape(-1, 2, 2)[:, 1],
            even=x**4, joined=jnp.concatenate([positive, jnp.exp(x)], -1),
            signed_gelu=nn.gelu(x), signed_norm=nn.LayerNorm(name="norm")(positive),
            signed_minus=positive - 1, signed_cube=x**3, signed_leaky=nn.leaky_relu(x),
            signed_tanh=nn.tanh(positive), signed_product=positive * x,
        )  # fmt: skip
        return sum(nn.Dense(3, name=name)(y) for name, y in made.items())


def test_signs_are_proven():
    layers = find_grid_sites(Signs(), jax.ShapeDtypeStruct((8, 4), np.float32)).layers
    assert len(layers) == 19
    for layer in layers:
        assert layer.unsigned["input"] == (not layer.path.startswith("signed")), layer.path
    # And no value contradicts: calibration refuses negative values under unsigned rules.
    x = np.random.default_rng(1).normal(0, 2, (64, 4)).astype(np.float32)
    rules = presets.rules("w4a4", model=Signs(), images=x)
    net, _ = small_nets.calibrated(Signs(), rules, x)
    assert net.spec_of("relu", "input").signed is False
    assert net.spec_of("signed_gelu", "input").signed is True
    # The ends were found by their place.
    assert net.spec_of("signed_input", "weight").bits == 8
    assert net.spec_of("signed_product", "weight").bits == 8


def test_sites_of_a_resnet():
    sites = {s.path: s for s in find_grid_sites(create("resnet14", 10, width=4), IMAGES).sites}
    blocks = [f"stage{s}_block{b}" for s in (1, 2, 3) for b in (0, 1)]
    norms = {f"{b}/bn2" for b in blocks} | {f"stage{s}_block0/shortcut_bn" for s in (2, 3)}
    assert set(sites) == {"stem_relu", "head", *blocks, *norms}
    assert all(s.unsigned == (s.path in ("stem_relu", *blocks)) for s in sites.values())
    assert sites["stage1_block1"].readers == ("stage2_block0/conv1", "stage2_block0/shortcut")
    assert sites["stem_relu"].readers == ("stage1_block0/conv1",)
    assert {sites[p].why for p in norms} == {"sum"}
    assert (sites["stage3_block1"].why, sites["head"].why) == ("pool", "logits")


def test_the_integer_preset_quantizes_once_where_a_tensor_is_made():
    model = create("resnet8", 10, width=4)
    rules = presets.rules("w4a4:integer", model=model, images=IMAGES)
    net, variables = small_nets.calibrated(model, rules, IMAGES)
    assert set(variables["quant"]["stage2_block0"]) == {
        "conv1", "conv2", "shortcut", "bn2", "shortcut_bn", "output_quantizer",
    }  # fmt: skip
    assert set(variables["quant"]["stage2_block0"]["conv1"]) == {"weight_quantizer"}
    assert net.spec_of("stage1_block0", "output").bits == 4
    assert net.spec_of("stage3_block0", "output").bits == 8
    assert net.spec_of("head", "output").signed
    covered = qk.coverage(net, variables, IMAGES)
    assert {p.status for p in covered.products} == {"quantized"}
    assert {p.bits for p in covered.products} == {(4, 4), (8, 8)}
    with pytest.raises(ValueError, match="'w4a4:integer' depends on the model's sums and pools"):
        presets.rules("w4a4:integer")
    with pytest.raises(ValueError, match="model came without images"):
        presets.rules("w4a4", model=model)


def test_a_layer_reads_the_codes_that_a_module_returned():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(6, name="first")(x)
            return nn.Dense(4, name="left")(y), nn.Dense(4, name="right")(y)

    x = np.random.default_rng(0).normal(0, 1, (5, 8)).astype(np.float32)
    weight = qk.Spec(4, granularity="channel")
    rules = [
        qk.Rule("first", weight=weight, input=qk.Spec(8), output=qk.Spec(5, symmetric=False)),
        qk.Rule("left|right", weight=weight),
    ]
    net, variables = small_nets.calibrated(Shared(), rules, x)
    left, _ = jax.jit(net.apply)(variables, x)
    quant, params = jax.tree.map(np.asarray, (variables["quant"], variables["params"]))
    grid, codes = quant["first"]["output_quantizer"], {}
    for name in ("first", "left"):
        scale = quant[name]["weight_quantizer"]["scale"]
        codes[name] = np.clip(np.rint(params[name]["kernel"] * (1 / scale)), -8, 7), scale
    scale = quant["first"]["input_quantizer"]["scale"]
    q = np.clip(np.rint(x * (1 / scale)), -127, 127) @ codes["first"][0]
    y = q * (scale * codes["first"][1]) + params["first"]["bias"]
    q = np.clip(np.rint(y * (1 / grid["scale"])) + grid["zero_point"], -16, 15) - grid["zero_point"]
    wanted = (q @ codes["left"][0]) * (grid["scale"] * codes["left"][1])
    wanted = wanted.astype(np.float32) + params["left"]["bias"]
    # The compiler may fuse the last product and sum; a code more or less would show as 1e-2.
    np.testing.assert_allclose(left, wanted, rtol=1e-5, atol=1e-6)
    assert {p.status for p in qk.coverage(net, variables, x).products} == {"quantized"}


class Mixer(nn.Module):
    """A block of an MLP-mixer whose ends have names of their own."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (4, 4), (4, 4), name="patches")(images).reshape(images.shape[0], -1, 8)
        y = nn.LayerNorm(name="norm1")(x).swapaxes(1, 2)
        y = nn.Dense(x.shape[1], name="tokens2")(nn.gelu(nn.Dense(6, name="tokens1")(y)))
        x = x + y.swapaxes(1, 2)
        y = nn.LayerNorm(name="norm2")(x)
        x = x + nn.Dense(8, name="mix2")(nn.gelu(nn.Dense(6, name="mix1")(y)))
        return nn.Dense(3, name="classes")(nn.LayerNorm(name="norm")(x).mean(1))


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [("vit", "integer"), pytest.param("mixer", "pact", marks=pytest.mark.slow)],
)
def test_presets_take_nets_whose_activations_have_both_signs(name, quantizer):
    fields = dict(depth=1, width=8, heads=2)
    model = create("vit", 3, **fields) if name == "vit" else Mixer()
    rules = presets.rules(f"w4a4:{quantizer}", model=model, images=IMAGES)
    net, variables = small_nets.calibrated(model, rules, IMAGES)
    covered = qk.coverage(net, variables, IMAGES)
    assert {p.status for p in covered.products} == {"quantized"}
    assert [p.bits for p in covered.products].count((8, 8)) == 2  # the ends
    if name == "vit":
        weights = "block0/attention/weights_value"
        assert not net.spec_of(weights, "input").signed and net.spec_of(weights, "other").signed
