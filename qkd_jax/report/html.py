"""The report: one self-contained page, made from the files of a run folder and nothing else.

Every part is left out when its file is not there, so a run that was interrupted has a page too. The
page has no script, loads nothing, and shows its pictures as inline SVG.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qkd_jax.record.json_files import read_json
from qkd_jax.record.metrics_log import FILE as LOG
from qkd_jax.record.metrics_log import read_log
from qkd_jax.report import plots, soft_label_figures, soft_labels
from qkd_jax.report.page import (
    Column,
    as_records,
    cell,
    code,
    column_table,
    document,
    figure,
    quiet,
    record_table,
    safe,
)
from qkd_jax.report.table import columns, count, number, percent, reference
from qkd_jax.whole_files import replace_file


def _headline(rows: Sequence[Mapping[str, Any]], examples: int | None) -> str:
    shown: list[Column] = [
        (heading, right, lambda row, text=text: escape(text(row)))
        for heading, right, text in columns(rows)
    ]
    parts = [column_table(shown, rows)]
    if any(row.get("agreement") is not None for row in rows):
        with_net = escape(reference(rows))
        parts.append(quiet(f"Agreement: test images with the same argmax as {with_net}."))
    if any("severity" in row for row in rows):
        parts.append(
            quiet(
                "Severity: over the mistakes, the mean height of the lowest common ancestor of "
                "prediction and label in the class tree; 1 is a sibling."
            )
        )
    if any(row.get("student_steps") is not None for row in rows):
        parts.append(quiet("Steps: in which the net learned, counted from its quantization."))
    known = [row["top1"] for row in rows if row.get("top1") is not None]
    if examples and known:
        worst = max(math.sqrt(max(p * (1 - p), 0.0) / examples) for p in known)
        parts.append(
            quiet(
                f"On {examples:,} test images the standard error of one accuracy, from the choice "
                f"of images alone, is up to {100 * worst:.2f} points."
            )
        )
    return "".join(parts)


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    largest = max(layer.get("bytes") or 0 for layer in layers) or 1
    bits = lambda value: "32 (float)" if value is None else f"{value:g}"

    def bar(layer: Mapping[str, Any]) -> str:
        width = max(round(120 * (layer.get("bytes") or 0) / largest), 1)
        return f'<span class="bar" style="width:{width}px"></span>'

    shown: list[Column] = [
        ("layer", False, lambda d: code(d.get("path", ""))),
        ("kind", False, lambda d: safe(d.get("kind", ""))),
        ("weight shape", False, lambda d: safe(" x ".join(map(str, d.get("shape") or [])))),
        ("parameters", True, lambda d: count(d.get("params"))),
        ("weight bits", True, lambda d: bits(d.get("weight_bits"))),
        ("input bits", True, lambda d: bits(d.get("input_bits"))),
        ("quantizer", False, lambda d: safe(d.get("quantizer") or "-")),
        ("bytes", True, lambda d: count(d.get("bytes"))),
        ("", False, bar),
    ]
    params, size = (sum(d.get(key) or 0 for d in layers) for key in ("params", "bytes"))
    total = ["all layers", "", "", count(params), "", "", "", count(size), ""]
    note = ""
    if size:
        note = quiet(
            f"{count(params)} parameters take {count(4 * params)} bytes as float32: "
            f"{4 * params / size:.1f} times as much."
        )
    return column_table(shown, layers, total=total) + note


def _quantizers(stages: Mapping[str, Any], schedule: Sequence[str]) -> str:
    """Returns the last diagnosis of each net's quantizers, from diagnosis.json."""
    order = sorted(stages, key=lambda s: schedule.index(s) if s in schedule else len(schedule))
    last = {net: (stage, rows) for stage in order for net, rows in stages[stage].items()}
    parts = [
        f"<h3>{escape(net)}, stage {code(stage)}</h3>{_operands(operands)}"
        for net, (stage, operands) in last.items()
    ]
    if not parts:
        return ""
    note = (
        "Measured on training images. Clipped: share of the elements beyond the grid's ends by "
        "more than half a step. Zero: share that becomes 0. Codes: those that occur of those there "
        "are. SQNR: signal-to-quantization-noise ratio; a dash where there is no noise or no "
        "signal."
    )
    return "".join(parts) + quiet(note)


def _operands(operands: Sequence[Mapping[str, Any]]) -> str:
    span = lambda d, low, high: f"{number(d.get(low), 3)} .. {number(d.get(high), 3)}"
    shown: list[Column] = [
        ("layer", False, lambda d: code(d.get("path"))),
        ("operand", False, lambda d: safe(d.get("operand"))),
        ("grid", False, lambda d: safe(d.get("label"))),
        ("bits", True, lambda d: count(d.get("bits"))),
        ("data", True, lambda d: span(d, "lo", "hi")),
        ("grid range", True, lambda d: span(d, "grid_lo", "grid_hi")),
        ("clipped %", True, lambda d: percent(d.get("clipped"))),
        ("zero %", True, lambda d: percent(d.get("zeros"))),
        ("codes", True, lambda d: f"{count(d.get('used'))}/{count(d.get('levels'))}"),
        ("SQNR dB", True, lambda d: number(d.get("sqnr"), 1)),
    ]
    if any(d.get("oscillating") is not None for d in operands):
        shown.append(("oscillating %", True, lambda d: percent(d.get("oscillating"))))
    return column_table(shown, operands)


def _facts(run: Mapping[str, Any]) -> str:
    starts = run.get("starts") or []
    if not starts:
        return ""
    last = starts[-1]
    git, devices = last.get("git") or {}, last.get("devices") or {}
    revision = git.get("revision")
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    pairs = {
        "command": code(" ".join(map(str, last.get("argv") or []))),
        "code": escape(f"{revision[:12]}{dirty}") if revision else "not from a git checkout",
        "devices": escape(
            f"{devices.get('count', '?')} x {devices.get('kind', '?')} "
            f"({devices.get('platform', '?')}), {last.get('cpus', '?')} CPU cores"
            + (f", {last['processor']}" if last.get("processor") else "")
        ),
        "versions": cell(last.get("versions") or {}),
        "platform": safe(last.get("platform", "")),
    }
    shown = {"git", "devices", "argv", "versions", "platform", "machine", "processor"}
    shown |= {"cpus", "hostname"}
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
    """Returns the caveats that go with the numbers."""
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
            f"Trained on {safe(platform)}. The same config and seed give the same bits on "
            "the same kind of device with the same versions; elsewhere rounding may differ."
        )
    exported = [row["export"] for row in results.get("rows") or [] if row.get("export")]
    if exported:
        engine = safe(exported[0].get("engine", "the engine"))
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
    return figure(
        plots.curves(rows),
        "Each band is a stage of the schedule. Training loss is that of the stage, so its level "
        "changes where a stage adds a term; accuracy is comparable throughout.",
    )


def _soft_labels_part(data: Mapping[str, Any]) -> str:
    """Returns the teacher's softened distributions beside those of its students."""
    pictures = []
    if svg := soft_label_figures.distributions(data):
        others = "".join(
            f", <b>{escape(net)}</b>, the same net taught by labels alone,"
            for net in data["others"]
        )
        pictures.append(
            figure(
                svg,
                "A hard label names one class (grey ground). The teacher "
                f"<b>{escape(data['teacher'])}</b> says more, and more of it shows as the "
                f"temperature T rises; beside it <b>{escape(data['student'])}</b>, taught at "
                f"T = {data['temperature']:g}{others} at the same temperatures. The images are of "
                "the test split, chosen for what stands below them.",
            )
        )
    if svg := soft_label_figures.similarities(data):
        correlations = ", ".join(
            f"{escape(net)} {value:+.2f}"
            for net in soft_labels.nets_of(data)
            if (value := soft_labels.rank_correlation(data, net)) is not None
        )
        tree = (
            " The last panel has the distances in the class tree, which no net has seen. Rank "
            f"correlation of likeness with nearness in the tree: {correlations}."
        )
        pictures.append(
            figure(
                svg,
                "The likeness of classes that soft labels carry: each row is the mean softened "
                "distribution over the test images of one true class. The diagonal is written and "
                f"not coloured: hard labels have nothing but it.{tree if correlations else ''}",
            )
        )
    return "".join(pictures)


def _quantizers_part(
    rows: Sequence[Mapping[str, Any]], nets: Sequence[str], order: Sequence[str]
) -> str:
    keys = {key for row in rows if row["split"] == "quant" for key in row["values"]}
    # One net is shown: the paths of the others look alike, and metrics.jsonl has them.
    named = [net for net in nets if any(key.startswith(f"{net}/") for key in keys)]
    net = named[0] if named else ""
    of = f" of <b>{escape(net)}</b>" if net else ""
    pictures = [
        figure(
            plots.quantizer_paths(rows, operand, net=net, order=order),
            f"The {operand} quantizers{of}: step sizes, scales and ranges, averaged over channels, "
            f"in units of the {operand}. Vertical lines are borders of stages.",
        )
        for operand in ("weight", "input", "output")
    ]
    others = ", ".join(escape(other) for other in named[1:])
    if others:
        pictures.append(quiet(f"Not shown: {others} (metrics.jsonl has them)."))
    return "".join(pictures)


def _net_order(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """Returns the nets of the run, the exported one first."""
    exported = [row["net"] for row in rows if row.get("export") and row.get("net")]
    return list(dict.fromkeys([*exported, *(config.get("nets") or {})]))


def _histogram_part(histograms: Mapping[str, Any], order: Sequence[str]) -> str:
    layers = histograms.get("layers") or {}
    left_out = max(len(layers) - plots.MAX_LAYERS, 0)
    more = f" {left_out} of {len(layers)} layers are left out." if left_out else ""
    return figure(
        plots.histograms(layers, order=order),
        "Weights divided by their step, so that each code sits at its number. Bars: share of the "
        "weights at each code. Lines: density of the float weights, per code; what lies beyond "
        f"the last code is clipped to it.{more}",
    )


@dataclasses.dataclass
class _Page:
    """The parts of the page so far, and what was left out of it because a file is damaged."""

    folder: Path
    parts: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def read(self, name: str, kind: type = dict) -> Any:
        """Returns the content of a file; an empty one where there is none or it is damaged."""
        try:
            return read_json(self.folder / name, kind) or kind()
        except ValueError as error:
            self.left_out.append(escape(str(error)))
            return kind()

    def made(self, what: str, file: str, make: Callable[[], Any], otherwise: Any = "") -> Any:
        """Returns `make()`; `otherwise`, and a note, where the file does not hold what it should.

        JSON has no types, so any of Python's complaints about a value may come.
        """
        try:
            return make()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            self.left_out.append(escape(f"{what}: {file} does not hold what a run writes ({why})."))
            return otherwise

    def add(self, anchor: str, title: str, file: str, make: Callable[[], str]) -> None:
        """Adds a part, unless it is empty."""
        if body := self.made(title, file, make):
            self.parts.append((anchor, title, body))


def render(folder: str | Path) -> str:
    """Returns the page of a run folder as text.

    Files that are absent are left out; what is left out because a file is damaged is said.
    """
    folder = Path(folder)
    page = _Page(folder)
    results, timings, config, run = map(
        page.read, ("results.json", "timings.json", "config.json", "run.json")
    )
    layers = page.read("model/layers.json", list)
    metrics, torn = page.made("Metrics", LOG, lambda: read_log(folder), ([], 0))
    if torn:
        lines = f"{torn:,} of {torn + len(metrics):,} lines are"
        page.left_out.append(f"{LOG}: {lines} damaged and left out of the figures.")

    rows = results.get("rows") or []
    dataset = results.get("dataset") or {}
    add, read = page.add, page.read
    if rows:
        headline = lambda: _headline(rows, dataset.get("test_examples"))
        add("results", "Results", "results.json", headline)
    add("latency", "Latency", "timings.json", lambda: _latency(timings))
    add("curves", "Loss and accuracy", LOG, lambda: _curves_part(metrics))
    soft = read("soft_labels.json")
    add("soft-labels", "Soft and hard labels", "soft_labels.json", lambda: _soft_labels_part(soft))
    paths = lambda: [str(layer.get("path")) for layer in layers]
    order = page.made("Layers", "model/layers.json", paths, [])
    nets = page.made("Nets", "results.json", lambda: _net_order(rows, config), [])
    add("steps", "Step sizes and ranges", LOG, lambda: _quantizers_part(metrics, nets, order))
    histograms = read("model/histograms.json")
    add(
        *("weights", "Weights on the code grid", "model/histograms.json"),
        lambda: _histogram_part(histograms, order),
    )
    add("layers", "Layers", "model/layers.json", lambda: _layers(layers))
    schedule = page.made("Schedule", "config.json", lambda: list(config.get("schedule") or []), [])
    diagnosis = read("diagnosis.json")
    add("quantizers", "Quantizers", "diagnosis.json", lambda: _quantizers(diagnosis, schedule))
    add("time", "Where the time went", "timings.json", lambda: _times(timings, schedule))
    add("run", "Run", "run.json", lambda: _facts(run))
    if config:
        text = escape(json.dumps(config, indent=2, sort_keys=True))
        shown = f"<details><summary>show</summary><pre>{text}</pre></details>"
        add("config", "Config", "config.json", lambda: shown)
    notes = page.made("Notes", "results.json", lambda: _notes(results, config, run), [])
    listed = "".join(f"<li>{note}</li>" for note in notes)
    add("notes", "Read with care", "results.json", lambda: f"<ul>{listed}</ul>")

    title = str(results.get("experiment") or config.get("experiment") or folder.resolve().name)
    subtitle = page.made("Subtitle", "results.json", lambda: _subtitle(rows, dataset))
    warning = ""
    if not rows:
        last = f" Its last logged step is {metrics[-1]['step']}." if metrics else ""
        warning = (
            '<p class="warn">This run has no results yet: it is running, or was interrupted.'
            f"{last} Started again with the same command, it continues.</p>"
        )
    if page.left_out:
        found = "".join(f"<li>{line}</li>" for line in page.left_out)
        warning += f'<div class="warn">Files of this run are damaged:<ul>{found}</ul></div>'
    return document(title, subtitle, warning, page.parts)


def _latency(timings: Mapping[str, Any]) -> str:
    latency = as_records(timings.get("latency"), "model")
    return record_table(latency) if latency else ""


def _times(timings: Mapping[str, Any], schedule: Sequence[str]) -> str:
    def place(name: Any) -> int:
        return schedule.index(name) if name in schedule else 999

    stages = as_records(timings.get("stages"), "stage")
    stages.sort(key=lambda r: place(r.get("stage")))
    said = "Seconds." if stages else ""
    for entry in as_records(timings.get("shared"), "run"):
        names = ", ".join(map(str, sorted(entry.get("stages") or (), key=place)))
        said += f" {names} ran in {entry.get('run', '?')} of the sweep, whose seconds are there."
    return (record_table(stages) if stages else "") + (quiet(safe(said)) if said else "")


def _subtitle(rows: Sequence[Mapping[str, Any]], dataset: Mapping[str, Any]) -> str:
    parts = []
    if dataset.get("name"):
        sizes = [
            f"{dataset[key]:,} {word}"
            for key, word in (("train_examples", "for training"), ("test_examples", "for test"))
            if dataset.get(key)
        ]
        named = safe(dataset["name"])
        parts.append(f"{named} ({escape(', '.join(sizes))})" if sizes else named)
    exported = [row for row in rows if row.get("export")]
    if exported and exported[-1].get("top1") is not None:
        row = exported[-1]
        size = row.get("weight_bytes")
        in_bytes = f" in {count(size)} bytes of weights" if size else ""
        parts.append(f"{safe(row.get('net', 'net'))}: {percent(row['top1'])} % top-1{in_bytes}")
    return ". ".join(parts) + ("." if parts else "")


def write(workdir: str | Path) -> Path:
    """Writes `report.html` of a run folder and returns its path; a reader sees the old or the new.

    Args:
        workdir: a run folder; any of its files may be missing.

    Raises:
        ValueError: there is no such folder. Damaged files are said on the page.
    """
    folder = Path(workdir)
    if not folder.is_dir():
        raise ValueError(
            f"workdir is {str(workdir)!r}, which is not a folder; give the --workdir of a run."
        )
    return replace_file(folder / "report.html", render(folder).encode())
