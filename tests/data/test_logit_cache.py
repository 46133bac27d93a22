"""Cached logits and the views they are of."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qkd_jax import data
from qkd_jax.data import logit_cache as cached
from qkd_jax.data.views import Views

EXAMPLES, CLASSES = 23, 7
WANTED = cached.Wanted("a" * 64, "made", "b" * 64, EXAMPLES, CLASSES, views=3)


def made(wanted=WANTED, seed=0):
    shape = (wanted.views, wanted.examples, wanted.classes)
    return (4 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def parts(logits, size=10):
    for view, table in enumerate(logits):
        for first in range(0, len(table), size):
            yield view, first, table[first : first + size]


def softmax(z):
    e = np.exp(np.float64(z) - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_all_logits_come_back_in_float16(tmp_path):
    logits = made()
    written = cached.write(tmp_path / "cache", WANTED, parts(logits))
    found = cached.read(tmp_path / "cache", WANTED)
    index, view = np.array([3, 22, 0, 3]), np.array([0, 2, 1, 1])
    for each in (written, found):
        rows = each.rows(index, view)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, logits[view, index].astype(np.float16))
    # Half of float16's spacing: 2^-11 of the value.
    np.testing.assert_allclose(found.rows(index, view), logits[view, index], rtol=2**-11)


@pytest.mark.parametrize("index", [[0, -1], [EXAMPLES], [2**40]])
def test_a_number_that_is_no_example_is_refused(tmp_path, index):
    found = cached.write(tmp_path / "cache", WANTED, parts(made()))
    with pytest.raises(ValueError, match=rf"index holds {index[-1]}; .* from 0 to {EXAMPLES - 1}"):
        found.rows(np.array(index), 0)
    with pytest.raises(ValueError, match="view holds -1"):
        found.rows(np.array([0]), -1)
    assert found.rows(np.zeros(0, int), 0).shape[0] == 0


def test_the_k_largest_keep_the_distribution_and_the_tail_is_flat(tmp_path):
    wanted = dataclasses.replace(WANTED, top_k=3)
    logits = made(wanted)
    found = cached.write(tmp_path, wanted, parts(logits))
    again = cached.read(tmp_path, wanted)
    index = np.arange(EXAMPLES)
    for view in range(3):
        rows, whole = found.rows(index, view), logits[view]
        np.testing.assert_array_equal(rows, again.rows(index, view))
        p, q = softmax(rows), softmax(whole)
        for i in index:
            order = np.argsort(-whole[i], kind="stable")
            top, rest = order[:3], order[3:]
            np.testing.assert_allclose(p[i, top], q[i, top], rtol=2e-2)  # exp of 8 * 2^-11
            np.testing.assert_allclose(p[i, rest].sum(), q[i, rest].sum(), rtol=2e-2)
            assert np.ptp(rows[i, rest]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_sha256": "c" * 64}, r"another teacher .aaaaaaaaaaaa..., not cccccccccccc...."),
        ({"fingerprint": "c" * 64}, "other data"),
        ({"views": 2}, r"another number of views .3, not 2."),
        ({"augment": ("flip",)}, "other augmentation"),
        ({"top_k": 2}, "another top_k"),
    ],
)
def test_logits_of_something_else_are_stale(tmp_path, change, message):
    cached.write(tmp_path, WANTED, parts(made()))
    with pytest.raises(cached.StaleError, match=message):
        cached.read(tmp_path, dataclasses.replace(WANTED, **change))
    # Written anew, the old file is gone.
    wanted = dataclasses.replace(WANTED, teacher_sha256="c" * 64)
    cached.write(tmp_path, wanted, parts(made(seed=1)))
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(
        cached.read(tmp_path, wanted).rows(np.arange(3), 0), made(seed=1)[0, :3].astype(np.float16)
    )


def test_a_damaged_file_is_refused(tmp_path):
    cached.write(tmp_path, WANTED, parts(made()))
    (path,) = tmp_path.glob("*.array_record")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(cached.DamagedError, match="is damaged: its sha256"):
        cached.read(tmp_path, WANTED)
    path.unlink()
    with pytest.raises(cached.DamagedError, match="it is not there"):
        cached.read(tmp_path, WANTED)
    (tmp_path / "info.json").write_text("{")
    with pytest.raises(cached.DamagedError, match="cannot be read"):
        cached.read(tmp_path, WANTED)
    assert cached.read(tmp_path / "nowhere", WANTED) is None


@pytest.mark.parametrize("there", [False, True])
def test_killed_while_writing_leaves_what_was_there(tmp_path, there):
    if there:
        cached.write(tmp_path, WANTED, parts(made()))
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import numpy as np
import test_logit_cache as t
def parts():
    for number, part in enumerate(t.parts(t.made(seed=1))):
        if number == 5:
            os.kill(os.getpid(), 9)
        yield part
t.cached.write({str(tmp_path)!r}, t.WANTED, parts())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), env=_environment())
    assert done.returncode == -9
    assert len(list(tmp_path.glob(".logits.*.tmp"))) == 1
    found = cached.read(tmp_path, WANTED)
    if there:
        np.testing.assert_array_equal(found.rows([4], 2), made()[2, 4:5].astype(np.float16))
    else:
        assert found is None
    cached.write(tmp_path, WANTED, parts(made(seed=1)))
    (left,) = tmp_path.glob(".logits.*.tmp")  # it might be of a process that still writes
    os.utime(left, (0, 0))
    cached.write(tmp_path, WANTED, parts(made(seed=1)))  # and a later start cleans up
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".array_record", ".json"]


def test_two_processes_may_write_at_once(tmp_path):
    def slowly():
        for number, part in enumerate(parts(made())):
            if number == 4:
                cached.write(tmp_path, WANTED, parts(made()))
            yield part

    cached.write(tmp_path, WANTED, slowly())
    found = cached.read(tmp_path, WANTED)
    np.testing.assert_array_equal(found.rows([4], 2), made()[2, 4:5].astype(np.float16))


def _environment():
    return {**os.environ, "PYTHONPATH": os.getcwd()}


def test_wrong_parts(tmp_path):
    with pytest.raises(ValueError, match="row 10 of view 1 is missing"):
        cached.write(tmp_path, WANTED, [p for p in parts(made()) if p[:2] != (1, 10)])
    with pytest.raises(ValueError, match="view 0 has examples from row 0 twice"):
        cached.write(tmp_path, WANTED, [*parts(made()), (0, 0, made()[0, :2])])
    with pytest.raises(ValueError, match="float16 holds"):
        cached.write(tmp_path, WANTED, parts(1e5 * np.sign(made())))
    with pytest.raises(ValueError, match="top_k is 7"):
        dataclasses.replace(WANTED, top_k=7)
    assert not (tmp_path / "info.json").exists() and not list(tmp_path.iterdir())
    json.dumps(dataclasses.asdict(WANTED))


def test_views_are_drawn_once_and_take_turns():
    dataset = data.load("synthetic", train_examples=10, test_examples=4, seed=0)
    arguments = dict(batch_size=4, seed=3, augment=("shift:2", "flip"))
    batches = data.train_batches(dataset, views=2, **arguments)
    seen = {}
    for step in range(15):  # six epochs of 2.5 steps
        batch = batches[step]
        for place, (row, image) in enumerate(zip(batch["index"], batch["image"], strict=True)):
            view = (4 * step + place) // 10 % 2
            seen.setdefault((int(row), view), []).append(image)
    assert len(seen) == 20 and all(len(images) == 3 for images in seen.values())
    for images in seen.values():
        assert all((image == images[0]).all() for image in images)
    assert any((seen[row, 0][0] != seen[row, 1][0]).any() for row in range(10))
    views = Views(dataset, 2, augment=arguments["augment"], seed=3)
    for (row, view), images in seen.items():
        np.testing.assert_array_equal(
            dataset.normalize(views.images(np.array([row]), view))[0], images[0]
        )
    plain = data.train_batches(dataset, views=1, **arguments)[1]
    np.testing.assert_array_equal(
        plain["image"], dataset.normalize(dataset.train_images[plain["index"]])
    )


def test_batches_carry_what_is_known():
    dataset = data.load("synthetic", train_examples=10, test_examples=4, seed=0)
    wanted = cached.Wanted("a" * 64, "synthetic", "b" * 64, 10, 3, views=2)
    records = np.zeros((2, 10), wanted.record)
    records["logits"] = np.arange(60).reshape(2, 10, 3)
    known = {"logits/net1": cached.CachedLogits(wanted, records)}
    batches = data.train_batches(dataset, batch_size=4, seed=0, views=2, known=known)
    batch = next(batches.iter(2))  # examples 8 to 11 of the sequence: two of each view
    view = np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(
        batch["logits/net1"], 3 * (10 * view + batch["index"])[:, None] + np.arange(3)
    )
    with pytest.raises(ValueError, match="views is 0"):
        data.train_batches(dataset, batch_size=4, seed=0, known=known)
