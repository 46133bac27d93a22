"""Learning curves over seeds: mean and band at the steps that every seed of an arm has logged."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax.record.log_index import Lines, index_log, read_lines
from qkd_jax.record.metrics_log import FILE
from qkd_jax.report.arms import LARGEST, Arm
from qkd_jax.report.plots import stage_spans

MAX_POINTS = 400
# {split: the value that is drawn of it}
CURVES = {"train": "loss", "test": "top1"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One net of an arm in one measure.

    Attributes:
        steps: [points], ascending, counted over the whole schedule.
        mean: [points], over the seeds.
        half: [points], half width of the 95 % t interval; None for one seed.
        seeds: seeds in every point.
    """

    steps: np.ndarray
    mean: np.ndarray
    half: np.ndarray | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Curves:
    """Curves of several arms.

    Attributes:
        found: {"loss" or "top1": {net: {arm's label: its curve}}}.
        spans: {arm's label: its stages, as `plots.stage_spans`}.
        notes: what was left out.
    """

    found: Mapping[str, Mapping[str, Mapping[str, Curve]]]
    spans: Mapping[str, list[tuple[str, int, int]]]
    notes: tuple[str, ...]


def read_curves(arms: Sequence[Arm]) -> Curves:
    """Reads the curves from the runs' metrics.jsonl; a damaged log is left out and said."""
    notes: list[str] = []
    found: dict[str, dict[str, dict[str, Curve]]] = {name: {} for name in CURVES.values()}
    spans = {}
    for arm in arms:
        indices = _indices(arm, notes)
        if not indices:
            continue
        rows = []
        for split, name in CURVES.items():
            picked, first_rows = _pick(arm, indices, split, notes)
            rows += first_rows
            curves, dropped = _curves(picked, name)
            for net, curve in curves.items():
                found[name].setdefault(net, {})[arm.label] = curve
            missing = _missing(indices, split)
            if missing or dropped:
                notes.append(
                    f"Curves of {arm.label}, {split}: {missing + dropped:,} steps that some of "
                    "its seeds have not, or not as numbers, are left out."
                )
        spans[arm.label] = stage_spans(rows)
    return Curves(found, spans, tuple(notes))


def _indices(arm: Arm, notes: list[str]) -> dict[int, dict[str, Lines]]:
    """Returns {seed: {split: where its lines are}}; seeds without a log are left out."""
    indices, absent = {}, []
    for seed, run in arm.runs.items():
        try:
            index, damaged = index_log(run.path)
        except (ValueError, OSError) as error:
            notes.append(f"{run.name}: no curve, for its log cannot be read: {error}")
            continue
        if damaged:
            notes.append(f"{run.name}: {damaged:,} lines of {FILE} are damaged and left out.")
        if any(split in index for split in CURVES):
            indices[seed] = index
        else:
            absent.append(run.name)
    if absent:
        notes.append(f"No learning curve of: {', '.join(absent)}.")
    return indices


def _common(indices: Mapping[int, Mapping[str, Lines]], split: str) -> np.ndarray:
    """The steps that every seed has logged, ascending."""
    none = Lines(np.empty(0, np.int64), np.empty(0, np.int64))
    each = [np.unique(index.get(split, none).steps) for index in indices.values()]
    common = each[0]
    for steps in each[1:]:
        common = common[np.isin(common, steps, assume_unique=True)]
    return common


def _missing(indices: Mapping[int, Mapping[str, Lines]], split: str) -> int:
    """How many steps some of the seeds have logged and some have not."""
    each = [index[split].steps for index in indices.values() if split in index]
    return len(np.unique(np.concatenate(each))) - len(_common(indices, split)) if each else 0


def _pick(
    arm: Arm, indices: Mapping[int, Mapping[str, Lines]], split: str, notes: list[str]
) -> tuple[dict[int, dict[str, dict[int, float]]], list[dict[str, Any]]]:
    """Reads each k-th of the common steps: {seed: {"net/value": {step: number}}}, rows of one."""
    common = _common(indices, split)
    wanted = common[:: max(math.ceil(len(common) / MAX_POINTS), 1)]
    wanted = np.union1d(wanted, common[-1:])
    picked: dict[int, dict[str, dict[int, float]]] = {}
    first_rows: list[dict[str, Any]] = []
    for seed, index in indices.items():
        values: dict[str, dict[int, float]] = {}
        if split in index:
            lines, run = index[split], arm.runs[seed]
            found = read_lines(run.path, lines.offsets[np.isin(lines.steps, wanted)])
            if damaged := found.count(None):
                notes.append(f"{run.name}: {damaged:,} lines of {FILE}, {split}, are damaged.")
            for row in found:
                if row is None:
                    continue
                if not picked:
                    first_rows.append(row)
                for name, value in row["values"].items():
                    if value is not None and abs(value) <= LARGEST:
                        values.setdefault(name, {})[row["step"]] = float(value)
        picked[seed] = values
    return picked, first_rows


def _curves(
    picked: Mapping[int, Mapping[str, Mapping[int, float]]], name: str
) -> tuple[dict[str, Curve], int]:
    """Returns {net: curve} of a value, and how many points not every seed has."""
    from scipy.special import stdtrit

    names = dict.fromkeys(key for values in picked.values() for key in values)
    curves, dropped = {}, 0
    for key in names:
        net, _, value = key.rpartition("/")
        if value != name or "/" in net:
            continue
        of_seed = [values.get(key, {}) for values in picked.values()]
        every = sorted({step for points in of_seed for step in points})
        steps = [step for step in every if all(step in points for points in of_seed)]
        dropped += len(every) - len(steps)
        if not steps:
            continue
        table = np.array([[points[step] for step in steps] for points in of_seed])
        half = None
        if len(table) > 1:
            width = float(stdtrit(len(table) - 1, 0.975)) / math.sqrt(len(table))
            half = table.std(axis=0, ddof=1) * width
        curves[net] = Curve(np.array(steps), table.mean(axis=0), half, len(table))
    return curves, dropped
