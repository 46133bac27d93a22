"""Every learned quantizer against its paper, restated in PyTorch (tests/golden/make_papers.py)."""

import ast
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantizers import QUANTIZERS

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "papers.npz"))
GROUPS = list(dict.fromkeys(key.rpartition("/")[0] for key in GOLDEN))
FIELDS = ("backward", "strength")  # options of every quantizer: fields of the spec


def group_of(name):
    return {k.rpartition("/")[2]: v for k, v in GOLDEN.items() if k.rpartition("/")[0] == name}


def read(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def spec_of(name):
    quantizer, bits, signed, text = name.split("|")
    options = {k: read(v) for k, v in (item.split("=") for item in text.split(",") if item)}
    fields = {k: options.pop(k) for k in FIELDS if k in options}
    golden = group_of(name)
    return Spec(
        int(bits),
        quantizer=quantizer,
        signed=signed == "1",
        symmetric="offset" not in golden,
        options=options,
        **fields,
    )


@pytest.mark.parametrize("name", [g for g in GROUPS if not g.startswith("torchao")])
def test_value_and_gradients_are_the_papers(name):
    golden, spec = group_of(name), spec_of(name)
    module = QUANTIZERS[spec.quantizer]
    x = jnp.asarray(golden["x"], jnp.float32)
    stats = numerics.finish(numerics.measure(x))
    start = module.init(stats, spec)
    params = {k: jnp.asarray(golden.get(k, v), jnp.float32) for k, v in start.items()}
    assert {k for k in params if k in golden} == set(golden) & set(start)

    y, pull = jax.vjp(lambda x, p: module.fake_quant(x, p, spec, batch_axes=(0,)), x, params)
    dx, dparams = pull(jnp.asarray(golden["g"], jnp.float32))
    np.testing.assert_allclose(y, golden["y"], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(dx, golden["dx"], rtol=1e-5, atol=2e-6)
    # Five elements of an example share a parameter; the paper's gradient comes without the factor.
    qmax = 2**spec.bits - 1 if spec.quantizer == "ewgs" else spec.format.qmax
    if "bits" in golden:  # learned: the largest code of those in use
        qmax = 2 ** (round(float(golden["bits"])) - spec.signed) - 1
    factor = 1 / math.sqrt(5 * max(qmax, 1))
    for key, value in dparams.items():
        wanted = golden.get("d" + key, np.zeros(())) * factor
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", [g for g in GROUPS if g.startswith("torchao")])
def test_scale_conventions_are_torchaos(name):
    golden = group_of(name)
    _, granularity, kind, bits = name.split("|")
    scaling = {"SYMMETRIC": "qmax_half", "SYMMETRIC_NO_CLIPPING_ERR": "cover"}.get(kind, "cover")
    spec = Spec(int(bits), symmetric=kind != "ASYMMETRIC", narrow_range=False, scaling=scaling)
    x = golden["x"]
    if granularity == "group":
        x = x.reshape(6, 2, 4)
    axes = {"tensor": (), "channel": (0,), "group": (0, 1)}[granularity]
    stats = numerics.finish(numerics.measure(jnp.asarray(x), channel_axes=axes))
    scale, zero_point = numerics.range_parameters(stats.lo, stats.hi, spec)
    np.testing.assert_allclose(np.ravel(scale), np.ravel(golden["scale"]), rtol=1e-6)
    np.testing.assert_array_equal(np.ravel(zero_point), np.ravel(golden["zero_point"]))
    codes = np.ravel(numerics.encode(jnp.asarray(x), scale, zero_point, spec.format))
    # At max|x| / (qmax + 1/2) the largest value lies half way between two codes, and the last bit
    # decides: torchao divides by the scale, this library multiplies by its reciprocal.
    place = np.ravel(np.float64(x) / np.float64(scale))
    tie = abs(abs(place - np.floor(place)) - 0.5) < 1e-5
    assert tie.sum() <= np.size(scale)
    wanted = np.ravel(golden["codes"])
    np.testing.assert_array_equal(codes[~tie], wanted[~tie])
    assert np.all(abs(codes - wanted) <= 1)


@pytest.mark.parametrize("signed", [True, False])
def test_learned_bits_are_a_narrower_lsq(signed):
    """8 bits that are down to 3 have the values and gradients of LSQ with 3 bits."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)), jnp.float32)
    x = x if signed else abs(x)
    wide = Spec(8, quantizer="lsq", signed=signed, narrow_range=False, options={"learn_bits": True})
    plain = Spec(3, quantizer="lsq", signed=signed, narrow_range=False)
    lsq, step = QUANTIZERS["lsq"], jnp.float32(0.3)

    def learned(x, step):
        params = {"step": step, "bits": jnp.float32(3.2)}
        return lsq.fake_quant(x, params, wide, batch_axes=(0,)).sum()

    def fixed(x, step):
        return lsq.fake_quant(x, {"step": step}, plain, batch_axes=(0,)).sum()

    found = jax.value_and_grad(learned, (0, 1))(x, step)
    wanted = jax.value_and_grad(fixed, (0, 1))(x, step)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["even", "away", "floor", "stochastic"])
@pytest.mark.parametrize("signed", [True, False])
def test_ewgs_is_linear_in_its_gain(rounding, signed):
    """So the gain's gradient is sum g x_hat / gain, with the codes of the forward pass."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40,)), jnp.float32)
    spec = Spec(3, quantizer="ewgs", signed=signed, rounding=rounding)
    lower = jnp.float32(-1.0 if signed else 0.1)
    g = jnp.asarray(np.random.default_rng(2).normal(size=(40,)), jnp.float32)

    def out(gain):
        params = {"lower": lower, "upper": jnp.float32(1.3), "gain": gain}
        return QUANTIZERS["ewgs"].fake_quant(x, params, spec, key=jax.random.key(3))

    found = jax.grad(lambda gain: jnp.sum(g * out(gain)))(jnp.float32(0.7))
    wanted = np.sum(np.float64(g) * np.float64(out(jnp.float32(0.7)))) / 0.7
    np.testing.assert_allclose(found, wanted / math.sqrt(40 * 7), rtol=1e-5)


def test_dorefa_rounds_the_gradient_of_a_layers_output():
    """Both backward products of a layer run on gradients of k bits, also behind a BatchNorm."""
    inputs = Spec(4, quantizer="dorefa", signed=False, options={"gradient_bits": 2})
    net = quantize(nn.Dense(6), [Rule(".*", weight=Spec(4), input=inputs)])
    x = jnp.asarray(np.random.default_rng(3).uniform(size=(5, 8)), jnp.float32)
    variables = calibrate(net, net.init(jax.random.key(0), x), [x])
    g = np.random.default_rng(4).normal(size=(5, 6)).astype(np.float32)
    _, pull = jax.vjp(lambda p: net.apply({**variables, "params": p}, x), variables["params"])
    (found,) = pull(jnp.asarray(g))
    top = np.abs(g).max(axis=1, keepdims=True)
    rounded = 2 * top * (np.round(3 * (g / (2 * top) + 0.5)) / 3 - 0.5)
    assert all(len(np.unique(row)) <= 4 for row in rounded)
    np.testing.assert_allclose(found["bias"], g.sum(0), rtol=1e-5, atol=1e-6)  # behind the product
    x_hat = np.round(15 * np.float64(x)) / 15
    np.testing.assert_allclose(found["kernel"], x_hat.T @ rounded, rtol=1e-4, atol=1e-5)
