"""Gradients of large tensors, whose sums are taken in another way than those of small ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.numerics.backward import _view
from qkd_jax.quantizers import QUANTIZERS

# An example is small enough for the plain sums, eight of them are not.
SHAPE = (8, 6, 8, 32)
SPECS = [
    *(Spec(4, quantizer=q, signed=False) for q in ("lsq", "tqt", "pact", "ewgs", "dsq", "sigmoid")),
    Spec(4, quantizer="lsq_plus", signed=False, symmetric=False),
    Spec(4, quantizer="lsq", options={"learn_bits": True}),
    Spec(3, quantizer="lsq_plus", signed=False, symmetric=False, backward="dsq"),
    Spec(4, quantizer="qil"),
    Spec(4, quantizer="qil", backward="sigmoid"),
    Spec(4, quantizer="apot"),
    Spec(4, quantizer="float", options={"learned": True}),
    Spec(1, quantizer="binary", options={"static": True}),
]
MESH = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))


def setup(spec, shape=SHAPE):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, *shape)).astype(np.float32)
    x = x if spec.signed or not spec.symmetric else abs(x)
    module = QUANTIZERS[spec.quantizer]
    params = module.init(numerics.finish(numerics.measure(x)), spec)
    params = {k: v * 0.7 if k != "bits" else v - 0.6 for k, v in params.items()}  # clips a part

    def gradients(x, g, params):
        f = lambda x, p: module.fake_quant(x, p, spec, batch_axes=(0,))
        return jax.vjp(f, x, params)[1](g)

    return jnp.asarray(x), jnp.asarray(g), params, gradients


def ids(spec):
    return f"{spec.label} {spec.backward}".replace(" ", "-")


@pytest.mark.parametrize("shape", [SHAPE, (4, 7, 7, 32), (2, 3, 3001), (6000,)])
def test_a_view_keeps_the_first_axis_and_every_element(shape):
    view = _view(shape)
    if view is None:
        assert shape in ((2, 3, 3001), (6000,))
        return
    first, _, short, long = view
    assert first == shape[0] and np.prod(view) == np.prod(shape)
    assert 4 <= short <= 16 and long >= 32


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_a_large_tensor_has_the_gradients_of_its_examples(spec):
    x, g, params, gradients = setup(spec)
    assert _view(x.shape) is not None and _view(x[:1].shape) is None
    dx, dparams = jax.jit(gradients)(x, g, params)
    one = jax.jit(gradients)
    parts = [one(x[i : i + 1], g[i : i + 1], params) for i in range(len(x))]
    np.testing.assert_allclose(dx, np.concatenate([p[0] for p in parts]), rtol=2e-6, atol=1e-6)
    for name, value in dparams.items():
        terms = np.array([p[1][name] for p in parts], np.float64)
        # Sums of thousands of terms in another order, against the size of the partial sums.
        np.testing.assert_allclose(value, terms.sum(), rtol=1e-4, atol=1e-5 * abs(terms).sum())
        assert value != 0 or name == "temperature"


@pytest.mark.parametrize("spec", SPECS[::3], ids=ids)
def test_devices_add_up(spec):
    x, g, params, gradients = setup(spec)
    dx, dparams = jax.jit(gradients)(x, g, params)
    mapped = jax.shard_map(
        gradients, mesh=MESH, in_specs=(P("batch"), P("batch"), P()), out_specs=(P("batch"), P())
    )
    across = NamedSharding(MESH, P("batch"))
    split = jax.jit(gradients)(jax.device_put(x, across), jax.device_put(g, across), params)
    for found in (jax.jit(mapped)(x, g, params), split):
        np.testing.assert_allclose(found[0], dx, rtol=2e-6, atol=1e-7)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[1], dparams
        )


def test_sums_can_be_differentiated_again():
    """Value and slope are finite; the slope ignores the jumps at the codes' borders."""
    x, g, params, gradients = setup(Spec(4, quantizer="qil"))
    loss = lambda p: jnp.sum(
        jnp.stack([v**2 for v in gradients(x, g * p["center"], p)[1].values()])
    )
    slope = jax.grad(loss)(params)["center"]
    assert np.isfinite(loss(params)) and np.isfinite(slope) and slope != 0


@pytest.mark.parametrize("quantizer", ["binary", "ternary", "dorefa"])
def test_moments_of_large_weights(quantizer):
    bits = {"binary": 1, "ternary": 2, "dorefa": 1}[quantizer]
    spec = Spec(bits, quantizer=quantizer)
    w = np.random.default_rng(0).normal(size=(3, 3, 32, 64)).astype(np.float32)
    module = QUANTIZERS[quantizer]
    params = module.init(numerics.finish(numerics.measure(w)), spec)
    size = abs(np.float64(w))
    above = size > 0.7 * size.mean()
    wanted = size[above].mean() if quantizer == "ternary" else size.mean()
    found = jax.jit(lambda w: module.live(w, params, spec))(w)
    np.testing.assert_allclose(found["bound" if quantizer == "dorefa" else "alpha"], wanted, 1e-5)
    if quantizer != "binary":
        return
    g = np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
    dw = jax.jit(lambda w, g: jax.vjp(lambda w: module.fake_quant(w, params, spec), w)[1](g)[0])(
        w, g
    )
    through = np.where(size <= 1, size.mean() * g, 0)
    np.testing.assert_allclose(
        dw, through + np.sign(w) * np.mean(g * np.sign(w), dtype=np.float64), rtol=1e-5, atol=1e-6
    )
