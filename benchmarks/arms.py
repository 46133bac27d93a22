"""Shared by the benchmarks: the path to the project, timing side by side, tables of arms.

An arm is a run in a folder of its own, so that an interrupted table resumes arm by arm.
"""

import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__all__ = ["config", "in_turns", "run_arm", "table_lines"]


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
    from configs import experiments

    return experiments.for_table(module, arguments)


def run_arm(config, folder):
    """Runs an arm, or reads one that is finished: (rows of results.json, timings.json).

    An arm that diverged has no rows.
    """
    from qkd_jax import experiment

    folder = pathlib.Path(folder)
    results = folder / "results.json"
    if not results.exists():
        begin = time.perf_counter()
        try:
            experiment.run(config, folder, report=False, verbose=False)
        except experiment.NonFiniteError as error:
            print(f"{folder.name}: {error}", file=sys.stderr)
            return [], {}
        print(f"{folder.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    timings = json.loads((folder / "timings.json").read_text())
    return json.loads(results.read_text())["rows"], timings


def table_lines(head, columns, rows):
    """Lines of a markdown table; `rows` is {name: {column: cell}}."""
    yield f"| {head} | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, cells in rows.items():
        yield f"| {name} | " + " | ".join(cells.get(c, "") for c in columns) + " |"
