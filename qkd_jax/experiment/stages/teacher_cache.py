"""A train stage's `cache`: logits of frozen teachers, computed once per view and read from disk.

    config.stages.distil.views = 8
    config.stages.distil.cache = dict(top_k=0, dir="")

The stage's `views` is the number of augmented views of each training image. `top_k` is the number
of logits kept of each (0: all), `dir` the folder of the files ("": the run folder's `cache`; a
folder of your own is shared by runs that agree on teacher, data, views and seed).
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.data import logit_cache as files
from qkd_jax.data.dataset import Dataset
from qkd_jax.data.views import Views
from qkd_jax.distillation.learn_table import as_sources
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.losses import TABLE
from qkd_jax.training.plan import Plan, cached_key
from qkd_jax.training.step import eval_step
from qkd_jax.trees import tree_sha256

DEFAULTS: dict[str, Any] = {"top_k": 0, "dir": ""}


def cache_fields(stage: Stage) -> dict[str, Any] | None:
    """The stage's `cache` with its defaults, checked; None without."""
    given = stage.fields["cache"]
    if not given:
        return None
    where = f"stages.{stage.name}.cache"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}; it must be a dict, such as {DEFAULTS!r}.")
    for key in given:
        if key not in DEFAULTS:
            raise checks.unknown(f"field {where}", key, DEFAULTS)
    fields = {**DEFAULTS, **given}
    if not stage.fields["views"]:
        raise ValueError(
            f"stages.{stage.name}.views is 0, which augments images at every step, and {where} "
            "holds a teacher's logits of images that come again; give views=1 (the images as they "
            "are) or more, or drop the cache."
        )
    checks.integer_in(f"{where}.top_k", fields["top_k"], 0)
    if not isinstance(fields["dir"], str):
        raise ValueError(
            f"{where}.dir is {fields['dir']!r}; it must be the path of a folder or ''."
        )
    return fields


def cached_nets(stage: Stage) -> tuple[str, ...]:
    """The teachers of a stage whose logits are cached: all that are frozen in it.

    Raises:
        ValueError: a `cache` in a stage without a frozen teacher, or with wrong fields; a `top_k`
            and a loss that needs all logits.
    """
    fields = cache_fields(stage)
    if fields is None:
        return ()
    frozen = tuple(net for net in stage.nets if net not in stage.fields["learn"])
    if not frozen:
        raise ValueError(
            f"stages.{stage.name}.cache is set, but no frozen net teaches in this stage; a teacher "
            "that learns changes at each step. Drop the cache."
        )
    if fields["top_k"]:
        _refuse_whole_logits(stage, frozen, fields["top_k"])
    return frozen


def _refuse_whole_logits(stage: Stage, frozen: Sequence[str], top_k: int) -> None:
    """Refuses losses that need the logits that were not kept, which all read as one value."""
    for net, rows in stage.fields["learn"].items():
        for label, row in rows.items():
            loss = str(row.get("loss") or label)
            taught = [name for name in as_sources(row.get("source")) if name in frozen]
            by_softmax = [name for name, entry in TABLE.items() if entry.by_softmax]
            if taught and loss in TABLE and (loss not in by_softmax or row.get("standardize")):
                how = " with standardize" if row.get("standardize") else ""
                raise ValueError(
                    f"stages.{stage.name}.learn.{net}.{label}: loss {loss!r}{how} looks at every "
                    f"logit of {taught[0]!r}, and the cache keeps the {top_k} largest: the others "
                    f"would all be alike. Set stages.{stage.name}.cache.top_k=0, or take one of "
                    f"{', '.join(by_softmax)}."
                )


def prepare(
    run: Run, stage: Stage, plan: Plan, augment: Sequence[str]
) -> dict[str, files.CachedLogits]:
    """Returns the cached logits of a stage's teachers, computing those that are missing or stale.

    Args:
        run: the run.
        stage: a `train` stage.
        plan: its plan.
        augment: of its images.

    Returns:
        {key in the batch: logits}, for `data.train_batches(known=...)`.

    Raises:
        ValueError: a file is damaged, or its folder cannot hold these logits.
    """
    fields = cache_fields(stage)
    if fields is None:
        return {}
    found = {}
    dataset, source = run.training_set(stage.fields["images"]), stage.fields["images"]
    with tempfile.TemporaryDirectory() as scratch:
        # One process writes; one that follows computes what it looks up by itself.
        base = Path(fields["dir"]) if fields["dir"] and not run.follows else None
        if base is None:
            base = Path(scratch) if run.folder is None else run.folder.path / "cache"
        for net in cached_nets(stage):
            name = f"{net}_views{stage.fields['views']}_top{fields['top_k'] or 'all'}"
            folder = base / (f"{name}_{source}" if source else name)
            found[cached_key(plan.slots[net])] = _of_teacher(
                run, dataset, net, stage.fields["views"], fields["top_k"], folder, augment
            )
    return found


def _of_teacher(
    run: Run,
    dataset: Dataset,
    net: str,
    count: int,
    top_k: int,
    folder: Path,
    augment: Sequence[str],
) -> files.CachedLogits:
    seed = run.settings["seed"]
    views = Views(dataset, count, augment=augment, seed=seed)
    wanted = files.Wanted(
        teacher_sha256=_sha256(run, net),
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        examples=len(dataset.train_images),
        classes=dataset.num_classes,
        views=count,
        augment=views.augment,
        seed=views.seed if views.augment else 0,
        top_k=top_k,
    )
    try:
        known = files.read(folder, wanted)
    except files.StaleError as error:
        known = None
        if run.verbose:
            print(f"{error} Computing those of {net!r} again.", flush=True)
    return (
        files.write(folder, wanted, _logits(run, dataset, net, views)) if known is None else known
    )


def _sha256(run: Run, net: str) -> str:
    """SHA-256 of a net's program and variables: strides and activations leave no array."""
    text = f"{run.nets[net]!r} {tree_sha256(run.variables[net])}"
    return hashlib.sha256(text.encode()).hexdigest()


def _logits(
    run: Run, dataset: Dataset, net: str, views: Views
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(view, first row, logits) of the whole training split, batch by batch."""
    compiled, variables = eval_step(run.nets[net]), run.variables[net]
    size, total = run.settings["eval_batch_size"], len(dataset.train_images)
    for view in range(views.count):
        for first in range(0, total, size):
            rows = np.arange(first, min(first + size, total))
            # One shape, so one program: the last batch is filled up with its own last image.
            filled = np.minimum(np.arange(first, first + size), total - 1)
            batch: dict[str, Any] = {
                "image": dataset.normalize(views.images(filled, view)),
                "label": dataset.train_labels[filled],
                "mask": np.arange(size) < len(rows),
            }
            _, logits = compiled(variables, batch)
            yield view, first, jax.device_get(logits)[: len(rows)]
