"""Strict JSON files: deterministic bytes, written atomically."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkd_jax.whole_files import read_bytes, replace_file


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
    text = json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
    return replace_file(path, text.encode())


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Reads a JSON file, as `write_json` writes it; None if there is none.

    Args:
        path: the file.
        kind: what it must hold: `dict` or `list`.

    Raises:
        ValueError: it holds something else, or is nested deeper than Python reads; the message
            names the file.
        OSError: it cannot be read.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read; restore or delete it.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore or delete it.") from error
    if not isinstance(found, kind):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__}, not a {kind.__name__} as a run writes "
            "it; restore or delete it."
        )
    return found
