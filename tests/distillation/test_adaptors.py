"""Adaptors between features of any shapes, and the margins of a teacher's BatchNorms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import losses
from qkd_jax.distillation import adaptors
from qkd_jax.distillation.adaptors.maps import as_map, map_shape, nearest
from qkd_jax.distillation.adaptors.margins import batch_norms_into, teacher_margins
from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.training.state import jit_once

# What two nets may have at their taps, shallow to deep.
SHAPES = {
    "twice as large": (((8, 8, 4), (8, 8, 6)), ((4, 4, 5), (4, 4, 9))),
    "half as large": (((4, 4, 4), (2, 2, 6)), ((8, 8, 5), (4, 4, 9))),
    "no factor": (((7, 7, 4), (4, 4, 6)), ((5, 5, 5), (3, 3, 9))),
    "much larger": (((28, 28, 4), (14, 14, 6)), ((7, 7, 5), (2, 2, 9))),
    "tokens to maps": (((8, 8, 4), (4, 4, 6)), ((17, 8), (17, 8))),
    "maps to tokens": (((50, 8), (50, 8)), ((8, 8, 4), (4, 4, 6))),
    "vectors": (((10,), (12,)), ((20,), (7,))),
    "vector to map": (((10,), (12,)), ((8, 8, 4), (4, 4, 6))),
}


ADAPTED = sorted(
    name
    for name, row in losses.TABLE.items()
    if row.adaptor and not row.has_heads and name not in ("ctkd", "irg")
)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_features_fit_the_loss(name, shapes):
    students, teachers = SHAPES[shapes]
    several = name in ("ab", "ofd", "fsp", "reviewkd", "semckd", "vid")
    students, teachers = (s if several else s[-1:] for s in (students, teachers))
    module = adaptors.build(name, students, teachers)
    assert hash(module) == hash(adaptors.build(name, students, teachers))

    def run(students, teachers):
        variables = module.init(jax.random.key(0), students, teachers, train=False)
        outputs, _ = module.apply(
            variables, students, teachers, train=True, mutable=["batch_stats"]
        )
        more = {"labels": jnp.zeros(3, jnp.int32), "index": jnp.zeros(3, jnp.int32)}
        loss = losses.LOSSES[name]
        if name == "crd":
            more |= {
                "memory": losses.crd_memory(5, 128, key=jax.random.key(0)),
                "key": jax.random.key(1),
                "negatives": 4,
            }
        takes = losses.TABLE[name].inputs
        keywords = {k: v for k, v in more.items() if k in takes or k == "negatives"}
        values = loss(**{k: v for k, v in outputs.items() if k in takes}, **keywords)
        return values[0] if name == "crd" else values

    given = [
        tuple(jax.ShapeDtypeStruct((3, *shape), np.float32) for shape in side)
        for side in (students, teachers)
    ]
    assert jax.eval_shape(run, *given).shape == (3,)


def test_tokens_lie_as_their_patches_did():
    assert map_shape((16, 5)) == map_shape((17, 5)) == (4, 4, 5)
    assert map_shape((6, 5)) == (6, 1, 5) and map_shape((5,)) == (1, 1, 5)
    tokens = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    np.testing.assert_array_equal(as_map(tokens), tokens[:, 1:].reshape(2, 2, 2, 3))
    with pytest.raises(ValueError, match="adaptors take vectors"):
        map_shape((2, 2, 2, 2))


def test_nearest_floors_as_torch_does():
    # torch.nn.functional.interpolate(mode="nearest") of 0..7 to 4 is 0, 2, 4, 6; of 0..2 to 5 is
    # 0, 0, 1, 1, 2, floor(i * 3 / 5).
    row = np.arange(8, dtype=np.float32).reshape(1, 1, 8, 1)
    np.testing.assert_array_equal(nearest(row, 1, 4)[0, 0, :, 0], [0, 2, 4, 6])
    np.testing.assert_array_equal(nearest(row[:, :, :3], 1, 5)[0, 0, :, 0], [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(nearest(row[:, :, :2], 2, 4)[0, :, :, 0], [[0, 0, 1, 1]] * 2)


def test_a_variance_starts_where_it_is_said():
    module = adaptors.build("vid", ((4, 4, 3),), ((4, 4, 6),), initial=2.5)
    features = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 6))
    variables = module.init(jax.random.key(0), features[:1], features[1:])
    outputs = module.apply(variables, features[:1], features[1:])
    np.testing.assert_allclose(outputs["variances"], [np.full(6, 2.5)], rtol=1e-5)


def test_a_temperature_starts_at_the_authors():
    module = adaptors.build("ctkd")
    found = module.apply(module.init(jax.random.key(0), (), ()), (), ())["temperature"]
    assert float(found) == pytest.approx(1 + 20 / (1 + math.exp(-1)), rel=1e-6)


def test_the_paraphraser_learns_from_its_reconstruction_alone():
    module = adaptors.build("ft", ((4, 4, 3),), ((4, 4, 6),))
    rng = np.random.default_rng(0)
    student = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32),)
    teacher = (jnp.asarray(rng.normal(size=(2, 4, 4, 6)), jnp.float32),)
    variables = jit_once(module.init)(jax.random.key(0), student, teacher)

    def value(params, kind):
        found, _ = module.apply(
            {**variables, "params": params}, student, teacher, train=True, mutable=["batch_stats"]
        )
        if kind == "adaptor_loss":
            return jnp.sum(found[kind])
        return jnp.sum(losses.ft(found["student_feature"], found["teacher_feature"]))

    for kind, learns in (
        ("ft", {"translator"}),
        ("adaptor_loss", {"paraphraser", "decoder0", "decoder1", "decoder2"}),
    ):
        grads = jit_once(jax.grad(lambda p, kind=kind: value(p, kind)))(variables["params"])
        moved = {n for n, g in grads.items() if any(np.any(x) for x in jax.tree.leaves(g))}
        assert moved == learns


@pytest.mark.parametrize(
    ("name", "fields", "want"),
    [
        (
            "resnet8",
            {"width": 4},
            [
                ["stage1_block0/bn2"],
                ["stage2_block0/bn2", "stage2_block0/shortcut_bn"],
                ["stage3_block0/bn2", "stage3_block0/shortcut_bn"],
            ],
        ),
        ("mobilenet", {}, [["stage1_block0/pointwise_bn"]]),
        ("mlp", {"batch_norm": True, "hidden": (5,)}, [["dense1_bn"]]),
        ("mlp", {"hidden": (5,)}, [[]]),
    ],
)
def test_the_batch_norms_that_make_a_tap(name, fields, want):
    net = quantize(create(name, 3, **fields))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    variables = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    first = "hidden1_pre" if name == "mlp" else "stage1_pre"
    taps = [first, "stage2_pre", "stage3_pre"][: len(want)]
    assert batch_norms_into(net, variables, tuple(taps), (8, 8, 1)) == want
    # Behind its activation no tap is a sum of BatchNorms.
    assert batch_norms_into(net, variables, (first.removesuffix("_pre"),), (8, 8, 1)) == [[]]


def test_margins_are_the_mean_of_what_a_relu_cuts_off():
    net = quantize(create("mlp", 3, batch_norm=True, hidden=(3,)))
    images = np.zeros((1, 2, 2, 1), np.float32)
    variables = jit_once(net.init)(jax.random.key(0), images)
    mean, std = np.array([0.5, -1.0, 0.0]), np.array([1.0, -0.5, 2.0])
    variables["params"]["dense1_bn"] = {"bias": jnp.asarray(mean), "scale": jnp.asarray(std)}
    zeros = {"margin0": jnp.zeros(3)}
    found = teacher_margins(zeros, net, variables, ("hidden1_pre",), (2, 2, 1))["margin0"]
    # By numerical integration of the density, which has no error function in it.
    for m, s, margin in zip(mean, np.abs(std), found, strict=True):
        x = np.linspace(m - 12 * s, 0, 200_001)
        density = np.exp(-0.5 * ((x - m) / s) ** 2)
        assert float(margin) == pytest.approx(np.sum(x * density) / np.sum(density), rel=1e-3)
