"""The tables of a comparison as text, before any format: captions, headings, cells."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qkd_jax.report.comparison import Compared, Comparison, Row
from qkd_jax.report.intervals import Difference, Mean
from qkd_jax.report.table import NONE, count

# {measure: (heading, factor, decimals)}
MEASURES = {
    "top1": ("top-1 %", 100.0, 2),
    "severity": ("severity", 1.0, 3),
    "loss": ("cross-entropy", 1.0, 3),
    "agreement": ("agreement %", 100.0, 2),
}
COSTS = {"weight_bytes": "weight bytes", "bit_operations": "bit operations"}
FRONT = {"weight_bytes": "bytes", "bit_operations": "bit-op."}
UNTESTED = "Nothing is tested: that needs two seeds that both sides have, and two nets."
MOST_CLASSES = 20
EXTREMES = 3


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
        name: a word, for anchors and labels.
        caption: what the cells are, with the number of seeds; sentences.
        headings: (text, whether its column is right-aligned).
        cells: rows of text.
    """

    name: str
    caption: str
    headings: tuple[tuple[str, bool], ...]
    cells: tuple[tuple[str, ...], ...]


Shown = list[tuple[str, bool, Callable[[Any], str]]]
"""Columns: (heading, whether right-aligned, record -> text)."""


def tables(comparison: Comparison) -> list[TextTable]:
    """Returns the tables: means; for each measure the differences; change by class."""
    found = [_means(comparison)]
    found += [_differences(comparison, measure) for measure in comparison.compared]
    if comparison.classes:
        found.append(_classes(comparison))
    return found


def seeds_text(comparison: Comparison) -> str:
    """Returns "3 seeds (0, 1, 2)"; where arms differ "2 to 3 seeds" or "2 of 3 seeds"."""
    each, every = [len(arm.runs) for arm in comparison.arms], len(comparison.seeds)
    most, least = max(each), min(each)
    number = f"{most}" if least == most else f"{least} to {most}"
    number += f" of {every}" if every > most else ""
    number += " seeds" if every > 1 else " seed"
    listed = ", ".join(map(str, comparison.seeds[:12])) + (
        ", ..." if len(comparison.seeds) > 12 else ""
    )
    return f"{number} ({listed})"


def names_of(comparison: Comparison) -> Shown:
    """The columns that say which row it is; the arm only where there are several."""
    shown: Shown = [("net", False, lambda r: r.net), ("method", False, lambda r: r.method)]
    return [("arm", False, lambda r: r.arm), *shown] if len(comparison.arms) > 1 else shown


def _made(name: str, caption: str, shown: Shown, records: Sequence[Any]) -> TextTable:
    headings = tuple((heading, right) for heading, right, _ in shown)
    cells = tuple(tuple(to(record) for _, _, to in shown) for record in records)
    return TextTable(name, caption, headings, cells)


def shared_once(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with those that arms share, numbers and all, where the first of them is.

    Its arm is then "3 arms", such as those whose float net is one.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr((row.key, row.values, row.costs, row.bits)), []).append(row)
    return [
        group[0] if len(group) == 1 else dataclasses.replace(group[0], arm=f"{len(group)} arms")
        for group in groups.values()
    ]


def _means(comparison: Comparison) -> TextTable:
    rows = shared_once(comparison.rows)
    shown = names_of(comparison)
    shown.append(("seeds", True, seeds_of))
    for measure in MEASURES:
        if any(measure in row.means for row in rows):
            heading, factor, digits = MEASURES[measure]
            to = lambda r, m=measure, f=factor, d=digits: mean_text(
                r.means.get(m), len(r.values["top1"]), f, d
            )
            shown.append((heading, True, to))
    shown.append(("bits W/A", True, bits_text))
    for cost, heading in COSTS.items():
        if any(row.costs[cost] is not None for row in rows):
            shown.append((heading, True, lambda r, c=cost: cost_text(c, r.costs[c])))
    shown.append(("Pareto", False, lambda r: ", ".join(FRONT[c] for c in r.front) or NONE))
    interval = (
        "Mean ± half width of the 95 % t interval over seeds (standard deviation)"
        if max(len(arm.runs) for arm in comparison.arms) > 1
        else "One value each, for an interval needs two seeds"
    )
    of_tree = (
        " Severity: mean height of a mistake in the class tree."
        if any("severity" in row.means for row in rows)
        else ""
    )
    bits = (
        " Bit operations: multiply-accumulates of one image times weight bits times input bits, 32 "
        "in float."
        if any(row.costs["bit_operations"] is not None for row in rows)
        else ""
    )
    agreement = (
        " Agreement: same argmax as the net that the run names, mostly its teacher."
        if any("agreement" in row.means for row in rows)
        else ""
    )
    caption = (
        f"{seeds_text(comparison)}. {interval}. Pareto: no row is as good in both mean top-1 and "
        f"bytes, or bit operations, and better in one.{of_tree}{agreement}{bits}"
    )
    return _made("results", caption, shown, rows)


def seeds_of(row: Row) -> str:
    """Returns "3", or "2 of 3" where some of the arm's seeds have no accuracy."""
    have = len(row.values["top1"])
    return f"{have}" if have == row.runs else f"{have} of {row.runs}"


def mean_text(found: Mean | None, seeds: int, factor: float, digits: int) -> str:
    """Returns "96.28 ± 0.74 (0.88)"; with fewer seeds than the row's "... n=2"."""
    if found is None:
        return NONE
    text = f"{factor * found.mean:.{digits}f}"
    if found.high is not None and found.sd is not None:
        half = found.high - found.mean
        text += f" ± {factor * half:.{digits}f} ({factor * found.sd:.{digits}f})"
    return text if found.n == seeds else f"{text} n={found.n}"


def bits_text(row: Row) -> str:
    """Returns "4/8", "2-4/8" where seeds differ."""
    one = lambda values: "-".join(
        f"{v:g}" for v in sorted({32 if v is None else v for v in values})
    )
    return "/".join(map(one, row.bits))


def cost_text(cost: str, value: float | None) -> str:
    """Returns 311,016 bytes, and bit operations as "781.8 M"; the CSV has all digits."""
    if value is None:
        return NONE
    if cost == "weight_bytes":
        return count(round(value))
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.4g}".rstrip(".") + f" {unit}"
    return count(round(value))


def _differences(comparison: Comparison, measure: str) -> TextTable:
    heading, factor, digits = MEASURES[measure]
    points = "points of top-1" if measure == "top1" else heading
    m, control = comparison.tests[measure], comparison.control
    assert control is not None
    several = several_controls(comparison.compared[measure])
    of_row = [(h, r, lambda c, to=to: to(c.row)) for h, r, to in names_of(comparison)]
    shown: Shown = list(of_row)
    if several:
        shown.append(("against", False, against_text))
    shown += [
        ("pairs", True, lambda c: str(c.difference.n)),
        (f"difference, {heading}", True, lambda c: difference_text(c.difference, factor, digits)),
        ("95 % interval", True, lambda c: interval_text(c, factor, digits)),
    ]
    caption = (
        f"{seeds_text(comparison)}. Row minus control ({control.text}) in {points}, paired by "
        "seed: mean and its 95 % t interval"
    )
    if m:
        shown += [
            (f"95 % for all {m}", True, lambda c: span_text(c.together, factor, digits)),
            ("p", True, lambda c: p_text(c.difference.p)),
            ("p (Holm)", True, lambda c: p_text(c.adjusted)),
        ]
        caption += (
            ", the interval that holds for all comparisons at once (Bonferroni), p of the paired t "
            "test as it is and adjusted by Holm's method for "
            f"{m} comparison{'s' if m > 1 else ''}. Each measure is adjusted by itself; rows with "
            "the numbers of their control are not tested, and differences that are equal for all "
            "seeds have neither interval nor p."
        )
    else:
        caption += f". {UNTESTED}"
    return _made(f"differences-{measure}", caption, shown, comparison.compared[measure])


def against_text(c: Compared) -> str:
    """A control by what it does not share with its row."""
    same_arm, same_key = c.control.arm == c.row.arm, c.control.key == c.row.key
    parts = [] if same_arm else [c.control.arm]
    return " / ".join(parts if same_key else [*parts, *c.control.key])


def several_controls(compared: Sequence[Compared]) -> bool:
    """Whether the caption does not say already what each row is compared with."""
    controls = {(c.control.arm, *c.control.key) for c in compared}
    return len(controls) > 1 and len({against_text(c) for c in compared}) > 1


def difference_text(found: Difference, factor: float, digits: int) -> str:
    """Returns "+0.59", "identical" where both sides have the same numbers."""
    return "identical" if found.same else f"{factor * found.mean:+.{digits}f}"


def interval_text(c: Compared, factor: float, digits: int) -> str:
    """Returns the interval of a difference as `span_text`, a dash where there is none."""
    d = c.difference
    known = None if d.low is None or d.high is None or d.same else (d.low, d.high)
    return span_text(known, factor, digits)


def span_text(span: tuple[float, float] | None, factor: float, digits: int) -> str:
    """Returns "[+0.11, +1.07]"."""
    if span is None:
        return NONE
    low, high = (f"{factor * end:+.{digits}f}" for end in span)
    return f"[{low}, {high}]"


def p_text(p: float | None) -> str:
    """Returns a p value with three decimals; small ones as "<0.001"."""
    if p is None:
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _classes(comparison: Comparison) -> TextTable:
    assert comparison.control is not None
    classes = max(len(change.differences) for change in comparison.classes)
    shown: Shown = [(h, r, lambda c, to=to: to(c.row)) for h, r, to in names_of(comparison)]

    def cell(change: Any, place: int) -> str:
        found = change.differences[place] if place < len(change.differences) else None
        return NONE if found is None else f"{100 * found.mean:+.1f}"

    def extremes(change: Any, sign: int) -> str:
        known = [(d.mean, i) for i, d in enumerate(change.differences) if d is not None]
        moved = sorted((sign * mean, i) for mean, i in known if sign * mean < 0)[:EXTREMES]
        return ", ".join(f"{i} ({100 * sign * mean:+.1f})" for mean, i in moved) or NONE

    if classes <= MOST_CLASSES:
        shown += [(str(i), True, lambda c, i=i: cell(c, i)) for i in range(classes)]
    else:
        shown += [
            ("largest falls", False, lambda c: extremes(c, 1)),
            ("largest rises", False, lambda c: extremes(c, -1)),
        ]
    caption = (
        f"{seeds_text(comparison)}. Change of the share of each class's test images that are "
        f"right, in points: row minus control ({comparison.control.text}), mean over paired seeds. "
        "Not tested: the intervals, which comparison.csv has, are not adjusted for their number."
    )
    return _made("classes", caption, shown, comparison.classes)
