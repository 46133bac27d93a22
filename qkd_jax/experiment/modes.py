"""The modes of the command line; eval, export and report read a run folder alone."""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from qkd_jax import checks, processes
from qkd_jax.data import NotPreparedError
from qkd_jax.experiment import soft_label_record, sweep_state
from qkd_jax.experiment.orchestrate import run, step_cache
from qkd_jax.experiment.origin import check_data, check_written
from qkd_jax.experiment.overview import overview
from qkd_jax.experiment.reading import check_sources, load_data, read
from qkd_jax.experiment.results import (
    is_older,
    printer,
    results_of,
    row,
    show,
    show_comparison,
    target_lines,
    write_report,
)
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.settings import resolve
from qkd_jax.experiment.stages import STAGES
from qkd_jax.experiment.together import follow
from qkd_jax.processes.startup import USAGE_ERROR
from qkd_jax.record.checkpoint import SaveError
from qkd_jax.record.folder import RunFolder
from qkd_jax.record.restoring import first_line, read_latest
from qkd_jax.record.stopping import (
    EXIT_FILES,
    EXIT_INTERRUPTED,
    EXIT_MEMORY,
    EXIT_NONFINITE,
    GracefulStop,
)
from qkd_jax.report import read_comparison, write_comparison
from qkd_jax.training.loop import NonFiniteError, Preempted
from qkd_jax.training.parallel import enable_compilation_cache
from qkd_jax.training.profiling import parse_steps


def _open(workdir: str | Path) -> tuple[RunFolder, Run]:
    """Opens a run folder to read: settings, data and the newest checkpoint."""
    folder = RunFolder(workdir, create=False)
    written = folder.read_config()
    plain = resolve(written)
    saved, _ = read_latest(folder.checkpoints)
    if saved is None:
        raise ValueError(
            f"{workdir} has no checkpoint yet; run it: python launch.py --config=... "
            f"--workdir={workdir}"
        )
    there = saved.meta.get("origin")
    check_written(there, written, folder.path)
    dataset = load_data(plain)
    check_data(there, dataset.fingerprint, folder.path)
    settings = read(plain, dataset)
    state = Run(settings, dataset, None, None, step_cache(settings))
    state.load(saved)
    return folder, state


def restore(workdir: str | Path) -> Run:
    """Returns a run as its newest checkpoint left it: `nets`, `variables`, `dataset`.

    Raises:
        ValueError: the folder has no checkpoint yet.
    """
    return _open(workdir)[1]


def evaluate(workdir: str | Path, *, verbose: bool = True) -> dict[str, Any]:
    """Evaluates every net of a run folder's newest checkpoint on the test split."""
    enable_compilation_cache()
    _, state = _open(workdir)
    rows = [row(state, name, "as it stands", state.evaluate(name)) for name in state.variables]
    results = results_of(state, rows)
    show(results, printer(verbose))
    return results


def export(workdir: str | Path, *, target: str = "", verbose: bool = True) -> dict[str, Any]:
    """Writes the deployable models of a run folder's newest checkpoint into `<workdir>/model`.

    `target`, a key of `quantize.targets.TARGETS`, replaces that of the stages and the config.

    Raises:
        ValueError: no deploy stage; a net that has not been trained; a target that cannot run it.
    """
    enable_compilation_cache()
    folder, state = _open(workdir)
    state.folder, state.rows = folder, []
    stages = [s for s in state.settings.stages if s.kind == "deploy"]
    if not stages:
        raise ValueError(f"the schedule of {workdir} has no deploy stage; add one to the config.")
    for stage in stages:
        missing = [name for name in stage.nets if name not in state.variables]
        if missing:
            raise ValueError(f"net {missing[0]!r} has not been trained yet in {workdir}.")
        if target:
            stage = dataclasses.replace(stage, fields={**stage.fields, "target": target})
            STAGES[stage.kind].check(state.settings.nets, stage)
        STAGES[stage.kind].run(state, stage, **stage.fields)
    results = results_of(state, state.rows)
    say = printer(verbose)
    show(results, say)
    for name in dict.fromkeys(name for stage in stages for name in stage.nets):
        for line in target_lines(folder.model / f"{name}_target.json"):
            say(line)
    say(f"written to {folder.model}")
    return results


def report(workdir: str | Path, *, against: str = "", verbose: bool = True) -> None:
    """Writes report.html of a run folder, or the comparison of a folder of runs; prints tables.

    Args:
        workdir: the folder; one without a config.json of its own is a folder of runs.
        against: the control of a comparison, see `qkd_jax.report.compare`.
        verbose: whether the tables are printed.

    Raises:
        ValueError: there is no such folder; see `qkd_jax.report.compare`.
    """
    folder = RunFolder(workdir, create=False)
    say = printer(verbose)
    if not (folder.path / "config.json").exists():
        state_of = lambda path: sweep_state.state_of(path).text()
        found, curves = read_comparison(folder.path, against=against, state_of=state_of)
        show_comparison(found, say)  # first: somebody else's folder may be there to be read alone
        write_comparison(folder.path, found, curves)
        say(f"comparison: {folder.path / 'comparison.html'}, beside it .md, .tex and .csv")
        return
    if against:
        raise ValueError(
            f"--against={against} names the control of a comparison, and {workdir} is one run; "
            "give the folder that holds the runs."
        )
    folder.read_config()
    results = folder.read_results()
    if results is not None:
        show(results, say)
        if is_older(folder.path / soft_label_record.FILE, folder.path / "results.json"):
            _write_soft_labels(workdir, say)
    write_report(folder, say)


def _write_soft_labels(workdir: str | Path, say: Callable[[str], None]) -> None:
    """Writes soft_labels.json of a finished run that lacks it; it needs the run's data."""
    try:
        folder, state = _open(workdir)
    except NotPreparedError as error:
        say(f"no pictures of soft labels: {error}")
        return
    soft_label_record.write(state, folder.path)


def inspect(config: Any, *, verbose: bool = True) -> str:
    """Returns (and prints) the schedule, every net's layers and the coverage; computes nothing."""
    settings = read(config)
    check_sources(settings)
    text = overview(settings)
    printer(verbose)(text)
    return text


def _complain(text: str) -> None:
    print(checks.printable(text), file=sys.stderr)


def _os_message(error: OSError) -> str:
    """Returns an error of the file system in a sentence, with the repair."""
    if isinstance(error, SaveError):
        text = str(error)
    else:
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        text = f"{name}{error.strerror or first_line(error)}."
    return (
        f"{text} Make room or give rights, and start the same command again: a run goes on from "
        "its newest checkpoint."
    )


def exit_code(act: Callable[[], Any], *, say: Callable[[str], None] = _complain) -> int:
    """Calls `act`; returns 0, or the exit code of the error that it ended with, which it prints.

    Args:
        act: what is done.
        say: prints a text.

    Raises:
        ValueError: a mistake of the user, whose message is all that needs to be shown.
    """
    try:
        act()
    except NonFiniteError as error:
        say(f"stopped: {error}")
        return EXIT_NONFINITE
    except Preempted as error:
        say(f"asked to stop, saved at {error}; the same command resumes.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        say(f"error: {_os_message(error)}")
        return EXIT_FILES
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say(
            f"error: out of memory ({first_line(error) or 'MemoryError'}); take a smaller batch, "
            "eval_batch_size, image or model. What was saved is whole: the same command resumes."
        )
        return EXIT_MEMORY
    return 0


def _together(
    config: Any,
    workdir: str | Path,
    start: Callable[[], processes.Group | None],
    *,
    profile_steps: tuple[int, int] | None = None,
) -> int:
    """Runs, in several processes where this is one of several; returns the exit code.

    One of several does not return: it ends once the others know.

    Raises:
        ValueError: a mistake of the user, where this process is alone or not yet with the others.
    """
    try:
        group = start()
    except processes.PeerError as error:
        _complain(f"error: {error}")
        return error.code
    if group is None:
        return exit_code(lambda: run(config, workdir, profile_steps=profile_steps))
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text.removeprefix("error: "))
        _complain(text if group.leads else f"{group}: {text}")

    code = 1
    try:
        if group.leads:
            act = lambda: run(config, workdir, group=group, profile_steps=profile_steps)
            code = exit_code(act, say=say)
        else:
            with GracefulStop() as stop:
                code = exit_code(lambda: follow(config, group, step_cache, stop), say=say)
    except processes.Ended as error:
        code = error.code
        if code:
            say(str(error))
    except BaseException as error:
        # A step fails where another process has died: the watch says which, and ends this one.
        group.settle()
        if isinstance(error, processes.PeerError | ValueError):
            code = getattr(error, "code", USAGE_ERROR)
            say(f"error: {error}")
        else:
            traceback.print_exc()
            said.append(f"{type(error).__name__}: {first_line(error)}")
    group.leave(code, " ".join(said))
    return code


def main(
    mode: str,
    *,
    config: Any,
    workdir: str | Path,
    target: str = "",
    against: str = "",
    cluster: Mapping[str, Any] | None = None,
    profile_steps: str = "",
) -> int:
    """Runs a mode of the command line; returns the exit code.

    Args:
        mode: "run", "inspect", "eval", "export" or "report".
        config: of a run, and to inspect.
        workdir: the run folder.
        target: of `export`.
        against: of `report`.
        cluster: arguments of `processes.start`, for a run of several processes; other modes are of
            one process.
        profile_steps: of a run, "a,b"; process 0 writes the trace.

    Raises:
        ValueError: a mistake of the user, whose message is all that needs to be shown.
    """
    traced = parse_steps(profile_steps) if profile_steps else None
    if mode == "run":
        return _together(
            config, workdir, lambda: processes.start(**(cluster or {})), profile_steps=traced
        )
    acts: dict[str, Callable[[], Any]] = {
        "inspect": lambda: inspect(config),
        "eval": lambda: evaluate(workdir),
        "export": lambda: export(workdir, target=target),
        "report": lambda: report(workdir, against=against),
    }
    return exit_code(acts[mode])
