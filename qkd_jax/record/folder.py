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
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from qkd_jax.record.progress import EXIT_INTERRUPTED, GracefulStop, Progress
from qkd_jax.trees import tree_sha256

__all__ = [
    "EXIT_INTERRUPTED",
    "GracefulStop",
    "Progress",
    "RunFolder",
    "environment",
    "git_state",
    "plain",
    "read_json",
    "read_metrics",
    "tree_sha256",
    "write_json",
]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "qkd_jax")


def plain(value: Any) -> Any:
    """Returns `value` as strict JSON can hold it.

    Mappings (anything with `items`) become dicts with text keys, sequences lists, NumPy and JAX
    scalars Python numbers, small arrays nested lists, paths text, non-finite numbers None.

    Raises:
        ValueError: for any other type.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [
            plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return plain(np.asarray(value).tolist())
    raise ValueError(
        f"cannot write {value!r} ({type(value).__name__}) as JSON; give text, numbers, None, "
        "lists, dicts or arrays."
    )


def write_json(path: str | Path, value: Any) -> Path:
    """Writes JSON atomically (a reader sees the old file or the new one) and deterministically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
    _replace(path, text.encode())
    return path


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; None if there is none.

    Raises:
        ValueError: naming the file, if it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore or delete it.") from error


def _lines(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns the whole lines of a metrics file up to the first damaged one."""
    found = []
    for line in data.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not {"step", "stage", "split", "values"} <= row.keys():
            break
        found.append((line + b"\n", row))
    return found


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl (or of the one in a run folder); torn lines are left out.

    A row is {"step": int, "stage": str, "split": str, "values": {name: float or None}}.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    return [row for _, row in _lines(path.read_bytes())] if path.exists() else []


def git_state(directory: str | Path | None = None) -> dict[str, Any]:
    """Returns {"revision", "dirty"} of the checkout that holds the code; None outside of one.

    A package installed into an environment that lies inside some other checkout is not taken for
    that one: its files are not tracked there.
    """
    here = Path(directory or Path(__file__).parent)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return {"revision": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    revision = git("rev-parse", "HEAD")
    return {"revision": revision, "dirty": None if status is None else bool(status)}


def environment() -> dict[str, Any]:
    """Returns what a result may depend on beside config and data: code, versions, machine."""
    import jax

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    devices = jax.devices()
    return {
        "git": git_state(),
        "argv": list(sys.argv),
        "versions": versions,
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "hostname": platform.node(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _flat_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value}; an empty dict is a value, so that its presence counts."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found.update(_flat_config(value, f"{prefix}.{key}" if prefix else key))
    return found


class RunFolder:
    """One folder, one run. Everything that is written here can be read back from here.

    Args:
        workdir: the folder.
        create: make it if absent; otherwise a folder that is absent is an error (for the modes
            that only read).

    Raises:
        ValueError: if it is absent and `create` is false, or if `workdir` is a file.
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
        self._lock: TextIO | None = None
        self._started = False
        self._count: int | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder free (see `lock`)."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def lock(self) -> None:
        """Holds the folder for this process until `close` or its end, however it ends.

        Raises:
            ValueError: if another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        if self._lock is not None:
            return
        file = open(self.path / ".lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            file.close()
            raise ValueError(
                f"{self.path} is in use by another run (process {holder}); wait for its end or "
                "use another --workdir."
            ) from None
        except OSError:  # a file system without locks: go on without
            file.close()
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file

    # config.json

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes the resolved config (a nested mapping)."""
        write_json(self.path / "config.json", config)

    def read_config(self) -> dict[str, Any]:
        """Returns the config of the run.

        Raises:
            ValueError: if the folder has none.
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
            ValueError: if it holds a run of another config, with every differing field.
        """
        theirs = read_json(self.path / "config.json")
        if theirs is None:
            return False
        there, here = _flat_config(theirs), _flat_config(json.loads(json.dumps(plain(config))))
        ignored = tuple(ignore)
        lines = []
        for field in sorted(there.keys() | here.keys()):
            if field in ignored or any(field.startswith(f"{name}.") for name in ignored):
                continue
            if field in there and field in here and there[field] == here[field]:
                continue
            old = json.dumps(there[field]) if field in there else "(not there)"
            new = json.dumps(here[field]) if field in here else "(not there)"
            lines.append(f"  {field}: {old} in the folder, {new} now")
        if lines:
            raise ValueError(
                f"{self.path} holds a run of another config:\n" + "\n".join(lines) + "\n"
                "Use another --workdir, or delete the folder."
            )
        return True

    # run.json

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
        """Returns {"schema": 1, "starts": [facts of each start]}, None if there is none."""
        return read_json(self.path / "run.json")

    # metrics.jsonl

    @property
    def lines(self) -> int:
        """How many lines metrics.jsonl has; save it in the checkpoint's meta for `truncate`."""
        return len(read_metrics(self.path)) if self._count is None else self._count

    def log(self, step: int, stage: str, split: str, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl and hands it to the system at once.

        Args:
            step: steps done, counted over the whole schedule.
            stage: the stage's name.
            split: "train", "test" or "quant" (values {"<net>/<layer>/<quantizer>/<param>": mean}).
            values: numbers, already on the host: reading a JAX array here would wait for it.
        """
        row = {"step": int(step), "stage": stage, "split": split, "values": plain(values)}
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if self._count is None:
            self._mend()
        # One write a line: a process killed in between leaves at most one torn line, at the end.
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(text + "\n")
        self._count = self.lines + 1

    def _mend(self) -> None:
        """Removes a torn last line, which the next one would otherwise be glued to."""
        path = self.path / "metrics.jsonl"
        data = path.read_bytes() if path.exists() else b""
        lines = [line for line, _ in _lines(data)]
        if b"".join(lines) != data:
            _replace(path, b"".join(lines))
        self._count = len(lines)

    def truncate(self, step: int, *, lines: int | None = None) -> None:
        """Cuts metrics.jsonl back to what a checkpoint had seen.

        Args:
            step: keep lines of steps up to this one.
            lines: keep at most this many lines (the value of `lines` when the checkpoint was
                saved). Exact also where several stages log at one step; without it, lines that
                were logged at `step` after the checkpoint would come twice.
        """
        path = self.path / "metrics.jsonl"
        data = path.read_bytes() if path.exists() else b""
        kept = [line for line, row in _lines(data)[:lines] if row["step"] <= step]
        if b"".join(kept) != data:
            _replace(path, b"".join(kept))
        self._count = len(kept)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl."""
        return read_metrics(self.path)

    # results.json, timings.json

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json; no times belong in there."""
        write_json(self.path / "results.json", results)

    def read_results(self) -> dict[str, Any] | None:
        """Returns results.json, None if the run has not written it yet."""
        return read_json(self.path / "results.json")

    def write_timings(self, timings: Mapping[str, Any]) -> None:
        """Writes timings.json."""
        write_json(self.path / "timings.json", timings)

    def read_timings(self) -> dict[str, Any] | None:
        """Returns timings.json, None if there is none."""
        return read_json(self.path / "timings.json")
