"""Kernels of convolutions in groups, large enough for XLA's vectorised reductions on the CPU.

With jaxlib 0.10.1 a sum over axes 0, 1 and 3 of [3, 3, 2, 32, 64] that something is added to ends
the process (`quantize.operands.joined_axes`), so that a failure here is a worker that is gone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qkd_jax as qk

OBSERVERS = ("minmax", "mse", "percentile")
QUANTIZERS = {
    "uniform": qk.Spec(4, granularity=32),
    "affine": qk.Spec(4, granularity=32, signed=False, symmetric=False),
    "lsq": qk.Spec(4, granularity=32, quantizer="lsq"),
    "lsq_plus": qk.Spec(4, granularity=32, quantizer="lsq_plus"),
    "ternary": qk.Spec(2, granularity=32, quantizer="ternary"),
    "float": qk.Spec(4, granularity=32, quantizer="float", options={"learned": True}),
}


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(64, (3, 3), name="conv")(x).mean((1, 2))


def net_and_images(spec):
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 64)).astype(np.float32)
    net = qk.quantize(Wide(), [qk.Rule("conv", weight=spec)])
    return net, net.init(jax.random.key(0), images), images


def groups_of(kernel):
    return np.asarray(kernel, np.float64).reshape(3, 3, 2, 32, 64)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_groups_of_a_wide_kernel_are_observed(observer):
    net, variables, images = net_and_images(QUANTIZERS["uniform"])
    variables = qk.calibrate(net, variables, [images, images], observer=observer)
    scale = variables["quant"]["conv"]["weight_quantizer"]["scale"]
    assert scale.shape == (1, 1, 2, 1, 64)
    cut = groups_of(variables["params"]["conv"]["kernel"])
    covering = np.maximum(cut.max((0, 1, 3)) / 7, -cut.min((0, 1, 3)) / 8)[None, None, :, None]
    if observer == "minmax":
        np.testing.assert_allclose(scale, covering, rtol=1e-6)
    else:
        assert np.all(scale <= covering * (1 + 1e-6)) and np.all(scale > covering / 10)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_groups_of_a_wide_kernel_are_trained(name):
    net, variables, images = net_and_images(QUANTIZERS[name])
    variables = qk.calibrate(net, variables, [images])
    optimizer = optax.sgd(1e-3, momentum=0.9)

    @jax.jit
    def step(variables, state):
        loss = lambda v: jnp.mean(jnp.square(net.apply(v, images) - 1))
        value, grads = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(variables, updates), state, value

    state, losses = optimizer.init(variables), []
    for _ in range(4):
        variables, state, value = step(variables, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    integer = qk.convert(net, variables, images)
    wanted = jax.jit(net.apply)(variables, images)
    np.testing.assert_array_equal(qk.integer_apply(integer, images), wanted)
