"""CIFAR ResNets: parameter counts, option A and B shortcuts, initialisation, features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import models

# Without optimisations XLA compiles random draws several times faster.
FAST = {"xla_backend_optimization_level": 0}


def init(model, images, seed=0):
    return jax.jit(model.init, compiler_options=FAST)(jax.random.key(seed), images)


def variables_of(model, shape=(2, 32, 32, 3)):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def count(model, shape=(2, 32, 32, 3)):
    leaves = jax.tree.leaves(variables_of(model, shape)["params"])
    return sum(np.prod(x.shape, dtype=int) for x in leaves)


def by_hand(depth, classes, stem, widths, projection=True, channels=3):
    """Counts weights from the architecture: a convolution has no bias, a BatchNorm two vectors."""
    total = 9 * channels * stem + 2 * stem
    width_in = stem
    for stage, width in enumerate(widths):
        for block in range((depth - 2) // 6):
            total += 9 * width_in * width + 9 * width * width + 4 * width
            changes = width_in != width or (stage > 0 and block == 0)
            if changes and projection:
                total += width_in * width + 2 * width
            width_in = width
    return total + width_in * classes + classes


# Literal counts: with 100 classes those of the CRD paper's nets; with 10 classes and option A the
# 0.27M, 0.85M and 1.7M of the ResNet paper's table 6.
@pytest.mark.parametrize(
    ("name", "classes", "fields", "stem", "widths", "wanted"),
    [
        ("resnet20", 10, {"shortcut": "pad"}, 16, (16, 32, 64), 269_722),
        ("resnet56", 10, {"shortcut": "pad"}, 16, (16, 32, 64), 853_018),
        ("resnet110", 10, {"shortcut": "pad"}, 16, (16, 32, 64), 1_727_962),
        ("resnet20", 10, {}, 16, (16, 32, 64), 272_474),
        ("resnet8", 100, {}, 16, (16, 32, 64), 83_892),
        ("resnet20", 100, {}, 16, (16, 32, 64), 278_324),
        ("resnet56", 100, {}, 16, (16, 32, 64), 861_620),
        ("resnet110", 100, {}, 16, (16, 32, 64), 1_736_564),
        ("resnet8x4", 100, {}, 32, (64, 128, 256), 1_233_540),
        ("resnet32x4", 100, {}, 32, (64, 128, 256), 7_433_860),
        ("resnet14", 10, {"width": 8}, 8, (8, 16, 32), None),
    ],
)
def test_parameter_counts(name, classes, fields, stem, widths, wanted):
    depth = int(name.removeprefix("resnet").split("x")[0])
    hand = by_hand(depth, classes, stem, widths, fields.get("shortcut") != "pad")
    assert count(models.create(name, classes, **fields)) == hand
    assert wanted is None or hand == wanted


def test_paths():
    params = variables_of(models.create("resnet14", 10))["params"]
    assert set(params) == {"stem", "stem_bn", "head"} | {
        f"stage{s}_block{b}" for s in (1, 2, 3) for b in (0, 1)
    }
    plain = {"conv1", "bn1", "conv2", "bn2"}
    assert set(params["stage1_block0"]) == set(params["stage2_block1"]) == plain
    assert set(params["stage2_block0"]) == plain | {"shortcut", "shortcut_bn"}
    assert params["stage2_block0"]["shortcut"]["kernel"].shape == (1, 1, 16, 32)
    assert set(params["stem"]) == {"kernel"} and set(params["head"]) == {"kernel", "bias"}
    # The wide variants change the width in stage 1 already.
    assert "shortcut" in variables_of(models.create("resnet8x4", 10))["params"]["stage1_block0"]


@pytest.mark.parametrize(
    ("size", "sizes"), [(32, (32, 16, 8)), (28, (28, 14, 7)), (8, (8, 4, 2)), (7, (7, 4, 2))]
)
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_feature_shapes(size, sizes, shortcut):
    model = models.create("resnet8", 10, width=4, shortcut=shortcut)
    images = jnp.zeros((3, size, size, 1))
    variables = variables_of(model, images.shape)
    _, aux = jax.eval_shape(lambda v, x: model.apply(v, x, mutable="features"), variables, images)
    wanted = {"pooled": (3, 16)}
    for stage, side in enumerate(sizes, start=1):
        shape = (3, side, side, 4 * 2 ** (stage - 1))
        wanted |= {f"stage{stage}": shape, f"stage{stage}_pre": shape}
    assert {k: v.shape for k, (v,) in aux["features"].items()} == wanted


@pytest.fixture(scope="module")
def net():
    model = models.create("resnet8", 10, width=4)
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    return model, init(model, images), images


def test_features_are_related_as_they_are_named(net):
    model, variables, images = net
    logits, aux = model.apply(variables, images, mutable="features")
    features = {k: v[0] for k, v in aux["features"].items()}
    for stage in ("stage1", "stage2", "stage3"):
        pre = features[f"{stage}_pre"]
        assert np.any(pre < 0)
        np.testing.assert_array_equal(features[stage], np.maximum(pre, 0))
    np.testing.assert_allclose(features["pooled"], features["stage3"].mean((1, 2)), rtol=1e-5)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        logits, features["pooled"] @ head["kernel"] + head["bias"][None], rtol=1e-4, atol=1e-6
    )
    assert "features" not in variables


def test_strided_convolutions_sample_the_papers_pixels():
    # One pixel of padding on each side, so stride 2 keeps the pixels 0, 2, 4, ...
    block = models.BasicBlock(width=2, stride=2)
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 1)).astype(np.float32)
    variables = init(block, x)
    one = models.BasicBlock(width=2, stride=1)
    taken = {}
    for model in (block, one):
        _, aux = model.apply(variables, x, capture_intermediates=True)
        taken[model.stride] = aux["intermediates"]["conv1"]["__call__"][0]
    np.testing.assert_allclose(taken[2], taken[1][:, ::2, ::2], rtol=1e-5, atol=1e-6)


def test_pad_shortcut_is_every_second_pixel_and_zero_channels():
    block = models.BasicBlock(width=5, stride=2, shortcut="pad")
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 2)).astype(np.float32)
    variables = init(block, x)
    variables["params"]["bn2"]["scale"] *= 0  # the residual branch gives 0
    y = block.apply(variables, x)
    np.testing.assert_array_equal(y[..., :2], np.maximum(x[:, ::2, ::2], 0))
    assert not np.any(y[..., 2:])
    assert "shortcut" not in variables["params"]


def test_convolutions_start_from_he_normal_over_fan_out():
    # More channels out than in, so that fan-in would show.
    variables = init(models.BasicBlock(width=256), jnp.zeros((1, 4, 4, 64)), seed=3)
    kernel = np.asarray(variables["params"]["conv1"]["kernel"])
    assert kernel.shape == (3, 3, 64, 256)
    deviation = np.sqrt(2 / (9 * 256))
    # 147,456 draws: the sample's own error of the deviation is 0.2 %.
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.01)
    # Not the truncated normal, which has nothing beyond 2.3 deviations.
    assert np.abs(kernel).max() > 4 * deviation


def test_batch_norm_settings(net):
    model, variables, images = net
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    stem = jax.lax.conv_general_dilated(
        padded,
        variables["params"]["stem"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    stats = updates["batch_stats"]["stem_bn"]
    np.testing.assert_allclose(stats["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.slow
def test_axis_name_gives_the_statistics_of_the_whole_batch():
    images = np.random.default_rng(1).standard_normal((4, 4, 4, 1)).astype(np.float32)
    model = models.create("resnet8", 3, width=2)
    variables = init(model, images)
    whole, whole_stats = model.apply(variables, images, train=True, mutable=["batch_stats"])
    mapped = models.create("resnet8", 3, width=2, axis_name="i")
    halves, stats = jax.vmap(
        lambda x: mapped.apply(variables, x, train=True, mutable=["batch_stats"]), axis_name="i"
    )(images.reshape(2, 2, 4, 4, 1))
    np.testing.assert_allclose(halves.reshape(4, 3), whole, rtol=1e-4, atol=1e-5)
    for one, two in zip(jax.tree.leaves(whole_stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(two[0], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortcut": "projektion"}, "shortcut is 'projektion'.*Did you mean 'projection'"),
        ({"width": 0}, "width is 0"),
        ({"depth": 10}, "depth is 10; it must be 6n.*8 and 14"),
        ({"shortcut": "pad", "stem_width": 32}, "shortcut is 'pad'.*16 channels.*32"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        variables_of(models.ResNet(**fields))
