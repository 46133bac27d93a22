"""What every entry of MODELS must satisfy; a new one is covered without another line.

Shapes are evaluated without computing; the computed test uses small images, and skips deep and
large nets.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import models
from qkd_jax.models import MODELS

IMAGE = (8, 8, 1)


def batch(seed=0, size=4, shape=IMAGE):
    return np.random.default_rng(seed).standard_normal((size, *shape)).astype(np.float32)


# Without optimisations XLA compiles several times faster, which is most of the time here.
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes(model, images):
    return jax.eval_shape(model.init, jax.random.key(0), images)


@functools.cache
def shapes_of(name):
    return shapes(models.create(name, 3), batch())


def skip_unless_small(name):
    leaves = jax.tree.leaves(shapes_of(name)["params"])
    if len(leaves) > 40 or sum(np.prod(x.shape, dtype=int) for x in leaves) > 1_000_000:
        pytest.skip("too large to compute here; its shapes are tested")


every = pytest.mark.parametrize("name", MODELS)


@every
def test_logits_for_any_image_shape(name):
    model = MODELS[name](num_classes=7)
    assert isinstance(model, nn.Module) and model == models.create(name, 7)
    assert hash(model) == hash(models.create(name, 7))
    # A deep net takes seconds to trace, and has the same blocks as a shallow one.
    deep = len(jax.tree.leaves(shapes_of(name)["params"])) > 40
    for shape in ((9, 13, 2),) if deep else ((9, 13, 2), (28, 28, 1), (32, 32, 3)):
        images = batch(shape=shape, size=2)
        variables = shapes(model, images)
        logits = jax.eval_shape(model.apply, variables, images)
        assert logits.shape == (2, 7) and logits.dtype == jnp.float32
        assert set(variables) <= {"params", "batch_stats"}


@every
def test_layer_names_read_well(name):
    variables = shapes_of(name)
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    paths = ["/".join(k.key for k in path) for path, _ in flat]
    assert any(p.startswith("head/") for p in paths)
    # linen numbers the layers that were given no name: "Conv_0".
    assert not [p for p in paths if any(part[0].isupper() for part in p.split("/"))]


@every
def test_features_are_taken_only_on_demand(name):
    model, images = models.create(name, 3), batch()
    variables = shapes_of(name)
    plain = jax.eval_shape(model.apply, variables, images)
    logits, aux = jax.eval_shape(
        lambda v, x: model.apply(v, x, mutable="features"), variables, images
    )
    assert plain == logits
    features = aux["features"]
    assert all(len(taken) == 1 for taken in features.values())
    assert features["pooled"][0].ndim == 2
    head = variables["params"]["head"]["kernel"]
    assert features["pooled"][0].shape == (4, head.shape[0])
    for key, (value,) in features.items():
        if f"{key}_pre" in features:
            assert features[f"{key}_pre"][0].shape == value.shape


@every
def test_bfloat16_computation_keeps_float32_parameters(name):
    model, images = models.create(name, 3, dtype="bfloat16"), batch()
    variables = shapes(model, images)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, aux = jax.eval_shape(
        lambda v, x: model.apply(v, x, mutable="features"), variables, images
    )
    assert logits.dtype == jnp.float32
    assert aux["features"]["pooled"][0].dtype == jnp.bfloat16


@every
def test_wrong_images_are_named(name):
    model = models.create(name, 3)
    with pytest.raises(ValueError, match=r"images has shape \(8, 8, 1\)"):
        shapes(model, batch()[0])
    with pytest.raises(ValueError, match="images has dtype uint8"):
        shapes(model, np.zeros((2, *IMAGE), np.uint8))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "mlp")) for n in MODELS]
)
def test_trains_and_evaluates(name):
    skip_unless_small(name)
    model, images = models.create(name, 3), batch()
    labels = np.array([0, 1, 2, 0])
    variables = compile_fast(model.init)(jax.random.key(0), images)

    @compile_fast
    def step(variables, images):
        def loss(params):
            logits, updates = model.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(4), labels]), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], grads)
        return variables | updates | {"params": params}, value, grads

    values = []
    state = variables
    for _ in range(4):
        state, value, grads = step(state, images)
        assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))
        values.append(float(value))
    assert values[-1] < values[0]
    assert jax.tree.structure(state) == jax.tree.structure(variables)

    # Evaluation: a pure function of the variables; other examples do not matter.
    logits = jax.jit(model.apply)(state, images)
    np.testing.assert_allclose(logits, model.apply(state, images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1:3], model.apply(state, images[1:3]), rtol=1e-4, atol=1e-5)

    # bfloat16 keeps 8 bits, and these nets have up to some twenty roundings in a row.
    low = models.create(name, 3, dtype=jnp.bfloat16).apply(variables, images)
    wanted = model.apply(variables, images)
    np.testing.assert_allclose(low, wanted, atol=0.05 * float(np.abs(wanted).max()))


def test_any_depth_6n_plus_2():
    model = models.create("resnet26", 10, width=8)
    assert model == models.ResNet(depth=26, num_classes=10, width=8)
    assert set(shapes(model, batch())["params"]) >= {"stage3_block3", "stem", "head"}


def test_values_as_they_come_from_json():
    model = models.create("mlp", 10, hidden=[16, 8])
    assert model == models.MLP(num_classes=10, hidden=(16, 8))
    assert isinstance(hash(model), int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnt20", 10), "unknown model 'resnt20'.*Did you mean 'resnet20'"),
        (("resnet21", 10), "depth is 21; it must be 6n.*20 and 26"),
        (("resnet2", 10), "depth is 2; it must be an integer of at least 8"),
        (("resnet20", 0), "num_classes is 0"),
        (("resnet20", "10"), "num_classes is '10'"),
    ],
)
def test_create_names_the_nearest_choice(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(*arguments)


def test_create_names_the_nearest_field():
    with pytest.raises(ValueError, match=r"resnet8.*'widht'.*Did you mean 'width'"):
        models.create("resnet8", 10, widht=8)
