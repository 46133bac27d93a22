"""Shared by the benchmarks: the path to the project, timing side by side, tables of arms.

An arm is a run in a folder of its own, so that an interrupted table resumes arm by arm.
"""

import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__all__ = ["config", "floats_of", "in_turns", "plot", "run_arm", "spread", "table_lines"]


def in_turns(runs, rounds):
    """Times functions side by side: {name: [seconds of every round]}.

    The order alternates, so that machine drift affects all alike; two calls come before.
    """
    for run in runs.values():
        run()
        run()
    seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def config(module, **arguments):
    """A module's config with these arguments, without deploy and diagnose stages or curves."""
    config = module.get_config(",".join(f"{k}={v}" for k, v in arguments.items())).unlock()
    kinds = config.stages
    config.schedule = tuple(
        s for s in config.schedule if kinds[s].kind not in ("deploy", "diagnose")
    )
    config.log.eval_every_steps = 0
    config.log.quant_every_steps = 0
    return config.lock()


def run_arm(config, folder, *, dry=False):
    """Runs an arm, or reads one that is finished: (rows of results.json, timings.json) or None.

    None where `dry` forbids to run it. An arm that diverged has no rows.
    """
    from qkd_jax import experiment

    folder = pathlib.Path(folder)
    results = folder / "results.json"
    if not results.exists():
        if dry:
            return None
        begin = time.perf_counter()
        try:
            experiment.run(config, folder, report=False, verbose=False)
        except experiment.NonFiniteError as error:
            print(f"{folder.name}: {error}", file=sys.stderr)
            return [], {}
        print(f"{folder.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    timings = json.loads((folder / "timings.json").read_text())
    return json.loads(results.read_text())["rows"], timings


def floats_of(values):
    """The values that are finite numbers; an arm that diverged has none."""
    return [v for v in values if v == v]


def spread(values, digits=2):
    """Mean +- standard deviation of the finite values, or a note that there is one seed or none."""
    values = floats_of(values)
    if not values:
        return "diverged"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}"


def table_lines(head, columns, rows):
    """Lines of a markdown table; `rows` is {name: {column: cell}}."""
    yield f"| {head} | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, cells in rows.items():
        yield f"| {name} | " + " | ".join(cells.get(c, "") for c in columns) + " |"


def plot(series, path, *, ylabel, line=None, line_label="", height=4.5):
    """Points with error bars by name: `series` is {label: {name: values}}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for found in series.values() for name in found))
    figure, axes = plt.subplots(figsize=(max(8, 0.42 * len(names) + 2), height))
    for place, (label, found) in enumerate(series.items()):
        shift = 0.8 * (place - (len(series) - 1) / 2) / len(series)
        shown = [(i, floats_of(found[n])) for i, n in enumerate(names) if n in found]
        shown = [(i, v) for i, v in shown if v]
        axes.errorbar(
            [i + shift for i, _ in shown],
            [statistics.fmean(v) for _, v in shown],
            [statistics.stdev(v) if len(v) > 1 else 0 for _, v in shown],
            fmt="o",
            capsize=2,
            label=label,
        )
    if line is not None:
        axes.axhline(line, ls="--", c="gray", label=line_label)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel(ylabel)
    axes.legend(ncols=3, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
