"""Trackers: TensorBoard and wandb draw the curves of a run, whose record stays metrics.jsonl.

A tracker has nothing of its own to remember: its points are made of the log's lines. When a run
resumes, the log is cut back to the checkpoint, and `begin` hands every tracker the lines that are
left; those that are logged again behind them come once more through `add`, with their numbers. So
curves have each point once, whatever killed the run.

Add a tracker as a class with these methods in TRACKERS; its package is imported where it is used.
A tracker that fails is dropped with a message: a run does not end because of its curves.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qkd_jax import checks
from qkd_jax.record.tensorboard_events import TensorBoard
from qkd_jax.record.wandb_run import Wandb

# The split of lines that count the codes of weights, {"<net>/<layer>/<code>": count}.
CODES = "codes"
# wandb refuses a histogram of more bins than 512.
MAX_BINS = 512
Row = Mapping[str, Any]


class Histogram(NamedTuple):
    """Counts of the whole numbers from `first` on, `width` of them in each bin."""

    first: int
    counts: tuple[int, ...]
    width: int = 1

    def edges(self) -> list[float]:
        """Returns the ends of the bins, one more than there are counts."""
        return [self.first - 0.5 + self.width * i for i in range(len(self.counts) + 1)]


class Points(NamedTuple):
    """What a line of the log is in a tracker: named numbers and histograms at a step."""

    step: int
    scalars: dict[str, float]
    histograms: dict[str, Histogram]


class Tracker(Protocol):
    """What a tracker does with points; line `number` of the log has the number 0, 1, ..."""

    def begin(self, points: Sequence[Points]) -> None:
        """Starts, or starts again, from the lines that the log has."""

    def add(self, number: int, points: Points) -> None:
        """Adds the points of a new line."""

    def images(self, number: int, step: int, images: Mapping[str, bytes]) -> None:
        """Adds PNG images by name, behind the last line."""

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left, of a run that came to its end or did not."""


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def points_of(row: Row) -> Points:
    """Returns the points of a line: "<split>/<name>"; what was not finite is left out.

    >>> points_of({"step": 3, "split": "test", "values": {"a/top1": 0.5, "a/loss": None}})
    Points(step=3, scalars={'test/a/top1': 0.5}, histograms={})
    """
    split, values = row["split"], row["values"]
    if split != CODES:
        known = {f"{split}/{name}": float(v) for name, v in values.items() if v is not None}
        return Points(row["step"], known, {})
    layers: dict[str, dict[int, int]] = {}
    for name, count in values.items():
        layer, _, code = name.rpartition("/")
        layers.setdefault(f"{split}/{layer}", {})[int(code)] = int(count)
    found = {}
    for name, counts in layers.items():
        first, last = min(counts), max(counts)
        width = -(-(last - first + 1) // MAX_BINS)
        bins = [0] * ((last - first) // width + 1)
        for code, count in counts.items():
            bins[(code - first) // width] += count
        found[name] = Histogram(first, tuple(bins), width)
    return Points(row["step"], {}, found)


def check(names: Sequence[str], where: str = "config.track.trackers") -> None:
    """Refuses an unknown tracker.

    Raises:
        ValueError: with the nearest name.
    """
    if isinstance(names, str):
        raise ValueError(f"{where} is {names!r}; give a tuple of names, such as ('tensorboard',).")
    for name in names:
        checks.one_of(where, name, TRACKERS)


def check_packages(names: Sequence[str], where: str = "config.track.trackers") -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        ValueError: naming the package and how to install it.
    """
    for name in names:
        if name not in PACKAGES:
            continue
        spec = importlib.util.find_spec(PACKAGES[name])
        if (
            spec is None or spec.origin is None
        ):  # a mere folder, which wandb leaves behind, has none
            raise ValueError(
                f"{where} has {name!r}, whose package {PACKAGES[name]} is not installed; "
                f"pip install {PACKAGES[name]} (or -e '.[trackers]', which has all), or leave "
                f"{name!r} out: metrics.jsonl and report.html have the same curves."
            )


class Follower:
    """Hands a log's lines to trackers; a tracker that fails is dropped, with a message."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]):
        self.trackers = dict(trackers)
        self.say = say

    def begin(self, rows: Sequence[Row]) -> None:
        """Tells the trackers which lines the log has."""
        self._each(lambda tracker: tracker.begin([points_of(row) for row in rows]))

    def add(self, number: int, row: Row) -> None:
        """Tells the trackers of a new line."""
        self._each(lambda tracker: tracker.add(number, points_of(row)))

    def images(self, number: int, step: int, draw: Callable[[], Mapping[str, bytes]]) -> None:
        """Gives the trackers the figures that `draw` returns."""
        draw = functools.cache(draw)
        self._each(lambda tracker: tracker.images(number, step, draw()))

    def close(self, *, failed: bool = False) -> None:
        """Closes all."""
        self._each(lambda tracker: tracker.close(failed=failed))
        self.trackers = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                self.drop(name, error)

    def drop(self, name: str, error: Exception) -> None:
        """Goes on without a tracker."""
        self.trackers.pop(name, None)
        self.say(
            f"tracker {name} failed ({type(error).__name__}: {error}); the run goes on without "
            "it. metrics.jsonl has all of its points: started again, it gets those it lacks."
        )


@contextlib.contextmanager
def tracking(
    metrics: Any,
    fields: Mapping[str, Any],
    config: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    group: str = "",
) -> Iterator[Follower]:
    """Lets trackers follow a `MetricsLog`.

    Args:
        metrics: the log; its next `truncate` begins.
        fields: config.track: "trackers", "project".
        config: the resolved config, which wandb shows.
        say: prints a message.
        group: the sweep of which the run is one; "" for none.
    """
    follower = Follower({}, say)
    options = {"project": fields["project"], "group": group, "config": config}
    for name in fields["trackers"]:
        try:
            follower.trackers[name] = TRACKERS[name](metrics.path.parent, options)
        except Exception as error:
            follower.drop(name, error)
    metrics.follower = follower if follower.trackers else None
    failed = True
    try:
        yield follower
        failed = False
    finally:
        metrics.follower = None
        follower.close(failed=failed)
