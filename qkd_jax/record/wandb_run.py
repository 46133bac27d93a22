"""A run of wandb, which a resumed run continues: its id is kept in `wandb.json`.

The number of a line of the log is wandb's own step, of which a run says how far it has come: that
is where a resumed run goes on, so what a kill kept from the service is sent again, and what it has
is not. What is kept on this machine (WANDB_MODE=offline) is written anew at every start.
"""

import io
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd_jax.record.json_files import read_json, write_json

FILE = "wandb.json"
# Seconds in which the service must answer, where WANDB_INIT_TIMEOUT says nothing: wandb's own 90
# would hold up every start of a machine without a network.
PATIENCE = 20.0


class Wandb:
    """A tracker; see `trackers.Tracker`. WANDB_MODE=offline keeps it on this machine.

    Args:
        folder: the run folder; its name is that of the run.
        options: "project", "group" ("" for none), and "config", which is shown.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        import wandb  # pyrefly: ignore[missing-import]

        self._wandb = wandb
        self.id = _id(folder.resolve())
        self._run = wandb.init(
            id=self.id,
            resume="allow",
            project=options["project"],
            group=options["group"] or None,
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(options["config"]),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or PATIENCE),
            ),
        )
        # The step of a point is the experiment's, which several lines of the log may share.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.lines = int(self._run.step)  # those that the service has
        if self._run.offline:
            for other in sorted((folder / "wandb").glob(f"offline-run-*-{self.id}")):
                if other.resolve() not in Path(self._run.dir).resolve().parents:
                    shutil.rmtree(other, ignore_errors=True)

    def begin(self, points: Sequence[Any]) -> None:
        """Sends what wandb lacks of the log's lines."""
        for number, of_line in enumerate(points):
            self.add(number, of_line)

    def add(self, number: int, points: Any) -> None:
        """Sends a line, unless it has been sent."""
        if number < self.lines:
            return
        values: dict[str, Any] = dict(points.scalars)
        for name, histogram in points.histograms.items():
            made = list(histogram.counts), histogram.edges()
            values[name] = self._wandb.Histogram(np_histogram=made)
        self._send(number, points.step, values)

    def images(self, number: int, step: int, images: Mapping[str, bytes]) -> None:
        """Sends images."""
        from PIL import Image

        if number >= self.lines:
            opened = {name: Image.open(io.BytesIO(png)) for name, png in images.items()}
            values = {name: self._wandb.Image(image) for name, image in opened.items()}
            self._send(number, step, values)

    def close(self, *, failed: bool = False) -> None:
        """Waits until all is sent or, offline, written; wandb shows whether the run failed."""
        self._run.finish(exit_code=int(failed))

    def _send(self, number: int, step: int, values: Mapping[str, Any]) -> None:
        self.lines = number + 1
        self._run.log({**values, "step": step}, step=number)


def _id(folder: Path) -> str:
    """Returns the id of a run folder; a copy of one that is still there is a run of its own."""
    known = read_json(folder / FILE) or {}
    first = Path(str(known.get("folder") or folder))
    copied = first != folder and (read_json(first / FILE) or {}).get("id") == known.get("id")
    id = secrets.token_hex(4) if copied or not known.get("id") else str(known["id"])
    written = {"schema": 1, "id": id, "folder": str(folder)}
    if written != known:
        write_json(folder / FILE, written)
    return id
