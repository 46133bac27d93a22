"""Worker processes of a sweep, as its launcher sees them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

PACKAGE = Path(__file__).parents[2]


class Worker:
    """One worker process (see `sweep_worker`) and the run that it has.

    Args:
        log: the file that takes what it prints before its first run.
        environment: variables of its own.

    Attributes:
        task: of the run that it has; None while it has none.
        ready: whether its imports are done.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None):
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH", "")]))
        self.log = log
        log.unlink(missing_ok=True)  # it may be a link
        with open(log, "xb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qkd_jax.experiment.sweep_worker"],
                env={**os.environ, **(environment or {}), "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                # Ctrl-C is for the launcher, which passes it on once.
                start_new_session=True,
            )
        self.task: dict[str, Any] | None = None
        self.ready = False
        self._rest = b""
        os.set_blocking(self.output.fileno(), False)

    @property
    def output(self) -> BinaryIO:
        """Where its answers come from."""
        return cast(BinaryIO, self.process.stdout)

    def give(self, task: dict[str, Any]) -> None:
        """Hands it a run."""
        self.task = task
        with contextlib.suppress(OSError):  # it has died; its end is seen at the next answer
            cast(BinaryIO, self.process.stdin).write(f"{json.dumps(task)}\n".encode())
            cast(BinaryIO, self.process.stdin).flush()

    def answers(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns what it has answered since the last call, and whether it has ended."""
        ended = False
        while True:
            try:
                part = os.read(self.output.fileno(), 65536)
            except BlockingIOError:
                break
            if not part:
                ended = True
                break
            self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        found = [json.loads(line) for line in lines]
        self.ready = self.ready or any("ready" in answer for answer in found)
        return [answer for answer in found if "name" in answer], ended

    def stop(self) -> None:
        """Asks its run to save and end."""
        self.dismiss()
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGTERM)

    def dismiss(self) -> None:
        """Lets it end when it has no run."""
        with contextlib.suppress(OSError):
            cast(BinaryIO, self.process.stdin).close()

    def end(self, patience: float | None = None) -> int:
        """Waits for its end and returns its exit code; kills it where that takes too long."""
        self.dismiss()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.output.close()
        return code


def share_cores(workers: Sequence[Worker]) -> None:
    """Divides this process's cores among workers that have a run.

    XLA has its threads already, as many as for a run alone, and how it cuts sums depends on their
    number: a worker is given fewer cores, not fewer threads, so that its bits are those of a run
    alone.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    busy = [worker for worker in workers if worker.ready and worker.task is not None]
    cores = sorted(os.sched_getaffinity(0))
    for place, worker in enumerate(busy):
        share = cores
        if len(cores) >= len(busy):
            begin, end = (len(cores) * k // len(busy) for k in (place, place + 1))
            share = cores[begin:end]
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{worker.process.pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), share)


def wait_for_answers(workers: Sequence[Worker], seconds: float) -> None:
    """Waits until a worker answers or ends, at most so long."""
    import selectors

    if not workers:
        time.sleep(seconds)
        return
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.output, selectors.EVENT_READ)
        selector.select(seconds)
