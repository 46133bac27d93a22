"""The origin of a checkpoint: which config, data, code and devices have made it.

`config.json` alone does not guard a run: it can be deleted, or lie beside the checkpoints of
another run. So each checkpoint carries its origin. Another config or other data make other numbers
and are refused; other code or another number of devices may, and are said and recorded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qkd_jax.data.dataset import Dataset
from qkd_jax.record.environment import code_version
from qkd_jax.record.folder import FREE_FIELDS, config_fields

# What FREE_FIELDS was before devices could divide nets: checkpoints of then are still read.
_EARLIER_FREE_FIELDS = ("checkpoint", "data.dir")
_REPAIR = "Use another --workdir, or delete the folder."


def config_digest(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a resolved config without its free fields."""
    return _digest(config, FREE_FIELDS)


def _digest(config: Mapping[str, Any], free: Sequence[str]) -> str:
    text = json.dumps(config_fields(config, ignore=free), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def origin_of(
    config: Mapping[str, Any], dataset: Dataset, git: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns {"config", "data", "code", "devices"} of a run: two SHA-256, a text, a count.

    Args:
        config: the resolved config.
        dataset: the data.
        git: of `environment.git_state`.
    """
    return {
        "config": config_digest(config),
        "data": dataset.fingerprint,
        "code": code_version(git),
        "devices": _devices(config["parallel"]),
    }


def _devices(parallel: Mapping[str, Any]) -> int | str:
    """The number of devices, or what they are where some of them divide the nets."""
    count = parallel["devices"] or jax.device_count()
    return f"{count} (model {parallel['model']})" if parallel["model"] > 1 else count


def check_digest(
    there: Mapping[str, Any] | None, digest: str, folder: Path, *, known: bool
) -> None:
    """Refuses the checkpoint of another config, before anything is built from this one.

    Args:
        there: the origin in the checkpoint; None in one that has none.
        digest: of `config_digest`.
        folder: the run folder, for messages.
        known: whether config.json says that the folder is a run of this config.

    Raises:
        ValueError: the checkpoint is of another config, or nothing says of which.
    """
    if there is None and not known:
        raise ValueError(
            f"{folder} has checkpoints but no config.json, and they do not say which config made "
            f"them. Put the config.json back. {_REPAIR}"
        )
    if there is not None and there.get("config") != digest:
        beside = (
            "its config.json is not the one that they were made with: put that back."
            if known
            else "its config.json is missing, and this config is not the one that made them."
        )
        raise ValueError(
            f"{folder} holds the checkpoints of a run of another config; {beside} {_REPAIR}"
        )


def check_written(
    there: Mapping[str, Any] | None, written: Mapping[str, Any], folder: Path
) -> None:
    """Refuses a checkpoint that was not made with the config.json beside it.

    Fields that configs have got since, and their defaults, are no part of it.

    Args:
        there: as for `check_digest`.
        written: the content of config.json.
        folder: the run folder, for messages.

    Raises:
        ValueError: the checkpoint is of another config.
    """
    if there is None or there.get("config") != _digest(written, _EARLIER_FREE_FIELDS):
        check_digest(there, config_digest(written), folder, known=True)


def check_data(there: Mapping[str, Any] | None, fingerprint: str, folder: Path) -> None:
    """Refuses the checkpoint of a run on other data.

    Args:
        there: as for `check_digest`.
        fingerprint: of the data that are here.
        folder: the run folder, for messages.

    Raises:
        ValueError: the checkpoint is of other data.
    """
    if there is not None and there.get("data") != fingerprint:
        raise ValueError(
            f"{folder} holds the checkpoints of a run on other data (fingerprint "
            f"{str(there.get('data'))[:12]}..., here {fingerprint[:12]}...); point "
            f"--config.data.dir at the data of that run. {_REPAIR}"
        )


def changes(there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns what differs and is no reason to stop: {"code": [there, here]} or "devices"."""
    return {
        key: [there.get(key), here[key]]
        for key in ("code", "devices")
        if there is not None and there.get(key) != here[key]
    }


def lines_of(changed: Mapping[str, list[Any]]) -> list[str]:
    """Returns a line of text for each thing that differs."""
    what = {
        "code": "code: made by {0}, going on with {1}; numbers may differ from those of either",
        "devices": "devices: made on {0}, going on with {1}; sums round in another order",
    }
    return [f"WARNING: {what[key].format(*both)}" for key, both in changed.items()]
