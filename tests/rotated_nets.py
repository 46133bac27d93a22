"""A vision transformer with rules for rotations, in float64 and with wide channels."""

import jax
import jax.numpy as jnp
import numpy as np

import qkd_jax as qk
from qkd_jax.models import MODELS

LAYERS = ".*/(query|key|value|out|mlp1|mlp2)"
INPUT = qk.Spec(4, symmetric=False, signed=False)
RULES = [
    qk.Rule("stem|head"),
    qk.Rule(LAYERS, weight=qk.Spec(8, granularity="channel"), input=INPUT),
    qk.Rule(".*"),
]


def in_float64(tree, rng=None):
    noise = (lambda a: 0) if rng is None else (lambda a: 0.3 * rng.normal(size=a.shape))
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64) + noise(a)), tree)


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def vit(pool="mean", **sizes):
    sizes = {"width": 24, "depth": 2, "heads": 2, "patch": 8} | sizes
    return MODELS["vit"](num_classes=5, pool=pool, **sizes)


IMAGES = np.random.default_rng(0).normal(size=(6, 16, 16, 1))


def wide_channels(params):
    """Gives channels of the stream, and some behind the GELU, 20 times the others' size."""
    params = jax.tree.map(np.array, params)
    params["stem"]["kernel"][..., [1, 23, 50]] *= 20
    for block in ("block0", "block1"):
        params[block]["mlp2"]["kernel"][..., [1, 23, 50]] *= 20
        params[block]["mlp1"]["kernel"][..., ::25] *= 20
    return {"params": params}


def check_exact(method, pool):
    """Asserts that a transformer turned in float64 computes what it did, and returns the trees."""
    with jax.enable_x64(True):
        net = qk.quantize(vit(pool), RULES)
        variables = net.init(jax.random.key(0), IMAGES)
        variables = in_float64(variables, np.random.default_rng(1))  # gains and biases too
        turned = method(net, variables, IMAGES)
        out, want = net.apply(turned, IMAGES), net.apply(variables, IMAGES)
        assert out.dtype == jnp.float64 and relative(out, want) < 1e-10
        kernels = [t["params"]["block0"]["mlp1"]["kernel"] for t in (turned, variables)]
        assert relative(*kernels) > 0.1
        return turned, variables
