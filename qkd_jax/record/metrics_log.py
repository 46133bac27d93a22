"""The log of metrics: one JSON line for each logged step, cut back on resume."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd_jax.record.json_files import plain
from qkd_jax.whole_files import append, read_bytes, replace_file

FILE = "metrics.jsonl"
_LARGEST = sys.float_info.max
_LARGEST_STEP = 2**53


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl (or of the one in a run folder), without damaged lines.

    A row is {"step": int, "stage": str, "split": str, "values": {name: float or None}}.
    """
    return read_log(path)[0]


def read_log(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of a metrics.jsonl, as `read_metrics`, and the number of damaged lines.

    The last line of a run that was killed may be torn; that is not counted.
    """
    path = Path(path)
    *whole, _ = (read_bytes(path / FILE if path.is_dir() else path) or b"").split(b"\n")
    rows = [parse_row(line) for line in whole]
    return [row for row in rows if row is not None], rows.count(None)


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Returns what a line of the log says, None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not {"step", "stage", "split", "values"} <= row.keys():
        return None
    step, values = row["step"], row["values"]
    numbers = isinstance(values, dict) and all(
        v is None or (isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= _LARGEST)
        for v in values.values()
    )
    texts = isinstance(row["stage"], str) and isinstance(row["split"], str)
    known = type(step) is int and 0 <= step <= _LARGEST_STEP
    return row if numbers and texts and known else None


def _lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], bytes]:
    """Returns ((line, row) up to the first damaged line, all bytes of the file)."""
    data = read_bytes(path) or b""
    lines = []
    for line in data.split(b"\n")[:-1]:
        if (row := parse_row(line)) is None:
            break
        lines.append((line + b"\n", row))
    return lines, data


class MetricsLog:
    """The file metrics.jsonl of a run folder.

    Args:
        folder: the run folder.

    Attributes:
        follower: is told which rows the file has when it is cut back, and of each new one; see
            `trackers.Follower`.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.follower: Any = None
        self._count: int | None = None

    @property
    def lines(self) -> int:
        """The number of lines; save it in the checkpoint's meta for `truncate`."""
        return len(_lines(self.path)[0]) if self._count is None else self._count

    def log(self, step: int, stage: str, split: str, values: Mapping[str, Any]) -> None:
        """Appends one line and hands it to the system at once.

        Args:
            step: steps done, counted over the whole schedule.
            stage: the stage's name.
            split: "train", "test" or "quant" (values {"<net>/<layer>/<quantizer>/<param>": mean}).
            values: numbers, already on the host: reading a JAX array here would wait for it.
        """
        row = {"step": int(step), "stage": stage, "split": split, "values": plain(values)}
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if self._count is None:  # a torn last line would be glued to the next one
            self.truncate()
        # One write a line: a process killed in between leaves at most one torn line, at the end.
        append(self.path, f"{text}\n".encode())
        self._count = self.lines + 1
        if self.follower is not None:
            self.follower.add(self._count - 1, row)

    def truncate(self, step: int | None = None, *, lines: int | None = None) -> None:
        """Cuts the file back to what a checkpoint had seen; torn lines go in any case.

        Args:
            step: keep lines of steps up to this one; None keeps all.
            lines: keep at most this many lines (the value of `lines` when the checkpoint was
                saved). Exact even if several stages log at one step; without it, lines that were
                logged at `step` after the checkpoint would be there twice.
        """
        found, data = _lines(self.path)
        kept = [pair for pair in found[:lines] if step is None or pair[1]["step"] <= step]
        if (whole := b"".join(line for line, _ in kept)) != data:
            replace_file(self.path, whole)
        self._count = len(kept)
        if self.follower is not None:
            self.follower.begin([row for _, row in kept])
