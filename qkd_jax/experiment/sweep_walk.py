"""The walk over the runs of a sweep: a few at a time, in worker processes, until none is left.

A run is known by its folder: done, locked by a process that runs it (one that an earlier launcher
started and left, or another machine's), or to be begun or resumed here. So a launcher that was
killed needs nothing of its own to go on.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax.experiment import sweep_state
from qkd_jax.experiment.sweep_list import LOGS, SHARED
from qkd_jax.experiment.sweep_plan import Planned
from qkd_jax.experiment.sweep_processes import Worker, share_cores, wait_for_answers
from qkd_jax.experiment.sweep_table import Line, SweepTable
from qkd_jax.record.environment import code_sha256
from qkd_jax.record.folder import holder
from qkd_jax.record.stopping import EXIT_INTERRUPTED, GracefulStop

_LOOK_SECONDS, _ELSEWHERE_SECONDS = 0.5, 1.0


def next_run(
    waiting: Sequence[Planned],
    running: Sequence[tuple[Planned, int]],
    is_kept: Callable[[str], bool],
) -> Planned | None:
    """Returns the first run that needs nothing which a running one is about to make for it.

    Args:
        waiting: runs that are left, in order.
        running: runs that are being done, each with its steps so far.
        is_kept: whether the state of a key is in the store.
    """
    making = {
        key
        for run, step in running
        for count, key in run.points
        if step < run.end_of(count) and not is_kept(key)
    }
    for run in waiting:
        if not any(key in making for _, key in run.points):
            return run
    return None


class Walk:
    """The state of a launcher.

    Args:
        planned: the runs.
        folder: of the sweep.
        jobs: how many run at a time.
        argv: the command, for the record of each run.
        stop: asks to stop.
        table: shows the runs.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        folder: Path,
        jobs: int,
        argv: Sequence[str],
        stop: GracefulStop,
        table: SweepTable,
    ):
        self.runs = {run.name: run for run in planned}
        self.folder, self.jobs, self.argv = folder, jobs, list(argv)
        self.stop, self.table = stop, table
        self.lines = {line.name: line for line in table.lines}
        self.waiting: list[str] = []
        self.elsewhere: list[str] = []
        self.failed: dict[str, int] = {}
        self.workers: list[Worker] = []
        self._stopping = False
        self._looked = self._asked = 0.0
        self._started = 0

    def run(self) -> int:
        """Runs all that is left; returns the sweep's exit code."""
        for name in self.runs:
            self._sort(name)
        self._announce()
        try:
            while True:
                if self.stop.requested and not self._stopping:
                    self._pass_on()
                self._hand_out()
                if not self.workers and (self._stopping or not self.elsewhere):
                    break
                wait_for_answers(self.workers, 0.1)
                for worker in list(self.workers):
                    self._listen(worker)
                self._look_elsewhere()
                self._look()
        finally:
            for worker in self.workers:  # an error is on its way out, or a second Ctrl-C
                worker.end(patience=0.0)
        return self._conclude()

    def _sort(self, name: str) -> None:
        """Puts a run where its folder says."""
        folder = self.folder / name
        process = holder(folder)
        if process is not None:
            self.elsewhere.append(name)
            self.lines[name].begins("elsewhere")
            self.table.say(
                f"{name}: process {process} is running it already; this sweep waits for it."
            )
        elif (folder / "results.json").exists():
            self._done(name)
        else:
            self.waiting.append(name)
            self.lines[name].begins("waiting")

    def _announce(self) -> None:
        done = sum(line.word == "done" for line in self.lines.values())
        self.table.say(
            f"{len(self.runs)} runs, {done} of them done; up to {self.jobs} at a time. What they "
            f"print is in {self.folder / LOGS}."
        )

    def _is_kept(self, key: str) -> bool:
        return (self.folder / SHARED / key).exists()

    def _hand_out(self) -> None:
        """Gives runs to idle workers, starts workers where there are too few, ends the others."""
        while not self._stopping and self.waiting:
            running = [w.task["name"] for w in self.workers if w.task is not None]
            if len(running) >= self.jobs:
                break
            active = [(self.runs[n], self.lines[n].step) for n in (*running, *self.elsewhere)]
            run = next_run([self.runs[n] for n in self.waiting], active, self._is_kept)
            if run is None:
                break
            idle = [worker for worker in self.workers if worker.task is None]
            worker = idle[0] if idle else self._start()
            self.waiting.remove(run.name)
            self._give(worker, run)
        if self._stopping or not (self.waiting or self.elsewhere):
            for worker in self.workers:
                if worker.task is None:
                    worker.dismiss()

    def _start(self) -> Worker:
        environment = {}
        if self.jobs > 1:  # each of several on one GPU gets its share of the memory
            share = f"{0.9 / self.jobs:.3f}"
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = os.environ.get(
                "XLA_PYTHON_CLIENT_MEM_FRACTION", share
            )
        self._started += 1
        worker = Worker(self.folder / LOGS / f".worker{self._started}.txt", environment)
        self.workers.append(worker)
        return worker

    def _give(self, worker: Worker, run: Planned) -> None:
        folder = self.folder / run.name
        sweep_state.clear_failure(folder)
        worker.give(
            {
                "name": run.name,
                "config": run.config,
                "folder": str(folder),
                "log": str(sweep_state.log_file(folder)),
                "argv": self.argv,
                "store": str(self.folder / SHARED),
                "points": run.points,
                "basis": run.basis,
                "code": code_sha256(),
            }
        )
        self.lines[run.name].begins("running")
        share_cores(self.workers)

    def _pass_on(self) -> None:
        self._stopping = True
        self.table.say("asked to stop: the runs save and end.")
        for worker in self.workers:
            worker.stop()

    def _listen(self, worker: Worker) -> None:
        was_ready = worker.ready
        answers, ended = worker.answers()
        if worker.ready and not was_ready:
            share_cores(self.workers)
        for answer in answers:
            worker.task = None
            self._settle(answer["name"], answer["code"], in_use=answer["in_use"])
        if ended:
            self.workers.remove(worker)
            code = worker.end()
            if worker.task is not None:
                self._settle(worker.task["name"], code or 1, worker=worker)
        if answers or ended:
            share_cores(self.workers)

    def _settle(
        self, name: str, code: int, *, in_use: bool = False, worker: Worker | None = None
    ) -> None:
        """Takes the end of a run."""
        folder, line = self.folder / name, self.lines[name]
        self._look_at(name)
        if in_use:
            self.elsewhere.append(name)
            line.begins("elsewhere")
        elif code == 0:
            self._done(name)
        elif code == EXIT_INTERRUPTED or (self._stopping and code < 0):
            line.word = "interrupted"
            if not self._stopping:  # somebody stopped this run alone: it is for the next launch
                self.table.say(f"{name}: asked to stop, and saved.")
                self.failed[name] = code
        else:
            line.word = "failed"
            self.failed[name] = code
            lines = sweep_state.last_lines(folder)
            if worker is not None and not lines:
                lines = worker.log.read_text(errors="replace").splitlines()[-5:]
            sweep_state.write_failure(folder, code, lines)
            self.table.say(f"{name}: failed, {sweep_state.code_text(code)}; the others go on.")

    def _done(self, name: str) -> None:
        line = self.lines[name]
        if line.word == "running":
            self.table.say(f"{name}: done.")
        sweep_state.clear_failure(self.folder / name)
        line.word, line.step = "done", line.total
        place = sweep_state.place_of(self.folder / name)
        line.stage, line.metric = place.stage, place.metric

    def _look_elsewhere(self) -> None:
        """Takes back runs that no other process runs any more."""
        now = time.monotonic()
        if now - self._asked < _ELSEWHERE_SECONDS:
            return
        self._asked = now
        for name in list(self.elsewhere):
            if holder(self.folder / name) is None:
                self.elsewhere.remove(name)
                self._sort(name)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for name, line in self.lines.items():
            if line.word in ("running", "elsewhere"):
                self._look_at(name)
        self.table.show()

    def _look_at(self, name: str) -> None:
        place = sweep_state.place_of(self.folder / name)
        self.lines[name].moved(place.step, place.stage, place.metric, time.monotonic())

    def _conclude(self) -> int:
        """Says how it ended; returns the exit code."""
        done = sum(line.word == "done" for line in self.lines.values())
        say = self.table.say
        for name, code in self.failed.items():
            say(f"\n{name}: {sweep_state.code_text(code)}; its last lines:")
            for text in sweep_state.last_lines(self.folder / name):
                say(f"  {text}")
            say(f"  (all of them: {sweep_state.log_file(self.folder / name)})")
        say(f"{done} of {len(self.runs)} runs are done in {self.folder}.")
        if self._stopping:
            say("stopped; the same command goes on.")
            return EXIT_INTERRUPTED
        codes = {code if code > 0 else 1 for code in self.failed.values()}
        if self.failed:
            say("the same command tries those that failed again, and only those.")
        return 0 if not codes else codes.pop() if len(codes) == 1 else 1


def walk_runs(
    planned: Sequence[Planned],
    folder: Path,
    *,
    jobs: int,
    argv: Sequence[str] | None = None,
    table: Mapping[str, Any] | None = None,
) -> int:
    """Runs a sweep; returns its exit code.

    Args:
        planned: its runs.
        folder: the sweep's.
        jobs: how many run at a time.
        argv: the command, for the runs' records; None is this process's.
        table: arguments of `SweepTable`.

    Returns:
        0 if every run is done; 75 if it was asked to stop; else the exit code of the runs that
        failed, or 1 where they have several or ended by a signal.
    """
    shown = SweepTable([Line(run.name, run.steps) for run in planned], jobs, **(table or {}))
    with GracefulStop() as stop, shown:
        return Walk(planned, folder, jobs, sys.argv if argv is None else argv, stop, shown).run()
