"""Batches by step: a batch is a function of the seed and the step number, and of nothing else.

The examples of a run are one long sequence: a new permutation of the train split for each epoch,
one after another. Step k takes the k-th slice of `batch_size`, so a batch may straddle two epochs,
no example is dropped, and each comes once an epoch. A step number is therefore the whole state of
the input, and a run can start anywhere. One *batch* is one element of a `grain.MapDataset`; one
element an example would be about twenty times slower.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qkd_jax import checks
from qkd_jax.data import augment as augmentations
from qkd_jax.data import draws
from qkd_jax.data import workers as workers_of
from qkd_jax.data.dataset import Dataset
from qkd_jax.data.views import Views

Batch = dict[str, np.ndarray]


class Lookup(Protocol):
    """Values known beforehand for every view of every training example, such as cached logits."""

    def rows(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Returns float32 [batch, ...] for training examples in views."""


class TrainBatches:
    """The train split as an endless sequence of batches; made by `train_batches`."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        augment: Sequence[str] = (),
        views: int = 0,
        known: Mapping[str, Lookup] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        checks.integer_in("batch_size", batch_size, 1)
        checks.integer_in("seed", seed, 0, draws.LARGEST_SEED)
        self.dataset = dataset
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.augment = tuple(augment) if not isinstance(augment, str) else augment
        self._augment = augmentations.parse(self.augment)
        augmentations.check_order(dataset.train_images, self.augment)
        checks.integer_in("views", views, 0)
        self.views = Views(dataset, views, augment=self.augment, seed=self.seed) if views else None
        self.known = dict(known or {})
        if self.known and self.views is None:
            raise ValueError(
                "views is 0, so every step augments its images and nothing is known of them "
                f"beforehand, but known has {sorted(self.known)}; give views=1 or more."
            )
        self.rows = None if rows is None else np.asarray(rows)
        if self.rows is not None:
            checks.rows_within("rows", self.rows, self.batch_size)
        # An epoch's order serves many steps; threads that prefetch may sit in two epochs.
        self._order = functools.lru_cache(maxsize=4)(self._permutation)

    @property
    def steps_per_epoch(self) -> float:
        """Examples of the train split over the batch size; not rounded."""
        return len(self.dataset.train_images) / self.batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        count = len(self.dataset.train_images)
        return draws.permutation(count, seed=self.seed, stream=draws.ORDER, index=epoch)

    def indices(self, step: int) -> np.ndarray:
        """Returns the rows of the train split that step takes, int64 [batch]."""
        checks.integer_in("step", step, 0)
        count = len(self.dataset.train_images)
        position, stop = int(step) * self.batch_size, (int(step) + 1) * self.batch_size
        pieces = []
        while position < stop:
            epoch, start = divmod(position, count)
            pieces.append(self._order(epoch)[start : start + stop - position])
            position += len(pieces[-1])
        return np.concatenate(pieces)

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step.

        Args:
            step: 0 or more.

        Returns:
            "image" float32 [batch, H, W, C], normalised; "label" int32 [batch]; "index" int64
            [batch], the rows of the train split; and what `known` knows, under its names.
        """
        batch = self.pixels(step)
        batch["image"] = self.dataset.normalize(batch["image"])
        return batch

    def pixels(self, step: int) -> Batch:
        """Returns the batch of a step with "image" as uint8: a quarter of the bytes to move."""
        whole = self.indices(step)
        index = whole if self.rows is None else whole[self.rows]
        extra = {}
        if self.views is None:
            images = augmentations.batch(
                self.dataset.train_images,
                whole,
                self._augment,
                seed=self.seed,
                step=int(step),
                rows=self.rows,
            )
        else:
            place = int(step) * self.batch_size + np.arange(self.batch_size)
            view = place // len(self.dataset.train_images) % self.views.count
            view = view if self.rows is None else view[self.rows]
            images = self.views.images(index, view)
            extra = {name: lookup.rows(index, view) for name, lookup in self.known.items()}
        return {"image": images, "label": self.dataset.train_labels[index], "index": index, **extra}

    def iter(
        self,
        start_step: int = 0,
        stop_step: int | None = None,
        *,
        prefetch: int = 4,
        workers: int = 0,
        pixels: bool = False,
    ) -> Iterator[Batch]:
        """Yields the batches of start_step, start_step + 1, ..., made ahead of time.

        Args:
            start_step: the first step.
            stop_step: one past the last step; None for no end.
            prefetch: how many batches are ready ahead of use; 0 makes each when it is asked for.
            workers: processes that make whole batches in turn, each with two ahead; 0 makes them in
                a thread of this process. The batches are the same for any number.
            pixels: whether to yield `pixels(step)`.

        Returns:
            An iterator of batches, equal to `[self[k] for k in range(start_step, stop_step)]`.

        Raises:
            UnreadableError: an image of a streamed set cannot be read; it names the file.
            RuntimeError: a worker process ended.
        """
        checks.integer_in("start_step", start_step, 0)
        checks.integer_in("prefetch", prefetch, 0)
        checks.integer_in("workers", workers, 0, workers_of.MOST)
        if stop_step is not None:
            checks.integer_in("stop_step", stop_step, start_step)
        # Grain wants a length; 2**40 steps do not end.
        stop = 2**40 if stop_step is None else stop_step
        make = self.pixels if pixels else self.__getitem__
        if workers:
            return workers_of.batches(make, start_step, stop, workers)
        if not prefetch:
            return (make(step) for step in range(start_step, stop))
        import grain

        steps = grain.MapDataset.range(start_step, stop).map(make)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return iter(steps.to_iter_dataset(options))

    def __getstate__(self) -> dict[str, Any]:
        # The epoch's order is a cached function, which does not travel to a worker process.
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = functools.lru_cache(maxsize=4)(self._permutation)

    def __iter__(self) -> Iterator[Batch]:
        return self.iter()


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    augment: Sequence[str] = (),
    views: int = 0,
    known: Mapping[str, Lookup] | None = None,
    rows: np.ndarray | None = None,
) -> TrainBatches:
    """Returns the endless training batches of a data set.

    Args:
        dataset: from `load`.
        batch_size: examples a step.
        seed: of order and augmentation; of nothing else.
        augment: names of `AUGMENTATIONS` with amounts, applied in order, as
            `("pad_crop:4", "flip")`. They act on the uint8 image, so pixels that come in at a
            border have the value 0 before normalisation.
        views: 0 augments at every step. Above 0, the augmented images are that many views of
            each example, drawn beforehand: epoch e shows view e modulo `views`. 1 shows the images
            as they are. See `views.Views`.
        known: {name in the batch: what is known of each example in each view}; needs `views`.
        rows: the rows of each batch that are made, int [rows]; by default all. They have the bits
            of those rows of the whole batch, so processes may share a batch in any way.

    Returns:
        An object with `[step]`, `.iter(start_step)` and `.indices(step)`.

    Raises:
        ValueError: for an unknown augmentation (with the nearest name), or a number out of range.
    """
    return TrainBatches(
        dataset,
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        views=views,
        known=known,
        rows=rows,
    )


class EvalBatches(Sequence[Batch]):
    """One split in order, in batches of one size; made by `eval_batches`."""

    def __init__(self, dataset: Dataset, split: str, batch_size: int) -> None:
        checks.integer_in("batch_size", batch_size, 1)
        self.dataset = dataset
        self.split = split
        self.batch_size = int(batch_size)
        self._images, self._labels = dataset.arrays(split)

    def __len__(self) -> int:
        return -(-len(self._images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; those of a streamed set are made ahead of use."""
        numbers = range(len(self))
        if isinstance(self._images, np.ndarray):
            return map(self.__getitem__, numbers)
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        made = grain.MapDataset.range(len(self)).map(self.__getitem__)
        return iter(made.to_iter_dataset(options))

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        start = (int(number) % len(self)) * self.batch_size
        images = self._images[start : start + self.batch_size]
        image = np.zeros((self.batch_size, *images.shape[1:]), np.float32)
        image[: len(images)] = self.dataset.normalize(images)
        return {"image": image, **self._outline(start)}

    def _outline(self, start: int) -> Batch:
        labels = self._labels[start : start + self.batch_size]
        count, padding = len(labels), self.batch_size - len(labels)
        return {
            "label": np.pad(labels, (0, padding)),
            "index": np.pad(np.arange(start, start + count), (0, padding), constant_values=-1),
            "mask": np.arange(self.batch_size) < count,
        }

    def outlines(self) -> Iterator[Batch]:
        """Yields the batches without their images, which a streamed set need not decode then."""
        return (self._outline(k * self.batch_size) for k in range(len(self)))


def eval_batches(dataset: Dataset, split: str, batch_size: int) -> EvalBatches:
    """Returns a split in order and without augmentation, as a list of equally shaped batches.

    Args:
        dataset: from `load`.
        split: "train" or "test".
        batch_size: examples a batch; the last one is padded with images of zeros.

    Returns:
        A sequence of batches as in training, and "mask" bool [batch]: False where an example is
        padding (there the label is 0 and the index -1).
    """
    return EvalBatches(dataset, split, batch_size)
