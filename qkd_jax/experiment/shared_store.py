"""The store of shared prefixes: the state after some stages, kept for the runs that have them too.

`<sweep>/shared/<key>/` holds a copy of a run folder at the end of such a stage: its checkpoint,
its metrics and the files that stages wrote, and in `shared.json` the SHA-256 of every one of
them. The folder appears whole or not at all; one whose bytes have changed is removed, and the
stages are run. While a run trains what others will take, it holds the lock `<key>.lock`, so that
they wait instead of doing the same.

A run that was begun with other code, on another machine or from other files than it goes on with
has a state that no key stands for: it may take stages, and keeps none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qkd_jax.record.json_files import read_json, write_json
from qkd_jax.record.metrics_log import FILE as METRICS
from qkd_jax.record.restoring import Damaged, first_line, read_step
from qkd_jax.training.loop import Preempted
from qkd_jax.whole_files import open_lock, read_bytes, replace_file

if TYPE_CHECKING:
    from qkd_jax.experiment.run_state import Run

RECORD, CHECKPOINT, FILES = "shared.json", "checkpoint", "files"
# Of a run folder, what belongs to the run and not to its stages, or can be computed again.
OWN = (
    *("config.json", "run.json", "results.json", "timings.json", "report.html", "checkpoints"),
    *("tensorboard", "wandb", "wandb.json", "profile"),
)
REMADE = ("cache", "soft_labels.json")
_POLL_SECONDS = 0.2


class SharedStages:
    """The prefixes of one run that it shares with others of its sweep.

    Args:
        directory: of the store.
        points: [(number of stages, key)], ascending, of `shared_prefix.branch_points`.
        name: the run's, for the record.
        basis: SHA-256 of everything that the run depends on now; "" where that is not known.
        say: takes a line of text.
    """

    def __init__(
        self,
        directory: Path,
        points: Sequence[tuple[int, str]],
        *,
        name: str,
        basis: str,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.directory = Path(directory)
        self.points = list(points)
        self.name = name
        self.basis = basis
        self.say = say
        self._lock: BinaryIO | None = None

    def before_stage(self, run: Run) -> None:
        """Takes the longest prefix that is there; else reserves the next one, to make it.

        Raises:
            Preempted: the run was asked to stop while it waited for another that makes it.
        """
        if self.basis not in run.bases:
            run.bases.append(self.basis)
        if not run.stage_step:  # a run that was killed between saving and keeping
            self.after_stage(run)
        for count, key in reversed(self.points):
            if count > run.stage_index and (self.directory / key).exists():
                with self._reserved(run, key):
                    if self._take(run, count, key):
                        self.release()
                        return
        ahead = [(count, key) for count, key in self.points if count > run.stage_index]
        if self._lock is None and ahead and self._stands_for(run):
            count, key = ahead[0]
            self._lock = self._reserve(run, key)
            if (self.directory / key).exists() and self._take(run, count, key):
                self.release()

    def after_stage(self, run: Run) -> None:
        """Keeps the state of a run that is saved, if others need it and have it not yet."""
        for count, key in self.points:
            if count == run.stage_index:
                try:
                    if not self._stands_for(run):
                        self.say(
                            f"the state after {count} stages is not kept for other runs: other "
                            "code, another machine or other files have had a part in it."
                        )
                    elif not (self.directory / key).exists():
                        self._keep(run, key)
                except OSError as error:  # a full disk: the run itself can go on
                    self.say(f"the state after {count} stages is not kept: {first_line(error)}")
                self.release()

    def _stands_for(self, run: Run) -> bool:
        """Whether all of a run's state was made from what its keys are hashes of."""
        return run.bases == [self.basis]

    def release(self) -> None:
        """Lets others make what this run has reserved."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    @contextlib.contextmanager
    def _reserved(self, run: Run, key: str) -> Any:
        file = None if self._lock is not None else self._reserve(run, key)
        try:
            yield
        finally:
            if file is not None:
                file.close()

    def _reserve(self, run: Run, key: str) -> BinaryIO:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = open_lock(self.directory / f"{key}.lock")
        said = False
        while not _locks(file):
            if run.stopping():
                file.close()
                raise Preempted(f"before stage {run.stage().name!r}, waiting for another run")
            if not said:
                self.say("another run of the sweep trains what this one shares with it; waiting.")
            said = True
            time.sleep(_POLL_SECONDS)
        return file

    def _keep(self, run: Run, key: str) -> None:
        """Copies a run folder as it is after a stage that is saved."""
        assert run.checkpoints is not None
        run.checkpoints.wait()
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(f".{key}.*.tmp"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        target = self.directory / f".{key}.{secrets.token_hex(4)}.tmp"
        try:
            target.mkdir()
            shutil.copytree(run.folder.checkpoints / str(run.step), target / CHECKPOINT)
            (target / METRICS).write_bytes(read_bytes(run.folder.path / METRICS) or b"")
            for path in _of_stages(run.folder.path):
                copy = target / FILES / path.relative_to(run.folder.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            record = {"run": self.name, "step": run.step, "files": _hashes(target)}
            write_json(target / RECORD, record)
            os.replace(target, self.directory / key)
        except OSError:
            if not (self.directory / key).exists():
                raise
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _take(self, run: Run, count: int, key: str) -> bool:
        """Brings a run to the end of a prefix; returns whether what is kept was whole."""
        folder = self.directory / key
        try:
            record = read_json(folder / RECORD)
            if record is None or record.get("files") != _hashes(folder):
                raise Damaged("its files are not those that were kept")
            saved = read_step(folder / CHECKPOINT, record["step"])
        except (Damaged, ValueError, KeyError, FileNotFoundError) as error:
            self.say(f"{folder} is damaged ({first_line(error)}); its stages are run again.")
            shutil.rmtree(folder, ignore_errors=True)
            return False
        stages = [stage.name for stage in run.settings.stages[run.stage_index : count]]
        for path in (folder / FILES).rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                replace_file(run.folder.path / path.relative_to(folder / FILES), data)
        replace_file(run.folder.path / METRICS, (folder / METRICS).read_bytes())
        run.folder.metrics.truncate()
        own = run.timings
        run.load(saved)
        run.bases = [self.basis]  # what is kept stands for what this run's keys say
        theirs = dict(run.timings.get("stages", {}))
        for entry in run.timings.get("shared", ()):
            theirs |= entry["stages"]
        taken = {name: theirs[name] for name in stages if name in theirs}
        fact = {"sha256": key, "run": record["run"]}
        # Times that this run has not spent stand apart from those of its own stages.
        run.timings = {**own, "shared": [*own.get("shared", ()), {**fact, "stages": taken}]}
        run.save(blocking=True)
        run.folder.write_run(
            shared=[
                *({k: v for k, v in e.items() if k != "stages"} for e in own.get("shared", ())),
                {**fact, "stages": stages},
            ],
            **({"synthetic": run.synthetic} if run.synthetic else {}),
        )
        self.say(
            f"{', '.join(stages)}: taken from run {record['run']!r} of this sweep, which has the "
            f"same (shared/{key[:12]}...)."
        )
        return True


def _locks(file: BinaryIO) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no locks here: two runs may train the same
        return True
    return True


def _of_stages(folder: Path) -> list[Path]:
    """The files of a run folder that its stages wrote."""
    return [
        path
        for entry in sorted(folder.iterdir())
        if entry.name not in (*OWN, *REMADE, METRICS) and not entry.name.startswith(".")
        for path in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])
        if path.is_file() and not path.is_symlink() and not path.name.endswith(".tmp")
    ]


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / RECORD
    }
