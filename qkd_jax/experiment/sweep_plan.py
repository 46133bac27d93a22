"""The runs of a sweep, read completely before the first of them begins."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax import weights
from qkd_jax.data import DATASETS, NotPreparedError
from qkd_jax.experiment.config_checks import check_frame
from qkd_jax.experiment.reading import check_sources, load_data, read
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.settings import Settings, resolve
from qkd_jax.experiment.shared_prefix import branch_points, prefix_keys
from qkd_jax.experiment.sweep_list import Entry
from qkd_jax.record.folder import FREE_FIELDS, RunFolder
from qkd_jax.record.trackers import check_packages


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        entry: its name and overrides.
        config: the resolved config.
        stages: its schedule.
        points: of `shared_prefix.branch_points`: what it shares with other runs.
        basis: SHA-256 of everything that the run depends on, its last key.
    """

    entry: Entry
    config: dict[str, Any]
    stages: tuple[Stage, ...]
    points: tuple[tuple[int, str], ...] = ()
    basis: str = ""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.entry.name

    @property
    def steps(self) -> int:
        """Global steps of its schedule."""
        return self.end_of(len(self.stages))

    def end_of(self, count: int) -> int:
        """Global steps of its first stages."""
        return sum(stage.steps for stage in self.stages[:count])


def plan_runs(
    entries: Sequence[Entry],
    config_of: Callable[[Entry], Any],
    *,
    folder: Path | None = None,
    only_look: bool = False,
) -> list[Planned]:
    """Reads the config of every run, and what runs share.

    Configs that differ in the seed and in the files that nets start from are checked once.

    Args:
        entries: the runs.
        config_of: returns the config of an entry.
        folder: of the sweep; the files that a run starts from are not asked for once it has begun.
        only_look: whether nothing will run, so that data need not be here.

    Raises:
        ValueError: a mistake in the config of a run, which is named; a run that has begun with
            another config, though its overrides are the same.
    """
    planned: list[Planned] = []
    checked: dict[str, Settings] = {}
    data: dict[str, tuple[Any, str]] = {}
    for entry in entries:
        try:
            plain = resolve(config_of(entry))
            settings = _read(plain, checked, data, only_look=only_look)
            if not only_look:
                check_packages(plain["track"]["trackers"])
            begun = folder is not None and (folder / entry.name / "config.json").exists()
            if not begun:
                check_sources(settings)
            elif folder is not None and not only_look:  # a run that is done too
                target = RunFolder(folder / entry.name, create=False)
                target.check_config(plain, ignore=FREE_FIELDS)
        except ValueError as error:
            raise ValueError(f"run {entry.name!r} of the sweep: {error}") from error
        planned.append(Planned(entry, plain, settings.stages))
    return _with_points(planned, [_fingerprint(run.config, data) for run in planned])


def _read(
    plain: dict[str, Any],
    checked: dict[str, Settings],
    data: dict[str, tuple[Any, str]],
    *,
    only_look: bool,
) -> Settings:
    check_frame(plain)
    key = _data_key(plain)
    if key not in data:
        dataset = None
        if plain["data"]["name"] in DATASETS:
            try:
                dataset = load_data(plain)
            except NotPreparedError:
                if not only_look:
                    raise
        data[key] = (dataset, dataset.fingerprint if dataset is not None else "")
    dataset, _ = data[key]
    examples = None if dataset is None else len(dataset.train_images)
    structure = json.dumps([_without_seed(plain), examples], sort_keys=True)
    if structure not in checked:
        checked[structure] = read(plain, dataset)
    return dataclasses.replace(checked[structure], config=plain)


def _data_key(plain: Mapping[str, Any]) -> str:
    return json.dumps([plain["data"], plain["seed"]], sort_keys=True)


def _fingerprint(plain: Mapping[str, Any], data: Mapping[str, tuple[Any, str]]) -> str:
    return data[_data_key(plain)][1]


def _without_seed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what changes no check but those of `check_frame` and `check_sources`."""
    nets = {
        name: {**fields, "init_from": "(a file)"}
        if isinstance(fields, Mapping) and _is_file(fields.get("init_from"), plain["nets"])
        else fields
        for name, fields in plain["nets"].items()
    }
    return {**plain, "seed": 0, "nets": nets}


def _is_file(source: Any, nets: Mapping[str, Any]) -> bool:
    return isinstance(source, str) and source not in nets and weights.is_source(source)


def _with_points(planned: list[Planned], fingerprints: list[str]) -> list[Planned]:
    # A fingerprint is unknown where the data are not here; runs of one data set share one then.
    keys = {
        run.name: prefix_keys(run.config, run.stages, fingerprint)
        for run, fingerprint in zip(planned, fingerprints, strict=True)
    }
    points = branch_points(keys, {run.name: run.stages for run in planned})
    return [
        dataclasses.replace(run, points=tuple(points[run.name]), basis=keys[run.name][-1])
        for run in planned
    ]
