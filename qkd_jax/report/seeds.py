"""Several runs of one experiment that differ in the seed: means, spreads and paired intervals.

    python -m qkd_jax.report.seeds runs/digits_seed* --against "QKD"

Reads `results.json` of each run folder and prints Markdown: for each row mean and standard
deviation over seeds, and for each pair with the row named by `--against` the mean difference with
its 95 % interval (Student's t on the differences seed by seed, so that what a seed makes easy or
hard for all arms cancels).
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.record.json_files import read_json

LARGEST = 1e100  # whose squares are numbers too
MEASURES = {
    "top1": ("top-1 %", 100.0, 2),
    "severity": ("severity", 1.0, 3),
    "loss": ("cross-entropy", 1.0, 3),
}


def paired_interval(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95
) -> tuple[float, float, float]:
    """Returns (mean, low, high) of `first - second` and its two-sided t interval.

    Args:
        first: one value a seed.
        second: the same seeds, in the same order.
        level: coverage.

    Raises:
        ValueError: lengths differ, or fewer than two pairs.
    """
    from scipy.special import stdtrit

    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"{len(first)} and {len(second)} values; a paired interval needs the same seeds on "
            "both sides, two at least."
        )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = float(stdtrit(len(differences) - 1, 0.5 + level / 2)) * error
    return mean, mean - half, mean + half


def collect(folders: Sequence[Path]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns {"net: method": [row of each run]}, the runs in the given order.

    Raises:
        ValueError: a folder without results, or runs whose rows differ.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    names: list[str] | None = None
    for folder in folders:
        path = Path(folder) / "results.json"
        results = read_json(path)
        if results is None:
            raise ValueError(f"{folder} has no results.json; finish that run, or leave it out.")
        try:
            rows = {f"{r['net']}: {r['method']}": _measured(r) for r in results["rows"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold the results of a run ({error!r}); restore it."
            ) from error
        if names is not None and names != list(rows):
            raise ValueError(
                f"{path} has the rows {list(rows)}, others {names}; compare like with like."
            )
        names = list(rows)
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    return found


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the measures of a row; TypeError where one is no finite number."""
    values = {key: row.get(key) for key in MEASURES}
    for key, value in values.items():
        known = isinstance(value, int | float) and abs(value) <= LARGEST
        if value is not None and (isinstance(value, bool) or not known):
            raise TypeError(f"{key} is {value!r:.80}")
    return values


def markdown(rows: Mapping[str, Sequence[Mapping[str, Any]]], *, against: str = "") -> str:
    """Returns the tables of `collect`'s rows, as Markdown."""
    seeds = len(next(iter(rows.values())))
    every = [row for runs in rows.values() for row in runs]
    measures = {k: m for k, m in MEASURES.items() if any(row.get(k) is not None for row in every)}
    headings = " | ".join(heading for heading, _, _ in measures.values())
    rule = "|---" * (1 + len(measures)) + "|"

    def line(name: str, cell: Callable[[str, float, int], str]) -> str:
        cells = [cell(key, factor, digits) for key, (_, factor, digits) in measures.items()]
        return f"| {name} | {' | '.join(cells)} |"

    lines = [f"{seeds} seeds; mean +- standard deviation over seeds.", ""]
    lines += [f"| net: method | {headings} |", rule]
    lines += [line(name, functools.partial(_mean, runs)) for name, runs in rows.items()]
    anchors = [name for name in rows if name.endswith(f": {against}")] if against else []
    if against and not anchors:
        raise checks.unknown("method", against, [name.split(": ", 1)[1] for name in rows])
    if seeds < 2:
        anchors = []  # no interval without a spread
    for anchor in anchors:
        lines += ["", f"Paired differences, {anchor} minus the row, mean [95 % t interval]:", ""]
        lines += [f"| against | {headings} |", rule]
        for name in rows:
            if name != anchor:
                lines.append(line(name, functools.partial(_paired, rows[anchor], rows[name])))
    return "\n".join(lines)


def _mean(runs: Sequence[Mapping[str, Any]], key: str, factor: float, digits: int) -> str:
    # A net without a mistake has no severity: the seeds that have one are averaged.
    values = [row[key] * factor for row in runs if row.get(key) is not None]
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    few = f" ({len(values)} seeds)" if len(values) < len(runs) else ""
    return f"{statistics.fmean(values):.{digits}f} +- {spread:.{digits}f}{few}"


def _paired(
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    key: str,
    factor: float,
    digits: int,
) -> str:
    pairs = [(a.get(key), b.get(key)) for a, b in zip(ours, theirs, strict=True)]
    known = [(a * factor, b * factor) for a, b in pairs if a is not None and b is not None]
    if len(known) < 2:
        return "-"
    mean, low, high = paired_interval(*zip(*known, strict=True))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def main() -> int:
    """The command line; see the module's text. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Means and paired intervals over seeds.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--against", default="QKD", help="the method whose differences are shown")
    args = parser.parse_args()
    try:
        text = markdown(collect(args.folders), against=args.against)
    except ValueError as error:
        print(checks.printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(checks.printable(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
