"""Augmentations against a loop over images, and their names."""

import numpy as np
import pytest

from qkd_jax.data import augment, draws


def batch(shape=(40, 5, 7, 2)):
    words = draws.words(int(np.prod(shape)), seed=0, stream=1)
    return (words >> np.uint64(56)).astype(np.uint8).reshape(shape)


def words(images, entry, seed=0):
    count = len(images) * entry.words
    return draws.words(count, seed=seed, stream=draws.AUGMENT).reshape(len(images), entry.words)


@pytest.mark.parametrize("amount", [1, 3, 9])
@pytest.mark.parametrize("name", ["shift", "pad_crop"])
def test_shift_equals_a_loop(name, amount):
    entry = augment.AUGMENTATIONS[name]
    images = batch()
    raw = words(images, entry)
    got = entry.function(images, raw, amount)
    moves = draws.below(2 * amount + 1, raw) - amount
    assert set(moves.ravel().tolist()) == set(range(-amount, amount + 1)) or amount == 9
    for image, out, (down, right) in zip(images, got, moves, strict=True):
        wanted = np.zeros_like(image)
        for row in range(5):
            for column in range(7):
                if 0 <= row + down < 5 and 0 <= column + right < 7:
                    wanted[row, column] = image[row + down, column + right]
        np.testing.assert_array_equal(out, wanted)


def test_flip_mirrors_about_half():
    entry = augment.AUGMENTATIONS["flip"]
    images = batch((400, 3, 4, 1))
    got = entry.function(images, words(images, entry), 0)
    mirrored = np.array([np.array_equal(g, i[:, ::-1]) for g, i in zip(got, images, strict=True)])
    kept = np.array([np.array_equal(g, i) for g, i in zip(got, images, strict=True)])
    assert np.all(mirrored ^ kept)
    # 200 expected, the standard deviation is 10.
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_every_augmentation_keeps_shape_type_and_its_input(name):
    entry = augment.AUGMENTATIONS[name]
    for shape in ((1, 1, 1, 1), (3, 8, 8, 1), (2, 5, 4, 3)):
        images = batch(shape)
        before = images.copy()
        images.setflags(write=False)
        got = entry.function(images, words(images, entry), 2)
        assert got.shape == shape and got.dtype == np.uint8
        np.testing.assert_array_equal(images, before)


def test_two_of_one_kind_draw_apart():
    images = batch((64, 9, 9, 1))

    def augmented(images, *names, step):
        rows = np.arange(len(images))
        return augment.batch(images, rows, augment.parse(names), seed=0, step=step)

    once = augmented(images, "shift:1", step=3)
    twice = augmented(images, "shift:1", "shift:1", step=3)
    again = augmented(once, "shift:1", step=3)
    assert not np.array_equal(twice, again)
    assert not np.array_equal(once, augmented(images, "shift:1", step=4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("shfit:1",), "unknown augmentation 'shfit'.*Did you mean 'shift'"),
        (("shift",), "'shift:1'"),
        (("shift:-1",), "at least 1"),
        (("shift:0",), "at least 1"),
        (("pad_crop:1.5",), "at least 1"),
        (("flip:2",), "takes no amount; write 'flip'"),
        (("randaugment",), "a magnitude of at least 1, as 'randaugment:1'"),
        (("randaugment:31",), "a magnitude of at most 30"),
        (("color_jitter",), "a strength in per cent of at least 1"),
        ("shift:1", r"give a tuple, as \('shift:1',\)"),
    ],
)
def test_errors_name_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        augment.parse(given)


def test_mixup_equals_a_loop():
    entry = augment.AUGMENTATIONS["mixup"]
    images = batch((6, 3, 4, 2))
    raw = words(images, entry)
    partners = draws.below(6, raw[:, 1:])[:, 0]
    shares = [int(word) / 2**64 for word in raw[:, 0]]
    for k, out in enumerate(entry.function(images, raw, 0)):
        mixed = shares[k] * images[k].astype(np.float64) + (1 - shares[k]) * images[partners[k]]
        # Half a level of rounding, and the share's 24 bits.
        np.testing.assert_allclose(out, mixed, atol=0.5 + 255 / 2**24)
    assert len(set(partners.tolist())) > 1 and 0.1 < np.mean(shares) < 0.9


def test_cutmix_equals_a_loop():
    entry = augment.AUGMENTATIONS["cutmix"]
    images = batch((40, 9, 12, 2))
    raw = words(images, entry)
    partners = draws.below(40, raw[:, 1])
    share = raw[:, 0] / 2**64
    pasted = []
    for k, out in enumerate(entry.function(images, raw, 0)):
        row, column = int(raw[k, 2]) * 9 >> 64, int(raw[k, 3]) * 12 >> 64
        tall, wide = (int(0.5 * side * (1 - share[k]) ** 0.5) for side in (9, 12))
        wanted = images[k].copy()
        for i in range(9):
            for j in range(12):
                if row - tall <= i < row + tall and column - wide <= j < column + wide:
                    wanted[i, j] = images[partners[k], i, j]
        np.testing.assert_array_equal(out, wanted)
        pasted.append(np.any(out != images[k], axis=-1).mean())
    assert min(pasted) == 0 and max(pasted) > 0.5
