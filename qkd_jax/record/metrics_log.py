"""The log of metrics: one JSON line for each logged step, cut back on resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd_jax.record.json_files import plain
from qkd_jax.record.whole_files import append, read_bytes, replace_file

FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl (or of the one in a run folder), without torn lines.

    A row is {"step": int, "stage": str, "split": str, "values": {name: float or None}}.
    """
    path = Path(path)
    return [row for _, row in _lines(path / FILE if path.is_dir() else path)[0]]


def _lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], bytes]:
    """Returns ((line, row) up to the first damaged line, all bytes of the file)."""
    data = read_bytes(path) or b""
    lines = []
    for line in data.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not {"step", "stage", "split", "values"} <= row.keys():
            break
        lines.append((line + b"\n", row))
    return lines, data


class MetricsLog:
    """The file metrics.jsonl of a run folder.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
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

    def truncate(self, step: int | None = None, *, lines: int | None = None) -> None:
        """Cuts the file back to what a checkpoint had seen; torn lines go in any case.

        Args:
            step: keep lines of steps up to this one; None keeps all.
            lines: keep at most this many lines (the value of `lines` when the checkpoint was
                saved). Exact even if several stages log at one step; without it, lines that were
                logged at `step` after the checkpoint would be there twice.
        """
        found, data = _lines(self.path)
        kept = [line for line, row in found[:lines] if step is None or row["step"] <= step]
        if b"".join(kept) != data:
            replace_file(self.path, b"".join(kept))
        self._count = len(kept)
