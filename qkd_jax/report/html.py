"""The report: one page that stands by itself, made from the files of a run folder and nothing else.

Every part is left out when its file is not there, so a run that was interrupted has a page too. The
page has no script, loads nothing, and shows its pictures as inline SVG.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qkd_jax.record.json_files import read_json
from qkd_jax.record.metrics_log import read_metrics
from qkd_jax.report import plots, soft_labels
from qkd_jax.report.page import as_records, cell, html_figure, html_table, page, record_table
from qkd_jax.report.table import columns, count, number, percent, reference

__all__ = ["render", "write"]


def _headline(rows: Sequence[Mapping[str, Any]], examples: int | None) -> str:
    shown = columns(rows)
    body = [[escape(text(row)) for _, _, text in shown] for row in rows]
    parts = [html_table([(heading, right) for heading, right, _ in shown], body)]
    if any(row.get("agreement") is not None for row in rows):
        parts.append(
            '<p class="quiet">Agreement: test images with the same argmax as '
            f"{escape(reference(rows))}.</p>"
        )
    if any("severity" in row for row in rows):
        parts.append(
            '<p class="quiet">Severity: over the mistakes, the mean height of the lowest common '
            "ancestor of prediction and label in the class tree; 1 is a sibling.</p>"
        )
    if any(row.get("student_steps") is not None for row in rows):
        parts.append(
            '<p class="quiet">Steps: in which the net learned, counted from its quantization.</p>'
        )
    known = [row["top1"] for row in rows if row.get("top1") is not None]
    if examples and known:
        worst = max(math.sqrt(max(p * (1 - p), 0.0) / examples) for p in known)
        parts.append(
            f'<p class="quiet">On {examples:,} test images the standard error of one accuracy, '
            f"from the choice of images alone, is up to {100 * worst:.2f} points.</p>"
        )
    return "".join(parts)


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    largest = max((layer.get("bytes") or 0 for layer in layers), default=0) or 1
    bits = lambda value: "32 (float)" if value is None else f"{value:g}"
    body = []
    for layer in layers:
        size = layer.get("bytes")
        width = round(120 * (size or 0) / largest)
        bar = f'<span class="bar" style="width:{max(width, 1)}px"></span>'
        body.append(
            [
                f"<code>{escape(str(layer.get('path', '')))}</code>",
                escape(str(layer.get("kind", ""))),
                escape(" x ".join(str(n) for n in layer.get("shape") or [])),
                count(layer.get("params")),
                bits(layer.get("weight_bits")),
                bits(layer.get("input_bits")),
                escape(str(layer.get("quantizer") or "-")),
                count(size),
                bar,
            ]
        )
    params = sum(layer.get("params") or 0 for layer in layers)
    size = sum(layer.get("bytes") or 0 for layer in layers)
    headings = [
        ("layer", False),
        ("kind", False),
        ("weight shape", False),
        ("parameters", True),
        ("weight bits", True),
        ("input bits", True),
        ("quantizer", False),
        ("bytes", True),
        ("", False),
    ]
    total = ["all layers", "", "", count(params), "", "", "", count(size), ""]
    note = ""
    if size:
        note = (
            f'<p class="quiet">{count(params)} parameters take {count(4 * params)} bytes as '
            f"float32: {4 * params / size:.1f} times as much.</p>"
        )
    return html_table(headings, body, total=total) + note


def _quantizers(stages: Mapping[str, Any], schedule: Sequence[str]) -> str:
    """What each quantizer does to data, from diagnosis.json: the last diagnosis of each net."""
    order = sorted(stages, key=lambda s: schedule.index(s) if s in schedule else len(schedule))
    last = {net: (stage, found) for stage in order for net, found in stages[stage].items()}
    parts = [
        f"<h3>{escape(net)}, stage <code>{escape(stage)}</code></h3>{_operands(operands)}"
        for net, (stage, operands) in last.items()
    ]
    if not parts:
        return ""
    note = (
        '<p class="quiet">Measured on training images. Clipped: share of the elements beyond the '
        "grid's ends by more than half a step. Zero: share that becomes 0. Codes: those that occur "
        "of those there are. SQNR: signal-to-quantization-noise ratio; a dash where there is no "
        "noise or no signal.</p>"
    )
    return "".join(parts) + note


def _operands(operands: Sequence[Mapping[str, Any]]) -> str:
    tracked = any(d.get("oscillating") is not None for d in operands)
    span = lambda d, low, high: f"{number(d.get(low), 3)} .. {number(d.get(high), 3)}"
    shown: list[tuple[str, bool, Any]] = [
        ("layer", False, lambda d: f"<code>{escape(str(d.get('path')))}</code>"),
        ("operand", False, lambda d: escape(str(d.get("operand")))),
        ("grid", False, lambda d: escape(str(d.get("label")))),
        ("bits", True, lambda d: count(d.get("bits"))),
        ("data", True, lambda d: span(d, "lo", "hi")),
        ("grid range", True, lambda d: span(d, "grid_lo", "grid_hi")),
        ("clipped %", True, lambda d: percent(d.get("clipped"))),
        ("zero %", True, lambda d: percent(d.get("zeros"))),
        ("codes", True, lambda d: f"{count(d.get('used'))}/{count(d.get('levels'))}"),
        ("SQNR dB", True, lambda d: number(d.get("sqnr"), 1)),
    ]
    if tracked:
        shown.append(("oscillating %", True, lambda d: percent(d.get("oscillating"))))
    body = [[text(d) for _, _, text in shown] for d in operands]
    return html_table([(heading, right) for heading, right, _ in shown], body)


def _facts(run: Mapping[str, Any]) -> str:
    starts = run.get("starts") or []
    if not starts:
        return ""
    last = starts[-1]
    git, devices = last.get("git") or {}, last.get("devices") or {}
    revision = git.get("revision")
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    pairs = {
        "command": "<code>" + escape(" ".join(map(str, last.get("argv") or []))) + "</code>",
        "code": escape(f"{revision[:12]}{dirty}") if revision else "not from a git checkout",
        "devices": escape(
            f"{devices.get('count', '?')} x {devices.get('kind', '?')} "
            f"({devices.get('platform', '?')}), {last.get('cpus', '?')} CPU cores"
        ),
        "versions": cell(last.get("versions") or {}),
        "platform": escape(str(last.get("platform", ""))),
    }
    shown = {"git", "devices", "argv", "versions", "platform", "machine", "cpus", "hostname"}
    for name, value in last.items():
        if name not in shown and value not in (None, ""):
            pairs[escape(name.replace("_", " "))] = cell(value)
    if len(starts) > 1:
        times = ", ".join(str(start.get("started", "?")) for start in starts)
        pairs["starts"] = escape(f"{len(starts)} ({times}): the run was interrupted and resumed")
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in pairs.items())
    return f"<dl>{items}</dl>"


def _notes(
    results: Mapping[str, Any], config: Mapping[str, Any], run: Mapping[str, Any]
) -> list[str]:
    """What a reader must know before quoting a number."""
    notes = []
    seed = config.get("seed")
    if results.get("rows"):
        which = "" if seed is None else f" (seed {seed})"
        notes.append(
            f"One run with one seed{which}. Differences between methods of the size of the spread "
            "between seeds mean nothing; repeat with other seeds before ranking methods."
        )
    starts = run.get("starts") or [{}]
    platform = (starts[-1].get("devices") or {}).get("platform")
    if platform:
        notes.append(
            f"Trained on {escape(str(platform))}. The same config and seed give the same bits on "
            "the same kind of device with the same versions; elsewhere rounding may differ."
        )
    exported = [row["export"] for row in results.get("rows") or [] if row.get("export")]
    if exported:
        engine = escape(str(exported[0].get("engine", "the engine")))
        notes.append(
            f"Latencies are those of {engine} on the machine of this run. Engines have no 2-bit "
            "products on CPU: low-bit weights are stored small and computed as 8 bits."
        )
    notes.append(
        "Weight bytes count the weights at their own width, packed, with their scales; not the "
        "file's structure."
    )
    return notes


def _curves_part(rows: Sequence[Mapping[str, Any]]) -> str:
    svg = plots.curves(rows)
    if svg is None:
        return ""
    return html_figure(
        svg,
        "Each band is a stage of the schedule. Training loss is that of the stage, so its level "
        "changes where a stage adds a term; accuracy is comparable throughout.",
    )


def _soft_labels_part(data: Mapping[str, Any]) -> str:
    """What the teacher says of test images and classes beside what its students say."""
    pictures = []
    if svg := soft_labels.distributions(data):
        others = "".join(
            f", <b>{escape(net)}</b>, the same net taught by labels alone,"
            for net in data["others"]
        )
        pictures.append(
            html_figure(
                svg,
                "A hard label names one class (grey ground). The teacher "
                f"<b>{escape(data['teacher'])}</b> says more, and more of it shows as the "
                f"temperature T rises; beside it <b>{escape(data['student'])}</b>, taught at "
                f"T = {data['temperature']:g}{others} at the same temperatures. The images are of "
                "the test split, chosen for what stands below them.",
            )
        )
    if svg := soft_labels.similarities(data):
        told = [
            f"{escape(net)} {value:+.2f}"
            for net in soft_labels.nets_of(data)
            if (value := soft_labels.rank_correlation(data, net)) is not None
        ]
        tree = (
            " The last panel has the distances in the class tree, which no net has seen. Rank "
            f"correlation of likeness with nearness in the tree: {', '.join(told)}."
            if told
            else ""
        )
        pictures.append(
            html_figure(
                svg,
                "The likeness of classes that soft labels carry: each row is the mean softened "
                "distribution over the test images of one true class. The diagonal is written and "
                f"not coloured: hard labels have nothing but it.{tree}",
            )
        )
    return "".join(pictures)


def _quant_part(
    rows: Sequence[Mapping[str, Any]], nets: Sequence[str], order: Sequence[str]
) -> str:
    keys = {key for row in rows if row["split"] == "quant" for key in row["values"]}
    # One net is shown: the paths of the others look alike, and metrics.jsonl has them.
    named = [net for net in nets if any(key.startswith(f"{net}/") for key in keys)]
    net = named[0] if named else ""
    of = f" of <b>{escape(net)}</b>" if net else ""
    pictures = [
        html_figure(
            svg,
            f"The {operand} quantizers{of}: step sizes, scales and ranges, averaged over channels, "
            f"in units of the {operand}. Vertical lines are borders of stages.",
        )
        for operand in ("weight", "input", "output")
        if (svg := plots.quantizer_paths(rows, operand, net=net, order=order))
    ]
    others = ", ".join(escape(other) for other in named[1:])
    if others:
        pictures.append(f'<p class="quiet">Not shown: {others} (metrics.jsonl has them).</p>')
    return "".join(pictures)


def _net_order(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """Nets of the run, the one that is exported first."""
    exported = [row["net"] for row in rows if row.get("export") and row.get("net")]
    return list(dict.fromkeys([*exported, *(config.get("nets") or {})]))


def _histogram_part(histograms: Mapping[str, Any], order: Sequence[str]) -> str:
    layers = histograms.get("layers") or {}
    svg = plots.histograms(layers, order=order)
    if svg is None:
        return ""
    left_out = len(layers) - min(len(layers), plots.MAX_LAYERS)
    more = f" {left_out} of {len(layers)} layers are left out." if left_out else ""
    return html_figure(
        svg,
        "Weights divided by their step, so that each code sits at its number. Bars: share of the "
        "weights at each code. Lines: density of the float weights, per code; what lies beyond "
        f"the last code is clipped to it.{more}",
    )


def render(folder: str | Path) -> str:
    """Returns the page of a run folder as text.

    Raises:
        ValueError: if a file of the folder cannot be read; files that are absent are left out.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json") or {}
    timings = read_json(folder / "timings.json") or {}
    config = read_json(folder / "config.json") or {}
    run = read_json(folder / "run.json") or {}
    layers = read_json(folder / "model" / "layers.json") or []
    histograms = read_json(folder / "model" / "histograms.json") or {}
    diagnosis = read_json(folder / "diagnosis.json") or {}
    soft = read_json(folder / "soft_labels.json") or {}
    metrics = read_metrics(folder)

    rows = results.get("rows") or []
    dataset = results.get("dataset") or {}
    parts: list[tuple[str, str, str]] = []

    def add(anchor: str, title: str, body: str) -> None:
        if body:
            parts.append((anchor, title, body))

    if rows:
        add("results", "Results", _headline(rows, dataset.get("test_examples")))
    add("latency", "Latency", _latency(timings))
    add("curves", "Loss and accuracy", _curves_part(metrics))
    add("soft-labels", "Soft and hard labels", _soft_labels_part(soft))
    order = [str(layer.get("path")) for layer in layers]
    nets = _net_order(rows, config)
    add("steps", "Step sizes and ranges", _quant_part(metrics, nets, order))
    add("weights", "Weights on the code grid", _histogram_part(histograms, order))
    if layers:
        add("layers", "Layers", _layers(layers))
    schedule = list(config.get("schedule") or [])
    add("quantizers", "Quantizers", _quantizers(diagnosis, schedule))
    stages = as_records(timings.get("stages"), "stage")
    stages.sort(key=lambda r: schedule.index(r["stage"]) if r.get("stage") in schedule else 999)
    if stages:
        add("time", "Where the time went", record_table(stages) + '<p class="quiet">Seconds.</p>')
    add("run", "Run", _facts(run))
    if config:
        text = escape(json.dumps(config, indent=2, sort_keys=True))
        add("config", "Config", f"<details><summary>show</summary><pre>{text}</pre></details>")
    notes = "".join(f"<li>{note}</li>" for note in _notes(results, config, run))
    add("notes", "Read with care", f"<ul>{notes}</ul>")

    title = str(results.get("experiment") or config.get("experiment") or folder.resolve().name)
    warning = ""
    if not rows:
        last = f" Its last logged step is {metrics[-1]['step']}." if metrics else ""
        warning = (
            '<p class="warn">This run has no results yet: it is going on, or was interrupted.'
            f"{last} Started again with the same command, it continues.</p>"
        )
    return page(title, _subtitle(rows, dataset), warning, parts)


def _latency(timings: Mapping[str, Any]) -> str:
    found = as_records(timings.get("latency"), "model")
    return record_table(found) if found else ""


def _subtitle(rows: Sequence[Mapping[str, Any]], dataset: Mapping[str, Any]) -> str:
    parts = []
    if dataset.get("name"):
        sizes = [
            f"{dataset[key]:,} {word}"
            for key, word in (("train_examples", "for training"), ("test_examples", "for test"))
            if dataset.get(key)
        ]
        named = escape(str(dataset["name"]))
        parts.append(f"{named} ({escape(', '.join(sizes))})" if sizes else named)
    exported = [row for row in rows if row.get("export")]
    if exported and exported[-1].get("top1") is not None:
        row = exported[-1]
        size = row.get("weight_bytes")
        in_bytes = f" in {count(size)} bytes of weights" if size else ""
        parts.append(
            f"{escape(str(row.get('net', 'net')))}: {percent(row['top1'])} % top-1{in_bytes}"
        )
    return ". ".join(parts) + ("." if parts else "")


def write(workdir: str | Path) -> Path:
    """Writes `report.html` of a run folder and returns its path; a reader sees the old or the new.

    Args:
        workdir: a run folder; any of its files may be missing.

    Raises:
        ValueError: if there is no such folder, or one of its files is damaged.
    """
    folder = Path(workdir)
    if not folder.is_dir():
        raise ValueError(
            f"workdir is {str(workdir)!r}, which is not a folder; give the --workdir of a run."
        )
    path = folder / "report.html"
    temporary = folder / ".report.html.tmp"
    temporary.write_text(render(folder), encoding="utf-8")
    os.replace(temporary, path)
    return path
