"""Random tensors of many shapes against PyTorch, brevitas and qwix (golden/make_parity.py)."""

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.quantize.operands import split_groups
from qkd_jax.quantizers import lsq_plus, pact, uniform

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "parity.npz"))
GROUPS = list(dict.fromkeys(key.rpartition("/")[0] for key in GOLDEN))


def of(oracle):
    return pytest.mark.parametrize("name", [g for g in GROUPS if g.startswith(f"{oracle}|")])


def read(name):
    golden = {k.rpartition("/")[2]: v for k, v in GOLDEN.items() if k.rpartition("/")[0] == name}
    return name.split("|")[1], name.split("|")[2], golden


def fields(text):
    bits, signed, axis = (ast.literal_eval(word) for word in text.split(","))
    return Spec(bits, signed=bool(signed), symmetric=False), axis


def along(values, axis, ndim):
    """One value, or one for each entry of an axis."""
    values = jnp.asarray(values, jnp.float32)
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = len(values)
    return values.reshape(()) if axis is None else values.reshape(shape)


@of("uniform")
def test_fixed_grids_are_pytorchs(name):
    _, text, golden = read(name)
    spec, axis = fields(text)
    x = jnp.asarray(golden["x"])
    scale, zero = (along(golden[k], axis, x.ndim) for k in ("scale", "zero"))
    params = {"scale": scale, "zero_point": zero}
    y, pull = jax.vjp(lambda x: uniform.fake_quant(x, params, spec), x)
    np.testing.assert_allclose(y, golden["y"], rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.asarray(golden["g"]))[0], golden["dx"], rtol=1e-5)


@of("learnable")
def test_learned_grids_are_pytorchs(name):
    _, text, golden = read(name)
    spec, axis = fields(text)
    x = jnp.asarray(golden["x"])
    scale, zero = (along(golden[k], axis, x.ndim) for k in ("scale", "zero"))
    params = {"step": scale, "offset": -zero * scale}
    y, pull = jax.vjp(lambda x, p: lsq_plus.fake_quant(x, p, spec, batch_axes=()), x, params)
    dx, dparams = pull(jnp.asarray(golden["g"]))
    np.testing.assert_allclose(y, golden["y"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dx, golden["dx"], rtol=1e-5)
    # PyTorch holds the zero point z fixed where LSQ+ holds the offset B = -z s.
    gs = 1 / math.sqrt(x.size / scale.size * spec.format.qmax)
    dzero = -scale * dparams["offset"] / gs
    dscale = dparams["step"] / gs - zero * dparams["offset"] / gs
    reach = np.abs(golden["g"]).sum() * spec.format.levels
    np.testing.assert_allclose(np.ravel(dzero), golden["dzero"], rtol=1e-5, atol=1e-6 * reach)
    np.testing.assert_allclose(np.ravel(dscale), golden["dscale"], rtol=1e-5, atol=1e-6 * reach)


@of("brevitas_weight")
def test_narrow_weights_are_brevitass(name):
    bits, kind, golden = read(name)
    spec = Spec(int(bits), narrow_range=True, scaling="qmax", granularity=kind)
    x = jnp.asarray(golden["x"])
    axes = (0,) if kind == "channel" else ()
    params = uniform.init(numerics.finish(numerics.measure(x, channel_axes=axes)), spec)
    np.testing.assert_allclose(np.ravel(params["scale"]), np.ravel(golden["scale"]), rtol=1e-6)
    codes = numerics.encode(x, params["scale"], 0, spec.format)
    np.testing.assert_array_equal(codes, golden["codes"])
    np.testing.assert_allclose(uniform.fake_quant(x, params, spec), golden["y"], rtol=1e-6)


@of("brevitas_input")
def test_inputs_behind_a_relu_are_brevitass(name):
    bits, _, golden = read(name)
    spec = Spec(int(bits), quantizer="pact", signed=False)
    alpha = jnp.float32(golden["scale"]) * spec.format.qmax
    x = jnp.asarray(golden["x"])
    y, pull = jax.vjp(lambda x: pact.fake_quant(jax.nn.relu(x), {"alpha": alpha}, spec), x)
    np.testing.assert_allclose(y, golden["y"], rtol=1e-6, atol=1e-7)
    # brevitas passes the gradient of what rounds to the highest code, PACT what lies below alpha.
    clear = abs(x / golden["scale"] - spec.format.qmax) > 0.51
    found = pull(jnp.asarray(golden["g"]))[0]
    np.testing.assert_allclose(found[clear], golden["dx"][clear], rtol=1e-5)
    assert clear.mean() > 0.8


@of("qwix")
def test_scales_and_codes_are_qwixs(name):
    _, text, golden = read(name)
    channels, axis, tile, qtype, how = text.split(";")
    bits, axis, tile = int(qtype.removeprefix("int")), int(axis), int(tile)
    kept = [int(c) for c in channels.split(",") if c]
    symmetric = how == "absmax"
    spec = Spec(
        bits, symmetric=symmetric, narrow_range=False, scaling="qmax_half" if symmetric else "cover"
    )
    x = jnp.asarray(golden["x"])
    if tile:
        x = split_groups(x, axis, tile)
        kept = [axis, *(c if c < axis else c + 1 for c in kept)]
    params = uniform.init(numerics.finish(numerics.measure(x, channel_axes=tuple(kept))), spec)
    scale, zero = params["scale"], params["zero_point"]
    np.testing.assert_allclose(np.ravel(scale), np.ravel(golden["scale"]), rtol=1e-6)
    np.testing.assert_array_equal(np.ravel(zero), np.ravel(golden.get("zero", 0 * np.ravel(zero))))
    codes = numerics.encode(x, scale, zero, spec.format).reshape(golden["codes"].shape)
    found = uniform.fake_quant(x, params, spec).reshape(golden["y"].shape)
    # At amax / (qmax + 1/2) the largest value is a tie, which the last bit of the scale decides.
    place = np.float64(x) / np.float64(scale)
    tie = (abs(abs(place - np.floor(place)) - 0.5) < 3e-5).reshape(codes.shape)
    assert tie.sum() <= (np.size(scale) if symmetric else 0)
    np.testing.assert_array_equal(codes[~tie], golden["codes"][~tie])
    assert np.all(abs(codes - golden["codes"]) <= 1)
    np.testing.assert_allclose(found[~tie], golden["y"][~tie], rtol=1e-6)
