"""The results table: one description of its columns for the terminal and for the page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
NONE = "-"
# Headings that are not broken at their space on a narrow terminal.
NARROW = {
    "cross-entropy": "cross-\nentropy",
    "agreement %": "agree-\nment %",
    "severity": "sever-\nity",
}


def percent(value: Any, digits: int = 2) -> str:
    """Returns a fraction in [0, 1] as "93.25", a dash for None."""
    return NONE if value is None else f"{100 * float(value):.{digits}f}"


def number(value: Any, digits: int = 4) -> str:
    """Returns a number with `digits` decimals, small ones as 1.2e-06, a dash for None."""
    if value is None:
        return NONE
    value = float(value)
    if value != 0 and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def count(value: Any) -> str:
    """Returns 5,312 for 5312, a dash for None."""
    return NONE if value is None else f"{int(value):,}"


def _bits(row: Row) -> str:
    def one(value: Any) -> str:
        if value is None:
            return "32"
        return f"{value:g}" if isinstance(value, int | float) else str(value)

    return f"{one(row.get('weight_bits'))}/{one(row.get('activation_bits'))}"


def _export(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: show((row.get("export") or {}).get(key))


def columns(rows: Sequence[Row]) -> list[tuple[str, bool, Callable[[Row], str]]]:
    """Returns (heading, right-aligned, row -> text) of the columns that these rows need.

    Columns of the exported model, of steps and of agreement are there only if some row has them.
    """
    found: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("net", False, lambda row: str(row.get("net", NONE))),
        ("method", False, lambda row: str(row.get("method", NONE))),
        ("top-1 %", True, lambda row: percent(row.get("top1"))),
        *(
            [("severity", True, lambda row: number(row.get("severity"), 3))]
            if any("severity" in row for row in rows)
            else []
        ),
        ("cross-entropy", True, lambda row: number(row.get("loss"))),
        ("bits W/A", True, _bits),
        ("weight bytes", True, lambda row: count(row.get("weight_bytes"))),
    ]
    if any(row.get("student_steps") is not None for row in rows):
        found.append(("steps", True, lambda row: count(row.get("student_steps"))))
    if any(row.get("agreement") is not None for row in rows):
        agreement = lambda row: percent(row.get("agreement"))
        found.append(("agreement %", True, agreement))
    exports = [row["export"] for row in rows if row.get("export")]
    if exports:
        engines = sorted({str(e.get("engine", "engine")) for e in exports})
        engine = engines[0] if len(engines) == 1 else "export"
        if len(engines) > 1:
            found.append(("export", False, _export("engine", lambda v: str(v or NONE))))
        found += [
            (f"{engine} top-1 %", True, _export("top1", percent)),
            ("same argmax %", True, _export("argmax_agreement", percent)),
            ("as trained %", True, _export("as_trained", _as_trained)),
            ("max logit diff.", True, _export("max_logit_difference", lambda v: number(v))),
        ]
    return found


def _as_trained(found: Any) -> str:
    """Agreement with the net before its biases were rounded for the engine."""
    return percent((found or {}).get("argmax_agreement"))


def reference(rows: Sequence[Row]) -> str:
    """Returns the net (or nets) with which these rows count agreement."""
    found = dict.fromkeys(
        str(row.get("agreement_with") or "the teacher")
        for row in rows
        if row.get("agreement") is not None
    )
    return " or ".join(found)


def _caption(results: Mapping[str, Any]) -> str:
    """The data set, and a line for each exported net: as columns they do not fit 80 characters."""
    dataset = results.get("dataset") or {}
    examples = dataset.get("test_examples")
    lines = [str(dataset["name"])] if dataset.get("name") else []
    if examples:
        lines.append(f"{int(examples):,} test images")
    if any(row.get("agreement") is not None for row in results.get("rows") or []):
        lines.append(f"agreement: same argmax as {reference(results['rows'])}")
    if any("severity" in row for row in results.get("rows") or []):
        lines.append("severity: mean height of a mistake in the class tree")
    lines = [", ".join(lines)] if lines else []
    for row in results.get("rows") or []:
        export = row.get("export")
        if export:
            lines.append(
                f"{row.get('net')} on {export.get('engine', 'its engine')}: "
                f"top-1 {percent(export.get('top1'))} %, "
                f"same argmax as deployed {percent(export.get('argmax_agreement'))} %, "
                f"as trained {_as_trained(export.get('as_trained'))} %, "
                f"largest logit difference {number(export.get('max_logit_difference'))}"
            )
    return "\n".join(lines)


def table(results: Mapping[str, Any]) -> Table:
    """Returns results.json's rows as a table for the terminal; it fits 80 characters.

    Args:
        results: {"rows": [...], "experiment": ..., "dataset": {...}} as in results.json; top1,
            agreement and the like are fractions in [0, 1].
    """
    rows = results.get("rows") or []
    made = Table(
        title=Text(str(results.get("experiment") or "results")),
        caption=Text(_caption(results)),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown = columns([{**row, "export": None} for row in rows])
    longest = max((len(str(row.get("net", NONE))) for row in rows), default=1)
    for heading, right, _ in shown:
        lines = NARROW.get(heading, heading.replace(" ", "\n", 1)) if right else heading
        made.add_column(
            lines,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=heading == "net" and longest <= 20,  # methods wrap better
        )
    for row in rows:
        made.add_row(*(Text(text(row)) for _, _, text in shown))
    return made
