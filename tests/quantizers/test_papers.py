"""Every learned quantizer against its paper, restated in PyTorch (tests/golden/make_papers.py)."""

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import Spec
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
