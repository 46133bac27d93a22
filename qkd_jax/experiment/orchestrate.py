"""Runs, resumes and reads experiments: the walk over a config's schedule of stages."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qkd_jax import data, weights
from qkd_jax.data import DATASETS, NotPreparedError
from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.distillation.taps import DataShape
from qkd_jax.experiment import settings as reading
from qkd_jax.experiment import soft_label_record
from qkd_jax.experiment.hygiene_checks import check_hygiene
from qkd_jax.experiment.overview import overview
from qkd_jax.experiment.results import row
from qkd_jax.experiment.run_state import Run, without_fresh
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.settings import Settings, resolve, shapes
from qkd_jax.experiment.stages import CHECKS, STAGES
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.record.folder import RunFolder
from qkd_jax.record.stopping import EXIT_INTERRUPTED, EXIT_NONFINITE, GracefulStop
from qkd_jax.training.loop import NonFiniteError, Preempted
from qkd_jax.training.parallel import StepCache, enable_compilation_cache
from qkd_jax.trees import tree_sha256

__all__ = [
    "evaluate",
    "export",
    "inspect",
    "main",
    "read",
    "report",
    "restore",
    "run",
    "walk",
]

# What may differ between a run folder and the command that goes on with it: none of it reaches a
# number in results.json.
FREE_FIELDS = ("checkpoint", "data.dir")


def load_data(config: dict[str, Any]) -> data.Dataset:
    """Loads the data set of a resolved config."""
    fields = config["data"]
    return data.load(
        fields["name"],
        data_dir=fields["dir"] or None,
        train_examples=fields["train_examples"] or None,
        seed=config["seed"],
    )


def read(config: Any, dataset: data.Dataset | None = None) -> Settings:
    """Checks a config completely and lays out its schedule.

    Args:
        config: a `ConfigDict` or dict.
        dataset: its data; without it the sizes are those that the set is known to have.

    Raises:
        ValueError: naming the field and the nearest valid choice.
    """
    plain = resolve(config)
    name = plain["data"]["name"]
    if name not in DATASETS:
        raise data.checks.unknown("data set in config.data.name", name, DATASETS)
    source = DATASETS[name]
    examples = _examples(plain) if dataset is None else len(dataset.train_images)
    shape = DataShape(source.image_shape, examples)
    found = reading.read(plain, STAGES, data=shape, classes=source.num_classes)
    for name, net in found.nets.items():
        try:
            mode_arguments(net, False)
            shapes(net, (1, *source.image_shape))
        except ValueError as error:
            raise ValueError(f"nets.{name}: {error}") from error
    for stage in found.stages:
        if stage.kind in CHECKS:
            checked = CHECKS[stage.kind](found.nets, stage)
            if stage.trains:
                check_hygiene(found, stage, checked, (1, *source.image_shape))
    return found


def _examples(config: dict[str, Any]) -> int:
    """Size of the training split; one that is not on this machine counts as 50,000."""
    try:
        return len(load_data(config).train_images)
    except NotPreparedError:
        return config["data"]["train_examples"] or 50_000


def _check_files(settings: Settings) -> None:
    """Reads what nets start from outside of this run; later runs of the folder do not need it."""
    source = DATASETS[settings["data"]["name"]]
    for name, net in settings.nets.items():
        fields = settings["nets"][name]
        init_from, fresh = fields.get("init_from"), fields.get("fresh", "")
        if init_from and weights.is_source(init_from):
            try:
                wanted = shapes(net, (1, *source.image_shape))
                without_fresh(name, wanted, weights.load(init_from), fresh)
            except ValueError as error:
                raise ValueError(f"nets.{name}.init_from: {error}") from error


def run(
    config: Any, workdir: str | Path, *, report: bool = True, verbose: bool = True
) -> dict[str, Any]:
    """Runs an experiment, or goes on with it where it was interrupted.

    Args:
        config: a `ConfigDict` or dict.
        workdir: the run folder.
        report: whether report.html is written at the end.
        verbose: whether progress and the table are printed.

    Returns:
        What results.json holds.

    Raises:
        ValueError: a mistake in the config; a folder that holds a run of another config.
        NonFiniteError: a loss or gradient is not finite.
        Preempted: SIGTERM came; everything is saved.
    """
    plain = resolve(config)
    say = _printer(verbose)
    dataset = None
    if not Path(workdir).exists():  # a mistake in the config leaves no folder behind
        dataset = load_data(plain)
        _check_files(read(plain, dataset))
    with RunFolder(workdir) as folder:
        folder.lock()
        known = folder.check_config(plain, ignore=FREE_FIELDS)
        done = folder.read_results() if known else None
        if done is not None:
            say(f"{workdir} holds the finished run of this config; nothing is left to do.")
            _show(done, say)
            if report and _is_older(folder.path / "report.html", folder.path / "results.json"):
                _write_report(folder, say)
            return done
        begin = time.perf_counter()
        enable_compilation_cache()
        dataset = dataset or load_data(plain)
        settings = read(plain, dataset)
        if not known:
            _check_files(settings)
            folder.write_config(plain)
        for warning in settings.warnings():
            say(warning)
        with Checkpoints(folder.checkpoints) as checkpoints, GracefulStop() as stop:
            state = Run(
                settings,
                dataset,
                folder,
                checkpoints,
                _steps(settings),
                stopping=lambda: stop.requested,
                verbose=verbose,
            )
            _resume(state, say)
            folder.write_run(
                seed=settings["seed"],
                data={"name": dataset.name, "fingerprint": dataset.fingerprint},
                resumed_from=state.step,
            )
            before = state.timings.get("seconds", 0.0)

            def clock() -> None:
                state.timings["seconds"] = before + time.perf_counter() - begin

            try:
                walk(state, clock)
            finally:
                clock()
                folder.write_timings(state.timings)
            checkpoints.wait()
            results = _results(state, state.rows)
            folder.write_run(
                nets={name: {"sha256": tree_sha256(v)} for name, v in state.variables.items()}
            )
            folder.write_results(results)
            if report:
                soft_label_record.write(state, folder.path)
        if report:
            _write_report(folder, say)
        _show(results, say)
        say(_times(state.timings))
    return results


def _printer(verbose: bool) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if verbose else (lambda text: None)


def _steps(settings: Settings) -> StepCache:
    fields = settings["parallel"]
    devices = jax.devices()
    return StepCache(mode=fields["mode"], devices=devices[: fields["devices"] or None])


def _resume(state: Run, say: Callable[[str], None]) -> None:
    """Takes over the newest whole checkpoint, and cuts the log back to it."""
    assert state.checkpoints is not None and state.folder is not None
    saved = state.checkpoints.restore_latest(report=say)
    if saved is None:
        state.folder.metrics.truncate(0, lines=0)
        return
    state.load(saved)
    state.folder.metrics.truncate(saved.step, lines=saved.meta["lines"])
    where = "the end" if state.finished else f"stage {state.stage().name!r}"
    at = f", step {state.stage_step} of {state.stage().steps}" if state.stage_step else ""
    say(f"going on from the checkpoint of step {saved.step}: {where}{at}")


def walk(state: Run, clock: Callable[[], None] = lambda: None) -> None:
    """Walks what is left of the schedule; saves after every stage.

    Raises:
        NonFiniteError: from a training stage.
        Preempted: the run was asked to stop.
    """
    while not state.finished:
        stage = state.stage()
        begin = time.perf_counter()
        try:
            for name in stage.nets:
                state.bring_in(name)
            STAGES[stage.kind](state, stage, **stage.fields)
        finally:
            state.add_times(stage.name, {"seconds": time.perf_counter() - begin})
        state.stage_index, state.stage_step = state.stage_index + 1, 0
        clock()
        state.save()
        if state.stopping() and not state.finished:
            raise Preempted(f"before stage {state.stage().name!r}")


def _open(workdir: str | Path) -> tuple[RunFolder, Run]:
    """Opens a run folder for the modes that read: settings, data and the newest checkpoint."""
    folder = RunFolder(workdir, create=False)
    plain = folder.read_config()
    dataset = load_data(plain)
    settings = read(plain, dataset)
    state = Run(settings, dataset, None, None, _steps(settings))
    with Checkpoints(folder.checkpoints) as checkpoints:
        saved = checkpoints.restore_latest()
    if saved is None:
        raise ValueError(
            f"{workdir} has no checkpoint yet; run it: python launch.py --config=... "
            f"--workdir={workdir}"
        )
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
    rows = [
        row(state, name, "as it stands", state.evaluate(name).metrics) for name in state.variables
    ]
    results = _results(state, rows)
    _show(results, _printer(verbose))
    return results


def export(workdir: str | Path, *, target: str = "", verbose: bool = True) -> dict[str, Any]:
    """Writes the deployable models of a run folder's newest checkpoint into `<workdir>/model`.

    `target`, a key of `deploy.targets.TARGETS`, stands in for that of the stages and the config.

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
            CHECKS["deploy"](state.settings.nets, stage)
        STAGES["deploy"](state, stage, **stage.fields)
    results = _results(state, state.rows)
    say = _printer(verbose)
    _show(results, say)
    for text in _targets(folder, stages):
        say(text)
    say(f"written to {folder.model}")
    return results


def _targets(folder: RunFolder, stages: list[Stage]) -> list[str]:
    """Says for each net of a named target what was written and what stays in float."""
    lines = []
    for name in dict.fromkeys(name for stage in stages for name in stage.nets):
        path = folder.model / f"{name}_target.json"
        if not path.exists():
            continue
        made = json.loads(path.read_text())
        lines.append(f"{made['file']} for {made['target']}, {made['bytes']:,} bytes")
        if "float_products" in made:
            floats, count = made["float_products"], len(made["integer_products"])
            lines.append(
                f"  {count} of {count + len(floats)} products run on integers"
                + (f"; in float: {', '.join(floats)}" if floats else "")
            )
        inside = ", ".join(made["inside_of_products"])
        lines.append(
            f"  products run on integers from {made['integers_from_bits']} bits on"
            + (f"; inside of them: {inside}" if inside else "")
        )
        by_table = ", ".join(made["stays_float_by_the_table"])
        lines.append(f"  float there, where a net has them: {by_table or 'nothing'}")
        if made["cannot_be_made_here"]:
            lines.append(f"  not made here: {made['cannot_be_made_here']}")
    return lines


def report(workdir: str | Path, *, verbose: bool = True) -> None:
    """Writes report.html of a run folder anew and prints the results table."""
    folder = RunFolder(workdir, create=False)
    folder.read_config()
    say = _printer(verbose)
    results = folder.read_results()
    if results is not None:
        _show(results, say)
        if _is_older(folder.path / soft_label_record.FILE, folder.path / "results.json"):
            _look_at_soft_labels(workdir, say)
    _write_report(folder, say)


def _look_at_soft_labels(workdir: str | Path, say: Callable[[str], None]) -> None:
    """Makes soft_labels.json of a finished run that lacks it; it needs the run's data."""
    try:
        folder, state = _open(workdir)
    except NotPreparedError as error:
        say(f"no pictures of soft labels: {error}")
        return
    soft_label_record.write(state, folder.path)


def inspect(config: Any, *, verbose: bool = True) -> str:
    """Returns (and prints) the schedule, every net's layers and the coverage; computes nothing."""
    settings = read(config)
    _check_files(settings)
    source = DATASETS[settings["data"]["name"]]
    text = overview(settings, (1, *source.image_shape))
    _printer(verbose)(text)
    return text


def _is_older(path: Path, other: Path) -> bool:
    """Whether a file is missing or older than another."""
    return not path.exists() or path.stat().st_mtime_ns < other.stat().st_mtime_ns


def _write_report(folder: RunFolder, say: Callable[[str], None]) -> None:
    from qkd_jax import report as reports

    say(f"report: {reports.write(folder.path)}")


def _results(state: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json holds."""
    dataset = state.dataset
    return {
        "schema": 1,
        "seed": state.settings["seed"],
        "dataset": {
            "name": dataset.name,
            "train_examples": len(dataset.train_images),
            "test_examples": len(dataset.test_images),
        },
        "rows": rows,
    }


def _show(results: dict[str, Any], say: Callable[[str], None]) -> None:
    from rich.console import Console

    from qkd_jax.report import table

    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:
        console.print(table(results))
    say(text.get())


def _times(timings: dict[str, Any]) -> str:
    """Where the seconds went, and the latencies, as text."""
    stages = timings.get("stages", {}).values()
    steps, first = (
        sum(stage.get(key, 0.0) for stage in stages)
        for key in ("train_seconds", "first_step_seconds")
    )
    lines = [
        f"{timings['seconds']:.0f} s: {steps:.0f} s of training steps, {first:.0f} s of first "
        "steps (compilation)"
    ]
    for entry in timings.get("latency", ()):
        lines.append(
            f"{entry['model']} on {entry['engine']}, batch {entry['batch']}: "
            f"{entry['median_ms']:.3f} ms (median of {entry['rounds']})"
        )
    return "\n".join(lines)


def main(mode: str, *, config: Any, workdir: str | Path, target: str = "") -> int:
    """Does what the command line asked for; returns the exit code.

    Raises:
        ValueError: a mistake of the user, whose message is all that needs to be shown.
    """
    try:
        if mode == "run":
            run(config, workdir)
        elif mode == "inspect":
            inspect(config)
        elif mode == "export":
            export(workdir, target=target)
        else:
            {"eval": evaluate, "report": report}[mode](workdir)
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return EXIT_NONFINITE
    except Preempted as error:
        print(f"asked to stop, saved at {error}; the same command goes on.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
