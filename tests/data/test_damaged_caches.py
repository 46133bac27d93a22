"""Damaged caches and official files: refused with the file's name, or what was written."""

import gzip
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from mutation import accepted, mutated, mutated_text

from qkd_jax.data import cache, logit_cache, official

IMAGES = np.arange(60, dtype=np.uint8).reshape(3, 4, 5, 1)


def test_decoded_images(monkeypatch, tmp_path):
    """What is broken is None: it is decoded again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.store("x", "k" * 64, {"images": IMAGES})
    (path,) = tmp_path.rglob("*.npz")
    for found in accepted(path, lambda: cache.load("x", "k" * 64, ("images",))):
        if found is not None:
            np.testing.assert_array_equal(found[0], IMAGES)


WANTED = logit_cache.Wanted("a" * 64, "made", "b" * 64, 23, 7, views=2)


@pytest.fixture
def logits(tmp_path):
    values = np.random.default_rng(0).standard_normal((2, 23, 7)).astype(np.float32)
    written = logit_cache.write(tmp_path, WANTED, [(0, 0, values[0]), (1, 0, values[1])])
    (path,) = tmp_path.glob("*.array_record")
    return path, written.records


@pytest.mark.parametrize("sealed", [False, True])
def test_cached_logits(logits, sealed):
    """With a right digest too: then records are whole, or refused."""
    path, records = logits
    info = path.parent / logit_cache.INFO
    said = json.loads(info.read_text())

    def read():
        if sealed:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            info.write_text(json.dumps(said | {"sha256": digest}))
        return logit_cache.read(path.parent, WANTED)

    for found in accepted(path, read, named=path.parent):
        assert sealed, "a byte has changed, and the digest has not"
        np.testing.assert_array_equal(found.records, records)  # array_record has checksums


def test_the_note_of_cached_logits(logits):
    path, records = logits
    info, read = path.parent / logit_cache.INFO, lambda: logit_cache.read(path.parent, WANTED)
    for found in accepted(info, read, damage=mutated_text, named=path.parent):
        np.testing.assert_array_equal(found.records, records)


def test_logits_of_too_few_examples(logits, tmp_path):
    path, _ = logits
    fewer = logit_cache.Wanted("a" * 64, "made", "b" * 64, 23, 7, views=1)
    logit_cache.write(tmp_path / "few", fewer, [(0, 0, np.ones((23, 7)))])
    (few,) = (tmp_path / "few").glob("*.array_record")
    path.write_bytes(few.read_bytes())
    info = path.parent / logit_cache.INFO
    said = json.loads(info.read_text())
    info.write_text(json.dumps(said | {"sha256": hashlib.sha256(few.read_bytes()).hexdigest()}))
    with pytest.raises(logit_cache.DamagedError, match="examples are missing"):
        logit_cache.read(path.parent, WANTED)


def idx():
    return b"\0\0\x08\x04" + b"".join(n.to_bytes(4, "big") for n in IMAGES.shape) + IMAGES.tobytes()


@pytest.mark.parametrize("inside", [False, True])
def test_idx_files(inside, tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx()))
    damage = (lambda _, rng: gzip.compress(mutated(idx(), rng), 1)) if inside else mutated
    for found in accepted(path, lambda: official.read_idx(path), damage=damage):
        assert found.size == IMAGES.size
        if not inside:  # gzip has a checksum
            np.testing.assert_array_equal(found, IMAGES)


def archive(names=b"a\nb\n"):
    out, records = io.BytesIO(), bytes(range(256)) * 13
    parts = {"train.bin": records[:3074], "test.bin": records[:3074]}
    texts = {"coarse_label_names.txt": names, "fine_label_names.txt": b"c\nd\n"}
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in {**parts, **texts}.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_archives(inside, tmp_path):
    path, whole = tmp_path / "cifar.tar.gz", archive()
    path.write_bytes(gzip.compress(whole))
    damage = (lambda _, rng: gzip.compress(mutated(whole, rng), 1)) if inside else mutated
    for splits, _ in accepted(path, lambda: official.read_cifar100({"x": path}), damage=damage):
        assert splits["train"]["image"].shape[1:] == (32, 32, 3)


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(gzip.compress(archive(names=b"a\n\xff\n")))
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz is not CIFAR's binary archive .*utf-8"):
        official.read_cifar100({"x": path})
