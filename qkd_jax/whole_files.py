"""Files that are read and written whole or not at all, and never through a symbolic link.

A folder that somebody sent may hold a link where a file is expected; following it would write to
whatever it points at.
"""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# `.<name>.<8 hex digits>.tmp`, beside the file that it becomes.
_TEMPORARY = ".*.????????.tmp"
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


def read_bytes(path: str | Path) -> bytes | None:
    """Returns a file's content; None if there is none.

    Raises:
        ValueError: it is a folder, a pipe or a device.
        OSError: it cannot be read.
    """
    path = Path(path)
    check_file(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a folder, and for a pipe or a device, whose content might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)} is no file; it must be one. Remove it.")


def replace_file(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replaces a file's content atomically, and only once the new one is on disk.

    A reader sees the old file or the new one. A link at `path` is replaced, not followed; a device
    or a pipe (/dev/null) is written to.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_stream(path):
        path.write_bytes(data)
        return path
    while True:
        try:
            with temporary(path) as file:
                file.write(data)
                settle(file, path)
            return path
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue  # `remove_temporaries` of a run that started at this moment


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file beside `path`, for `settle` to move there; else it is gone at the end.

    Writers that want a name and not a file take its `name`.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            file = open(name, "xb")  # exclusive: follows no link
        except FileExistsError:
            continue
        break
    try:
        with _named(path), file:
            yield file
    finally:
        with contextlib.suppress(OSError):
            name.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives a write's error ("No space left on device") the name of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def settle(file: BinaryIO, path: Path) -> None:
    """Moves a `temporary` file to `path` in one operation, once its content is on disk.

    Raises:
        OSError: the content cannot be written, or the file is gone.
    """
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)


def _is_stream(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def append(path: Path, data: bytes) -> None:
    """Appends to a file in one write, and makes it where there is none.

    Raises:
        ValueError: it is a link.
        OSError: it cannot be written.
    """
    with (
        _named(path),
        os.fdopen(_opened(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0) as file,
    ):
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_lock(path: Path) -> BinaryIO:
    """Opens a lock's file to read and write, and makes it where there is none.

    Raises:
        ValueError: it is a link.
        OSError: it cannot be opened.
    """
    return os.fdopen(_opened(path, os.O_RDWR), "r+b", buffering=0)


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CREAT | _NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(
            f"{path} is a symbolic link, and a run writes into its own folder only; remove it."
        ) from None


def remove_temporaries(folder: Path, *, older_than: float = 0.0) -> None:
    """Removes what writers that were killed have left in a folder and the folders below it.

    Args:
        folder: the folder.
        older_than: seconds; a younger file may be of a process that still writes.
    """
    for path in folder.rglob(_TEMPORARY):
        with contextlib.suppress(OSError):
            if not older_than or time.time() - path.lstat().st_mtime > older_than:
                path.unlink()
