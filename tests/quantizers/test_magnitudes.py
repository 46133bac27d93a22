"""Weights of 1e20 to 1e37: a power of two in front changes no digit of what comes out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics, quantizers
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantizers import QUANTIZERS

X = np.random.default_rng(0).normal(0.1, 1.0, (4, 3)).astype(np.float32)
UPSTREAM = np.cos(np.arange(X.size, dtype=np.float32)).reshape(X.shape)
# tanh squashes DoReFa's weights, and its activations are clipped at 1; XNOR's gradient stops at 1.
FIXED, FIXED_GRADIENT = ("dorefa",), ("dorefa", "binary")


def specs():
    for name in QUANTIZERS:
        for granularity in ("tensor", "channel"):
            fields = dict(quantizer=name, signed=True, granularity=granularity)
            tried = [dict(bits=bits, **fields) for bits in (4, 2, 1)]
            tried += [dict(tried[0], signed=False)]
            yield next(spec for spec in map(taken, tried) if spec is not None)


def taken(fields):
    try:
        spec = Spec(**fields)
        quantizers.check(spec)
    except ValueError:
        return None
    return spec


def run(spec, factor):
    """Parameters, x_hat and the gradients of sum(upstream * x_hat), for the data times a factor."""
    module = QUANTIZERS[spec.quantizer]
    x = jnp.asarray((X if spec.signed else abs(X)) * np.float32(factor))
    axes = (1,) if spec.granularity == "channel" else ()
    params = module.init(numerics.finish(numerics.measure(x, channel_axes=axes)), spec)
    fake_quant = lambda x, params: module.fake_quant(x, quantizers.live(x, params, spec), spec)
    x_hat, back = jax.vjp(fake_quant, x, params)
    return params, x_hat, *back(jnp.asarray(UPSTREAM))


@pytest.mark.parametrize("spec", list(specs()), ids=lambda spec: spec.label.replace(" ", "-"))
def test_a_power_of_two_moves_through(spec):
    """Exact: only exponents of floats change; squares overflow from 2^64 on."""
    factor = 2.0**121
    params, x_hat, dx, dparams = run(spec, factor)
    small, small_hat, small_dx, small_dparams = run(spec, 1.0)
    for leaf in jax.tree.leaves((params, x_hat, dx, dparams)):
        assert np.isfinite(leaf).all()
    if spec.quantizer in FIXED:
        return
    np.testing.assert_array_equal(x_hat, small_hat * factor)
    if spec.quantizer in FIXED_GRADIENT:
        return
    np.testing.assert_allclose(dx, small_dx, rtol=1e-6)
    for name, gradient in dparams.items():
        # What scales with the data has the same gradient; what does not (a logarithm, a
        # temperature) one that scales.
        moved = np.allclose(params[name], small[name] * factor, rtol=1e-6)
        wanted = np.float64(small_dparams[name]) * (1.0 if moved else factor)
        # Sums over the tensor, which cancel in part.
        atol = 1e-5 * (1.0 if moved else factor)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsq_plus", "tqt", "ewgs", "apot"])
def test_layers_of_very_large_weights(name):
    """Calibrated, run and differentiated as a layer: the same codes, the same gradients."""
    net = quantize(nn.Dense(3), [Rule(".*", weight=Spec(4, quantizer=name))])
    x = jnp.asarray(X)[:, :2] * 0.5

    def layer(factor):
        kernel = jnp.asarray(X[:2] * np.float32(factor))
        variables = {"params": {"kernel": kernel, "bias": jnp.zeros(3)}}
        variables = calibrate(net, variables, [x], observer="minmax")

        def loss(params):
            return jnp.sum(net.apply({**variables, "params": params}, x) * UPSTREAM)

        return net.apply(variables, x), jax.grad(loss)(variables["params"])["kernel"]

    (out, gradient), (small, small_gradient) = layer(2.0**120), layer(1.0)
    np.testing.assert_allclose(out, small * 2.0**120, rtol=1e-6)
    np.testing.assert_allclose(gradient, small_gradient, rtol=1e-6)
