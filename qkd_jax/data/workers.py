"""Worker processes that make batches: Grain's, each whole batches in turn.

A batch is a function of its step, so which process makes it changes nothing, and an element of a
Grain data set is a step. Grain hands the arrays over in shared memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

MOST = 256
AHEAD = 2  # batches that each worker has ready


def batches(
    make: Callable[[int], dict[str, np.ndarray]], start: int, stop: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields make(start), make(start + 1), ... up to stop, made by worker processes.

    Args:
        make: returns the batch of a step; it is pickled.
        start: the first step.
        stop: one past the last.
        workers: processes.

    Raises:
        RuntimeError: a worker ended without an error of its own, as one that is killed.
    """
    import grain
    from absl import flags

    # Grain asks its own flags, which nobody has parsed where a run did not start by a command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    none = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
    steps: Any = grain.MapDataset.range(start, stop).map(make).to_iter_dataset(none)
    iterator = iter(steps.mp_prefetch(options))
    try:
        yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise RuntimeError(
            f"a worker process of the input ended ({error}) If it was killed for memory (exit code "
            "-9), set config.data.workers lower: each holds up to "
            f"{AHEAD + 1} batches. The run continues at its last checkpoint."
        ) from error
    finally:
        with contextlib.suppress(Exception):  # its processes may be gone already
            iterator.close()
