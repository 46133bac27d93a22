"""A worker of a sweep: a process that runs one run after another.

    python -m qkd_jax.experiment.sweep_worker

It reads tasks, one JSON line each, from standard input, and answers on standard output. What runs
print goes into a file of their own. Imports and compiled steps are paid once for all its runs.

A task is {"name", "config", "folder", "log", "argv", "store", "points", "basis", "code"};
the answers are {"ready": true} and {"name", "code", "in_use"}. It ends with standard input, so a
worker whose launcher was killed finishes its run and leaves.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from qkd_jax import checks
from qkd_jax.experiment.modes import exit_code
from qkd_jax.experiment.orchestrate import run, step_cache
from qkd_jax.experiment.settings import Settings
from qkd_jax.experiment.shared_store import SharedStages
from qkd_jax.record.environment import code_sha256
from qkd_jax.record.folder import InUseError
from qkd_jax.record.stopping import EXIT_FILES, EXIT_INTERRUPTED, EXIT_MEMORY, GracefulStop
from qkd_jax.training.parallel import StepCache

USAGE_ERROR, CRASH = 2, 1
# Steps of many structures: a sweep over nets would collect programs without end.
MOST_STEPS = 32


def run_task(
    task: Mapping[str, Any], stop: GracefulStop | None, steps: Callable[[Settings], StepCache]
) -> tuple[int, bool]:
    """Runs one run of a sweep; returns (exit code, whether another process has its folder)."""
    # The keys are of the launcher's code; a worker that began after an edit has another.
    same = task["code"] == code_sha256()
    if not same:
        print("WARNING: the code has changed since the sweep began; nothing is shared.", flush=True)
    shared = SharedStages(
        Path(task["store"]),
        [(int(count), key) for count, key in task["points"]] if same else (),
        name=task["name"],
        basis=task["basis"] if same else "",
        say=lambda text: print(text, flush=True),
    )
    folder = task["folder"]
    try:
        code = exit_code(lambda: run(task["config"], folder, shared=shared, steps=steps, stop=stop))
        return code, False
    except InUseError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR, True
    except ValueError as error:
        print(f"error: {checks.printable(error)}", file=sys.stderr, flush=True)
        return USAGE_ERROR, False


def step_caches() -> Callable[[Settings], StepCache]:
    """Returns a function that gives configs of the same devices one cache of compiled steps."""
    caches: dict[str, StepCache] = {}

    def find(settings: Settings) -> StepCache:
        key = json.dumps(settings["parallel"], sort_keys=True)
        if key not in caches or len(caches[key]) > MOST_STEPS:
            caches[key] = step_cache(settings)
        return caches[key]

    return find


def main() -> int:
    """Serves tasks until standard input ends; returns the exit code."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**facts: Any) -> None:
        with contextlib.suppress(OSError):  # the launcher is gone; the run is done all the same
            os.write(answers, f"{json.dumps(facts)}\n".encode())

    with GracefulStop() as stop:
        code_sha256()  # of the files as they have just been imported
        jax.devices()  # starts the threads, before the launcher gives this process its cores
        answer(ready=True)
        steps = step_caches()
        for line in sys.stdin:
            if stop.requested:
                break
            task = json.loads(line)
            sys.argv = task["argv"]
            code, in_use = CRASH, False
            try:
                with contextlib.suppress(OSError):  # on a full disk the run itself says so
                    _print_to(task["log"])
                code, in_use = run_task(task, stop, steps)
            except OSError:  # what it prints cannot be written
                code = EXIT_FILES
            except Exception:
                with contextlib.suppress(OSError):
                    traceback.print_exc()
                    sys.stderr.flush()
            answer(name=task["name"], code=code, in_use=in_use)
            if code in (CRASH, EXIT_MEMORY, EXIT_INTERRUPTED) or stop.requested:
                return code  # the next run gets a new process
    return 0


def _print_to(path: str) -> None:
    """Appends what this process prints to a file; a link in its place is replaced."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(path):
        os.unlink(path)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
