"""Progress reporting: the live line of a stage, and its rates.

Nothing here touches a device: losses are numbers that the loop has fetched already.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from qkd_jax import checks


def duration(seconds: float) -> str:
    """Returns "0:07", "3:20" or "1:02:03"."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class _Facts(ProgressColumn):
    """The column of rates, computed when it is drawn, not at every step."""

    def __init__(self, owner: Progress):
        super().__init__()
        self.owner = owner

    def render(self, task: Task) -> Text:
        return Text(self.owner.line())


class Progress:
    """The live line of one stage: a bar on a terminal, otherwise a plain line now and then.

    Time before the first `update` (tracing, compiling, the first batch) and the time that `paused`
    reports (evaluation, saving) are left out of the rates.

        with Progress("co_study", total=500, batch_size=64) as progress:
            for step in range(500):
                ...
                progress.update(step + 1, loss=0.7, waited=0.001)

    Args:
        stage: name of the stage.
        total: its steps.
        batch_size: examples a step, for examples/s.
        start: steps done before (a resumed stage).
        interval: seconds between plain lines, where there is no terminal.
        console: where to write; None is standard error.
        enabled: false writes nothing (tests, library use); the rates are measured all the same.
        clock: returns seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        batch_size: int,
        *,
        start: int = 0,
        interval: float = 5.0,
        console: Console | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        checks.integer_in("total", total, 0)
        checks.integer_in("start", start, 0)
        self.stage, self.total, self.batch_size = stage, total, batch_size
        self.step = start
        self.loss: float | None = None
        self._start, self._interval, self._clock = start, interval, clock
        self._console = console or Console(file=sys.stderr)
        self._enabled = enabled
        self._bar: Bar | None = None
        self._entered = self._clock()
        self._first: float | None = None
        self._counted_from = start
        self._ended: float | None = None
        self._last_line = self._entered
        self.waited = 0.0
        self.outside = 0.0

    def __enter__(self) -> Progress:
        self._entered = self._last_line = self._clock()
        if self._enabled and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                _Facts(self),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.step)
            self._bar.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._ended = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step)
            self._bar.stop()
            self._bar = None
        elif self._enabled:
            self._print("" if kind is None else " (stopped)")

    def update(self, step: int, *, loss: float | None = None, waited: float = 0.0) -> None:
        """Reports how far the stage is.

        Args:
            step: steps of this stage that are done (the device may still be at the last one).
            loss: the latest known loss, None to keep the one before.
            waited: seconds the loop has waited for data since the last call.
        """
        now = self._clock()
        self.step = step
        if loss is not None:
            self.loss = float(loss)
        if self._first is None:
            # This step compiled: it counts as preparation, and the rates start after it.
            self._first, self._counted_from = now, step
        else:
            self.waited += waited
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        elif self._enabled and now - self._last_line >= self._interval:
            self._last_line = now
            self._print("")

    def paused(self, seconds: float) -> None:
        """Leaves seconds of no training (evaluation, saving, compiling) out of the rates."""
        if self._first is not None:
            self.outside += seconds

    @property
    def preparation(self) -> float:
        """Seconds up to the end of the first step: mostly tracing and compiling."""
        end = self._first if self._first is not None else self._ended or self._clock()
        return end - self._entered

    @property
    def seconds(self) -> float:
        """Seconds of training: the time that the rates refer to."""
        if self._first is None:
            return 0.0
        return max((self._ended or self._clock()) - self._first - self.outside, 0.0)

    def summary(self) -> dict[str, float]:
        """Returns the stage's numbers for timings.json; rates are 0 where nothing was measured."""
        seconds, steps = self.seconds, self.step - self._counted_from
        rate = steps / seconds if seconds > 0 else 0.0
        return {
            "steps": self.step - self._start,
            "first_step_seconds": self.preparation,
            "train_seconds": seconds,
            "outside_seconds": self.outside,
            "steps_per_second": rate,
            "examples_per_second": rate * self.batch_size,
            "data_wait_fraction": min(self.waited / seconds, 1.0) if seconds > 0 else 0.0,
        }

    def line(self) -> str:
        """Returns the rates as one line of text."""
        numbers = self.summary()
        loss = "" if self.loss is None else f"loss {self.loss:.4f}"
        if self._first is None:
            return f"first step: {duration(self.preparation)}" if self._ended is None else ""
        rate = numbers["steps_per_second"]
        parts = [loss]
        if rate > 0:
            parts += [f"{_rate(rate)} steps/s", f"{_rate(rate * self.batch_size)} examples/s"]
            if self._ended is None:
                parts.append(f"ETA {duration((self.total - self.step) / rate)}")
            parts.append(f"data wait {100 * numbers['data_wait_fraction']:.0f} %")
        parts.append(f"first step {self.preparation:.1f} s")
        if self._ended is not None:
            parts.append(f"total {duration(self._ended - self._entered)}")
        return " | ".join(part for part in parts if part)

    def _print(self, end: str) -> None:
        facts = self.line()
        text = f"{self.stage} {self.step}/{self.total}" + (f" | {facts}" if facts else "") + end
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
