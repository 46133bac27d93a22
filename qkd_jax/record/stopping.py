"""Graceful shutdown, and the exit codes of a run that did not finish."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

EXIT_NONFINITE = 3
# sysexits.h: EX_OSERR, the system gives no memory, and EX_IOERR, a file cannot be written or read.
EXIT_MEMORY = 71
EXIT_FILES = 74
# sysexits.h EX_TEMPFAIL, "try again": a scheduler can requeue the job on this code, and it differs
# from Python's 1 (an error) and from 143 (killed by SIGTERM without having saved).
EXIT_INTERRUPTED = 75


class GracefulStop:
    """Turns the first SIGTERM (and Ctrl-C) into a flag; the loop saves and exits by itself.

        with GracefulStop() as stop:
            ...
            if stop.requested:
                save(); sys.exit(EXIT_INTERRUPTED)

    A second signal of the same kind acts as it would have without this. Outside the main thread,
    where Python allows no handlers, the flag can only be set by `request`.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)):
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None
        self.requested = False

    def request(self) -> None:
        """Asks the loop to stop."""
        self.requested = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received, self.requested = signal.Signals(number), True
        self._restore(signal.Signals(number))

    def _restore(self, which: signal.Signals) -> None:
        if which in self._before:
            with contextlib.suppress(TypeError):  # a handler that was not set from Python
                signal.signal(which, self._before.pop(which))

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for which in self._signals:
                self._before[which] = signal.signal(which, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for which in list(self._before):
            self._restore(which)
