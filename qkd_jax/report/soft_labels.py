"""The numbers behind the figures of soft labels, which carry more than hard ones do.

`collect` makes a plain dict (soft_labels.json of a run folder) from images, labels and logits;
`soft_label_figures` draws it.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax.data.record_writer import png

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
MATRIX = 200  # classes up to which the matrices are kept


def softmax(logits: Any, temperature: float) -> np.ndarray:
    """Returns the distribution over the last axis at a temperature, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def collect(
    images: Any,
    labels: np.ndarray,
    logits: Mapping[str, np.ndarray],
    *,
    temperature: float,
    names: Sequence[str] = (),
    order: Sequence[int] = (),
    distance: np.ndarray | None = None,
    count: int = 6,
) -> dict[str, Any]:
    """Collects the numbers of the figures as plain data.

    Args:
        images: uint8 [examples, height, width, 1 or 3], of the test split, streamed or an array.
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
    nets = list(logits)
    teacher, student = nets[:2]
    classes = logits[teacher].shape[1]
    chosen = choose(logits[teacher], logits[student], labels, temperature, count)
    data: dict[str, Any] = {
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
        data["order"] = [int(label) for label in order] or list(range(classes))
        data["similarity"] = {}
        for net in nets:
            soft = softmax(logits[net], temperature)
            sums = np.zeros((classes, classes))
            np.add.at(sums, labels, soft)
            counts = np.maximum(np.bincount(labels, minlength=classes), 1)
            data["similarity"][net] = np.round(sums / counts[:, None], 6).tolist()
        if distance is not None:
            data["distance"] = np.asarray(distance).tolist()
    return data


def choose(
    teacher: np.ndarray, student: np.ndarray, labels: np.ndarray, temperature: float, count: int
) -> list[tuple[int, str]]:
    """Chooses rows that show the kinds of case there are, each of another class if possible.

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
    chosen: list[tuple[int, str]] = []
    while len(chosen) < min(count, len(labels)) and any(queue for _, queue in queues):
        for why, queue in queues:
            shown = {int(labels[row]) for row, _ in chosen}
            unseen = [row for row in queue if int(labels[row]) not in shown]
            if queue and len(chosen) < count:
                row = (unseen or queue)[0]
                queue.remove(row)
                chosen.append((row, why))
    order = [why for why, _, _ in kinds]
    return sorted(chosen, key=lambda item: order.index(item[1]))


def nets_of(data: Mapping[str, Any]) -> list[str]:
    """Returns the nets in the order of all figures, which JSON's sorted keys do not keep."""
    return [data["teacher"], data["student"], *data["others"]]


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Returns the entries of a square matrix that are not on its diagonal."""
    return matrix[~np.eye(len(matrix), dtype=bool)]


def rank_correlation(data: Mapping[str, Any], net: str) -> float | None:
    """Returns Spearman's correlation of a net's similarities with nearness in the class tree.

    The diagonal does not count. None without a tree, or where one of both is constant.
    """
    from scipy.stats import rankdata

    if "distance" not in data:
        return None
    near = rankdata(-off_diagonal(np.asarray(data["distance"], float)))
    like = rankdata(off_diagonal(np.asarray(data["similarity"][net], float)))
    if near.std() == 0 or like.std() == 0:
        return None
    return float(np.corrcoef(near, like)[0, 1])
