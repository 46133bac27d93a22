"""The comparison of a folder's runs as numbers: means over seeds, differences, Pareto fronts.

A row is a net with a method in an arm. Nothing here is formatted; `comparison_tables` does that.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax.report.arms import COSTS, MEASURES, Arm, RowKey, RunsFolder, read_runs
from qkd_jax.report.control import Control, find_control
from qkd_jax.report.intervals import (
    Difference,
    Mean,
    holm,
    mean_interval,
    paired_difference,
    pareto_front,
)

TESTED = ("top1", "severity", "loss")
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """A net with a method in an arm.

    Attributes:
        arm: the arm's label.
        net: the net.
        method: the method.
        values: {measure: {seed: value}}, without values that are not known or not finite.
        runs: seeds of the arm.
        means: {measure: its mean over the seeds that have it}.
        costs: {"weight_bytes" or "bit_operations": mean}, None where no seed has it.
        bits: (weight bits, activation bits) that occur among the seeds.
        classes: {seed: share of the test images of each class that are right; None without any}.
        front: costs in which it is on the Pareto front.
    """

    arm: str
    net: str
    method: str
    values: Mapping[str, Mapping[int, float]]
    runs: int
    means: Mapping[str, Mean]
    costs: Mapping[str, float | None]
    bits: tuple[tuple[Any, ...], tuple[Any, ...]]
    classes: Mapping[int, tuple[float | None, ...]]
    front: tuple[str, ...] = ()

    @property
    def key(self) -> RowKey:
        """(net, method)."""
        return self.net, self.method


@dataclasses.dataclass(frozen=True)
class Compared:
    """A row against its control in one measure, over the seeds that both have.

    Attributes:
        row: the row.
        control: what it is compared with.
        seeds: seeds that both have.
        unpaired: seeds that one of them has alone.
        difference: row minus control.
        adjusted: p by Holm's method among the `Comparison.tests` of the measure.
        together: the interval whose coverage holds for all of them at once (Bonferroni); None
            where the difference has none.
    """

    row: Row
    control: Row
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    difference: Difference
    adjusted: float | None = None
    together: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class ClassChange:
    """Change of the accuracy of each class against the control, over paired seeds."""

    row: Row
    control: Row
    differences: tuple[Difference | None, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison.

    Attributes:
        title: the folder's name.
        arms: the arms.
        seeds: all seeds.
        rows: all rows, arm by arm, in the order of results.json.
        control: what differences are taken against, None without.
        compared: {measure: a row each against its control}.
        tests: {measure: number of comparisons among which p is adjusted}.
        classes: change by class.
        notes: what a reader must know.
    """

    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    control: Control | None
    compared: Mapping[str, tuple[Compared, ...]]
    tests: Mapping[str, int]
    classes: tuple[ClassChange, ...]
    notes: tuple[str, ...]


def build(
    folder: str | Path, *, against: str = "", state_of: Callable[[Path], str] | None = None
) -> Comparison:
    """Compares the runs of a folder.

    Args:
        folder: a folder of runs.
        against: the control, see `find_control`; "" compares nothing.
        state_of: see `read_runs`.

    Raises:
        ValueError: see `read_runs` and `find_control`.
    """
    return compared_runs(read_runs(folder, state_of=state_of), against=against)


def compared_runs(found: RunsFolder, *, against: str = "") -> Comparison:
    """Compares runs that have been read; see `build`."""
    rows = [row for arm in found.arms for row in _rows_of(arm)]
    notes = [*found.notes, *_gaps(rows)]
    rows = _with_fronts(rows)
    control = None
    pairs: list[tuple[Row, Row]] = []
    if against:
        names = {arm.label: tuple(r.key for r in rows if r.arm == arm.label) for arm in found.arms}
        control = find_control(names, against)
        at = {(row.arm, *row.key): row for row in rows}
        pairs = [(at[one], at[other]) for one, other in control.pairs]
        if control.without:
            listed = ", ".join(" / ".join(key) for key in control.without)
            notes.append(f"Without a control, so not compared: {listed}.")
    compared, tests = {}, {}
    for measure in TESTED:
        one = [c for row, other in pairs if (c := _compare(row, other, measure)) is not None]
        if one:
            compared[measure], tests[measure] = _adjusted(one, measure)
    notes += _unpaired(compared)
    title = found.path.resolve().name
    changes = [c for row, other in pairs if (c := _class_change(row, other)) is not None]
    seeds = tuple(sorted({seed for arm in found.arms for seed in arm.runs}))
    return Comparison(
        *(title, found.arms, seeds, tuple(rows), control, compared, tests),
        *(tuple(changes), tuple(notes)),
    )


def _rows_of(arm: Arm) -> list[Row]:
    keys = list(dict.fromkeys(key for run in arm.runs.values() for key in run.rows))
    rows = []
    for net, method in keys:
        have = {s: r.rows[net, method] for s, r in arm.runs.items() if (net, method) in r.rows}
        values = {
            measure: {s: float(row[measure]) for s, row in have.items() if _known(row, measure)}
            for measure in MEASURES
        }
        means = {m: mean_interval(list(v.values()), level=LEVEL) for m, v in values.items() if v}
        costs = {
            cost: mean_interval(v).mean
            if (v := [row[cost] for row in have.values() if _known(row, cost)])
            else None
            for cost in COSTS
        }
        widths = [
            tuple(dict.fromkeys(row.get(key) for row in have.values()))
            for key in ("weight_bits", "activation_bits")
        ]
        classes = {
            seed: tuple(c / n if n else None for c, n in zip(row["class_correct"], of, strict=True))
            for seed, row in have.items()
            if row.get("class_correct") and (of := arm.runs[seed].class_examples)
        }
        bits = (widths[0], widths[1])
        rows.append(Row(arm.label, net, method, values, len(arm.runs), means, costs, bits, classes))
    return rows


def _known(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _gaps(rows: Sequence[Row]) -> list[str]:
    """Says which values are not there, of those that a row has for other seeds or should have."""
    notes = []
    for row in rows:
        for measure in ("top1", "loss"):
            lacking = row.runs - len(row.values[measure])
            if lacking:
                what = {"top1": "top-1", "loss": "finite cross-entropy"}[measure]
                notes.append(
                    f"{row.arm} / {row.net} / {row.method} has no {what} for {lacking} of "
                    f"{row.runs} seeds: it may have diverged. Its mean is over the others."
                )
    if all(row.costs["bit_operations"] is None for row in rows):
        notes.append("No run says its bit operations: they were made before these were recorded.")
    elif unknown := [r for r in rows if r.costs["bit_operations"] is None and r.costs[COSTS[0]]]:
        listed = ", ".join(sorted({row.arm for row in unknown}))
        notes.append(f"Bit operations of some rows are not recorded, in: {listed}.")
    return notes


def _with_fronts(rows: list[Row]) -> list[Row]:
    fronts: dict[int, list[str]] = {}
    for cost in COSTS:
        known = [
            (i, float(price), row.means["top1"].mean)
            for i, row in enumerate(rows)
            if (price := row.costs[cost]) is not None and "top1" in row.means
        ]
        marks = pareto_front([(price, accuracy) for _, price, accuracy in known])
        for (i, *_), mark in zip(known, marks, strict=True):
            if mark:
                fronts.setdefault(i, []).append(cost)
    return [dataclasses.replace(row, front=tuple(fronts.get(i, ()))) for i, row in enumerate(rows)]


def _compare(row: Row, control: Row, measure: str) -> Compared | None:
    ours, theirs = row.values[measure], control.values[measure]
    both = tuple(seed for seed in ours if seed in theirs)
    alone = tuple(sorted(ours.keys() ^ theirs.keys()))
    if not both:
        return None
    difference = paired_difference([ours[s] for s in both], [theirs[s] for s in both], level=LEVEL)
    return Compared(row, control, both, alone, difference)


def _identical(row: Row, control: Row) -> bool:
    """Whether two rows have the same numbers for the same seeds: they are one net, not two."""
    pairs = [(row.values[measure], control.values[measure]) for measure in TESTED]
    return all(a[seed] == b[seed] for a, b in pairs for seed in a.keys() & b.keys())


def _adjusted(found: list[Compared], measure: str) -> tuple[tuple[Compared, ...], int]:
    """Adds what holds for all comparisons of a measure at once."""

    # Nets that arms share make the same comparison in each: it counts once. Accuracies of two nets
    # may agree by chance, so it is the same one only where all measures agree.
    def numbers(c: Compared) -> str:
        sides = (c.row.values, c.control.values)
        return repr([[of[m].get(s) for m in TESTED for s in c.seeds] for of in sides])

    tested = [c for c in found if c.difference.n > 1 and not _identical(c.row, c.control)]
    once = {numbers(c): c.difference.p for c in tested}
    adjusted = dict(zip(once, holm(list(once.values())), strict=True))
    level = 1 - (1 - LEVEL) / max(len(once), 1)

    def with_family(c: Compared) -> Compared:
        if c not in tested:
            return c
        ours, theirs = c.row.values[measure], c.control.values[measure]
        d = paired_difference([ours[s] for s in c.seeds], [theirs[s] for s in c.seeds], level=level)
        together = None if d.low is None or d.high is None else (d.low, d.high)
        return dataclasses.replace(c, adjusted=adjusted[numbers(c)], together=together)

    return tuple(map(with_family, found)), len(once)


def _unpaired(compared: Mapping[str, Sequence[Compared]]) -> list[str]:
    lines: dict[str, None] = {}
    for found in compared.values():
        for c in found:
            if c.unpaired:
                seeds = ", ".join(map(str, c.unpaired))
                lines[f"{c.row.arm} / {c.row.net} / {c.row.method} (seed {seeds})"] = None
    if not lines:
        return []
    return [f"Seeds that only one side of a difference has, left out of it: {'; '.join(lines)}."]


def _class_change(row: Row, control: Row) -> ClassChange | None:
    both = [seed for seed in row.classes if seed in control.classes]
    widths = {len(of[seed]) for of in (row.classes, control.classes) for seed in both}
    if len(widths) != 1:
        return None
    differences: list[Difference | None] = []
    for place in range(widths.pop()):
        pairs = [(row.classes[s][place], control.classes[s][place]) for s in both]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        differences.append(
            paired_difference([a for a, _ in known], [b for _, b in known]) if known else None
        )
    return ClassChange(row, control, tuple(differences))
