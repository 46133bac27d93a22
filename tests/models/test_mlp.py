"""The MLP against its formula, and its parameter count."""

import jax
import numpy as np
import pytest

from qkd_jax.models import MLP

IMAGES = np.random.default_rng(0).standard_normal((3, 4, 4, 2)).astype(np.float32)


def test_forward_is_the_formula():
    model = MLP(num_classes=5, hidden=(7, 6))
    # Without optimisations XLA compiles random draws several times faster.
    options = {"xla_backend_optimization_level": 0}
    variables = jax.jit(model.init, compiler_options=options)(jax.random.key(0), IMAGES)
    params = variables["params"]
    assert set(variables) == {"params"} and set(params) == {"dense1", "dense2", "head"}
    logits, aux = model.apply(variables, IMAGES, mutable="features")
    x = IMAGES.reshape(3, 32)
    for number in (1, 2):
        layer = params[f"dense{number}"]
        x = x @ layer["kernel"] + layer["bias"][None]
        np.testing.assert_allclose(
            aux["features"][f"hidden{number}_pre"][0], x, rtol=1e-4, atol=1e-5
        )
        x = np.maximum(x, 0)
    np.testing.assert_allclose(aux["features"]["pooled"][0], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        logits, x @ params["head"]["kernel"] + params["head"]["bias"][None], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("hidden", "batch_norm", "wanted"),
    [
        ((), False, 32 * 5 + 5),
        ((7, 6), False, 32 * 7 + 7 + 7 * 6 + 6 + 6 * 5 + 5),
        ((7,), True, 32 * 7 + 14 + 7 * 5 + 5),
    ],
)
def test_parameter_count(hidden, batch_norm, wanted):
    model = MLP(num_classes=5, hidden=hidden, batch_norm=batch_norm)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == wanted
    assert ("batch_stats" in variables) == batch_norm


def test_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"hidden\[1\] is 0"):
        jax.eval_shape(MLP(hidden=(4, 0)).init, jax.random.key(0), IMAGES)
