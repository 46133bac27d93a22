"""Shared by the makers of images: their result, checks of their numbers, and their reports."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qkd_jax import checks

REPORT_EVERY = 50  # steps between two losses that are waited for


class Synthesis(NamedTuple):
    """Images float32 [count, H, W, C] as the net takes them, and labels int32 [count]."""

    images: np.ndarray
    labels: np.ndarray


def synthesis(images: np.ndarray, labels: np.ndarray, lr: float) -> Synthesis:
    """Returns the images and labels that were made.

    Raises:
        ValueError: The images are not finite.
    """
    if not np.isfinite(images).all():
        raise ValueError(f"the images are not finite in the end; lower lr, now {lr}.")
    return Synthesis(images.astype(np.float32), labels.astype(np.int32))


def check_fields(
    fields: Mapping[str, Any],
    *,
    sizes: Iterable[str],
    rates: Iterable[str],
    weights: Iterable[str],
) -> None:
    """Refuses, by name, sizes below 1, rates that are not above 0 and weights below 0."""
    for name in sizes:
        checks.integer_in(name, fields[name], 1)
    for name in rates:
        checks.positive(name, fields[name])
    for name in weights:
        checks.in_range(name, fields[name], 0, math.inf)


def loss_to_report(loss: jax.Array, step: int, steps: int) -> float | None:
    """Returns the loss every 50 steps and at the last one; else None, without waiting for it."""
    return float(loss) if step == steps or step % REPORT_EVERY == 0 else None


def classes_wanted(labels: Any, count: int, classes: int) -> np.ndarray:
    """Returns the class that each of `count` images aims at; None deals them out in turn.

    Raises:
        ValueError: Another number of labels, or one out of range.
    """
    wanted = np.arange(count) % classes if labels is None else np.asarray(labels)
    if wanted.shape != (count,) or wanted.min() < 0 or wanted.max() >= classes:
        raise ValueError(
            f"labels is {wanted.shape} from {wanted.min()} to {wanted.max()}; it must be one class "
            f"below {classes} for each of the {count} images."
        )
    # A gather by int8 overflows from 128 classes on.
    return wanted.astype(np.promote_types(wanted.dtype, np.int32))
