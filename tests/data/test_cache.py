"""The cache of decoded images: a broken file is found, reported and made anew."""

import logging

import numpy as np
import pytest

from qkd_jax import data
from qkd_jax.data import cache, digits, sources

NAMES = ("train_images", "train_labels")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qkd_jax" / "decoded"


def arrays():
    return {
        "train_images": np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4, 1),
        "train_labels": np.arange(5, dtype=np.int32),
    }


def test_what_was_stored_is_loaded(own_cache):
    assert cache.load("x", "k" * 64, NAMES) is None
    cache.store("x", "k" * 64, arrays())
    loaded = cache.load("x", "k" * 64, NAMES)
    for got, wanted in zip(loaded, arrays().values(), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    assert len(list(own_cache.iterdir())) == 1
    assert cache.load("x", "j" * 64, NAMES) is None


def test_no_broken_file_is_taken(own_cache, caplog):
    """Every byte flipped in turn, every length: the arrays come back exact, or None is said."""
    cache.store("x", "k" * 64, arrays())
    (path,) = own_cache.iterdir()
    whole = path.read_bytes()
    refused = 0
    variants = [
        whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        for place in range(len(whole))
    ]
    variants += [whole[:length] for length in range(0, len(whole), 37)]
    with caplog.at_level(logging.WARNING):
        for content in variants:
            path.write_bytes(content)
            loaded = cache.load("x", "k" * 64, NAMES)
            refused += loaded is None
            if loaded is not None:
                for got, wanted in zip(loaded, arrays().values(), strict=True):
                    assert got.dtype == wanted.dtype
                    np.testing.assert_array_equal(got, wanted)
    assert refused > len(variants) / 3
    assert "is broken" in caplog.text and "decoding 'x' again" in caplog.text


def test_a_broken_cache_is_made_anew(own_cache, caplog):
    wanted = data.load("digits").fingerprint
    (path,) = own_cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert data.load("digits").fingerprint == wanted
    assert "is broken" in caplog.text
    assert path.read_bytes() == whole or len(path.read_bytes()) == len(whole)


def test_another_source_has_another_key(tmp_path):
    folder = digits.write(tmp_path)
    before = cache.key(folder)
    assert cache.key(folder) == before
    (shard,) = folder.glob("*array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert cache.key(folder) != before


def test_a_cache_that_cannot_be_written_is_left_out(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    folder = digits.write(tmp_path / "tfds")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = data.DATASETS["digits"]
    images, labels = sources.decoded("digits", source, folder, ("train",))
    assert digits.content_hash(images, labels) == digits.SHA256
    assert "cannot be written" in caplog.text


def test_a_flag_that_says_encrypted_is_damage(own_cache, caplog):
    """One bit of the zip's index; zipfile asks for a password by a RuntimeError."""
    cache.store("x", "k" * 64, arrays())
    (path,) = own_cache.iterdir()
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    assert cache.load("x", "k" * 64, NAMES) is None and "is broken" in caplog.text
