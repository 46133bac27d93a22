"""Views: a fixed number of augmented copies of the training split, drawn beforehand.

Fresh augmentation shows a net another image at every step, so nothing about an image can be looked
up. With V views, epoch e shows view e mod V of every example: what a frozen teacher says about them
is computed once and read from then on. One view is the images as they are, without augmentation.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.data import augment as augmentations
from qkd_jax.data import draws
from qkd_jax.data.dataset import Dataset

LARGEST = 2**16 - 1  # a view's number is stored in 16 bits


class Views:
    """The views of a data set's training split.

    Args:
        dataset: from `load`.
        views: how many; 1 is the images as they are, whatever `augment` says.
        augment: names of `AUGMENTATIONS`, as in `train_batches`.
        seed: of the augmentation.

    Raises:
        ValueError: for a number out of range, or an unknown augmentation.
    """

    def __init__(
        self, dataset: Dataset, views: int, *, augment: Sequence[str] = (), seed: int = 0
    ) -> None:
        checks.integer_in("views", views, 1, LARGEST)
        self.dataset = dataset
        self.count = int(views)
        self.seed = int(seed)
        self.augment = tuple(augment) if views > 1 else ()
        self._augment = augmentations.parse(self.augment)
        augmentations.check_order(dataset.train_images, self.augment)
        for text, (entry, _) in zip(self.augment, self._augment, strict=True):
            if not entry.keeps_labels:
                raise ValueError(
                    f"augment has {text!r}, which mixes the images of a batch: a view shows an "
                    "image by itself, whatever batch it is in. Take it out, or augment at every "
                    "step (views=0)."
                )
        # A batch sits in two epochs at most.
        self._raw = functools.lru_cache(maxsize=2 * max(len(self._augment), 1))(self._words)

    def __getstate__(self) -> dict[str, Any]:
        # A cached function does not travel to a worker process.
        return {name: value for name, value in vars(self).items() if name != "_raw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._raw = functools.lru_cache(maxsize=2 * max(len(self._augment), 1))(self._words)

    def _words(self, view: int, slot: int, each: int) -> np.ndarray:
        count = len(self.dataset.train_images)
        raw = draws.words(count * each, seed=self.seed, stream=draws.VIEWS, index=view, slot=slot)
        return raw.reshape(count, each)

    def images(self, rows: np.ndarray, views: np.ndarray | int) -> np.ndarray:
        """Returns uint8 [rows, H, W, C]: row `rows[i]` of the split as view `views[i]` shows it.

        Raises:
            ValueError: a number that is no row's.
        """
        rows = np.asarray(rows)
        checks.rows_within("rows", rows, len(self.dataset.train_images))
        views = np.broadcast_to(views, rows.shape)
        if not self._augment:
            return self.dataset.train_images[rows]
        images = np.empty((len(rows), *self.dataset.image_shape), np.uint8)
        for number in np.unique(views):
            chosen = np.flatnonzero(views == number)
            raw = [
                self._raw(int(number), slot, entry.words)[rows[chosen]]
                for slot, (entry, _) in enumerate(self._augment)
            ]
            images[chosen] = augmentations.view(
                self.dataset.train_images, rows[chosen], self._augment, raw
            )
        return images
