"""The figures of a comparison: accuracy against cost, learning curves with bands."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qkd_jax import checks
from qkd_jax.report import svg
from qkd_jax.report.comparison import Comparison, Row
from qkd_jax.report.comparison_tables import COSTS, names_of
from qkd_jax.report.learning_curves import Curve, Curves
from qkd_jax.report.plots import mark_stages, segments

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_ARMS = len(svg.COLORS) * len(svg.LINES)
MOST_NETS = 8
MOST_NAMED = 12
MOST_PANELS, MOST_WHISKERS = 12, 50


def _clipped(text: str, most: int = 40) -> str:
    """A name that fits a figure; "$" is escaped, which matplotlib reads as mathematics."""
    text = checks.printable(text).replace("\n", " ").replace("\t", " ")
    short = text if len(text) <= most else f"{text[: most - 3]}..."
    return short.replace("$", r"\$")


def _style(place: int) -> tuple[str, str, str]:
    """Returns (colour, line, marker) of the arm in this place."""
    colors, lines = svg.COLORS, svg.LINES
    line = lines[place // len(colors) % len(lines)]
    return colors[place % len(colors)], line, MARKERS[(place + place // len(colors)) % len(MARKERS)]


def pareto(comparison: Comparison) -> str | None:
    """Returns mean top-1 against bytes and against bit operations; None where none is known.

    Rows of several arms are coloured by arm, those of one arm by row. The line joins the points of
    the Pareto front, which are filled; whiskers are 95 % intervals (of the front alone, where there
    are many points). Points of one cost stand side by side.
    """
    panels = [c for c in COSTS if any(_point(row, c) is not None for row in comparison.rows)]
    if not panels:
        return None
    several = len(comparison.arms) > 1
    group = (lambda row: row.arm) if several else (lambda row: f"{row.net}, {row.method}")
    groups = list(dict.fromkeys(map(group, comparison.rows)))
    style = {name: _style(place) for place, name in enumerate(groups)}
    named = groups[: MOST_NAMED * 2]
    with svg.style():
        tall = math.ceil(len(named) / 4) * 0.22
        figure, grid = svg.figure(
            1, len(panels), height=3.4, top=0.25 + tall, bottom=0.55, gap=(0.45, 0.7)
        )
        for axes, cost in zip(grid[0], panels, strict=True):
            _pareto_panel(axes, comparison, cost, style)
        handles = [
            grid[0, 0].plot([], [], style[n][2], color=style[n][0], markersize=5)[0] for n in named
        ]
        _legend(figure, handles, named)
        return svg.text(figure, "mean top-1 accuracy against weight bytes and bit operations")


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend in rows of at most four."""
    figure.legend(
        *(handles, [_clipped(name) for name in names]),
        loc="upper center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(names), 4),
        borderaxespad=0.1,
        fontsize=8.5,
    )


def _point(row: Row, cost: str) -> tuple[float, float] | None:
    price = row.costs[cost]
    if price is None or price <= 0 or "top1" not in row.means:
        return None
    return price, 100 * row.means["top1"].mean


def _pareto_panel(
    axes: Any, comparison: Comparison, cost: str, style: Mapping[str, tuple[str, str, str]]
) -> None:
    from matplotlib.transforms import ScaledTranslation

    several = len(comparison.arms) > 1
    of_price: dict[float, list[tuple[Row, float]]] = {}
    for row in comparison.rows:
        if (point := _point(row, cost)) is not None:
            of_price.setdefault(point[0], []).append((row, point[1]))
    if not of_price:
        axes.set_visible(False)
        return
    steps = sorted(of_price)
    middle = math.sqrt(steps[0] * steps[-1])
    front: dict[float, float] = {}
    ends: list[float] = []
    crowded = sum(map(len, of_price.values())) > MOST_WHISKERS
    for price in steps:
        points = of_price[price]
        apart = min(6.0, 48.0 / len(points))
        for place, (row, accuracy) in enumerate(points):
            color, _, marker = style[row.arm if several else f"{row.net}, {row.method}"]
            found, best = row.means["top1"], cost in row.front
            half = 0.0 if found.high is None else 100 * (found.high - found.mean)
            half = half if best or not crowded else 0.0
            ends += [accuracy - half, accuracy + half]
            beside = (place - (len(points) - 1) / 2) * apart / 72
            axes.errorbar(
                *([price], [accuracy]),
                yerr=[half] if half else None,
                fmt=marker,
                color=color,
                markerfacecolor=color if best else "white",
                markersize=6 if best else 5,
                elinewidth=0.8,
                zorder=3 if best else 2,
                transform=axes.transData
                + ScaledTranslation(beside, 0, axes.figure.dpi_scale_trans),
            )
            if best and several and price not in front and len(front) < MOST_NAMED:
                right = price > middle
                axes.annotate(
                    _clipped(f"{row.net}, {row.method}", 28),
                    (price, accuracy),
                    xytext=(72 * beside + (-8 if right else 8), 4),
                    textcoords="offset points",
                    ha="right" if right else "left",
                    fontsize=7.5,
                    color=svg.QUIET,
                )
            if best:
                front[price] = accuracy
    axes.plot(*zip(*front.items(), strict=True), color=svg.EDGE, drawstyle="steps-post", zorder=1)
    axes.set_xscale("log")
    # Points that were moved are not seen by the axes.
    aside = max((steps[-1] / steps[0]) ** 0.12, 1.25)
    axes.set_xlim(steps[0] / aside, steps[-1] * aside)
    room = 0.05 * (max(ends) - min(ends)) or 1.0
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.set_xlabel(COSTS[cost])
    axes.set_ylabel("mean top-1 (%)")


def curves(found: Curves, arms: Sequence[str]) -> str | None:
    """Returns training loss and test accuracy of each net, a line an arm; None without any.

    Args:
        found: the curves.
        arms: the arms' labels, in order; those beyond `MOST_ARMS` are not drawn.
    """
    arms = arms[:MOST_ARMS]
    nets = list(dict.fromkeys(net for by_net in found.found.values() for net in by_net))
    nets = nets[:MOST_NETS]
    measures = [
        (name, label, scale)
        for name, label, scale in (
            ("loss", "training loss", 1.0),
            ("top1", "test top-1 (%)", 100.0),
        )
        if found.found.get(name)
    ]
    if not measures or not nets:
        return None
    style = {arm: _style(place) for place, arm in enumerate(arms)}
    drawn = [a for a in arms if any(a in of for m in found.found.values() for of in m.values())]
    spans = list(found.spans.values())
    same = spans[0] if spans and all(s == spans[0] for s in spans) else []
    with svg.style():
        tall = math.ceil(len(drawn) / 4) * 0.22 if len(arms) > 1 else 0.0
        figure, grid = svg.figure(
            *(len(nets), len(measures)),
            **dict(height=1.7, top=0.45 + 0.65 * bool(same) + tall, bottom=0.5),
            **dict(gap=(0.42, 0.65), sharex=True),
        )
        for place, net in enumerate(nets):
            for axes, (name, label, scale) in zip(grid[place], measures, strict=True):
                of_arm = found.found[name].get(net, {})
                if not any(arm in of_arm for arm in arms):
                    axes.set_visible(False)
                    continue
                mark_stages(axes, same, names=place == 0, across=len(measures))
                pad = 36 if place == 0 and same else 4  # above the names of the stages
                axes.set_title(_clipped(net), fontsize=9, fontweight="bold", pad=pad)
                for arm in arms:
                    if arm in of_arm:
                        _band(axes, of_arm[arm], found.spans[arm], scale, style[arm])
                axes.set_ylabel(label)
                if name == "loss":
                    _log_if_wide(axes, [of_arm[a] for a in arms if a in of_arm])
        last = max((span[-1] for of_arm in spans for span in of_arm[-1:]), default=0)
        if last:
            grid[0, 0].set_xlim(0, 1.02 * last)
        svg.name_axes(figure, "step, counted over the whole schedule")
        if len(arms) > 1:
            handles = [grid[0, 0].plot([], [], style[a][1], color=style[a][0])[0] for a in drawn]
            _legend(figure, handles, drawn)
        return svg.text(figure, "mean training loss and test accuracy over the steps, with bands")


def _band(
    axes: Any,
    curve: Curve,
    spans: Sequence[tuple[str, int, int]],
    scale: float,
    style: tuple[str, str, str],
) -> None:
    """Draws a curve with its band, cut where other nets' stages lie between two of its points."""
    color, line, _ = style
    few = len(curve.steps) < 40
    place = 0
    for segment in segments([(int(step), 0.0) for step in curve.steps], spans):
        part = slice(place, place + len(segment))
        place += len(segment)
        steps, mean = curve.steps[part], scale * curve.mean[part]
        half = None if curve.half is None else scale * curve.half[part]
        if len(segment) == 1:
            axes.errorbar(
                steps, mean, yerr=half, fmt="o", color=color, markersize=2.5, elinewidth=1
            )
            continue
        axes.plot(steps, mean, line, color=color, marker="o" if few else None, markersize=2.5)
        if half is not None:
            axes.fill_between(
                *(steps, mean - half, mean + half), color=color, alpha=0.18, linewidth=0
            )


def _log_if_wide(axes: Any, drawn: Sequence[Curve]) -> None:
    lowest = min(float(c.mean.min()) for c in drawn)
    highest = max(float(c.mean.max()) for c in drawn)
    if lowest > 0 and highest > 30 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 2)  # a band may reach below 0
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def classes(comparison: Comparison) -> str | None:
    """Returns the change of each class with its interval, a panel a row; None without any.

    At most `MOST_PANELS` rows are drawn, and intervals only up to `MOST_WHISKERS` classes.
    """
    changes = [c for c in comparison.classes if any(d and not d.same for d in c.differences)]
    changes = changes[:MOST_PANELS]
    if not changes:
        return None
    whiskers = max(len(change.differences) for change in changes) <= MOST_WHISKERS
    ends = [
        100 * (sign * d.mean + (d.high - d.mean if whiskers and d.high is not None else 0))
        for change in changes
        for d in change.differences
        if d is not None
        for sign in (-1, 1)
    ]
    across = min(len(changes), 3)
    with svg.style():
        figure, grid = svg.figure(
            *(math.ceil(len(changes) / across), across),
            **dict(height=1.5, top=0.35, bottom=0.5, gap=(0.55, 0.4)),
        )
        for axes in grid.flat[len(changes) :]:
            axes.set_visible(False)
        for axes, change in zip(grid.flat, changes, strict=False):
            points = [(i, d) for i, d in enumerate(change.differences) if d is not None]
            means = [100 * d.mean for _, d in points]
            colors = [svg.COLORS[0] if mean >= 0 else svg.COLORS[1] for mean in means]
            axes.bar([i for i, _ in points], means, color=colors, width=0.7, alpha=0.75)
            if whiskers:
                halves = [100 * (d.high - d.mean) if d.high is not None else 0 for _, d in points]
                axes.errorbar(
                    *([i for i, _ in points], means),
                    **dict(yerr=halves, fmt="none", ecolor=svg.INK, elinewidth=0.7),
                )
            axes.axhline(0, color=svg.EDGE, linewidth=0.8)
            if len(change.differences) <= 12:
                axes.set_xticks(range(len(change.differences)))
            name = " / ".join(to(change.row) for *_, to in names_of(comparison))
            axes.set_title(_clipped(name, 44), fontsize=8.5)
            axes.tick_params(labelsize=8)
            axes.set_ylim(-1.05 * max(ends), 1.05 * max(ends))
        svg.name_axes(figure, "class", "points")
        return svg.text(figure, "change of the accuracy of each class against the control")
