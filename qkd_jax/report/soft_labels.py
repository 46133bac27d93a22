"""What soft labels say that hard ones do not: the numbers behind two figures, and the figures.

`collect` makes a plain dict (soft_labels.json of a run folder) from images, labels and logits;
`distributions` and `similarities` draw it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax.report import plots

__all__ = ["collect", "distributions", "rank_correlation", "similarities"]

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
SHOWN = 12  # classes that a panel has room for
MATRIX = 200  # classes up to which the matrices are kept
COLORS = plots.COLORS


def softmax(logits: Any, temperature: float) -> np.ndarray:
    """The distribution over the last axis at a temperature, float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def collect(
    images: np.ndarray,
    labels: np.ndarray,
    logits: Mapping[str, np.ndarray],
    *,
    temperature: float,
    names: Sequence[str] = (),
    order: Sequence[int] = (),
    distance: np.ndarray | None = None,
    count: int = 6,
) -> dict[str, Any]:
    """The numbers of the figures, as plain data.

    Args:
        images: uint8 [examples, height, width, 1 or 3], of the test split.
        labels: int [examples].
        logits: {net: [examples, classes]}; the teacher comes first, the student second, after them
            nets to compare with.
        temperature: at which the student was taught.
        names: of the classes; their numbers by default.
        order: the classes in the order in which the matrices show them.
        distance: [classes, classes] by a class tree, if there is one.
        count: how many images are chosen.

    Returns:
        "teacher", "student", "others", "temperature", "temperatures", "names", "images" (row,
        label, why it was chosen, PNG, logits by net) and, for up to 200 classes, "similarity"
        ({net: mean softened distribution by true class}, at `temperature`), "order", "distance".
    """
    from qkd_jax.data.record_writer import png

    nets = list(logits)
    teacher, student = nets[:2]
    classes = logits[teacher].shape[1]
    chosen = choose(logits[teacher], logits[student], labels, temperature, count)
    found: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "others": nets[2:],
        "temperature": float(temperature),
        "temperatures": sorted({*TEMPERATURES, float(temperature)})[: len(TEMPERATURES) + 1],
        "names": [str(name) for name in names] or [str(label) for label in range(classes)],
        "images": [
            {
                "row": row,
                "label": int(labels[row]),
                "why": why,
                "png": base64.b64encode(png(images[row])).decode(),
                "logits": {n: [round(float(z), 4) for z in logits[n][row]] for n in nets},
            }
            for row, why in chosen
        ],
    }
    if classes <= MATRIX:
        found["order"] = [int(label) for label in order] or list(range(classes))
        found["similarity"] = {}
        for net in nets:
            soft = softmax(logits[net], temperature)
            sums = np.zeros((classes, classes))
            np.add.at(sums, labels, soft)
            counts = np.maximum(np.bincount(labels, minlength=classes), 1)
            found["similarity"][net] = np.round(sums / counts[:, None], 6).tolist()
        if distance is not None:
            found["distance"] = np.asarray(distance).tolist()
    return found


def choose(
    teacher: np.ndarray, student: np.ndarray, labels: np.ndarray, temperature: float, count: int
) -> list[tuple[int, str]]:
    """Rows that between them show the kinds of case there are, each of another class if possible.

    In turn: an image whose soft label, though right, says most about other classes; one that the
    teacher is sure of; one that the teacher alone gets right; one that the student alone does; one
    that both get wrong.
    """
    soft = softmax(teacher, temperature)
    entropy = -np.sum(soft * np.log(np.maximum(soft, 1e-300)), axis=1)
    right, learnt = teacher.argmax(1) == labels, student.argmax(1) == labels
    rows = np.arange(len(labels))
    kinds = [
        ("the teacher sees likeness", rows[right & learnt], -entropy),
        ("the teacher is sure", rows[right & learnt], entropy),
        ("the teacher alone is right", rows[right & ~learnt], -entropy),
        ("the student alone is right", rows[~right & learnt], -entropy),
        ("both are wrong", rows[~right & ~learnt], -entropy),
    ]
    queues = [
        (why, among[np.argsort(key[among], kind="stable")].tolist()) for why, among, key in kinds
    ]
    found: list[tuple[int, str]] = []
    while len(found) < min(count, len(labels)) and any(queue for _, queue in queues):
        for why, queue in queues:
            taken = {int(labels[row]) for row, _ in found}
            fresh = next((row for row in queue if int(labels[row]) not in taken), None)
            row = fresh if fresh is not None else queue[0] if queue else None
            if row is not None and len(found) < count:
                queue.remove(row)
                found.append((row, why))
    order = [why for why, _, _ in kinds]
    return sorted(found, key=lambda item: order.index(item[1]))


def distributions(data: Mapping[str, Any]) -> str | None:
    """Teacher's and students' softened distributions on each chosen image; None without images."""
    images = data.get("images") or []
    if not images:
        return None
    nets = nets_of(data)
    temperatures, names = data["temperatures"], data["names"]
    with plots._context():
        figure, grid = plots._figure(
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
            for place, temperature in enumerate(temperatures):
                axes = grid[line, 1 + place]
                for number, net in enumerate(nets):
                    shares = 100 * softmax(image["logits"][net], temperature)[classes]
                    width = 0.84 / len(nets)
                    at = np.arange(len(classes)) + (number - (len(nets) - 1) / 2) * width
                    bars = axes.bar(at, shares, width, color=COLORS[number], linewidth=0)
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
        figure.text(
            0.5,
            0.06 / figure.get_size_inches()[1],
            "class; probability in %",
            ha="center",
            va="bottom",
            fontsize=9,
        )
        plots._legend(figure, list(handles.values()), list(handles), inches=0.05)
        return plots._svg(figure, "softened distributions of teacher and students on test images")


def nets_of(data: Mapping[str, Any]) -> list[str]:
    """The nets in the order in which all figures have them: a JSON file sorts its keys."""
    return [data["teacher"], data["student"], *data["others"]]


def _classes(image: Mapping[str, Any], data: Mapping[str, Any]) -> np.ndarray:
    """All classes in the tree's order or, of many, those that the teacher holds likeliest.

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


def _class_ticks(
    axes: Any, classes: np.ndarray, names: Sequence[str], label: int, named: bool
) -> None:
    axes.set_xticks(range(len(classes)))
    shown = [names[c] if len(names[c]) <= 11 else f"{names[c][:10]}." for c in classes]
    short = all(len(name) <= 2 for name in shown)
    axes.set_xticklabels(
        shown if named else [""] * len(shown),
        rotation=0 if short else 60,
        ha="center" if short else "right",
        rotation_mode="anchor",
        fontsize=8 if short else 7,
    )
    axes.tick_params(axis="x", length=0, pad=2)
    for place, tick in enumerate(axes.get_xticklabels()):
        if classes[place] == label:
            tick.set_fontweight("bold")
            tick.set_color(plots.INK)
    # The true class stands on a grey ground in each panel, named or not.
    where = np.flatnonzero(classes == label)
    if len(where):
        axes.axvspan(where[0] - 0.5, where[0] + 0.5, color="#eceff3", linewidth=0, zorder=0)
    axes.set_xlim(-0.6, len(classes) - 0.4)


def _thumbnail(axes: Any, image: Mapping[str, Any], names: Sequence[str]) -> None:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(image["png"]))) as opened:
        pixels = np.asarray(opened)
    axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_anchor("C")
    words = image["why"].split()
    half = (len(words) + 1) // 2
    axes.set_title(names[image["label"]], fontsize=8.5, loc="center", fontweight="bold", pad=2)
    text = f"{' '.join(words[:half])}\n{' '.join(words[half:])}"
    axes.set_xlabel(text, fontsize=7, color=plots.QUIET, labelpad=2)


def similarities(data: Mapping[str, Any]) -> str | None:
    """Mean softened distribution by true class, of each net, beside the tree's distances.

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
    labels = [names[c] if len(names[c]) <= 11 else f"{names[c][:10]}." for c in order]
    across = min(panels, 2)
    tall = math.ceil(panels / across)
    with plots._context():
        figure, grid = plots._figure(
            tall, across, height=3.6, top=0.45, bottom=0.95 if few else 0.3, gap=(1.25, 1.1)
        )
        axes_list = list(grid.flat)
        largest = max(_off_diagonal(matrix).max() for _, matrix in shown) or 1.0
        for axes, (net, matrix) in zip(axes_list, shown, strict=False):
            table = 100 * matrix[np.ix_(order, order)]
            _matrix(axes, table, labels if few else [], "Blues", 100 * largest, ".1f")
            axes.set_title(f"{net}, T = {data['temperature']:g}, in %", fontsize=9)
        if "distance" in data:
            axes = axes_list[len(shown)]
            table = np.asarray(data["distance"], float)[np.ix_(order, order)]
            _matrix(axes, table, labels if few else [], "Oranges", table.max() or 1.0, ".0f")
            axes.set_title("distance in the class tree (height of the common ancestor)", fontsize=9)
        for axes in axes_list[panels:]:
            axes.set_visible(False)
        return plots._svg(figure, "mean softened distribution by true class, and the class tree")


def _matrix(
    axes: Any, table: np.ndarray, labels: Sequence[str], colors: str, largest: float, form: str
) -> None:
    # The diagonal would take the whole scale: it is written, and left white.
    values = np.ma.masked_where(np.eye(len(table), dtype=bool), table)
    axes.imshow(values, cmap=colors, vmin=0, vmax=largest, interpolation="nearest", aspect="auto")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
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
        color = "white" if dark else plots.QUIET if row == column else plots.INK
        axes.text(
            column, row, format(value, form), ha="center", va="center", fontsize=6.5, color=color
        )


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


def rank_correlation(data: Mapping[str, Any], net: str) -> float | None:
    """Spearman's correlation of a net's similarities with the tree's nearness, off the diagonal.

    None without a tree, or where one of both is constant.
    """
    from scipy.stats import rankdata

    if "distance" not in data:
        return None
    near = rankdata(-_off_diagonal(np.asarray(data["distance"], float)))
    like = rankdata(_off_diagonal(np.asarray(data["similarity"][net], float)))
    if near.std() == 0 or like.std() == 0:
        return None
    return float(np.corrcoef(near, like)[0, 1])
