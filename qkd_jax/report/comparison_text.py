"""The tables of a comparison as Markdown and as LaTeX, and all of its numbers as CSV."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qkd_jax import checks
from qkd_jax.report.comparison import Comparison
from qkd_jax.report.comparison_tables import COSTS, TextTable, tables

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': r"\char34{}",  # \textquotedbl is not in LaTeX's default encoding
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
COLUMNS = (
    *("kind", "arm", "net", "method", "measure", "seed", "n", "value", "sd", "low", "high"),
    *("control", "p", "p_holm", "comparisons", "low_all", "high_all", "note"),
)


def _printed(text: str) -> str:
    return checks.printable(text.replace("\n", " ").replace("\t", " "))


def _markdown_cell(text: str) -> str:
    shown = _printed(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in shown)


def markdown(comparison: Comparison) -> str:
    """Returns the tables and notes as Markdown."""
    cell = _markdown_cell
    lines = [f"# {cell(comparison.title)}"]
    if comparison.notes:
        lines += ["", *(f"- {cell(note)}" for note in comparison.notes)]
    for table in tables(comparison):
        lines += ["", markdown_table(table)]
    return "\n".join(lines) + "\n"


def markdown_table(table: TextTable) -> str:
    """Returns a table with its caption above it, as Markdown."""
    cell = _markdown_cell
    lines = [cell(table.caption), ""]
    lines.append(f"| {' | '.join(cell(heading) for heading, _ in table.headings)} |")
    lines.append("|" + "|".join("---:" if right else "---" for _, right in table.headings) + "|")
    lines += [f"| {' | '.join(map(cell, row))} |" for row in table.cells]
    return "\n".join(lines)


def _latex_cell(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in _printed(text))


def latex(comparison: Comparison) -> str:
    """Returns the tables as LaTeX, for booktabs; notes are comments."""
    cell = _latex_cell
    lines = ["% \\usepackage{booktabs}"]
    lines += [f"% {_printed(note)}" for note in comparison.notes]
    for table in tables(comparison):
        columns = "".join("r" if right else "l" for _, right in table.headings)
        lines += [
            "",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{cell(table.caption)}}}",
            f"\\label{{tab:{table.name}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            " & ".join(cell(heading) for heading, _ in table.headings) + " \\\\",
            "\\midrule",
            *(_latex_row(table, row) for row in table.cells),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
    return "\n".join(lines) + "\n"


def _latex_row(table: TextTable, row: Sequence[str]) -> str:
    """A row, with minus signs in columns of numbers.

    A cell that begins with "[" is put in braces: it would be an option of the line break before it.
    """
    cells = []
    for text, (_, right) in zip(row, table.headings, strict=True):
        shown = _latex_cell(text)
        if right:
            shown = re.sub(r"(?<![\w.])-(?=\d)", "$-$", shown)
        cells.append(f"{{{shown}}}" if shown.startswith(("[", "*")) else shown)
    return " & ".join(cells) + " \\\\"


def csv_text(comparison: Comparison) -> str:
    """Returns every number in long form, one a line, with the columns `COLUMNS`.

    `kind` is "run" (a value of one seed), "mean", "cost", "difference" or "class". Values are as in
    results.json: shares, not percent.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for line in _csv_lines(comparison):
        writer.writerow({k: _csv_cell(v) for k, v in line.items() if v is not None})
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    return _printed(value) if isinstance(value, str) else value


def _csv_lines(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for row in comparison.rows:
        names = {"arm": row.arm, "net": row.net, "method": row.method}
        for measure, values in row.values.items():
            for seed, value in values.items():
                yield {"kind": "run", **names, "measure": measure, "seed": seed, "value": value}
        for measure, found in row.means.items():
            span = {"sd": found.sd, "low": found.low, "high": found.high}
            yield {
                **{"kind": "mean", **names, "measure": measure, "n": found.n},
                **{"value": found.mean, **span},
            }
        for cost in COSTS:
            if row.costs[cost] is not None:
                front = "on the Pareto front" if cost in row.front else None
                line = {"kind": "cost", **names, "measure": cost}
                yield {**line, "value": row.costs[cost], "note": front}
    for measure, compared in comparison.compared.items():
        for c in compared:
            yield {
                **_difference(c, measure, c.difference),
                **{"kind": "difference", "p": c.difference.p, "p_holm": c.adjusted},
                **{"comparisons": comparison.tests[measure]},
                **dict(zip(("low_all", "high_all"), c.together or (None, None), strict=True)),
                "note": "identical" if c.difference.same else None,
            }
    for change in comparison.classes:
        for place, found in enumerate(change.differences):
            if found is not None:
                yield {"kind": "class", **_difference(change, f"class {place}", found)}


def _difference(pair: Any, measure: str, found: Any) -> dict[str, Any]:
    control = "/".join((pair.control.arm, *pair.control.key))
    return {
        **{"arm": pair.row.arm, "net": pair.row.net, "method": pair.row.method},
        **{"measure": measure, "control": control, "n": found.n, "value": found.mean},
        **{"sd": found.sd, "low": found.low, "high": found.high},
    }
