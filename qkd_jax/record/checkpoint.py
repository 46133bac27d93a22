"""Checkpoints: one Orbax manager a run, with our own checksum of everything that is inside.

What Orbax does: atomic writing (a step's folder appears complete or not at all), writing in the
background, and deleting old steps. What is added here, because Orbax does not do it:

* a sha256 of the tree and its meta: Orbax restores flipped bytes silently;
* restoring goes back to the step before when the newest one is damaged, and says so (`restoring`,
  which is also what everything that only reads a run folder calls);
* saving a step again that is already there (a stage that trains nothing does not move the step)
  replaces it without a moment in which neither exists;
* the score of a step lives in its meta. Orbax forgets scores when the manager is opened again
  (it writes them only under `best_fn`, and `best_fn` with `max_to_keep` deletes the newest step).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax import checks
from qkd_jax.record.packing import pack
from qkd_jax.record.restoring import (
    ASIDE,
    FORMAT,
    Damaged,
    Restored,
    canonical,
    first_line,
    orbax_alone,
    quiet_orbax,
    read_latest,
    read_record,
    read_step,
)
from qkd_jax.trees import arrays_sha256


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


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
    """The checkpoints of a run, for its owner: the newest `keep` and the one of the highest score.

    Use as a context manager, or call `close()` at the end. One process opens this and writes; all
    others read with `restoring.read_latest`.

    Args:
        directory: folder of the checkpoints (made if absent).
        keep: how many of the newest to keep, at least 1. With 2, a damaged newest one costs the
            way back to the one before, not the run.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        checks.integer_in("keep", keep, 1)
        self.directory = Path(directory).absolute()
        self._scores: dict[int, float] = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        self._tidy()
        self._manager = self._open(keep)
        self._load_scores()

    def _open(self, keep: int) -> Any:
        # Orbax costs 0.4 s to import, which --help and inspect should not pay.
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._args = ocp.args
        quiet_orbax()
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), _BestScore(self._scores)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Without this every step's metadata is parsed here, and one damaged file would stop
            # the manager from opening at all.
            lightweight_initialize=True,
            # The folder is there, and several processes do not make one together.
            create=False,
            multiprocessing_options=orbax_alone(),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _tidy(self) -> None:
        """Repairs what a process killed at any moment may have left behind."""
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob(f"*{ASIDE}"):
            final = path.with_suffix("")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    def _load_scores(self) -> None:
        for step in self.steps():
            with contextlib.suppress(Damaged):
                score = read_record(self._path(step)).get("score")
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
            SaveError: this checkpoint, or the one before, cannot be written.
        """
        checks.integer_in("step", step, 0)
        stored, index, arrays, impls = pack(tree)
        try:
            # Twice: keys that are numbers become text, and text sorts differently.
            text = canonical(json.loads(canonical(dict(meta))))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"meta cannot be written as JSON ({error}); it must hold text, numbers, None, "
                "lists and dicts only. Put arrays into the tree."
            ) from error
        usable = score is not None and math.isfinite(score)
        kept = float(score) if usable else None
        record = {
            "format": FORMAT,
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
        except Exception as error:
            raise self._save_error(error) from error
        if blocking:
            self.wait()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _set_aside(self, step: int) -> None:
        """Renames the folder of a step that exists; it is deleted once the new one is complete."""
        if self._path(step).exists():
            self._path(step).rename(self.directory / f"{step}{ASIDE}")
            self._manager.reload()

    def _save_error(self, error: Exception) -> SaveError:
        """Reads the folder again after a failed save, and returns the error to raise."""
        with contextlib.suppress(OSError):
            self._tidy()
        self._manager.reload()
        self._scores.clear()
        self._load_scores()
        kept = ", ".join(map(str, self.steps())) or "none"
        # TensorStore names two paths before the system's words, which are what helps.
        system = re.search(r": ([^:\[\]]+) \[os_error_code", str(error))
        why = system.group(1) if system else first_line(error)
        return SaveError(
            f"a checkpoint cannot be written to {self.directory} ({why}); kept steps: {kept}."
        )

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            SaveError: it failed; the checkpoints before it can be restored.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._save_error(error) from error
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
            return read_step(self._path(step), step)
        except Damaged as error:
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
        restored, damaged = read_latest(self.directory, report)
        for step in damaged:
            self._move_broken(step)
        if damaged:
            self._manager.reload()
        return restored

    def _move_broken(self, step: int) -> None:
        target = self.directory / f"{step}.broken"
        if target.exists():
            shutil.rmtree(target)
        self._path(step).rename(target)
        self._scores.pop(step, None)
