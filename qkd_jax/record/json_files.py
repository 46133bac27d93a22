"""Strict JSON files: deterministic bytes, written atomically."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Returns `value` as strict JSON can hold it.

    Mappings (anything with `items`) become dicts with text keys, sequences lists, NumPy and JAX
    scalars Python numbers, small arrays nested lists, paths text, non-finite numbers None.

    Raises:
        ValueError: any other type.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return plain(np.asarray(value).tolist())
    raise ValueError(
        f"cannot write {value!r} ({type(value).__name__}) as JSON; give text, numbers, None, "
        "lists, dicts or arrays."
    )


def write_json(path: str | Path, value: Any) -> Path:
    """Writes JSON with sorted keys; a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
    replace_file(path, text.encode())
    return path


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file's content atomically, and only once the new one is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; None if there is none.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore or delete it.") from error
