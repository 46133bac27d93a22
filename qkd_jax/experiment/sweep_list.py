"""The list of a sweep's runs: its checks, its configs, and its file `sweep.json`.

An entry is a name and its overrides, as on the command line: a bare key is an argument of
`get_config`, `config.x.y` a field.
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.record.json_files import plain, read_json, write_json
from qkd_jax.whole_files import open_lock

FILE = "sweep.json"
FIELD = "config."
# Folders of a sweep beside those of its runs.
LOGS, SHARED = "logs", "shared"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a sweep: its name, which is that of its folder, and its overrides."""

    name: str
    overrides: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """The entry as `sweep.json` holds it."""
        return {"name": self.name, "overrides": plain(self.overrides)}

    def text(self) -> str:
        """The overrides on one line."""
        return ", ".join(f"{key}={as_text(value)}" for key, value in self.overrides.items())


def entries_of(found: Any, fields: Mapping[str, str]) -> list[Entry]:
    """Returns the entries of what a `get_sweep` returned, checked.

    Args:
        found: pairs (name, overrides).
        fields: {"config.x.y": text} of the command line, which every run gets.

    Raises:
        ValueError: no list of such pairs; a name that cannot be a folder's, is taken or is there
            twice; a value that is not plain; a field that the command line sets and an entry too.
    """
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(
            f"get_sweep returned {found!r:.200}; it must return a list of (name, overrides), one "
            "for each run, such as [('seed-0', {'seed': 0})]."
        )
    entries: list[Entry] = []
    known: dict[str, str] = {}  # by their lower case: some file systems know no other
    for place, pair in enumerate(found):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not isinstance(pair[1], Mapping)
            or not all(isinstance(key, str) for key in pair[1])
        ):
            raise ValueError(
                f"entry {place} of get_sweep is {pair!r:.200}; it must be a pair of a name and a "
                "dict of overrides, such as ('seed-0', {'seed': 0})."
            )
        name, overrides = pair
        checks.name(f"entry {place} of get_sweep", name)
        if name.lower() in (LOGS, SHARED):
            raise ValueError(
                f"entry {place} of get_sweep has the name {name!r}, which is that of a folder of "
                "the sweep's own; give it another."
            )
        if name.lower() in known:
            other = known[name.lower()]
            raise ValueError(
                f"get_sweep has two entries of the name {name!r}"
                + (f" ({other!r} is the same folder where case does not count)" * (other != name))
                + "; each run needs a folder of its own, so give them different names."
            )
        known[name.lower()] = name
        for key, value in overrides.items():
            try:
                as_text(value)
            except ValueError as error:
                raise ValueError(f"entry {name!r} of get_sweep: {key} {error}") from None
        for field in fields:
            if field in overrides:
                raise ValueError(
                    f"--{field} is given for every run, and entry {name!r} of the sweep sets it "
                    "too; drop one of them."
                )
        entries.append(Entry(name, {**overrides, **fields}))
    return entries


def as_text(value: Any) -> str:
    """Returns a plain value as the command line spells it.

    Raises:
        ValueError: anything but numbers, text, booleans, lists and tuples of them.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple) and all(
        isinstance(item, bool | int | float | str) for item in value
    ):
        return repr(tuple(value))
    raise ValueError(
        f"is {value!r:.100} ({type(value).__name__}); give text, a number, a boolean, or a tuple "
        "of them."
    )


def arguments_of(text: str) -> tuple[str, dict[str, str]]:
    """Returns (path, {argument: its text}) of a `--config=path:k=v,k`; a bare `k` has "true"."""
    path, _, arguments = text.partition(":")
    items = [item.strip().partition("=") for item in arguments.split(",") if item.strip()]
    return path, {key.strip(): value.strip() if eq else "true" for key, eq, value in items}


def config_text(path: str, arguments: Mapping[str, str]) -> str:
    """Returns `path:k=v,k=v`."""
    listed = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{path}:{listed}" if listed else path


def base_of(text: str, own: Collection[str]) -> str:
    """Returns `--config` without the arguments that are the sweep's own and no config's."""
    path, arguments = arguments_of(text)
    return config_text(path, {k: v for k, v in arguments.items() if k not in own})


def command_of(base: str, entry: Entry) -> tuple[str, dict[str, str]]:
    """Returns an entry's (`--config`, {"config.x.y": text}); its arguments replace the base's.

    Raises:
        ValueError: the value of an argument holds a comma, which ends it.
    """
    path, arguments = arguments_of(base)
    fields = {}
    for key, value in entry.overrides.items():
        text = as_text(value)
        if key.startswith(FIELD):
            fields[key] = text
            continue
        if "," in text or "=" in text:
            raise ValueError(
                f"entry {entry.name!r} of the sweep sets the argument {key} to {text!r}; a value "
                "behind the colon holds no comma and no '='. Override a field, 'config.x.y'."
            )
        arguments[key] = text
    return config_text(path, arguments), fields


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a file and holds it; on a file system without locks, does nothing."""
    with open_lock(path) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def write_list(
    folder: Path, text: str, entries: Sequence[Entry], *, own: Collection[str] = ()
) -> None:
    """Writes `sweep.json`, or extends it by runs that it lacks; several processes may at once.

    Args:
        folder: of the sweep; made if absent.
        text: of `--config`.
        entries: the runs.
        own: arguments in `text` that are the sweep's own.

    Raises:
        ValueError: the folder holds another sweep, runs that the list has no longer, or a file or a
            symbolic link in the place of a folder that the sweep writes into.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"workdir is {str(folder)!r}, a file; it must be a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _check_folders(folder, [entry.name for entry in entries])
    path = folder / FILE
    here = [json.loads(json.dumps(entry.record())) for entry in entries]
    with locked(folder / ".sweep.lock"):
        saved = read_json(path)
        if saved is None and (folder / "config.json").exists():
            raise ValueError(
                f"{folder} is the folder of a run; give the sweep a folder of its own."
            )
        if saved is not None:
            _check_same(path, saved, text, here, own)
            if len(saved["runs"]) == len(here):
                return
        write_json(path, {"config": text, "runs": here})


def _check_folders(folder: Path, names: Sequence[str]) -> None:
    # A run that is done is only read.
    begun = (name for name in names if not (folder / name / "results.json").exists())
    for name in (LOGS, SHARED, *begun):
        if (folder / name).is_symlink():
            raise ValueError(
                f"{folder / name} is a symbolic link, and a sweep writes into its own folder only; "
                "remove it."
            )
    for name in (LOGS, SHARED):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a file; a sweep has a folder there. Remove it.")


def _check_same(
    path: Path,
    saved: Mapping[str, Any],
    text: str,
    here: Sequence[Mapping[str, Any]],
    own: Collection[str],
) -> None:
    there = saved.get("runs")
    if (
        not isinstance(saved.get("config"), str)
        or not isinstance(there, list)
        or not all(
            isinstance(run, Mapping) and isinstance(run.get("name"), str) and "overrides" in run
            for run in there
        )
    ):
        raise ValueError(f"{path} is not the list of a sweep; restore or delete it.")
    repair = "Use another --workdir, or delete the folder."
    if base_of(saved["config"], own) != base_of(text, own):
        raise ValueError(
            f"{path.parent} holds the sweep of {saved['config']!r}, and this one is of {text!r}. "
            f"{repair}"
        )
    known = {run["name"]: run["overrides"] for run in here}
    for run in there:
        if run["name"] not in known:
            raise ValueError(
                f"{path.parent} holds a sweep with the run {run['name']!r}, which this one lacks; "
                f"a sweep can be extended, not cut. {repair}"
            )
        if known[run["name"]] != run["overrides"]:
            raise ValueError(
                f"{path.parent} holds a sweep whose run {run['name']!r} has the overrides "
                f"{run['overrides']}, and now it has {known[run['name']]}. {repair}"
            )
