"""Decoded images on disk: one uncompressed .npz a data set, keyed by the content of its files.

A file is written beside its place and moved there in one operation, so that a reader sees a whole
file or none; several processes may write at once. The zip format's CRC-32 of each array is checked
on reading: a broken file is reported, and made again from the source.
"""

import hashlib
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from qkd_jax.whole_files import settle, temporary

log = logging.getLogger(__name__)

# Change it when the meaning of the stored arrays changes, so that old files are not read.
LAYOUT = "1"


def directory() -> pathlib.Path:
    """Returns the cache folder: `$XDG_CACHE_HOME/qkd_jax`, else `~/.cache/qkd_jax`."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "qkd_jax"


def key(folder: pathlib.Path) -> str:
    """Returns the SHA-256 (hex) of the names and contents of the files in `folder`."""
    digest = hashlib.sha256(LAYOUT.encode())
    # What file browsers and notebooks leave behind is not part of the data.
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def _path(name: str, key: str) -> pathlib.Path:
    return directory() / "decoded" / f"{name}-{key[:32]}.npz"


def load(name: str, key: str, names: Sequence[str]) -> list[np.ndarray] | None:
    """Returns the arrays called `names`, or None where there is no file or it is broken."""
    path = _path(name, key)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return [file[n] for n in names]
    except FileNotFoundError:
        return None
    except Exception as e:  # zipfile and NumPy raise many types
        log.warning("%s is broken (%s); decoding %r again.", path, e, name)
        return None


def store(name: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays; a cache that cannot be written is reported and left out."""
    path = _path(name, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
            settle(file, path)
    except OSError as error:
        log.warning("%s cannot be written (%s); decoding each time.", path, error)
