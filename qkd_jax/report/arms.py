"""A folder of runs, read: which of them are seeds of one arm, and what is wrong with the others.

Runs whose configs agree in all but `seed` and the fields that reach no number are seeds of one arm.
Files are read and never written or locked: a run that is alive goes on.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.record.folder import FREE_FIELDS, config_fields
from qkd_jax.record.json_files import read_json
from qkd_jax.record.log_index import last_rows

LARGEST = 1e100  # whose squares are numbers too
MEASURES = ("top1", "severity", "loss", "agreement")
COSTS = ("weight_bytes", "bit_operations")
# What no run measures outside of these: a share given in percent, a negative size.
_RANGES = {"top1": (0, 1), "agreement": (0, 1), **{cost: (0, LARGEST) for cost in COSTS}}
# What of a config reaches no number of results.json: that, and what is logged how often.
_FREE = ("seed", "log", *FREE_FIELDS)

_DIRTY = " with uncommitted changes"

RowKey = tuple[str, str]
"""(net, method); a method that comes twice for a net is "method #2" the second time."""


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """A finished run.

    Attributes:
        name: of its folder.
        path: its folder.
        seed: its seed.
        fields: its config as {"a.b": value}, without the seed and fields that reach no number.
        rows: {(net, method): row of results.json}, in order.
        experiment: "" or what results.json calls it.
        class_examples: test images of each class; empty where it is not known.
        data: fingerprint of its data, "" where it is not known.
        environment: {"code", "devices", "processor"}: on what it was made.
    """

    name: str
    path: Path
    seed: int
    fields: Mapping[str, Any]
    rows: Mapping[RowKey, Mapping[str, Any]]
    experiment: str
    class_examples: tuple[int, ...]
    data: str
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds alone: {seed: run}, ascending."""

    label: str
    runs: Mapping[int, SeedRun]


@dataclasses.dataclass(frozen=True)
class RunsFolder:
    """What a folder of runs holds.

    Attributes:
        path: the folder.
        arms: its arms, in the order of sweep.json, else of their first runs' names.
        notes: what a reader of the comparison must know, a sentence each.
    """

    path: Path
    arms: tuple[Arm, ...]
    notes: tuple[str, ...]


def read_runs(folder: str | Path, *, state_of: Callable[[Path], str] | None = None) -> RunsFolder:
    """Reads the runs that lie in a folder, and `sweep.json` where there is one.

    Args:
        folder: the folder; a run is a folder in it that has a config.json.
        state_of: says how far a run is that is not finished, or not there; by default its last
            logged step.

    Raises:
        ValueError: there is no finished run; runs of one seed are over different data; two runs of
            one config and seed have different results.
    """
    folder, state_of = Path(folder), state_of or _state
    notes: list[str] = []
    found, unfinished = [], []
    planned, config = _planned(folder, notes)
    place = {name: number for number, name in enumerate(planned)}
    inside = sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: (place.get(path.name, len(place)), _natural(path.name), path.name),
    )
    runs = [path for path in inside if (path / "config.json").exists()]
    for path in runs:
        try:
            run = _read_run(path)
        except (ValueError, OSError) as error:
            notes.append(f"Run {path.name} is left out, its files are damaged: {error}")
            continue
        if run is None:
            unfinished.append(f"{path.name} ({state_of(path)})")
        else:
            found.append(run)
    there = {path.name for path in runs}
    unfinished += [f"{n} ({state_of(folder / n)})" for n in planned if n not in there]
    if unfinished:
        notes.append(f"Not finished, so not in any number: {', '.join(unfinished)}.")
    for path in inside:
        if path not in runs and any((p / "config.json").exists() for p in path.glob("*")):
            notes.append(f"{path.name}/ holds runs too; those of one folder are compared, not it.")
    if not found:
        state = " ".join(notes) or "No folder in it has a config.json."
        raise ValueError(
            f"{folder} has neither a config.json of its own nor a finished run in it. {state} Give "
            "the --workdir of a run, or a folder of runs of which one at least is finished."
        )
    _check_data(found)
    arms = _arms(found, notes, config or folder.resolve().name)
    notes += [*_seeds(arms), *_environments(found)]
    unknown = [run.name for run in found if not run.data]
    if unknown:
        notes.append(f"Nothing says on which data these were made: {', '.join(unknown)}.")
    return RunsFolder(folder, arms, tuple(notes))


def _natural(name: str) -> list[tuple[int, float, str]]:
    """A key that puts w10 behind w9, and lr-0.1 behind lr-0.05."""
    parts = re.findall(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)|([^0-9]+)", name)
    return [(0, float(number), "") if number else (1, 0, text) for number, text in parts]


def _planned(folder: Path, notes: list[str]) -> tuple[list[str], str]:
    """Names of the runs that a sweep wants, and of its config: "qkd" of "configs/qkd.py:a=b"."""
    try:
        sweep = read_json(folder / "sweep.json") or {}
        config = Path(str(sweep.get("config") or "").partition(":")[0]).stem
        names = [run["name"] for run in sweep.get("runs") or []]
        for name in names:
            checks.name(f"a run of {folder / 'sweep.json'}", name)
        return names, config
    except (AttributeError, KeyError, TypeError):
        why = f"{folder / 'sweep.json'} does not hold the runs of a sweep"
    except (ValueError, OSError) as error:
        why = str(error)
    notes.append(f"It is not known which runs were planned: {why}")
    return [], ""


def _state(path: Path) -> str:
    """How far an unfinished run has come."""
    rows = []
    with contextlib.suppress(ValueError, OSError):
        rows = last_rows(path)
    if rows:
        return f"last logged step {rows[-1]['step']:,}, stage {rows[-1]['stage']}"
    return "no step logged" if path.exists() else "not begun"


def _read_run(path: Path) -> SeedRun | None:
    """Returns a run; None for one that is not finished.

    Raises:
        ValueError: its files do not hold what a run writes.
    """
    config = read_json(path / "config.json")
    results = read_json(path / "results.json")
    if config is None or results is None:
        return None
    record = read_json(path / "run.json") or {}
    try:
        seed = config["seed"]
        if type(seed) is not int or results.get("seed", seed) != seed:
            raise TypeError(f"seed {results.get('seed')!r:.80}, {seed!r:.80} in config.json")
        examples = (results.get("dataset") or {}).get("class_examples") or []
        if not all(type(count) is int and 0 <= count <= LARGEST for count in examples):
            raise TypeError("class_examples holds no counts")
        return SeedRun(
            name=path.name,
            path=path,
            seed=seed,
            fields=_fields(config, seed),
            rows=_rows(results["rows"], len(examples)),
            experiment=str(results.get("experiment") or ""),
            class_examples=tuple(examples),
            data=_fingerprint(record),
            environment=_environment(record),
        )
    except (AttributeError, KeyError, TypeError, RecursionError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path / 'results.json'} does not hold the results of a run of its config.json "
            f"({why}); restore it."
        ) from error


def _fields(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What says of which arm a run is. A net may come from a file of the same seed's own."""
    own = re.compile(rf"(?<![A-Za-z])(seed|s)([_=-]?)0*{seed}(?![0-9])")
    return {
        name: own.sub(r"\1\2{seed}", value)
        if name.endswith(".init_from") and isinstance(value, str)
        else value
        for name, value in config_fields(config, ignore=_FREE).items()
    }


def _rows(rows: Sequence[Mapping[str, Any]], classes: int) -> dict[RowKey, Mapping[str, Any]]:
    found: dict[RowKey, Mapping[str, Any]] = {}
    for row in rows:
        net, method = row["net"], row["method"]
        if not isinstance(net, str) or not isinstance(method, str):
            raise TypeError(f"net {net!r:.80}, method {method!r:.80}")
        for key in (*MEASURES, *COSTS, "weight_bits", "activation_bits"):
            value, (low, high) = row.get(key), _RANGES.get(key, (-LARGEST, LARGEST))
            known = isinstance(value, int | float) and low <= value <= high
            if value is not None and (isinstance(value, bool) or not known):
                raise TypeError(f"{key} is {value!r:.80}")
        correct = row.get("class_correct")
        if correct is not None and (
            len(correct) != classes or any(type(count) is not int for count in correct)
        ):
            raise TypeError("class_correct holds no count for each class")
        found[net, _unique(method, [key[1] for key in found if key[0] == net])] = row
    return found


def _unique(name: str, others: Collection[str]) -> str:
    """Returns the name; where others have it, the first free one of "name #2", "name #3", ..."""
    numbered = (f"{name} #{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in others)


def _fingerprint(record: Mapping[str, Any]) -> str:
    starts = record.get("starts") or [{}]
    first = starts[0]
    known = (first.get("data") or {}).get("fingerprint") or first.get("data_fingerprint")
    return str(known or "")


def _environment(record: Mapping[str, Any]) -> dict[str, str]:
    """What may move last bits, of every start of a run."""
    found: dict[str, dict[str, None]] = {}
    for start in record.get("starts") or []:
        git, devices = start.get("git") or {}, start.get("devices") or {}
        versions = start.get("versions") or {}
        revision = str(git.get("revision") or "no git revision")[:12]
        facts = {
            "code": revision + (_DIRTY if git.get("dirty") else ""),
            "versions": ", ".join(f"{k} {versions[k]}" for k in ("jax", "flax") if k in versions),
            "devices": f"{devices.get('count', '?')} x {devices.get('kind', '?')}",
            "processor": f"{start.get('processor') or start.get('machine') or '?'}",
        }
        for name, fact in facts.items():
            found.setdefault(name, {})[fact] = None
    return {name: ", then ".join(facts) for name, facts in found.items()}


def _check_data(runs: Sequence[SeedRun]) -> None:
    """Refuses runs whose data differ where they should be the same: of one name, of one seed.

    The training images may be drawn by the seed, so another seed may have other data.
    """
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(str(run.fields.get("data.name", "")), []).append(run.name)
    if len(names) > 1:
        listed = "; ".join(f"{data}: {', '.join(of)}" for data, of in names.items())
        raise ValueError(
            f"the runs are over different data sets ({listed}); compare those of one data set: "
            "move the others to a folder of their own."
        )
    seen: dict[int, dict[str, list[str]]] = {}
    for run in runs:
        if run.data:
            seen.setdefault(run.seed, {}).setdefault(run.data, []).append(run.name)
    for seed, of in seen.items():
        if len(of) > 1:
            listed = "; ".join(f"{data[:12]}...: {', '.join(n)}" for data, n in of.items())
            raise ValueError(
                f"runs of seed {seed} are over different data, by their fingerprints ({listed}); "
                "a difference between them would be one of the data too. Move those of one kind "
                "to a folder of their own."
            )


def _arms(runs: Sequence[SeedRun], notes: list[str], name: str) -> tuple[Arm, ...]:
    groups: dict[str, dict[int, SeedRun]] = {}
    twins: list[str] = []
    for run in runs:
        group = groups.setdefault(json.dumps(run.fields, sort_keys=True), {})
        other = group.setdefault(run.seed, run)
        if other is run:
            continue
        if _numbers(other) != _numbers(run):
            raise ValueError(
                f"{other.name} and {run.name} are runs of one config and one seed with different "
                "results, and counting both would make one seed two; move one of them away."
            )
        twins.append(f"{run.name} (as {other.name})")
    if twins:
        notes.append(f"Runs with config, seed and results of another are not counted: {_an(twins)}")
    labels = _labels([list(group.values()) for group in groups.values()], name)
    return tuple(
        Arm(label, dict(sorted(group.items())))
        for label, group in zip(labels, groups.values(), strict=True)
    )


def _an(names: Sequence[str]) -> str:
    return ", ".join(names) + "."


def _numbers(run: SeedRun) -> Any:
    return {key: [row.get(name) for name in MEASURES] for key, row in run.rows.items()}


def _labels(groups: Sequence[Sequence[SeedRun]], name: str) -> list[str]:
    """A label for each arm, unique: the runs' names without the seed's part, or what differs.

    Runs that are called by their seed alone have the `name` of what holds them.
    """
    labels = [_label(group) or name for group in groups]
    same = {label for label in labels if labels.count(label) > 1}
    if same:
        told = _differences([group[0].fields for group in groups])
        labels = [
            f"{label} ({what})" if label in same and what else label
            for label, what in zip(labels, told, strict=True)
        ]
    unique: list[str] = []
    for label in labels:
        unique.append(_unique(label, unique))
    return unique


def _label(runs: Sequence[SeedRun]) -> str:
    stripped = collections.Counter(_without_seed(run.name, run.seed) for run in runs)
    label, times = stripped.most_common(1)[0]
    if label and 2 * times > len(runs):  # one that is called otherwise renames no arm
        return label
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    length = next(
        (i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1),
        min(map(len, names)),
    )
    common = re.sub(r"([_\-.+ ]*(seed|s)?[_=-]*)$", "", names[0][:length])
    return common or runs[0].experiment


def _without_seed(name: str, seed: int) -> str:
    """Takes "seed3", "s3" or a last "3" out of a name: "w4a4_seed3" and "w4a4-3" are "w4a4"."""
    for pattern in (rf"seed[_=-]?0*{seed}", rf"s[_=-]?0*{seed}", rf"0*{seed}$"):
        whole = rf"(^|[_\-.+, ]){pattern}(?=$|[_\-.+, ])"
        rest, count = re.subn(whole, "", name, count=1)
        if count:
            return rest.strip("_-.+, ")
    return name


def _differences(fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each of several configs from the others, in a few words."""
    names = sorted({name for config in fields for name in config})
    spelled = lambda value: json.dumps(value, sort_keys=True)
    differing = [n for n in names if len({spelled(config.get(n)) for config in fields}) > 1][:3]
    return [
        ", ".join(f"{name}={config.get(name)!s:.40}" for name in differing) for config in fields
    ]


def _seeds(arms: Sequence[Arm]) -> list[str]:
    """Says which arm lacks which seed."""
    every = sorted({seed for arm in arms for seed in arm.runs})
    missing = [(arm.label, [s for s in every if s not in arm.runs]) for arm in arms]
    return [
        f"Arm {label} lacks seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; its "
        "means are over the others, and differences are taken over seeds that both sides have."
        for label, seeds in missing
        if seeds
    ]


def _environments(runs: Sequence[SeedRun]) -> list[str]:
    """Says where runs were made by different code, versions, devices or processors."""
    notes = []
    for name in ("code", "versions", "devices", "processor"):
        found: dict[str, list[str]] = {}
        for run in runs:
            found.setdefault(run.environment.get(name, "not recorded"), []).append(run.name)
        if len(found) > 1:
            listed = "; ".join(f"{fact}: {_some(names)}" for fact, names in found.items())
            notes.append(f"Runs differ in {name}, which may move their numbers ({listed}).")
    dirty = [run.name for run in runs if _DIRTY in run.environment.get("code", "")]
    if dirty:
        notes.append(
            f"Made with uncommitted changes, so the code that made them is not on record: "
            f"{_some(dirty)}."
        )
    return notes


def _some(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
