"""How far each run of a sweep is, read from its folder alone; the run is not asked."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd_jax.experiment.sweep_list import LOGS
from qkd_jax.record.folder import holder
from qkd_jax.record.json_files import read_json, write_json
from qkd_jax.record.log_index import last_rows

# Enough of the end of what a run printed for its last lines.
TAIL_BYTES = 65536


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is.

    Attributes:
        step: global steps that its log has seen.
        stage: the stage of the last line.
        metric: the newest loss or top-1, as text.
    """

    step: int = 0
    stage: str = ""
    metric: str = ""


def place_of(folder: Path) -> Place:
    """Returns where a run is by the end of its log."""
    rows = []
    with contextlib.suppress(OSError, ValueError):
        rows = last_rows(folder)
    if not rows:
        return Place()
    metric = next((text for row in reversed(rows) if (text := _metric(row))), "")
    return Place(rows[-1]["step"], rows[-1]["stage"], metric)


def _metric(row: Mapping[str, Any]) -> str:
    """The first loss of a training row, the first top-1 of a test row."""
    wanted, scale, unit = {
        "train": ("loss", 1.0, ""),
        "test": ("top1", 100.0, " %"),
    }.get(row["split"], ("", 1.0, ""))
    for name, value in row["values"].items():
        net, _, metric = name.rpartition("/")
        if wanted and metric == wanted and value is not None:
            return f"{net} {metric} {value * scale:.4g}{unit}"
    return ""


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a run.

    Attributes:
        word: "done", "running", "interrupted", "failed" or "not begun".
        place: where it is.
        process: of the one that runs it.
        code: its exit code, where it failed; below 0 the signal that ended it.
    """

    word: str
    place: Place = Place()
    process: str = ""
    code: int = 0

    def text(self) -> str:
        """The state on one line."""
        more = {
            "running": f"running now (process {self.process})",
            "interrupted": f"interrupted at step {self.place.step}",
            "failed": f"failed: {code_text(self.code)}",
        }
        return more.get(self.word, self.word)


def state_of(folder: Path) -> State:
    """Returns the state of the run in a folder, which may be absent."""
    process = holder(folder)
    if process is not None:
        return State("running", place_of(folder), process)
    if (folder / "results.json").exists():
        return State("done", place_of(folder))
    failure = read_failure(folder)
    if failure is not None:
        return State("failed", place_of(folder), code=failure["code"])
    place = place_of(folder)
    begun = place.step or any((folder / "checkpoints").glob("[0-9]*"))
    return State("interrupted" if begun else "not begun", place)


def code_text(code: int) -> str:
    """Returns what an exit code says."""
    import signal

    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
        return f"ended by signal {-code}"
    meanings = {
        2: "a mistake in the config or the folder",
        3: "not finite",
        71: "out of memory",
        74: "files",
    }
    return f"exit code {code}" + (f", {meanings[code]}" if code in meanings else "")


def log_file(folder: Path) -> Path:
    """The file that takes what a run of a sweep prints."""
    return folder.parent / LOGS / f"{folder.name}.txt"


def _failure_file(folder: Path) -> Path:
    return folder.parent / LOGS / f"{folder.name}.failed.json"


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Returns {"code", "lines"} of the last try of a run that failed, else None."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(_failure_file(folder))
        if found is not None and isinstance(found.get("code"), int):
            return found
    return None


def write_failure(folder: Path, code: int, lines: list[str]) -> None:
    """Records how a run failed; without a word on a full disk, where it could not be said."""
    with contextlib.suppress(OSError):
        write_json(_failure_file(folder), {"code": code, "lines": lines})


def clear_failure(folder: Path) -> None:
    """Removes the record of a failure."""
    with contextlib.suppress(OSError):
        _failure_file(folder).unlink(missing_ok=True)


def last_lines(folder: Path, count: int = 5) -> list[str]:
    """Returns the last lines of what a run printed."""
    try:
        with open(log_file(folder), "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
