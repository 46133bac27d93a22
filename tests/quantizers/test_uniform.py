import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax.numerics import Spec, Stats
from qkd_jax.quantizers import uniform

NAMES = ("int2", "int3", "uint2", "int4", "uint4", "int8", "uint8")
KINDS = ("symmetric", "symmetric_uneven", "affine", "affine_uneven")


def spec_of(name, **fields):
    signed = name[0] == "i"
    return Spec(int(name.strip("uint")), signed=signed, **fields)


def vjp(x, scale, zero_point, spec, g):
    params = {"scale": jnp.float32(scale), "zero_point": jnp.float32(zero_point)}
    y, pull = jax.vjp(lambda x, p: uniform.fake_quant(x, p, spec), jnp.asarray(x), params)
    return jax.tree.map(np.asarray, (y, *pull(jnp.asarray(g))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_against_torch(quantizer_golden, kind, name):
    golden = quantizer_golden(f"uniform/{kind}/{name}")
    x, scale, zero_point = golden["x"], golden["scale"], golden["zero_point"]
    # The affine 8-bit golden grid is -127 to 127 too.
    spec = spec_of(name, symmetric="affine" not in kind, narrow_range=name == "int8")
    y, dx, dparams = vjp(x, scale, zero_point, spec, golden["g"])
    # PyTorch rounds x / s + z, we round x / s and then add z, as ONNX does. They part at exact
    # halves when z is odd: by one step in the value, and in the mask at the ends of the grid.
    u = x * (np.float32(1) / scale)
    tie = (u - np.floor(u) == 0.5) & (zero_point % 2 == 1)
    np.testing.assert_allclose(y[~tie], golden["y"][~tie], rtol=1e-6)
    np.testing.assert_array_equal(dx[~tie], golden["dx"][~tie])
    assert np.all(abs(y - golden["y"]) <= scale * 1.0001)
    assert tie.sum() < (30 if zero_point % 2 else 1)
    assert dparams == {"scale": 0, "zero_point": 0}


def test_per_channel_against_torch(quantizer_golden):
    golden = quantizer_golden("uniform_channel")
    params = {
        k: jnp.asarray(golden[k], jnp.float32)[None, :, None] for k in ("scale", "zero_point")
    }
    spec = Spec(4, symmetric=False, granularity="channel")
    y, pull = jax.vjp(lambda x: uniform.fake_quant(x, params, spec), jnp.asarray(golden["x"]))
    np.testing.assert_allclose(y, golden["y"], rtol=1e-6)
    np.testing.assert_array_equal(pull(jnp.asarray(golden["g"]))[0], golden["dx"])


def test_affine_init_against_torch(quantizer_golden):
    golden = quantizer_golden("observers")
    zero = np.zeros(4)
    stats = Stats(golden["lo"], golden["hi"], zero, zero, zero, zero)
    params = uniform.init(stats, Spec(8, signed=False, symmetric=False, granularity="channel"))
    np.testing.assert_allclose(params["scale"], golden["scale"], rtol=1e-6)
    np.testing.assert_array_equal(params["zero_point"], golden["zero_point"])


# Codes -4 to 3 and scale 1/2, so that the edges, the halves and their neighbours are exact.
U = np.array([-9, -4.75, -4.5, -4.25, -4, -3.5, -0.5, 0, 0.5, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 9])
MASKS = {
    #             -9 -4.75 -4.5 -4.25 -4 -3.5 -.5  0 .5 2.5 2.75 3 3.25 3.5 3.75 9
    "strict": "    0   0    0    0    0   1    1   1  1  1   1   0   0   0   0   0",
    # -4.5 rounds to -4, which is even and on the grid; 3.5 rounds to 4, which is not.
    "rounded": "   0   0    1    1    1   1    1   1  1  1   1   1   1   0   0   0",
    "none": "      1   1    1    1    1   1    1   1  1  1   1   1   1   1   1   1",
}


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_mask_on_and_around_every_edge(mask):
    wanted = np.array(MASKS[mask or "rounded"].split(), np.float32)
    spec = Spec(3, mask=mask)
    y, dx, _ = vjp((U / 2).astype(np.float32), 0.5, 0, spec, 3 * np.ones(16, np.float32))
    np.testing.assert_array_equal(dx, 3 * wanted)
    np.testing.assert_array_equal(y, np.clip(np.round(U), -4, 3) / 2)


@pytest.mark.parametrize("mask", MASKS)
def test_mask_with_a_zero_point(mask):
    # Codes 0 to 7 and zero point 4: the same real grid, so the same masks.
    spec = Spec(3, signed=False, symmetric=False, mask=mask)
    y, dx, _ = vjp((U / 2).astype(np.float32), 0.5, 4, spec, np.ones(16, np.float32))
    np.testing.assert_array_equal(dx, np.array(MASKS[mask].split(), np.float32))
    np.testing.assert_array_equal(y, np.clip(np.round(U), -4, 3) / 2)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 16),
    st.floats(2**-13, 2**13, width=32),
    st.lists(st.floats(-1e5, 1e5, width=32, allow_subnormal=False), min_size=6, max_size=6),
)
def test_values_against_numpy_in_float64(bits, scale, values):
    spec = Spec(bits, narrow_range=False)
    scale, x = np.float32(scale), np.array(values, np.float32)
    y = uniform.fake_quant(x, {"scale": scale, "zero_point": np.float32(0)}, spec)
    u = x.astype(np.float64) / scale
    # Float32 may decide a near tie the other way.
    clear = abs(u - np.floor(u) - 0.5) > 1e-6 * np.maximum(abs(u), 1)
    truth = np.clip(np.round(u), spec.format.qmin, spec.format.qmax) * np.float64(scale)
    np.testing.assert_allclose(np.asarray(y)[clear], truth[clear], rtol=1e-6)


def test_grid_is_not_trained_and_a_collapsed_scale_is_harmless():
    spec = Spec(4)
    x = jnp.linspace(-1, 1, 9)
    for scale in (0.0, -1.0, 1e-30):
        y, dx, dparams = vjp(x, scale, 0, spec, np.ones(9, np.float32))
        assert np.isfinite(y).all() and np.isfinite(dx).all()
        assert dparams == {"scale": 0, "zero_point": 0}
        view, _, _ = uniform.integer_view({"scale": jnp.float32(scale), "zero_point": 0.0}, spec)
        assert view > 0
