"""Figures of soft labels, drawn from the dict that `soft_labels.collect` makes."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax.report import svg
from qkd_jax.report.soft_labels import nets_of, off_diagonal, softmax

SHOWN = 12  # classes that a panel has room for
MAX_PIXELS = 1 << 22  # of a picture


def distributions(data: Mapping[str, Any]) -> str | None:
    """Draws the softened distributions of all nets on each chosen image; None without images."""
    images = data.get("images") or []
    if not images:
        return None
    nets = nets_of(data)
    temperatures, names = data["temperatures"], data["names"]
    with svg.style():
        figure, grid = svg.figure(
            len(images),
            1 + len(temperatures),
            height=1.15,
            top=0.75,
            bottom=0.95,
            gap=(0.62, 0.32),
        )
        handles: dict[str, Any] = {}
        for line, image in enumerate(images):
            _thumbnail(grid[line, 0], image, names)
            classes = _classes(image, data)
            for column, temperature in enumerate(temperatures):
                axes = grid[line, 1 + column]
                for number, net in enumerate(nets):
                    shares = 100 * softmax(image["logits"][net], temperature)[classes]
                    width = 0.84 / len(nets)
                    xs = np.arange(len(classes)) + (number - (len(nets) - 1) / 2) * width
                    bars = axes.bar(xs, shares, width, color=svg.COLORS[number], linewidth=0)
                    handles.setdefault(net, bars)
                if line == 0:
                    taught = " (taught)" if temperature == data["temperature"] else ""
                    axes.set_title(f"T = {temperature:g}{taught}", fontsize=9)
                axes.set_ylim(bottom=0)
                axes.locator_params(axis="y", nbins=4)
                axes.grid(axis="x", visible=False)
                last = line == len(images) - 1
                _class_ticks(axes, classes, names, image["label"], last or len(names) > SHOWN)
                axes.tick_params(axis="y", labelsize=7.5)
        svg.name_axes(figure, "class; probability in %", inches=0.06)
        svg.legend(figure, list(handles.values()), list(handles), inches=0.05)
        return svg.text(figure, "softened distributions of teacher and students on test images")


def _classes(image: Mapping[str, Any], data: Mapping[str, Any]) -> np.ndarray:
    """Returns all classes in the tree's order or, of many, those likeliest to the teacher.

    The true class and what each net answers are among them in any case.
    """
    order = np.asarray(data.get("order") or range(len(data["names"])))
    if len(order) <= SHOWN:
        return order
    likeliest = np.argsort(-np.asarray(image["logits"][data["teacher"]]), kind="stable")
    answers = [int(np.argmax(logits)) for logits in image["logits"].values()]
    wanted = dict.fromkeys([image["label"], *answers, *likeliest.tolist()])
    chosen = set(list(wanted)[:8])
    return np.asarray([label for label in likeliest.tolist() if label in chosen])


def _short(names: Sequence[str], classes: np.ndarray) -> list[str]:
    return [names[c] if len(names[c]) <= 11 else f"{names[c][:10]}." for c in classes]


def _class_ticks(
    axes: Any, classes: np.ndarray, names: Sequence[str], label: int, named: bool
) -> None:
    axes.set_xticks(range(len(classes)))
    shown = _short(names, classes)
    short = all(len(name) <= 2 for name in shown)
    axes.set_xticklabels(
        shown if named else [""] * len(shown),
        rotation=0 if short else 60,
        ha="center" if short else "right",
        rotation_mode="anchor",
        fontsize=8 if short else 7,
    )
    axes.tick_params(axis="x", length=0, pad=2)
    for shown_class, tick in zip(classes, axes.get_xticklabels(), strict=True):
        if shown_class == label:
            tick.set_fontweight("bold")
            tick.set_color(svg.INK)
    # The true class stands on a grey ground in each panel, named or not.
    where = np.flatnonzero(classes == label)
    if len(where):
        axes.axvspan(where[0] - 0.5, where[0] + 0.5, color="#eceff3", linewidth=0, zorder=0)
    axes.set_xlim(-0.6, len(classes) - 0.4)


def _thumbnail(axes: Any, image: Mapping[str, Any], names: Sequence[str]) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(image["png"])), formats=("PNG",)) as opened:
            size = opened.size
            pixels = np.asarray(opened) if math.prod(size) <= MAX_PIXELS else None
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"a picture is no PNG file ({error})") from error
    if pixels is None:
        raise ValueError(f"a picture has {size[0]} x {size[1]} pixels; at most {MAX_PIXELS:,}")
    axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    svg.bare(axes)
    axes.set_anchor("C")
    words = image["why"].split()
    half = (len(words) + 1) // 2
    axes.set_title(names[image["label"]], fontsize=8.5, loc="center", fontweight="bold", pad=2)
    text = f"{' '.join(words[:half])}\n{' '.join(words[half:])}"
    axes.set_xlabel(text, fontsize=7, color=svg.QUIET, labelpad=2)


def similarities(data: Mapping[str, Any]) -> str | None:
    """Draws each net's mean softened distribution by true class, beside the tree's distances.

    None where there are no matrices.
    """
    matrices = data.get("similarity")
    if not matrices:
        return None
    order, names = np.asarray(data["order"]), data["names"]
    shown = [(net, np.asarray(matrices[net])) for net in nets_of(data)]
    panels = len(shown) + ("distance" in data)
    few = len(order) <= SHOWN
    # A tick a group of five would crowd 100 classes' axes too: many classes go unnamed.
    labels = _short(names, order) if few else []
    across = min(panels, 2)
    tall = math.ceil(panels / across)
    with svg.style():
        figure, grid = svg.figure(
            tall, across, height=3.6, top=0.45, bottom=0.95 if few else 0.3, gap=(1.25, 1.1)
        )
        axes_list = list(grid.flat)
        largest = max(off_diagonal(matrix).max() for _, matrix in shown) or 1.0
        for axes, (net, matrix) in zip(axes_list, shown, strict=False):
            table = 100 * matrix[np.ix_(order, order)]
            _matrix(axes, table, labels, "Blues", 100 * largest, ".1f")
            axes.set_title(f"{net}, T = {data['temperature']:g}, in %", fontsize=9)
        if "distance" in data:
            axes = axes_list[len(shown)]
            table = np.asarray(data["distance"], float)[np.ix_(order, order)]
            _matrix(axes, table, labels, "Oranges", table.max() or 1.0, ".0f")
            axes.set_title("distance in the class tree (height of the common ancestor)", fontsize=9)
        for axes in axes_list[panels:]:
            axes.set_visible(False)
        return svg.text(figure, "mean softened distribution by true class, and the class tree")


def _matrix(
    axes: Any, table: np.ndarray, labels: Sequence[str], colors: str, largest: float, form: str
) -> None:
    # The diagonal would take the whole scale: it is written, and left white.
    values = np.ma.masked_where(np.eye(len(table), dtype=bool), table)
    axes.imshow(values, cmap=colors, vmin=0, vmax=largest, interpolation="nearest", aspect="auto")
    svg.bare(axes)
    axes.tick_params(length=0, labelsize=7.5)
    if not labels:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    short = all(len(label) <= 2 for label in labels)
    axes.set_xticks(
        range(len(labels)),
        labels,
        rotation=0 if short else 40,
        ha="center" if short else "right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(labels)), labels)
    for (row, column), value in np.ndenumerate(table):
        dark = row != column and value > 0.6 * largest
        color = "white" if dark else svg.QUIET if row == column else svg.INK
        axes.text(
            column, row, format(value, form), ha="center", va="center", fontsize=6.5, color=color
        )
