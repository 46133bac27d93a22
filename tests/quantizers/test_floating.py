"""Floating-point quantization against ml_dtypes and finite differences."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qkd_jax import numerics, quantizers
from qkd_jax.numerics import FLOAT_FORMATS, Spec
from qkd_jax.quantizers import floating

KINDS = {8: ml_dtypes.float8_e4m3fn, 6: ml_dtypes.float6_e3m2fn, 4: ml_dtypes.float4_e2m1fn}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


@pytest.mark.parametrize("bits", KINDS)
def test_values_are_those_of_the_type(bits):
    spec, x = Spec(bits, quantizer="float"), normal(500)
    params = floating.init(numerics.finish(numerics.measure(x)), spec)
    scale = np.float32(params["scale"])
    np.testing.assert_allclose(scale * float(ml_dtypes.finfo(KINDS[bits]).max), abs(x).max(), 1e-6)
    wanted = (x * (1 / scale)).astype(KINDS[bits]).astype(np.float32) * scale
    np.testing.assert_array_equal(floating.fake_quant(x, params, spec), wanted)


def test_gradients_pass_inside_and_the_scale_learns():
    spec = Spec(4, quantizer="float", options={"learned": True})
    x, g = normal(6, 5), normal(6, 5, seed=1)
    scale = np.float32(0.4)  # 6 * 0.4 = 2.4: some of x is beyond
    f = lambda x, s: floating.fake_quant(x, {"scale": s}, spec, batch_axes=(0,))
    _, pull = jax.vjp(f, jnp.asarray(x), jnp.asarray(scale))
    dx, dscale = pull(jnp.asarray(g))
    u = np.float64(x) / np.float64(scale)
    inside = abs(u) <= 6
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    grid = FLOAT_FORMATS["e2m1"].values()
    cast = grid[abs(u[..., None] - grid).argmin(-1)]
    wanted = np.sum(g * np.where(inside, cast - u, cast)) / math.sqrt(5 * 6)
    np.testing.assert_allclose(dscale, wanted, rtol=1e-5)
    still = Spec(4, quantizer="float")
    grad = jax.grad(lambda s: floating.fake_quant(x, {"scale": s}, still).sum())(jnp.asarray(scale))
    assert grad == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(bits=5), "bits=5; its formats have 4, 6, 8, 16 bits"),
        (dict(bits=8, options={"format": "e4m3"}), "Did you mean 'e4m3fn'"),
        (dict(bits=6, options={"format": "e5m2"}), "'e5m2', which has 8. Use bits=8"),
        (dict(bits=8, signed=False), "signed=False; it works with signed=True alone"),
        (dict(bits=8, rounding="floor"), "rounding='floor'"),
    ],
)
def test_specs_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        quantizers.check(Spec(quantizer="float", **fields))
