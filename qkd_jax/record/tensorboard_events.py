"""TensorBoard's event files, `<run folder>/tensorboard`, written by tensorboardX.

The events are derived from the log and written anew when a run starts or resumes: what the log
lost, the curves lose too. A TensorBoard that is looking on goes to the new file, whose first event
says that all is said again. For that the old ones are emptied and stay: it never leaves a file that
is gone.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoard:
    """A tracker; see `trackers.Tracker`.

    Args:
        folder: the run folder.
        options: not used.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        # Missing in tests and on most machines: an optional dependency.
        from tensorboardX import summary  # pyrefly: ignore[missing-import]
        from tensorboardX.event_file_writer import EventsWriter  # pyrefly: ignore[missing-import]
        from tensorboardX.proto import (  # pyrefly: ignore[missing-import]
            event_pb2,
            summary_pb2,
        )

        self.path = folder / FOLDER
        self._summary, self._writer, self._protocol = summary, EventsWriter, event_pb2
        self._messages = summary_pb2
        self._file: Any = None

    def begin(self, points: Sequence[Any]) -> None:
        """Writes a new file with the points of all lines."""
        self.close()
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link, which is not followed; remove it.")
        self.path.mkdir(exist_ok=True)
        old = sorted(self.path.glob("events*tfevents*"))
        for file in old:
            if file.is_symlink():
                file.unlink()
            else:
                os.truncate(file, 0)
        # Numbered, since TensorBoard reads files by the order of their names.
        self._file = self._writer(str(self.path / f"events.{len(old):06d}"))
        # A TensorBoard that has read a file before discards all it had from step 0 on.
        start = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self._write(0, session_log=start)
        for of_line in points:
            self._add(of_line)
        self._file.flush()

    def add(self, number: int, points: Any) -> None:
        """Appends the points of a line."""
        self._add(points)
        self._file.flush()

    def _add(self, points: Any) -> None:
        if points.scalars:  # one event a line: an event each would cost a small step some percent
            kind = self._messages.Summary
            values = [kind.Value(tag=n, simple_value=v) for n, v in points.scalars.items()]
            self._write(points.step, summary=kind(value=values))
        for name, histogram in points.histograms.items():
            counts, edges = histogram.counts, histogram.edges()
            centers = [edge + histogram.width / 2 for edge in edges[:-1]]
            sums = [sum(n * c**p for n, c in zip(counts, centers, strict=True)) for p in (1, 2)]
            # TensorBoard's first bin begins at `min` and its last one ends at `max`.
            summary = self._summary.histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sums[0],
                sum_squares=sums[1],
                bucket_limits=edges[1:],
                bucket_counts=list(counts),
            )
            self._write(points.step, summary=summary)

    def images(self, number: int, step: int, images: Mapping[str, bytes]) -> None:
        """Appends images."""
        import io

        import numpy as np
        from PIL import Image

        for name, png in images.items():
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            summary = self._summary.image(name, pixels, dataformats="HWC")
            self._write(step, summary=summary)
        self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, step: int, **what: Any) -> None:
        event = self._protocol.Event(step=step, wall_time=time.time(), **what)
        self._file.write_event(event)
