"""Small linen nets, none of the package's own, and variables that look trained."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.deploy import has_vnni
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate

# Bits of weights in products that engines compute: with 8, sums saturate on x86 without VNNI.
PRODUCT_BITS = 8 if has_vnni() else 7


class Mixed(nn.Module):
    """Strided, depthwise, dilated, residual and dense layers, with and without biases."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name, **options: nn.BatchNorm(
            use_running_average=not train, name=name, **options
        )
        x = nn.relu(norm("stem_bn")(nn.Conv(8, (3, 3), strides=2, name="stem")(x)))
        y = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(x)
        y = nn.relu(norm("depthwise_bn", use_scale=False)(y))
        y = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(y)
        y = nn.relu(norm("grouped_bn", use_bias=False)(y))
        y = nn.Conv(8, (3, 3), kernel_dilation=2, use_bias=False, name="dilated")(y)
        x = nn.relu(norm("dilated_bn")(y) + x)
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = nn.avg_pool(x, (2, 2), (1, 1), padding="SAME", count_include_pad=False)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(norm("hidden_bn")(nn.Dense(12, name="hidden")(x)))
        return nn.Dense(5, name="head")(x)


NORMS = ("stem_bn", "depthwise_bn", "grouped_bn", "dilated_bn", "hidden_bn")
IMAGES = (9, 11, 3)


def images(batch=6, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *IMAGES))


def trained_like(variables, seed=0):
    """Fills a tree of shapes: BatchNorm gains of both signs, and biases away from 0."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        kind, shape = path[-1].key, leaf.shape
        if kind == "scale":
            array = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
        elif kind == "var":
            array = rng.uniform(0.5, 2, shape)
        elif kind in ("bias", "mean"):
            array = rng.normal(0, 0.3, shape)
        else:
            array = rng.normal(0, 1, shape) / np.sqrt(max(np.prod(shape[:-1]), 1))
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, variables)


def rules(weight_bits, input_bits, *, quantizer="lsq", granularity="channel", ends=8):
    """Rules for `Mixed`: signed first input, unsigned elsewhere (behind ReLUs and pools)."""
    inner = Spec(input_bits, quantizer=quantizer, signed=False)
    weight = Spec(weight_bits, quantizer=quantizer, granularity=granularity)
    end = Spec(ends, granularity=granularity)
    return (
        Rule("stem", weight=end, input=Spec(8, signed=False, symmetric=False)),
        Rule("head", weight=end, input=Spec(8, signed=False)),
        Rule(".*", weight=weight, input=inner),
    )


def float_net(model, example, rules=(), seed=0):
    """Returns a net and float variables that no initialiser has computed (which takes seconds)."""
    net = quantize(model, rules)
    shapes = jax.eval_shape(net.init, jax.random.key(0), example)
    return net, trained_like(shapes, seed)


def calibrated(model, rules, example, seed=0):
    """Returns a quantized net and its variables."""
    net, variables = float_net(model, example, rules, seed)
    return net, calibrate(net, variables, [example], observer="minmax")


CASES = {
    "w8a8": rules(8, 8, quantizer="uniform", granularity="tensor"),
    "w4a4": rules(4, 4),
    "w2a2": rules(2, 2, ends=7),
    "qil": rules(3, 5, quantizer="qil", granularity="tensor"),
}
# Each case compiles a net of its own: one runs with the fast tests, the others with the slow ones.
ONE_FAST = ["w2a2", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "w2a2")]


@functools.lru_cache
def case(name):
    """Returns (net, variables, images) of `Mixed` with the rules of a case; do not change them."""
    example = images(32)
    return *calibrated(Mixed(), CASES[name], example), example
