"""Runs that are asked to stop, and what they have saved."""

from pathlib import Path

from qkd_jax.record.checkpoint import Checkpoints


class StopAt:
    """Asks a run to stop after so many questions, as SIGTERM does at some moment."""

    def __init__(self, count):
        self.left = count
        self.received = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0


def checkpoint_of(folder):
    """Returns the newest checkpoint of a run folder."""
    with Checkpoints(Path(folder) / "checkpoints") as checkpoints:
        return checkpoints.restore_latest()
