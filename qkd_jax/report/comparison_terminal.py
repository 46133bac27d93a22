"""The tables of a comparison for a terminal: two lines a row, so that they fit 80 characters."""

import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qkd_jax.report.comparison import Compared, Comparison, Row
from qkd_jax.report.comparison_tables import (
    COSTS,
    MEASURES,
    against_text,
    bits_text,
    cost_text,
    difference_text,
    interval_text,
    mean_text,
    p_text,
    seeds_of,
    seeds_text,
    several_controls,
    span_text,
)


def terminal(comparison: Comparison) -> list[Table]:
    """Returns the results, and the differences in each measure.

    Agreement, changes by class and what the columns mean in full are in the files.
    """
    found = [_results(comparison)]
    return found + [_differences(comparison, measure) for measure in comparison.compared]


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    made = Table(
        title=Text(title),
        caption=Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    made.add_column(Text(headings[0]), overflow="fold")
    for heading in headings[1:]:
        made.add_column(Text(heading), justify="right", no_wrap=True)
    return made


def _fill(made: Table, rows: Sequence[tuple[Row, Sequence[str]]], *, several: bool) -> Table:
    """Adds rows; where there are several arms, each has a line before its own."""
    before = None
    for row, cells in rows:
        if several and row.arm != before:
            made.add_row(Text(row.arm, style="bold"))
            before = row.arm
        indent = " " if several else ""
        made.add_row(Text(f"{indent}{row.net}\n{indent}{row.method}"), *map(Text, cells))
    return made


def _results(comparison: Comparison) -> Table:
    rows = comparison.rows
    others = [m for m in ("severity", "loss") if any(m in row.means for row in rows)]
    costs = [cost for cost in COSTS if any(row.costs[cost] is not None for row in rows)]
    headings = ["net\nmethod", "seeds", "top-1 %", "\n".join(MEASURES[m][0] for m in others)]
    headings.append("bits\nW/A")
    if costs:
        headings.append("\n".join(COSTS[cost] for cost in costs))

    def cells(row: Row) -> list[str]:
        of = len(row.values["top1"])

        def mean(measure: str) -> str:
            _, factor, digits = MEASURES[measure]
            return mean_text(row.means.get(measure), of, factor, digits)

        # The standard deviation of top-1 stands below it; those of the others are in the files.
        found = [seeds_of(row), mean("top1").replace(" (", "\n(")]
        found.append("\n".join(re.sub(r" \([\d.]+\)", "", mean(measure)) for measure in others))
        found.append(bits_text(row))
        if costs:
            marks = ["*" if cost in row.front else " " for cost in costs]
            prices = [cost_text(cost, row.costs[cost]) for cost in costs]
            found.append("\n".join(map(" ".join, zip(prices, marks, strict=True))))
        return found

    caption = (
        f"{seeds_text(comparison)}; mean ± half width of the 95 % t interval (standard "
        "deviation). * on the Pareto front of mean top-1 against that cost."
    )
    made = _table(comparison.title, caption, headings)
    return _fill(made, [(row, cells(row)) for row in rows], several=len(comparison.arms) > 1)


def _differences(comparison: Comparison, measure: str) -> Table:
    heading, factor, digits = MEASURES[measure]
    m, compared = comparison.tests[measure], comparison.compared[measure]
    assert comparison.control is not None
    several = several_controls(compared)
    headings = ["net\nmethod", "pairs", "difference", f"95 % interval\nfor all {m}", "p\np (Holm)"]
    if several:
        headings.append("against")

    def cells(c: Compared) -> list[Any]:
        d = c.difference
        found = [
            str(d.n),
            difference_text(d, factor, digits),
            f"{interval_text(c, factor, digits)}\n{span_text(c.together, factor, digits)}",
            f"{p_text(d.p)}\n{p_text(c.adjusted)}",
        ]
        return [*found, against_text(c)] if several else found

    caption = (
        f"{seeds_text(comparison)}; row minus control, paired by seed. Below: the interval that "
        f"holds for all {m} comparisons at once, and p adjusted for their number."
    )
    made = _table(f"{heading}: difference from {comparison.control.text}", caption, headings)
    rows = [(c.row, cells(c)) for c in compared]
    return _fill(made, rows, several=len(comparison.arms) > 1)
