"""The report's figures of a run, as SVG text: they read plain dicts and know no files."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkd_jax.quantize.variables import quantizer_key
from qkd_jax.report import svg

MAX_POINTS = 500
MAX_LAYERS = 12
Rows = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[int, float]]
Series = dict[str, list[tuple[int, float]]]


def series(rows: Rows, split: str, name: str) -> Series:
    """Returns {net: [(step, value)]} of the values "<net>/<name>" in the rows of a split."""
    found: Series = {}
    for row in rows:
        if row["split"] != split:
            continue
        for key, value in row["values"].items():
            net, _, metric = key.rpartition("/")
            if metric == name and isinstance(value, int | float):
                found.setdefault(net, []).append((row["step"], float(value)))
    return found


def stage_spans(rows: Rows) -> list[tuple[str, int, int]]:
    """Returns (stage, first step, last step) in order, of the stages that trained."""
    last: dict[str, int] = {}
    for row in rows:
        if row["split"] == "train":
            last[row["stage"]] = max(row["step"], last.get(row["stage"], 0))
    spans, start = [], 0
    for stage, end in sorted(last.items(), key=lambda item: item[1]):
        spans.append((stage, start, end))
        start = end
    return spans


def _thin(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Means of neighbours, so that a long run's curve has at most MAX_POINTS points."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(v for _, v in g) / len(g) for g in groups]


def segments(
    points: Sequence[tuple[int, float]], spans: Sequence[tuple[str, int, int]]
) -> list[list[tuple[int, float]]]:
    """Cuts a net's curve where other nets' stages lie between two of its points."""
    ends = [end for _, _, end in spans]
    cut: list[list[tuple[int, float]]] = []
    before = -1
    for point in sorted(points):
        stage = sum(end < point[0] for end in ends)
        if before < 0 or stage - before > 1:
            cut.append([])
        cut[-1].append(point)
        before = stage
    return cut


def mark_stages(
    axes: Any, spans: Sequence[tuple[str, int, int]], *, names: bool, across: int = 1
) -> None:
    """Shades every second stage, and writes the stages' names above the axes.

    `across` is the number of axes side by side: names that do not fit are turned.
    """
    total = max((end for _, _, end in spans), default=1)
    for number, (stage, start, end) in enumerate(spans):
        if number % 2 == 0:
            axes.axvspan(start, end, color=svg.BAND, linewidth=0, zorder=0)
        if not names:
            continue
        share = (end - start) / total
        fits = share > 0.008 * across * len(stage)
        axes.annotate(
            stage.replace("_", " "),
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center" if fits else "left",
            va="bottom",
            rotation=0 if fits else 28,
            rotation_mode="anchor",
            fontsize=8.5,
            color=svg.QUIET,
        )
    if spans:
        axes.set_xlim(0, total)


def curves(rows: Rows, *, draw: Callable[[Any, str], Any] = svg.text) -> Any:
    """Returns the training loss and test accuracy over steps, stages marked; None without any.

    Args:
        rows: lines of metrics.jsonl; nets are the parts of "<net>/loss" and "<net>/top1".
        draw: `svg.text`, or `svg.png` for an image.
    """
    loss = series(rows, "train", "loss")
    accuracy, split = series(rows, "test", "top1"), "test"
    if not accuracy:
        accuracy, split = series(rows, "train", "top1"), "training"
    if not loss and not accuracy:
        return None
    spans = stage_spans(rows)
    nets = sorted(
        dict.fromkeys([*loss, *accuracy]), key=lambda net: min(_steps(loss, accuracy, net))
    )
    color = {net: svg.COLORS[i % len(svg.COLORS)] for i, net in enumerate(nets)}
    line = {net: svg.LINES[i // 2 % len(svg.LINES)] for i, net in enumerate(nets)}
    panels = [
        (found, label, scale, marker)
        for found, label, scale, marker in (
            (loss, "training loss (nats)", 1.0, None),
            (accuracy, f"{split} top-1 (%)", 100.0, "o"),
        )
        if found
    ]
    with svg.style():
        figure, grid = svg.figure(
            len(panels), 1, height=2.5, top=0.75, bottom=0.8, gap=(0.2, 0), sharex=True
        )
        for number, (found, label, scale, marker) in enumerate(panels):
            axes = grid[number, 0]
            mark_stages(axes, spans, names=number == 0)
            for net in nets:
                for segment in segments(found.get(net, []), spans):
                    steps, values = _thin(segment)
                    axes.plot(
                        steps,
                        [scale * v for v in values],
                        line[net],
                        color=color[net],
                        marker=marker if len(steps) < 40 else None,
                        markersize=3,
                    )
            values = [v for points in found.values() for _, v in points]
            if scale == 1.0 and min(values) > 0 and max(values) > 30 * min(values):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylabel(label)
        grid[-1, 0].set_xlabel("step, counted over the whole schedule")
        handles = [grid[0, 0].plot([], [], line[n], color=color[n])[0] for n in nets]
        svg.legend(figure, handles, nets, inches=-0.05)
        return draw(figure, "training loss and test accuracy over the steps of the run")


def _steps(loss: Series, accuracy: Series, net: str) -> list[int]:
    return [step for found in (loss, accuracy) for step, _ in found.get(net, [])]


def _small_multiples(count: int, **sizes: Any) -> tuple[Any, list[Any]]:
    """Returns (figure, one axes for each of `count` panels), four or five in a row."""
    across = min(count, 5 if count in (5, 9, 10) else 4)
    figure, grid = svg.figure(math.ceil(count / across), across, **sizes)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid.flat:
        axes.tick_params(labelsize=8)
    return figure, list(grid.flat[:count])


def _in_order(paths: Sequence[str], order: Sequence[str]) -> list[str]:
    """`paths` in the order of the net's layers, as far as it is known."""
    place = {path: number for number, path in enumerate(order)}
    return sorted(paths, key=lambda path: place.get(path, len(place)))


def _pick(paths: Sequence[str], limit: int = MAX_LAYERS) -> list[str]:
    """At most `limit` of the layers, spread evenly, the first and the last among them."""
    if len(paths) <= limit:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (limit - 1))] for i in range(limit)]


def quantizer_paths(
    rows: Rows,
    operand: str,
    *,
    net: str = "",
    order: Sequence[str] = (),
    draw: Callable[[Any, str], Any] = svg.text,
) -> Any:
    """Returns how one operand's quantizer parameters move, one panel a layer; None without any.

    Args:
        rows: lines of metrics.jsonl; those of split "quant" have values
            {"[<net>/]<layer>/<quantizer>/<param>": mean over channels}.
        operand: "weight", "input" or "output".
        net: only keys under this prefix.
        order: the net's layers in order.
        draw: of `curves`.
    """
    layers: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for key, value in row["values"].items() if row["split"] == "quant" else ():
            if net and not key.startswith(f"{net}/"):
                continue
            *layer, quantizer, param = key.removeprefix(f"{net}/" if net else "").split("/")
            if not layer or quantizer != quantizer_key(operand):
                continue
            if isinstance(value, int | float):
                lines = layers.setdefault("/".join(layer), {})
                lines.setdefault(param, []).append((row["step"], float(value)))
    if not layers:
        return None
    chosen = _pick(_in_order(list(layers), order))
    params = sorted({param for layer in chosen for param in layers[layer]})
    ends = [end for _, _, end in stage_spans(rows)]
    color = svg.COLORS[("weight", "input", "output").index(operand)]
    with svg.style():
        figure, panels = _small_multiples(
            len(chosen), height=1.1, top=0.55, bottom=0.5, sharex=True
        )
        for axes, layer in zip(panels, chosen, strict=True):
            seen = [step for points in layers[layer].values() for step, _ in points]
            for end in ends:
                if min(seen) < end < max(seen):
                    axes.axvline(end, color=svg.EDGE, linewidth=0.8, zorder=1)
            for param, points in layers[layer].items():
                steps, means = _thin(sorted(points))
                style = svg.LINES[params.index(param) % len(svg.LINES)]
                marker = "o" if len(steps) < 8 else None
                axes.plot(steps, means, style, color=color, marker=marker, markersize=2.5)
            axes.set_title(layer, fontsize=8.5)
            axes.locator_params(nbins=4)
        svg.name_axes(figure, "step", "mean over channels")
        styles = [svg.LINES[number % len(svg.LINES)] for number in range(len(params))]
        handles = [panels[0].plot([], [], style, color=color)[0] for style in styles]
        svg.legend(figure, handles, [f"{operand} {param}" for param in params], inches=0.05)
        return draw(figure, f"{operand} quantizer parameters of {net or 'the net'} over the steps")


def histograms(
    layers: Mapping[str, Mapping[str, Any]],
    *,
    order: Sequence[str] = (),
    draw: Callable[[Any, str], Any] = svg.text,
) -> Any:
    """Returns float weights and their codes on the code grid, one panel a layer; None without any.

    Args:
        layers: the "layers" of model/histograms.json, see `report.weight_histograms`.
        order: the net's layers in order.
        draw: of `curves`.
    """
    if not layers:
        return None
    chosen = _pick(_in_order(list(layers), order))
    with svg.style():
        figure, panels = _small_multiples(
            len(chosen), height=1.2, top=0.75, bottom=0.5, gap=(0.6, 0.4)
        )
        known: dict[str, Any] = {}
        for axes, path in zip(panels, chosen, strict=True):
            known |= _one_histogram(axes, path, layers[path])
        svg.name_axes(figure, "code = weight / step", "share of the weights (%)")
        svg.legend(figure, list(known.values()), list(known), inches=0.05)
        return draw(figure, "histograms of the float weights and of their codes, layer by layer")


def _one_histogram(axes: Any, path: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Draws one layer and returns {label: handle}."""
    edges, codes = layer["edges"], layer["codes"]
    total = max(sum(layer["counts_codes"]), 1)
    share = [100 * count / total for count in layer["counts_codes"]]
    # One outline instead of a bar a code: 255 bars of an 8-bit layer would be most of the page.
    xs, heights = [], []
    for code, height in zip(codes, share, strict=True):
        xs += [code - 0.36, code - 0.36, code + 0.36, code + 0.36]
        heights += [0, height, height, 0]
    known = {"codes": axes.fill_between(xs, heights, color=svg.COLORS[5], linewidth=0, zorder=2)}
    # Float bins are narrower than a code: drawn as a density per code, so that areas compare.
    per_code = 100 / total / max(edges[1] - edges[0], 1e-12)
    lines = [
        ("counts_before", svg.COLORS[-1], ":", "float weights before training with quantization"),
        ("counts_float", svg.COLORS[1], "-", "float weights behind the codes"),
    ]
    for key, color, style, label in lines:
        if layer.get(key):
            values = [per_code * count for count in layer[key]]
            known[label] = axes.stairs(
                values, edges, color=color, linestyle=style, linewidth=1.1, zorder=3
            )
    axes.set_title(f"{path}\n{layer['label']}" if layer.get("label") else path, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    if len(codes) <= 7:
        axes.set_xticks(codes)
    else:
        axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4)
    return known
