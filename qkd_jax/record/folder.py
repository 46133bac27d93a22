"""The run folder: the record of a run, written so that it can be trusted.

| file | holds | written |
|---|---|---|
| `config.json` | the resolved config | once, by the first start |
| `run.json` | code, versions, devices, seed, data and net fingerprints | one entry a start |
| `metrics.jsonl` | one line a logged step: step, stage, split, values | cut back on resume |
| `results.json` | the final table | atomically |
| `timings.json` | everything that is a time | atomically |
| `diagnosis.json` | what each quantizer does to data | by each `diagnose` stage |
| `checkpoints/`, `model/`, `report.html` | see `checkpoint`, `deploy`, `report` | by those |

JSON is written with sorted keys and without times (but for `timings.json` and the start times in
`run.json`), so a run that was killed and resumed ends with the bytes of one that was not.
Non-finite numbers become null: `NaN` is not JSON, and a strict reader would refuse the file.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qkd_jax.record.environment import environment
from qkd_jax.record.json_files import plain, read_json, write_json
from qkd_jax.record.metrics_log import MetricsLog
from qkd_jax.whole_files import open_lock, remove_temporaries

# What may differ between a run folder and the command that resumes it: none of it reaches a number
# in results.json, but for the rounding of sums that devices share.
FREE_FIELDS = (
    "checkpoint",
    "data.dir",
    "data.workers",
    "parallel.devices",
    "parallel.model",
    "parallel.rules",
    "track",
)

_HAS_LOCKS = importlib.util.find_spec("fcntl") is not None  # not on Windows


class InUseError(ValueError):
    """Another process has locked a run folder."""


class RunFolder:
    """One folder, one run. Everything that is written here can be read back from here.

    Args:
        workdir: the folder.
        create: make it if absent; otherwise a folder that is absent is an error (for the modes
            that only read).

    Attributes:
        path: the folder.
        checkpoints: where checkpoints go.
        model: where deployed models go.
        metrics: the log of metrics.

    Raises:
        ValueError: it is absent and `create` is false, or `workdir` is a file.
    """

    def __init__(self, workdir: str | Path, *, create: bool = True):
        self.path = Path(workdir)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"workdir is {str(workdir)!r}, a file; it must be a folder.")
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_dir():
            raise ValueError(
                f"workdir is {str(workdir)!r}, which does not exist; give the folder of a run, "
                "as made by launch.py --config=... --workdir=..."
            )
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.metrics = MetricsLog(self.path)
        self._lock: BinaryIO | None = None
        self._started = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def lock(self) -> None:
        """Locks the folder for this process until `close` or its end, however it ends.

        Raises:
            InUseError: another process holds the lock.
        """
        if not _HAS_LOCKS:
            return
        if self._lock is not None:
            return
        file = open_lock(self.path / ".lock")
        try:
            _try_lock(file)
        except BlockingIOError:
            process = file.read(20).decode(errors="replace").strip()
            process = process if process.isdecimal() else "?"
            file.close()
            raise InUseError(
                f"{self.path} is in use by another run (process {process}); wait for its end or "
                "use another --workdir."
            ) from None
        except OSError:  # a file system without locks: run without
            file.close()
            return
        self._lock = file
        with contextlib.suppress(OSError):  # a full disk: the first file that matters says so
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        remove_temporaries(self.path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes the resolved config (a nested mapping)."""
        write_json(self.path / "config.json", config)

    def read_config(self) -> dict[str, Any]:
        """Returns the config of the run.

        Raises:
            ValueError: the folder has none.
        """
        config = read_json(self.path / "config.json")
        if config is None:
            raise ValueError(
                f"{self.path} has no config.json, so it is not a run folder; give the --workdir of "
                "a run, or --config=... to start one there."
            )
        return config

    def check_config(self, config: Mapping[str, Any], *, ignore: Sequence[str] = ()) -> bool:
        """Returns whether the folder holds a run of this config (False: of none yet).

        Args:
            config: the config to run now.
            ignore: dotted fields that may differ because they cannot change the result; "a" covers
                "a.b" too.

        Raises:
            ValueError: it holds a run of another config; every differing field is named.
        """
        saved = read_json(self.path / "config.json")
        if saved is None:
            return False
        there, here = (config_fields(c, ignore=ignore) for c in (saved, config))
        lines = []
        for field in sorted(there.keys() | here.keys()):
            if field in there and field in here and there[field] == here[field]:
                continue
            old, new = (
                json.dumps(fields[field]) if field in fields else "(not there)"
                for fields in (there, here)
            )
            lines.append(f"  {field}: {old} in the folder, {new} now")
        if lines:
            raise ValueError(
                f"{self.path} holds a run of another config:\n" + "\n".join(lines) + "\n"
                "Use another --workdir, or delete the folder."
            )
        return True

    def write_run(self, **facts: Any) -> None:
        """Appends this start to run.json: `environment()` and the facts given.

        Called again in the same process it adds facts that became known later (a net's sha256)
        to the same entry.

        Args:
            **facts: e.g. seed=1, data_fingerprint="...", resumed_from=1200, nets={"teacher": ...}.
        """
        record = self.read_run() or {"schema": 1, "starts": []}
        if self._started:
            entry = record["starts"][-1]
        else:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            entry = {"started": now, **environment()}
            record["starts"].append(entry)
            self._started = True
        for name, value in facts.items():
            old = entry.get(name)
            both = isinstance(old, dict) and hasattr(value, "items")
            entry[name] = {**old, **value} if both else value
        write_json(self.path / "run.json", record)

    def read_run(self) -> dict[str, Any] | None:
        """Returns {"schema": 1, "starts": [facts of each start]}, None if there is none.

        Raises:
            ValueError: the file holds something else.
        """
        record = read_json(self.path / "run.json")
        starts = [] if record is None else record.get("starts")
        if not isinstance(starts, list) or not all(isinstance(s, dict) for s in starts):
            raise ValueError(
                f"{self.path / 'run.json'} has no list of starts; restore or delete it."
            )
        return record

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json; no times belong in there."""
        write_json(self.path / "results.json", results)

    def read_results(self) -> dict[str, Any] | None:
        """Returns results.json, None if the run has not written it yet."""
        return read_json(self.path / "results.json")

    def write_timings(self, timings: Mapping[str, Any]) -> None:
        """Writes timings.json."""
        write_json(self.path / "timings.json", timings)


def _try_lock(file: BinaryIO) -> None:
    """Takes a lock; `holder` of another process holds it for a moment too, hence the tries."""
    import fcntl

    for left in reversed(range(5)):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.02)
    return None


def holder(workdir: str | Path) -> str | None:
    """Returns the number of the process that runs in a folder ("?": unknown), None if none does."""
    path = Path(workdir) / ".lock"
    if not _HAS_LOCKS or not path.is_file() or path.is_symlink():
        return None
    import fcntl

    with contextlib.suppress(OSError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read(20).decode(errors="replace").strip()
            return text if text.isdecimal() else "?"
    return None


def config_fields(config: Any, *, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a config as {"a.b": value}, as JSON keeps it, without the fields `ignore`.

    "a" in `ignore` covers "a.b" too.
    """
    flat = _flat_config(json.loads(json.dumps(plain(config))))
    ignored = lambda field: any(field == n or field.startswith(f"{n}.") for n in ignore)
    return {field: value for field, value in flat.items() if not ignored(field)}


def _flat_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value}; an empty dict is a value, so that its presence counts."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat_config(value, f"{prefix}.{key}" if prefix else key))
    return flat
