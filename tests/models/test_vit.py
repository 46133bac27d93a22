"""The vision transformer against its formula in NumPy, its sizes, and bad fields."""

import math

import jax
import numpy as np
import pytest

from qkd_jax.models import ViT

IMAGES = np.random.default_rng(0).standard_normal((2, 5, 8, 2))


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def gelu(x):  # the tanh form, linen's default
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def forward(params, images, heads, pool):
    images = np.pad(images, ((0, 0), (1, 2), (0, 0), (0, 0)))  # 5 rows to two patches of 4
    n, h, w, c = images.shape
    x = images.reshape(n, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, -1, 16 * c) @ params["stem"]["kernel"].reshape(16 * c, -1)
    x = x + params["stem"]["bias"]
    if pool == "class":
        x = np.concatenate([np.broadcast_to(params["token"], (n, 1, x.shape[-1])), x], 1)
    x = x + params["positions"]
    for block in ("block0", "block1"):
        p = params[block]
        y, a = norm(x, p["norm1"]), p["attention"]
        q, k, v = (
            np.einsum("ntc,chd->nthd", y, a[s]["kernel"]) + a[s]["bias"]
            for s in ("query", "key", "value")
        )
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        mixed = np.einsum("nhqk,nkhd->nqhd", weights, v)
        x = x + np.einsum("nqhd,hdc->nqc", mixed, a["out"]["kernel"]) + a["out"]["bias"]
        x = x + dense(gelu(dense(norm(x, p["norm2"]), p["mlp1"])), p["mlp2"])
    x = norm(x, params["norm"])
    return dense(x[:, 0] if pool == "class" else x.mean(1), params["head"])


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_forward_is_the_formula(pool):
    model = ViT(num_classes=3, depth=2, width=8, heads=2, pool=pool)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES.astype(np.float32))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)
    params = jax.tree.map(lambda a: a.astype(np.float64), variables["params"])
    found = model.apply(variables, IMAGES.astype(np.float32))
    wanted = forward(params, IMAGES, 2, pool)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(heads=3), "heads is 3, which does not divide the width of 64"),
        (dict(patch=0), "patch is 0"),
        (dict(pool="max"), "pool is 'max'"),
        (dict(distilled=True), "distilled adds a token .* set pool='class'"),
        (dict(positions="rotary", grid=2), "grid is the size of learned positions"),
        (dict(positions="rotary", heads=32), "a head has 2 channels.* multiple of 4"),
        (dict(biases=("q",)), "biases is 'q'"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ViT(**fields).init, jax.random.key(0), IMAGES.astype(np.float32))
