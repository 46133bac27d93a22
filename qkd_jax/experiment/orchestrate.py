"""Runs and resumes experiments: the walk over a config's schedule of stages."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from qkd_jax.experiment import soft_label_record
from qkd_jax.experiment.config_checks import mesh_layout
from qkd_jax.experiment.origin import (
    changes,
    check_data,
    check_digest,
    lines_of,
    origin_of,
)
from qkd_jax.experiment.reading import check_sources, load_data, read
from qkd_jax.experiment.results import is_older, printer, results_of, show, times_text, write_report
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.settings import Settings, resolve
from qkd_jax.experiment.shared_store import SharedStages
from qkd_jax.experiment.stages import STAGES
from qkd_jax.experiment.sweep_list import FILE as SWEEP_FILE
from qkd_jax.experiment.together import check_same, facts_of, send_state
from qkd_jax.processes import Group
from qkd_jax.record import trackers
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.record.environment import git_state
from qkd_jax.record.folder import FREE_FIELDS, RunFolder
from qkd_jax.record.metrics_log import read_metrics
from qkd_jax.record.stopping import GracefulStop
from qkd_jax.report import images
from qkd_jax.training.loop import Preempted
from qkd_jax.training.parallel import StepCache, enable_compilation_cache
from qkd_jax.training.profiling import FOLDER, Profile, check_steps
from qkd_jax.trees import tree_sha256


def run(
    config: Any,
    workdir: str | Path,
    *,
    report: bool = True,
    verbose: bool = True,
    shared: SharedStages | None = None,
    steps: Callable[[Settings], StepCache] | None = None,
    stop: GracefulStop | None = None,
    group: Group | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Runs an experiment, or resumes it where it was interrupted.

    Args:
        config: a `ConfigDict` or dict.
        workdir: the run folder.
        report: whether report.html is written at the end.
        verbose: whether progress and the table are printed.
        shared: the stages that it shares with other runs of a sweep.
        steps: returns the cache of compiled steps for a config's devices, where runs share one.
        stop: asks the run to stop; without it SIGTERM and Ctrl-C do.
        group: the processes of the run where there are several, of which this is process 0.
        profile_steps: the first and the last step of a trace, written to <workdir>/profile.

    Returns:
        The content of results.json.

    Raises:
        ValueError: a mistake in the config; a folder that holds a run of another config.
        NonFiniteError: a loss or gradient is not finite.
        Preempted: SIGTERM came; everything is saved.
    """
    plain = resolve(config)
    say = printer(verbose)
    trackers.check(plain["track"]["trackers"])
    trackers.check_packages(plain["track"]["trackers"])
    dataset = None
    if not Path(workdir).exists():  # a mistake in the config leaves no folder behind
        dataset = load_data(plain)
        checked = read(plain, dataset)
        check_sources(checked)
        if profile_steps is not None:
            check_steps(profile_steps, checked.stages)
    git = git_state()
    if group is not None:  # before the folder is made
        dataset = dataset or load_data(plain)
        group.compare(facts_of(plain, dataset, git))
    with RunFolder(workdir) as folder:
        folder.lock()
        known = folder.check_config(plain, ignore=FREE_FIELDS)
        results = folder.read_results() if known else None
        if results is not None:
            say(f"{workdir} holds the finished run of this config; nothing is left to do.")
            show(results, say)
            with _tracked(folder, plain, say) as follower:  # those that the run had not, or lost
                follower.begin(read_metrics(folder.path) if follower.trackers else [])
                _draw(follower, folder)
            if report and is_older(folder.path / "report.html", folder.path / "results.json"):
                write_report(folder, say)
            return results
        begin = time.perf_counter()
        enable_compilation_cache()
        dataset = dataset or load_data(plain)
        settings = read(plain, dataset)
        if not known:
            check_sources(settings)
        if profile_steps is not None:
            check_steps(profile_steps, settings.stages)
        for warning in settings.warnings():
            say(warning)
        asked = contextlib.nullcontext(stop) if stop is not None else GracefulStop()
        follow = _tracked(folder, plain, say)  # outermost: no checkpoint waits for a service
        with follow as follower, Checkpoints(folder.checkpoints) as checkpoints, asked as stop:
            state = Run(
                settings,
                dataset,
                folder,
                checkpoints,
                (steps or step_cache)(settings),
                stopping=lambda: stop.requested or (group is not None and group.asked),
                verbose=verbose,
                group=group,
                profile=Profile(*profile_steps, folder.path / FOLDER) if profile_steps else None,
                origin=origin_of(plain, dataset, git),
            )
            changed = _resume(state, folder, checkpoints, say, known=known)
            if not known:
                folder.write_config(plain)
            folder.write_run(
                git=git,
                seed=settings["seed"],
                data={"name": dataset.name, "fingerprint": dataset.fingerprint},
                resumed_from=state.step,
                **({"changed": changed} if changed else {}),
            )
            if profile_steps is not None and state.step >= profile_steps[1]:
                say(f"the run is at step {state.step}, past --profile_steps: nothing is traced")
            before = state.timings.get("seconds", 0.0)

            def clock() -> None:
                state.timings["seconds"] = before + time.perf_counter() - begin

            try:
                walk(state, clock, shared)
            finally:
                if shared is not None:
                    shared.release()
                clock()
                folder.write_timings(state.timings)
            checkpoints.wait()
            results = results_of(state, state.rows)
            folder.write_run(
                nets={name: {"sha256": tree_sha256(v)} for name, v in state.variables.items()}
            )
            folder.write_results(results)
            _draw(follower, folder)
            if report:
                soft_label_record.write(state, folder.path)
        if report:
            write_report(folder, say)
        show(results, say)
        say(times_text(state.timings))
    return results


def _tracked(
    folder: RunFolder, plain: Mapping[str, Any], say: Callable[[str], None]
) -> contextlib.AbstractContextManager[trackers.Follower]:
    """Lets the trackers of a config follow the log of a folder, as one of its sweep's."""
    parent = folder.path.resolve().parent
    group = parent.name if (parent / SWEEP_FILE).is_file() else ""
    return trackers.tracking(folder.metrics, plain["track"], plain, say, group=group)


def _draw(follower: trackers.Follower, folder: RunFolder) -> None:
    """Gives trackers the figures of a finished run, at the step of its last line."""
    if follower.trackers:
        rows = read_metrics(folder.path)
        last = rows[-1]["step"] if rows else 0
        follower.images(len(rows), last, lambda: images(folder.path))


def step_cache(settings: Settings) -> StepCache:
    """Returns an empty cache of steps, compiled for the devices of a config."""
    fields = settings["parallel"]
    return StepCache(
        mode=fields["mode"],
        devices=jax.devices()[: fields["devices"] or None],
        layout=mesh_layout(fields),
    )


def _resume(
    state: Run,
    folder: RunFolder,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
    *,
    known: bool,
) -> dict[str, list[Any]]:
    """Loads the newest whole checkpoint, and cuts the log back to it; returns what has changed.

    Raises:
        ValueError: the checkpoint is of another config or of other data (see `origin`).
    """
    saved = checkpoints.restore_latest(report=say)
    if saved is None:
        folder.metrics.truncate(0, lines=0)
        return {}
    there = saved.meta.get("origin")
    check_digest(there, state.origin["config"], folder.path, known=known)
    check_data(there, state.origin["data"], folder.path)
    changed = changes(there, state.origin)
    for line in lines_of(changed):
        say(line)
    state.load(saved)
    folder.metrics.truncate(saved.step, lines=saved.meta["lines"])
    where = "the end" if state.finished else f"stage {state.stage().name!r}"
    at = f", step {state.stage_step} of {state.stage().steps}" if state.stage_step else ""
    say(f"resuming from the checkpoint of step {saved.step}: {where}{at}")
    return changed


def walk(
    state: Run, clock: Callable[[], None] = lambda: None, shared: SharedStages | None = None
) -> None:
    """Runs the stages of the schedule that are left; saves after each.

    Args:
        state: the run.
        clock: called before each checkpoint, to bring `state.timings` up to date.
        shared: the stages that other runs of a sweep have too.

    Raises:
        NonFiniteError: from a training stage.
        Preempted: the run was asked to stop.
    """
    while not state.finished:
        if shared is not None:
            shared.before_stage(state)
            if state.finished:
                break
        stage = state.stage()
        begin = time.perf_counter()
        try:
            for name in stage.nets:
                state.init_net(name)
            if stage.trains:
                send_state(state, stage)
            STAGES[stage.kind].run(state, stage, **stage.fields)
            if stage.trains:
                check_same(state, stage)
        finally:
            state.add_times(stage.name, {"seconds": time.perf_counter() - begin})
        state.stage_index, state.stage_step = state.stage_index + 1, 0
        clock()
        state.save()
        if shared is not None:
            shared.after_stage(state)
        if state.stopping() and not state.finished:
            raise Preempted(f"before stage {state.stage().name!r}")
