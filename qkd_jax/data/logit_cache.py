"""Logits of a frozen teacher on disk: an array_record file, one record an example and view.

A record holds the example's row in the training split, the view, and the logits as float16: all of
them, or the k largest with their classes and the log of the sum of exp over the others. `info.json`
beside it says what they are of (the teacher's sha256, the data's fingerprint, the views) and gives
the file's sha256. It is replaced in one operation after the file is whole, so a process that is
killed while it writes leaves what was there before.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.whole_files import check_file, remove_temporaries, replace_file, settle, temporary

INFO = "info.json"
NAME = r"logits-[0-9a-f]{16}\.array_record"
FORMAT = 1
# A temporary file that is younger may be of a process that still writes; seconds.
ABANDONED = 24 * 3600.0


class StaleError(ValueError):
    """The logits are of another teacher, other data or other views; the message says which."""


class DamagedError(ValueError):
    """The file is not what was written."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The identity of cached logits.

    Attributes:
        teacher_sha256: of all that makes the teacher: its program and its variables.
        dataset: name of the data set.
        fingerprint: sha256 of its arrays.
        examples: of its training split.
        classes: of the teacher.
        views: how many views of each example; see `views.Views`.
        augment: of the views.
        seed: of the views.
        top_k: how many logits are kept of an example; 0 for all.
    """

    teacher_sha256: str
    dataset: str
    fingerprint: str
    examples: int
    classes: int
    views: int = 1
    augment: tuple[str, ...] = ()
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        checks.integer_in("top_k", self.top_k, 0, self.classes - 1)

    @property
    def record(self) -> np.dtype:
        """The layout of one record."""
        fields: list[Any] = [("example", "<u4"), ("view", "<u2")]
        if not self.top_k:
            return np.dtype([*fields, ("logits", "<f2", (self.classes,))])
        top = [("classes", "<u4", (self.top_k,)), ("logits", "<f2", (self.top_k,))]
        return np.dtype([*fields, *top, ("rest", "<f4")])


# The name of each difference, in the order in which they are listed.
WORDS = {
    "teacher_sha256": "another teacher",
    "fingerprint": "other data",
    "dataset": "another data set",
    "examples": "another number of examples",
    "classes": "another number of classes",
    "views": "another number of views",
    "augment": "other augmentation",
    "seed": "another seed of the views",
    "top_k": "another top_k",
}


class CachedLogits:
    """A teacher's logits for every training example in every view.

    Where only the k largest are stored, the other classes share equally what probability is left:
    each gets the logit log((sum of exp over them) / their number). At temperature 1 the k largest
    and the total of the others are then right; above 1 the flat tail gets somewhat more than the
    uneven one had.

    Attributes:
        wanted: what they are of.
        records: [views, examples], of the layout `wanted.record`.
    """

    def __init__(self, wanted: Wanted, records: np.ndarray) -> None:
        self.wanted = wanted
        self.records = records

    def rows(self, index: np.ndarray, view: np.ndarray | int) -> np.ndarray:
        """Returns the logits of training examples in views, float32 [batch, classes].

        Raises:
            ValueError: a number that is no example's, or no view's.
        """
        checks.rows_within("index", np.asarray(index), self.wanted.examples)
        checks.rows_within("view", np.asarray(view), self.wanted.views)
        found = self.records[view, index]
        if not self.wanted.top_k:
            return found["logits"].astype(np.float32)
        others = self.wanted.classes - self.wanted.top_k
        flat = (found["rest"] - math.log(others)).astype(np.float32)
        logits = np.repeat(flat[:, None], self.wanted.classes, axis=1)
        np.put_along_axis(
            logits, found["classes"].astype(np.int64), found["logits"].astype(np.float32), axis=1
        )
        return logits


def pack(wanted: Wanted, view: int, first: int, logits: np.ndarray) -> np.ndarray:
    """Returns the records of examples first, first + 1, ... of a view.

    Args:
        wanted: what the logits are of.
        view: the view's number.
        first: row of the first example.
        logits: float [examples, classes].

    Raises:
        ValueError: a logit that float16 cannot hold.
    """
    if not np.isfinite(logits).all() or np.abs(logits).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(
            f"the teacher's logits run from {logits.min():g} to {logits.max():g}; float16 holds "
            "finite numbers up to 65504, so train without the cache."
        )
    records = np.zeros(len(logits), wanted.record)
    records["example"] = np.arange(first, first + len(logits))
    records["view"] = view
    if not wanted.top_k:
        records["logits"] = logits
        return records
    order = np.argsort(-logits, axis=1, kind="stable")
    top, rest = order[:, : wanted.top_k], order[:, wanted.top_k :]
    records["classes"] = top
    records["logits"] = np.take_along_axis(logits, top, axis=1)
    others = np.take_along_axis(logits, rest, axis=1).astype(np.float64)
    largest = others.max(axis=1)
    records["rest"] = largest + np.log(np.exp(others - largest[:, None]).sum(axis=1))
    return records


def write(
    folder: str | os.PathLike[str], wanted: Wanted, parts: Iterable[tuple[int, int, np.ndarray]]
) -> CachedLogits:
    """Writes logits and returns them as `read` would.

    Args:
        folder: where; made if need be. What an earlier write left there is replaced.
        wanted: what the logits are of.
        parts: (view, row of the first example, logits [examples, classes]); every example of every
            view once, in any order.

    Raises:
        ValueError: an example that is missing or comes twice, or a logit that float16 cannot hold.
        OSError: the folder cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = np.zeros((wanted.views, wanted.examples), wanted.record)
    seen = np.zeros(table.shape, bool)
    with temporary(folder / "logits") as file:
        writer = ArrayRecordWriter(file.name, "group_size:256")
        for view, first, logits in parts:
            records = pack(wanted, view, first, np.asarray(logits))
            if seen[view, first : first + len(records)].any():
                raise ValueError(f"view {view} has examples from row {first} twice.")
            seen[view, first : first + len(records)] = True
            table[view, first : first + len(records)] = records
            for record in records:
                writer.write(record.tobytes())
        writer.close()
        if not seen.all():
            view, row = np.argwhere(~seen)[0]
            raise ValueError(f"row {row} of view {view} is missing; give every example once.")
        digest = _sha256(pathlib.Path(file.name))
        data = folder / f"logits-{digest[:16]}.array_record"
        settle(file, data)
    fields = dataclasses.asdict(wanted)
    info = {"format": FORMAT, "file": data.name, "sha256": digest, **fields}
    replace_file(folder / INFO, json.dumps(info, indent=2).encode())
    for other in folder.glob("*.array_record"):
        if other.name != data.name:
            other.unlink(missing_ok=True)
    remove_temporaries(folder, older_than=ABANDONED)
    return CachedLogits(wanted, table)


def read(folder: str | os.PathLike[str], wanted: Wanted) -> CachedLogits | None:
    """Reads logits that were written for exactly this; None where there are none.

    Raises:
        StaleError: they are of another teacher, other data or other views.
        DamagedError: the file is missing, or its bytes are not those that were written.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    folder = pathlib.Path(folder)
    try:
        check_file(folder / INFO)
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        path, digest = folder / info["file"], info["sha256"]
        if not re.fullmatch(NAME, info["file"]):
            raise ValueError(f"file is {info['file']!r:.80}")
        given = {name: info[name] for name in WORDS}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(_damaged(folder / INFO, f"it cannot be read ({error!r})")) from error
    if info.get("format") != FORMAT:
        raise StaleError(f"the cached logits in {folder} are of format {info.get('format')!r}.")
    expected = json.loads(json.dumps(dataclasses.asdict(wanted)))
    differences = [
        f"{words} ({_short(given[name])}, not {_short(expected[name])})"
        for name, words in WORDS.items()
        if given[name] != expected[name]
    ]
    if differences:
        raise StaleError(f"the cached logits in {folder} are of {', '.join(differences)}.")
    if not path.is_file():
        raise DamagedError(_damaged(path, "it is not there"))
    if (found := _sha256(path)) != digest:
        raise DamagedError(_damaged(path, f"its sha256 is {_short(found)}, not {_short(digest)}"))
    table = np.zeros((wanted.views, wanted.examples), wanted.record)
    seen = np.zeros(table.shape, bool)
    try:
        reader = ArrayRecordReader(str(path))
        records = np.frombuffer(b"".join(reader.read_all()), wanted.record)
        reader.close()
        place = records["view"], records["example"]
        table[place], seen[place] = records, True
    except Exception as error:  # array_record raises RuntimeError
        raise DamagedError(_damaged(path, f"its records cannot be read ({error})")) from error
    if not seen.all():
        raise DamagedError(_damaged(path, "examples are missing"))
    return CachedLogits(wanted, table)


def _damaged(path: pathlib.Path, what: str) -> str:
    return (
        f"{path} is damaged: {what}. Remove {path.parent} and start again: the logits are computed "
        "again."
    )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
