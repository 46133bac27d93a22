"""Sweeps: many runs of one config file, each in a folder of its own under one folder.

    python launch.py --config=configs/qkd.py:seeds=8 --sweep --workdir=runs/qkd --jobs=2

`sweep_list` is the list of runs and its file, `sweep_plan` reads their configs, `shared_prefix`
finds what they have in common and `shared_store` keeps it; `sweep_walk` runs them in
`sweep_processes`, each a `sweep_worker`; `sweep_state` and `sweep_table` say how far they are.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qkd_jax import checks
from qkd_jax.experiment import sweep_list, sweep_state
from qkd_jax.experiment.modes import exit_code
from qkd_jax.experiment.orchestrate import run
from qkd_jax.experiment.results import printer
from qkd_jax.experiment.shared_store import SharedStages
from qkd_jax.experiment.sweep_plan import Planned, plan_runs
from qkd_jax.experiment.sweep_walk import walk_runs
from qkd_jax.record.stopping import EXIT_INTERRUPTED

WIDTH = 118


def sweep(
    mode: str,
    found: Any,
    *,
    config: str,
    own: Collection[str],
    fields: Mapping[str, str],
    config_of: Callable[[str, Mapping[str, str]], Any],
    workdir: str | Path,
    jobs: int = 1,
    index: int | None = None,
) -> int:
    """Runs or shows a sweep; returns the exit code.

    Args:
        mode: "run" or "inspect".
        found: what the config file's `get_sweep` returned.
        config: of `--config`.
        own: arguments in `config` that are the sweep's own, and not `get_config`'s.
        fields: {"config.x.y": text} of the command line, for every run.
        config_of: returns the config of (`--config`, {"config.x.y": text}).
        workdir: the folder of the sweep; for "inspect" it may be "".
        jobs: how many run at a time.
        index: runs this one alone, in this process.

    Raises:
        ValueError: a mistake in the list or in a config; nothing has run then.
    """
    checks.integer_in("--jobs", jobs, 1)
    entries = sweep_list.entries_of(found, fields)
    if index is not None and not 0 <= index < len(entries):
        raise ValueError(
            f"--sweep_index is {index}, and the sweep has {len(entries)} runs: 0 to "
            f"{len(entries) - 1} (under Slurm: --array=0-{len(entries) - 1})."
        )
    folder = Path(workdir) if workdir else None
    base = sweep_list.base_of(config, own)
    planned = plan_runs(
        entries,
        lambda entry: config_of(*sweep_list.command_of(base, entry)),
        folder=folder,
        only_look=mode == "inspect",
    )
    if mode == "inspect":
        show(planned, folder, index=index)
        return 0
    assert folder is not None
    code = exit_code(lambda: sweep_list.write_list(folder, config, entries, own=own))
    if code:
        return code
    if index is None:
        codes: list[int] = []  # the launcher's own files may fail too
        code = exit_code(lambda: codes.append(walk_runs(planned, folder, jobs=jobs)))
        return code or codes[0]
    return run_one(planned[index], folder)


def run_one(planned: Planned, folder: Path) -> int:
    """Runs one run of a sweep in this process; returns the exit code of a run.

    Raises:
        ValueError: a mistake of the user; a run that another process runs.
    """
    target = folder / planned.name
    say = printer(verbose=True)
    shared = SharedStages(
        folder / sweep_list.SHARED,
        planned.points,
        name=planned.name,
        basis=planned.basis,
        say=say,
    )
    say(f"run {planned.name!r} of the sweep in {folder}: {planned.entry.text() or 'no overrides'}")
    sweep_state.clear_failure(target)
    code = exit_code(lambda: run(planned.config, target, shared=shared))
    if code not in (0, EXIT_INTERRUPTED):
        sweep_state.write_failure(target, code, [])
    return code


def show(planned: Sequence[Planned], folder: Path | None, *, index: int | None = None) -> None:
    """Prints what would run: names, overrides, steps, what is shared, and how far each run is."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, no_color=True, highlight=False, markup=False)
    table = Table(title=f"{len(planned)} runs", title_justify="left")
    headings = ("", "run", "overrides", "steps", "shared", *(("state",) if folder else ()))
    for heading in headings:
        right = heading in ("", "steps", "shared")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    made: set[str] = set()
    total = saved = done = 0
    for place, entry in enumerate(planned):
        # Of the stages that others have too, the steps that one of those before it takes.
        known = [count for count, key in entry.points if key in made]
        taken = entry.end_of(max(known, default=0))
        made |= {key for _, key in entry.points}
        total, saved = total + entry.steps, saved + taken
        row = [str(place), entry.name, entry.entry.text(), f"{entry.steps:,}"]
        row.append(f"{taken:,}" if taken else "")
        if folder is not None:
            state = sweep_state.state_of(folder / entry.name)
            done += state.word == "done"
            row.append(state.text())
        if index in (None, place):
            table.add_row(*row)
    console.print(table)
    console.print(
        f"{total:,} steps in all, {saved:,} of them in stages that a run before has too and that "
        "are run once" + (f"; {done} of {len(planned)} runs are done" if folder else "") + "."
    )
    printer(verbose=True)(text.getvalue())
