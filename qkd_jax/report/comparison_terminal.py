"""The tables of a comparison for a terminal: two lines a row, so that they fit 80 characters."""

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from qkd_jax import checks
from qkd_jax.report.comparison import Compared, Comparison, Row
from qkd_jax.report.comparison_tables import (
    COSTS,
    MEASURES,
    UNTESTED,
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


def _fill(made: Table, rows: Sequence[tuple[Row, str, Sequence[str]]], *, several: bool) -> Table:
    """Adds rows (row, control or "", cells); several arms have a line each before their rows."""
    before = None
    for row, control, cells in rows:
        if several and row.arm != before:
            made.add_row(Text(checks.printable(row.arm), style="bold"))
            before = row.arm
        indent = " " if several else ""
        lines = [row.net, row.method, *([f"against {control}"] if control else [])]
        made.add_row(
            Text("\n".join(indent + checks.printable(line) for line in lines)), *map(Text, cells)
        )
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
    return _fill(made, [(row, "", cells(row)) for row in rows], several=len(comparison.arms) > 1)


def _differences(comparison: Comparison, measure: str) -> Table:
    heading, factor, digits = MEASURES[measure]
    m, compared = comparison.tests[measure], comparison.compared[measure]
    assert comparison.control is not None
    # The control stands below its row: a column of names would leave the rows' own no room.
    control = against_text if several_controls(compared) else lambda c: ""
    headings = ["net\nmethod", "pairs", "difference"]
    caption = f"{seeds_text(comparison)}; row minus control, paired by seed. "
    if m:
        headings += [f"95 % interval\nfor all {m}", "p\np (Holm)"]
        caption += (
            f"Below: the interval that holds for all {m} comparisons at once, and p adjusted for "
            "their number."
        )
    else:
        caption += UNTESTED

    def cells(c: Compared) -> list[str]:
        d = c.difference
        found = [str(d.n), difference_text(d, factor, digits)]
        if m:
            spans = interval_text(c, factor, digits), span_text(c.together, factor, digits)
            found += ["\n".join(spans), f"{p_text(d.p)}\n{p_text(c.adjusted)}"]
        return found

    made = _table(f"{heading}: difference from {comparison.control.text}", caption, headings)
    rows = [(c.row, control(c), cells(c)) for c in compared]
    return _fill(made, rows, several=len(comparison.arms) > 1)
