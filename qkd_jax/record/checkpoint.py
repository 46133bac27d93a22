"""Checkpoints: one Orbax manager a run, with our own checksum of everything that is inside.

What Orbax does: atomic writing (a step's folder appears complete or not at all), writing in the
background, and deleting old steps. What is added here, because Orbax does not do it:

* a sha256 of the tree and its meta: Orbax restores flipped bytes silently;
* restoring goes back to the step before when the newest one is damaged, and says so;
* saving a step again that is already there (a stage that trains nothing does not move the step)
  replaces it without a moment in which neither exists;
* the score of a step lives in its meta. Orbax forgets scores when the manager is opened again
  (it writes them only under `best_fn`, and `best_fn` with `max_to_keep` deletes the newest step).

On disk a step is `<step>/meta/metadata` (JSON: meta, score, checksum, index of the arrays) and
`<step>/tree` (arrays, see `packing`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.record.packing import pack, unpack
from qkd_jax.trees import arrays_sha256

_FORMAT = 1
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: `tree` is flat, {"nets/net0/params/stem/kernel": array}.

    Arrays are NumPy (dtype and bits as saved); typed random keys are typed JAX keys again. `meta`
    is what was given to `save` after a round trip through JSON (tuples are lists).
    """

    step: int
    tree: dict[str, Any]
    meta: dict[str, Any]
    score: float | None = None


class _Damaged(Exception):
    """A step's folder does not hold what was saved; the text says what is wrong."""


def _json_value(value: Any) -> Any:
    """NumPy and JAX scalars as Python numbers; other types are json's error."""
    if hasattr(value, "item") and np.shape(value) == ():
        return value.item()
    raise TypeError(type(value).__name__)


def _canonical(meta: Any) -> str:
    return json.dumps(meta, sort_keys=True, default=_json_value)


class _BestScore:
    """Orbax preservation policy: keeps the step of the highest score (the newest of equals)."""

    def __init__(self, scores: Mapping[int, float]):
        self.scores = scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = _best(self.scores, [c.step for c in checkpoints])
        return [c.step == best for c in checkpoints]


def _best(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
    scored = [step for step in steps if step in scores]
    return max(scored, key=lambda step: (scores[step], step)) if scored else None


class Checkpoints:
    """The checkpoints of a run: the newest `keep` and the one of the highest score.

    Use as a context manager, or call `close()` at the end. One process writes.

    Args:
        directory: folder of the checkpoints (made if absent).
        keep: how many of the newest to keep, at least 1. With 2, a damaged newest one costs the
            way back to the one before, not the run.
        read_only: nothing is tidied, moved aside or saved, so that an active run in this folder is
            not disturbed.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
        checks.integer_in("keep", keep, 1)
        self.directory = Path(directory).absolute()
        self.read_only = read_only
        self._scores: dict[int, float] = {}
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._tidy()
        self._manager = self._open(keep)
        self._load_scores()

    def _open(self, keep: int) -> Any:
        # Orbax costs 0.4 s to import, which --help and inspect should not pay.
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._args = ocp.args
        _quiet()
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), _BestScore(self._scores)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            create=not self.read_only,
            read_only=self.read_only,
            # Without this every step's metadata is parsed here, and one damaged file would stop
            # the manager from opening at all.
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _tidy(self) -> None:
        """Repairs what a process killed at any moment may have left behind."""
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob("*.replaced"):
            final = path.with_suffix("")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    def _load_scores(self) -> None:
        for step in self.steps():
            with contextlib.suppress(_Damaged):
                score = self._read_meta(step).get("score")
                if isinstance(score, int | float):
                    self._scores[step] = float(score)

    def steps(self) -> list[int]:
        """Returns the steps that are kept, ascending (one being written included)."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the kept step of the highest score, None if none has a score."""
        return _best(self._scores, self.steps())

    def save(
        self,
        step: int,
        tree: Any,
        meta: Mapping[str, Any],
        *,
        score: float | None = None,
        blocking: bool = False,
    ) -> None:
        """Saves a tree: waits for the arrays and copies them, then writes in the background.

        An error of a background save is raised by the next call of `save`, `wait` or `close`. A
        step that is saved already is replaced. The caller may donate or change `tree` afterwards.

        Args:
            step: number of the checkpoint, at least 0.
            tree: any pytree of arrays, typed random keys and numbers; saved flat (see `trees`).
            meta: JSON-able facts that belong to it (stage, step in the stage, ...).
            score: higher is better; the highest is kept beside the newest. None or a non-finite
                number is no score.
            blocking: wait until it is on disk.

        Raises:
            ValueError: for a leaf or a meta that cannot be saved.
        """
        checks.integer_in("step", step, 0)
        if self.read_only:
            raise ValueError(f"{self.directory} was opened with read_only=True; open it without.")
        stored, index, arrays, impls = pack(tree)
        try:
            # Twice: keys that are numbers become text, and text sorts differently.
            text = _canonical(json.loads(_canonical(dict(meta))))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"meta cannot be written as JSON ({error}); it must hold text, numbers, None, "
                "lists and dicts only. Put arrays into the tree."
            ) from error
        usable = score is not None and math.isfinite(score)
        kept = float(score) if usable else None
        record = {
            "format": _FORMAT,
            "step": int(step),
            "meta": json.loads(text),
            "score": kept,
            "sha256": arrays_sha256(arrays, impls, f"{step} {kept!r} {text}"),
            "index": index,
        }
        self.wait()
        self._set_aside(step)
        self._scores.pop(step, None)
        if usable:
            self._scores[step] = float(score)
        try:
            self._manager.save(
                step,
                args=self._args.Composite(
                    tree=self._args.StandardSave(stored), meta=self._args.JsonSave(record)
                ),
                force=True,
            )
        except Exception:
            self._recover()
            raise
        if blocking:
            self.wait()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _set_aside(self, step: int) -> None:
        """Renames the folder of a step that exists; it is deleted once the new one is complete."""
        if self._path(step).exists():
            self._path(step).rename(self.directory / f"{step}.replaced")
            self._manager.reload()

    def _recover(self) -> None:
        """Reads the folder again after a failed save."""
        self._tidy()
        self._manager.reload()
        self._scores.clear()
        self._load_scores()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises its error if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception:
            self._recover()
            raise
        if not self.read_only:
            self._tidy()

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
            return
        # An error is on its way out already: an unfinished save must not hide it.
        with contextlib.suppress(Exception):
            self.close()

    def restore(self, step: int) -> Restored:
        """Returns the checkpoint of one step after checking every byte.

        Raises:
            ValueError: if there is none, or if it is damaged.
        """
        self.wait()
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "(none)"
            raise ValueError(f"step is {step}; {self.directory} holds checkpoints of steps {have}.")
        try:
            return self._read(step)
        except _Damaged as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} is damaged: {error}. "
                "Use another step."
            ) from error

    def restore_latest(self, report: Callable[[str], Any] = print) -> Restored | None:
        """Returns the newest checkpoint that is whole, None if the folder has none at all.

        A damaged one is reported (step and reason), the one before is used, and the damaged one
        is renamed to "<step>.broken" so that the step can be saved again.

        Args:
            report: takes one line of text for each damaged checkpoint.

        Raises:
            ValueError: if there are checkpoints and all are damaged. They are left in place: a run
                must not start from nothing as if it were new.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._read(step)
            except _Damaged as error:
                damaged[step] = str(error)
                report(f"checkpoint of step {step} in {self.directory} is damaged: {error}")
                continue
            if damaged and not self.read_only:
                for broken in damaged:
                    self._move_broken(broken)
                self._manager.reload()
            if damaged:
                report(f"going on from the checkpoint of step {step} instead")
            return restored
        if damaged:
            listed = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise ValueError(
                f"all checkpoints in {self.directory} are damaged ({listed}). Restore the folder "
                "from a copy, or delete it to start the run from the beginning."
            )
        return None

    def _move_broken(self, step: int) -> None:
        target = self.directory / f"{step}.broken"
        if target.exists():
            shutil.rmtree(target)
        self._path(step).rename(target)
        self._scores.pop(step, None)

    def _read_meta(self, step: int) -> dict[str, Any]:
        path = self._path(step) / "meta" / "metadata"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise _Damaged(f"{path.relative_to(self.directory)} is missing") from None
        except (OSError, ValueError) as error:
            name = path.relative_to(self.directory)
            raise _Damaged(f"{name} cannot be read ({_first_line(error)})") from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise _Damaged(f"{path.relative_to(self.directory)} is not a record of format 1")
        return record

    def _read(self, step: int) -> Restored:
        record = self._read_meta(step)
        try:
            stored = self._manager.restore(
                step, args=self._args.Composite(tree=self._args.StandardRestore())
            )["tree"]
            arrays, impls = unpack(stored, record["index"])
            facts = f"{step} {record.get('score')!r} {_canonical(record['meta'])}"
            digest = arrays_sha256(arrays, impls, facts)
        except Exception as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_DAMAGE:
                raise  # the machine's trouble, not the file's: a good step must not be set aside
            # Orbax and TensorStore raise many types for missing, cut and undecodable files.
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise _Damaged(f"its arrays cannot be read ({reason})") from error
        if digest != record.get("sha256"):
            raise _Damaged("its sha256 is not the one that was saved: bytes have changed")
        tree: dict[str, Any] = dict(arrays)
        for name, impl in impls.items():
            tree[name] = jax.random.wrap_key_data(jax.numpy.asarray(arrays[name]), impl=impl)
        return Restored(step, tree, record["meta"], record.get("score"))


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text[:200] + ("..." if len(text) > 200 else "")


def _quiet() -> None:
    """Orbax writes tens of absl lines a save at INFO; a run's terminal shows its progress."""
    logger = logging.getLogger("absl")
    if logger.getEffectiveLevel() < logging.WARNING:
        logger.setLevel(logging.WARNING)
