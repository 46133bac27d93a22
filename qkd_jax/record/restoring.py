"""Reading checkpoints without touching their folder, so that a run which is alive goes on.

On disk a step is `<step>/meta/metadata` (JSON: meta, score, checksum, index of the arrays) and
`<step>/tree` (arrays, see `packing`). A step that is being saved a second time lies in
`<step>.replaced` until the new one is complete.
"""

import dataclasses
import errno
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax.record.packing import stored_names, unpack
from qkd_jax.trees import arrays_sha256
from qkd_jax.whole_files import check_file

FORMAT = 1
ASIDE = ".replaced"
# A live run may remove the step that is being read; it has saved a newer one by then.
_TRIES = 200
_TROUBLE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE)


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


class Damaged(Exception):
    """A step's folder does not hold what was saved; the text says what is wrong."""


def canonical(meta: Any) -> str:
    """Returns meta as JSON in one spelling, for the checksum."""
    return json.dumps(meta, sort_keys=True, default=_json_value)


def _json_value(value: Any) -> Any:
    """NumPy and JAX scalars as Python numbers; other types are json's error."""
    if hasattr(value, "item") and np.shape(value) == ():
        return value.item()
    raise TypeError(type(value).__name__)


def saved_steps(directory: Path) -> dict[int, Path]:
    """Returns {step: its folder}, ascending, of the steps that are complete."""
    found: dict[int, Path] = {}
    for path in sorted(directory.glob(f"*{ASIDE}")) + sorted(directory.glob("*")):
        name = path.name.removesuffix(ASIDE)
        if re.fullmatch(r"[0-9]{1,18}", name) and path.is_dir():
            found[int(name)] = path
    return dict(sorted(found.items()))


def read_latest(
    directory: str | Path, report: Callable[[str], Any] = print
) -> tuple[Restored | None, list[int]]:
    """Returns the newest checkpoint that is whole, and the damaged steps that are newer.

    Args:
        directory: the folder of the checkpoints; one that is absent has none.
        report: takes one line of text for each damaged checkpoint, and for the one used instead.

    Raises:
        ValueError: there are checkpoints and all are damaged: a run must not start from nothing as
            if it were new.
    """
    directory = Path(directory).absolute()
    damaged: dict[int, str] = {}
    for _ in range(_TRIES):
        listed = saved_steps(directory)
        left = [step for step in listed if step not in damaged]
        if not left:
            break
        step = left[-1]
        try:
            restored = read_step(listed[step], step)
        except Damaged as error:
            if saved_steps(directory) != listed:
                continue
            damaged[step] = str(error)
            report(f"checkpoint of step {step} in {directory} is damaged: {error}")
            continue
        newer = [bad for bad in damaged if bad > step]
        if newer:
            report(f"going on from the checkpoint of step {step} instead")
        return restored, newer
    else:
        raise ValueError(
            f"{directory} changes faster than it can be read; wait for the end of its run."
        )
    if damaged:
        each = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise ValueError(
            f"all checkpoints in {directory} are damaged ({each}). Restore the folder from a copy, "
            "or delete it to start the run from the beginning."
        )
    return None, []


def read_record(folder: Path) -> dict[str, Any]:
    """Returns a step's record: format, step, meta, score, sha256, index.

    Raises:
        Damaged: it is missing or not a record.
    """
    path = folder / "meta" / "metadata"
    name = path.relative_to(folder.parent)
    try:
        check_file(path)
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise_trouble_of_machine(error)
        raise Damaged(f"{name} cannot be read ({first_line(error)})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise Damaged(f"{name} is not a record of format {FORMAT}")
    return record


def read_step(folder: Path, step: int) -> Restored:
    """Returns the checkpoint in a step's folder after checking every byte.

    Raises:
        Damaged: it does not hold what was saved.
    """
    record = read_record(folder)
    try:
        index = record["index"]
        arrays, impls = unpack(_read_arrays(folder / "tree", stored_names(index)), index)
        facts = f"{step} {record.get('score')!r} {canonical(record['meta'])}"
        digest = arrays_sha256(arrays, impls, facts)
    except Exception as error:
        raise_trouble_of_machine(error)
        # Orbax and TensorStore raise many types for missing, cut and undecodable files.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Damaged(f"its arrays cannot be read ({reason})") from error
    if digest != record.get("sha256"):
        raise Damaged("its sha256 is not the one that was saved: bytes have changed")
    tree: dict[str, Any] = dict(arrays)
    for name, impl in impls.items():
        tree[name] = jax.random.wrap_key_data(jax.numpy.asarray(arrays[name]), impl=impl)
    return Restored(step, tree, record["meta"], record.get("score"))


def check_folder(folder: Path) -> None:
    """Raises ValueError where something below a folder is a pipe or a device: Orbax opens all."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_file(path)


def _read_arrays(folder: Path, names: set[str]) -> Any:
    # Orbax costs 0.4 s to import, which --help and inspect should not pay.
    import orbax.checkpoint as ocp

    quiet_orbax()
    check_folder(folder)
    wanted = ocp.args.PyTreeRestore(
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    )
    options = orbax_alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        return checkpointer.restore(folder, args=wanted)


def raise_trouble_of_machine(error: BaseException) -> None:
    """Raises an error that is the machine's and not the file's: a good step is not set aside."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _TROUBLE:
        raise error


def orbax_alone() -> Any:
    """Returns Orbax's options for one process of several that reads and writes by itself.

    By default Orbax waits for the others at each save and each read.
    """
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )


def first_line(error: BaseException) -> str:
    """Returns an error's text on one line of at most 200 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text[:200] + ("..." if len(text) > 200 else "")


def quiet_orbax() -> None:
    """Silences Orbax's own log: tens of lines a save, and a traceback for each error it raises."""
    logging.getLogger("absl").addFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
