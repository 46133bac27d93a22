"""Data tests keep to folders of their own: neither the user's cache nor TFDS_DATA_DIR."""

import os

import pytest

# What the machine has, taken before the tests hide it.
PREPARED = os.environ.get("TFDS_DATA_DIR")


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def prepared_dir():
    """The machine's TFDS_DATA_DIR."""
    if not PREPARED:
        pytest.skip("TFDS_DATA_DIR is not set")
    return PREPARED
