"""The live table of a sweep's runs; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qkd_jax import checks
from qkd_jax.record.progress import duration


@dataclasses.dataclass
class Line:
    """One run in the table.

    Attributes:
        name: the run's.
        total: steps of its schedule.
        word: its state.
        step: steps done.
        stage: the stage that it is in.
        metric: its newest loss or top-1.
        rate: steps a second since it was first seen to move; 0 while unknown.
    """

    name: str
    total: int
    word: str = "waiting"
    step: int = 0
    stage: str = ""
    metric: str = ""
    rate: float = 0.0
    _from: tuple[float, int] | None = None

    def moved(self, step: int, stage: str, metric: str, now: float) -> None:
        """Takes what the run's log says now."""
        if self._from is None or step < self._from[1]:
            self._from = (now, step)
        elif step > self._from[1] and now > self._from[0]:
            self.rate = (step - self._from[1]) / (now - self._from[0])
        self.step, self.stage, self.metric = step, stage, metric

    def begins(self, word: str) -> None:
        """The run starts, or starts again."""
        self.word, self._from, self.rate = word, None, 0.0

    @property
    def left(self) -> int:
        """Steps that are left."""
        return 0 if self.word in ("done", "failed") else max(self.total - self.step, 0)

    @property
    def eta(self) -> str:
        """The time that it needs, if it is running and known."""
        return duration(self.left / self.rate) if self.rate and self.word == "running" else ""


def eta_of(lines: Sequence[Line], jobs: int) -> str:
    """The time that the whole sweep needs: the steps left at the rate of so many runs."""
    running = [line.rate for line in lines if line.rate and line.word == "running"]
    known = running or [line.rate for line in lines if line.rate]
    if not known:
        return ""
    left = [line.left for line in lines if line.left]
    mean = sum(known) / len(known)
    # The longest run is never shorter than at its own rate.
    seconds = sum(left) / (mean * max(1, min(jobs, len(left))))
    return duration(max([seconds, *(step / mean for step in left)])) if left else ""


class _Console(Console):
    """A console that says no more once its reader has gone (`| head`): the runs need none."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())  # what is buffered goes there at the end
            os.close(nowhere)


class SweepTable:
    """Shows the runs of a sweep while they run.

    Args:
        lines: the runs.
        jobs: how many run at a time.
        interval: seconds between plain lines.
        console: where to write; None is standard error.
        clock: returns seconds.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        jobs: int,
        *,
        interval: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.lines, self.jobs = list(lines), jobs
        self._console = console or _Console(file=sys.stderr)
        self._interval, self._clock, self._last = interval, clock, clock()
        self._live: Live | None = None

    def __enter__(self) -> SweepTable:
        if self._console.is_terminal:
            self._live = Live(self.table(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Prints a line, above the table where there is one."""
        self._console.print(checks.printable(text), markup=False, highlight=False, soft_wrap=True)

    def show(self) -> None:
        """Brings the table up to date, or prints a line if it is time for one."""
        if self._live is not None:
            self._live.update(self.table())
        elif self._clock() - self._last >= self._interval:
            self._last = self._clock()
            self.say(self.summary())

    def summary(self) -> str:
        """Everything on one line."""
        done = sum(line.word == "done" for line in self.lines)
        parts = [f"{done} of {len(self.lines)} done"]
        failed = sum(line.word == "failed" for line in self.lines)
        parts += [f"{failed} failed"] if failed else []
        parts += [f"ETA {eta}"] if (eta := eta_of(self.lines, self.jobs)) else []
        for line in self.lines:
            if line.word == "running":
                eta = f", ETA {line.eta}" if line.eta else ""
                metric = f", {line.metric}" if line.metric else ""
                parts.append(f"{line.name}: {line.stage} {line.step}/{line.total}{metric}{eta}")
        return " | ".join(parts)

    def table(self) -> Table:
        """The table, with a caption for the whole."""
        table = Table(
            caption=self.summary().split(" | ")[0] + self._whole(), caption_justify="left"
        )
        for heading in ("run", "state", "stage", "steps", "newest", "ETA"):
            table.add_column(heading, justify="right" if heading in ("steps", "ETA") else "left")
        for line in self._shown():
            steps = f"{line.step}/{line.total}"
            table.add_row(line.name, line.word, line.stage, steps, line.metric, line.eta)
        return table

    def _whole(self) -> str:
        eta = eta_of(self.lines, self.jobs)
        return f", ETA of the whole {eta}" if eta else ""

    def _shown(self) -> list[Line]:
        """The rows that fit on the screen: runs that are active first."""
        room = max(self._console.height - 6, 4) if self._console.is_terminal else len(self.lines)
        if len(self.lines) <= room:
            return self.lines
        rank = {"running": 0, "failed": 1, "elsewhere": 2, "waiting": 3, "interrupted": 3}
        kept = sorted(self.lines, key=lambda line: rank.get(line.word, 4))[:room]
        return [line for line in self.lines if line in kept]
