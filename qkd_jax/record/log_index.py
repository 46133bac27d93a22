"""Single lines of a long metrics.jsonl, found without reading what is in all of them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qkd_jax.record.metrics_log import FILE, parse_row
from qkd_jax.whole_files import check_file, read_bytes

# The beginning of a line as `MetricsLog.log` spells it.
_HEAD = re.compile(
    rb'^\{"split":"([^"\\\n]*)","stage":"(?:[^"\\\n]|\\.)*","step":(\d{1,16}),"values":\{', re.M
)
_TAIL = 1 << 16


class Lines(NamedTuple):
    """Where the lines of one split are: their steps and their places in the file, in order."""

    steps: np.ndarray
    offsets: np.ndarray


def index_log(folder: str | Path) -> tuple[dict[str, Lines], int]:
    """Returns {split: its lines} of a run folder's metrics.jsonl, and how many lines are damaged.

    Only the beginning of a line is read, unless a line has not the one that a run writes: then all
    of them are read whole.

    Raises:
        OSError: the file cannot be read.
    """
    data = read_bytes(Path(folder) / FILE) or b""
    data = data[: data.rfind(b"\n") + 1]  # the last line of a run that was killed may be torn
    heads = [(m[1], m[2], m.start()) for m in _HEAD.finditer(data)]
    damaged = 0
    if len(heads) != data.count(b"\n"):
        heads, place = [], 0
        for line in data.split(b"\n")[:-1]:
            row = parse_row(line)
            if row is None:
                damaged += 1
            else:
                heads.append((row["split"].encode(), row["step"], place))
            place += len(line) + 1
    found: dict[bytes, tuple[list[int], list[int]]] = {}
    for split, step, offset in heads:
        steps, offsets = found.setdefault(split, ([], []))
        steps.append(int(step))
        offsets.append(offset)
    lines = {
        split.decode(errors="replace"): Lines(np.array(steps, np.int64), np.array(offsets))
        for split, (steps, offsets) in found.items()
    }
    return lines, damaged


def read_lines(folder: str | Path, offsets: Iterable[int]) -> list[dict[str, Any] | None]:
    """Returns the rows at places in a metrics.jsonl, as `read_metrics`; None for a damaged one."""
    path = Path(folder) / FILE
    check_file(path)
    rows = []
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(int(offset))
            rows.append(parse_row(file.readline()))
    return rows


def last_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the last whole rows of a run folder's metrics.jsonl, some hundreds; the last at last.

    Raises:
        OSError: the file cannot be read.
    """
    path = Path(folder) / FILE
    check_file(path)
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - _TAIL, 0))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := parse_row(line)) is not None]
