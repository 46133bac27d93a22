"""The page of a comparison, and the files that it is written to."""

import dataclasses
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

from qkd_jax import checks
from qkd_jax.report import comparison_figures as figures
from qkd_jax.report.comparison import Comparison, build
from qkd_jax.report.comparison_tables import TextTable, seeds_text, tables
from qkd_jax.report.comparison_text import csv_text, latex, markdown
from qkd_jax.report.learning_curves import Curves, read_curves
from qkd_jax.report.page import Column, column_table, document, figure, quiet
from qkd_jax.whole_files import replace_file

NAME = "comparison"
TITLES = {
    "results": "Results",
    "differences-top1": "Differences in top-1",
    "differences-severity": "Differences in severity",
    "differences-loss": "Differences in cross-entropy",
    "classes": "Change by class",
}


def compare(
    folder: str | Path, *, against: str = "", state_of: Callable[[Path], str] | None = None
) -> Comparison:
    """Compares the runs of a folder, and writes what it finds into the folder.

    `comparison.html` is one self-contained page; `comparison.md`, `comparison.tex` (booktabs) and
    `comparison.csv` (every number, one a line) hold its tables. The runs are only read. Written
    twice, the files have the same bytes.

    Args:
        folder: a folder of runs, each a folder with a config.json; sweep.json may say which were
            planned.
        against: the control of paired differences by seed: an arm, a method, "net/method" (in the
            same runs) or "arm/net/method" (one row for all); "" shows none.
        state_of: says how far a run is that is not finished; by default its last logged step.

    Returns:
        The numbers.

    Raises:
        ValueError: no finished run; runs over different data; two runs of one config and seed with
            different results; a control that nothing has the name of.
        OSError: a file cannot be written.
    """
    found, curves = read_comparison(folder, against=against, state_of=state_of)
    write_comparison(folder, found, curves)
    return found


def read_comparison(
    folder: str | Path, *, against: str = "", state_of: Callable[[Path], str] | None = None
) -> tuple[Comparison, Curves]:
    """Returns the numbers and the curves that `compare` writes; nothing is written."""
    found = build(folder, against=against, state_of=state_of)
    curves = read_curves(found.arms)
    return dataclasses.replace(found, notes=(*found.notes, *curves.notes)), curves


def write_comparison(folder: str | Path, found: Comparison, curves: Curves) -> None:
    """Writes the files of `compare`.

    Raises:
        OSError: a file cannot be written.
    """
    texts = {
        "html": render_comparison(found, curves),
        "md": markdown(found),
        "tex": latex(found),
        "csv": csv_text(found),
    }
    for suffix, text in texts.items():
        replace_file(Path(folder) / f"{NAME}.{suffix}", text.encode(errors="backslashreplace"))


def _text(value: str) -> str:
    return escape(checks.printable(value))


def _cell(text: str) -> str:
    """A cell; a standard deviation stands below its mean."""
    return re.sub(r" \(([\d.]+)\)(?=$| n=)", r"<br>(\1)", _text(text))


def _table(table: TextTable) -> str:
    columns: list[Column] = [
        (checks.printable(heading), right, lambda r, i=str(i): _cell(r[i]))
        for i, (heading, right) in enumerate(table.headings)
    ]
    records = [{str(i): text for i, text in enumerate(row)} for row in table.cells]
    return column_table(columns, records) + quiet(_text(table.caption))


def render_comparison(found: Comparison, curves: Curves) -> str:
    """Returns the page as text."""
    seeds = _text(seeds_text(found))
    made = {table.name: table for table in tables(found)}
    parts = [("results", TITLES["results"], _table(made.pop("results")))]
    front = figure(
        figures.pareto(found),
        f"{seeds}. Mean top-1 with its 95 % interval over weight bytes and over bit operations of "
        "one image; towards the upper left is better. Filled: on the Pareto front, which the line "
        "joins; where there are many rows, these alone have intervals. Points of one cost stand "
        "side by side; rows whose cost is not recorded are left out.",
    )
    if front:
        parts.append(("pareto", "Accuracy against cost", front))
    changes = made.pop("classes", None)
    parts += [(name, TITLES[name], _table(table)) for name, table in made.items()]
    if changes:
        drawn = figure(
            figures.classes(found),
            f"{seeds}. Change of each class's accuracy against the control, in points, with 95 % t "
            f"intervals (up to {figures.MOST_WHISKERS} classes) that are not adjusted for their "
            f"number. At most {figures.MOST_PANELS} rows are drawn.",
        )
        parts.append(("classes", TITLES["classes"], _table(changes) + drawn))
    labels = [arm.label for arm in found.arms]
    drawn = figure(
        figures.curves(curves, labels),
        f"{seeds}. Mean over seeds; the band is the 95 % t interval at each step. Training loss is "
        "that of the stage, so its level changes where a stage adds a term. Of long logs some 400 "
        f"steps are drawn; at most {figures.MOST_NETS} nets and {figures.MOST_ARMS} arms.",
    )
    if drawn:
        parts.append(("curves", "Learning curves", drawn))
    parts.append(("runs", "Runs", _runs(found)))
    parts.append(("reading", "Read with care", _care(found)))
    warning = ""
    if found.notes:
        listed = "".join(f"<li>{_text(note)}</li>" for note in found.notes)
        warning = f'<div class="warn">Before these numbers are used:<ul>{listed}</ul></div>'
    arms = f"{len(labels)} arm{'s' if len(labels) > 1 else ''}, {seeds}"
    against = f", against {_text(found.control.text)}" if found.control else ""
    return document(
        f"Comparison: {checks.printable(found.title)}",
        f"{arms}{against}.",
        warning,
        parts,
        wide=True,
    )


def _runs(found: Comparison) -> str:
    columns: list[Column] = [
        ("arm", False, lambda r: _text(r["arm"])),
        ("seed", True, lambda r: str(r["run"].seed)),
        ("run", False, lambda r: _text(r["run"].name)),
        ("data", False, lambda r: _text(r["run"].data[:12] or "-")),
        ("code", False, lambda r: _text(r["run"].environment.get("code", "-"))),
        ("devices", False, lambda r: _text(r["run"].environment.get("devices", "-"))),
    ]
    records = [{"arm": arm.label, "run": run} for arm in found.arms for run in arm.runs.values()]
    shown = column_table(columns, records)
    return f"<details><summary>{len(records)} runs</summary>{shown}</details>"


def _care(found: Comparison) -> str:
    notes = [
        "Intervals and tests are Student's t over seeds: they take the values (for differences, "
        "those seed by seed) as draws from a normal distribution, which few seeds cannot show.",
        "They hold for other seeds of these recipes; the choice of the test images is part of the "
        "spread only where the seed draws them.",
        "Adjusted p values count the comparisons on this page. Of those that were made on other "
        "pages, or while the recipe was chosen, they know nothing.",
    ]
    if not found.control:
        notes.append(
            "Without --against=CONTROL no differences are shown. Overlapping intervals of two "
            "means are no test: a seed that is hard for one arm is mostly hard for the other."
        )
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
