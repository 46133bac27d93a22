"""A student behind a projector and another net's head: paths, features, and its way to integers."""

import jax
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax.models import BorrowedClassifier, create
from qkd_jax.quantize import presets
from qkd_jax.training.state import jit_once

IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)


def body(name="resnet8", **fields):
    return create(name, 10, **fields)


def test_the_body_keeps_its_paths_and_loses_its_head():
    alone = body(width=4)
    shapes = jax.eval_shape(alone.init, jax.random.key(0), IMAGES)["params"]
    borrower = BorrowedClassifier(body(width=4), 10, features=24)
    found = jax.eval_shape(borrower.init, jax.random.key(0), IMAGES)["params"]
    assert found["head"]["kernel"].shape == (24, 10)
    for name in shapes:
        if name != "head":
            assert jax.tree.map(np.shape, shapes[name]) == jax.tree.map(np.shape, found[name])
    own = {n for n in found if n not in shapes}
    layers = {f"projector{k}" for k in (1, 2, 3)}
    assert own == layers | {f"{name}_bn" for name in layers}


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "mobilenet_v2", "mlp"])
def test_every_body_is_projected_to_the_features_wanted(name):
    borrower = BorrowedClassifier(body(name), 10, features=24)

    def run(images):
        variables = borrower.init(jax.random.key(0), images)
        return borrower.apply(variables, images, mutable=["features"])

    logits, found = jax.eval_shape(run, IMAGES)
    assert logits.shape == (8, 10)
    assert found["features"]["projected"][0].shape[-1] == 24
    assert found["features"]["pooled"][0].shape == (8, 24)


def test_a_body_that_keeps_its_head_is_refused():
    with pytest.raises(ValueError, match="cannot leave out its head"):
        BorrowedClassifier(body("vit", width=8, heads=2, depth=1), 10).init(
            jax.random.key(0), IMAGES
        )


@pytest.mark.slow
def test_it_becomes_integers_like_any_net():
    net = qk.quantize(
        BorrowedClassifier(body("mlp", hidden=(12,)), 10, features=8), presets.rules("w4a4")
    )
    variables = jit_once(net.init)(jax.random.key(1), IMAGES)
    variables = qk.calibrate(net, variables, [IMAGES])
    assert "0 MISSED" in str(qk.coverage(net, variables, IMAGES))
    integer = qk.convert(net, variables, IMAGES)
    want, got = net.apply(variables, IMAGES), qk.integer_apply(integer, IMAGES)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
