"""Adaptors: modules between two nets' features and a loss, which learn beside the student.

`ADAPTORS` maps the name that a loss's row in `losses.TABLE` gives to a builder. A builder gets the
shapes of the student's and the teacher's features (tuples, without the batch) and options by
keyword, and returns a linen module called as

    module(student_features, teacher_features, train=...) -> {input name of the loss: array}

or None where nothing has to be adapted. Features come as tuples, shallow to deep; the teacher's
are detached, so an adaptor on them learns and the teacher does not. What the module returns under
"adaptor_loss" ([batch]) is added to the step's loss as it is until the term starts, for parts that
learn from a target of their own (`Loss.before_start`). A collection "teacher" is filled from the
teacher's variables when a stage starts.

A loss with `heads_logits` has classifiers for adaptors, which give these also without the teacher's
features; their builders get the number of classes as a third argument.

To add an adaptor, write the module in a file of this package, its builder, and a line in
`ADAPTORS`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from qkd_jax import checks
from qkd_jax.distillation.adaptors.fusion import calibration, embeddings, review, temperature
from qkd_jax.distillation.adaptors.heads import branches, shallow_heads
from qkd_jax.distillation.adaptors.maps import maps_and_vectors, views
from qkd_jax.distillation.adaptors.margins import teacher_margins
from qkd_jax.distillation.adaptors.regressors import (
    connectors,
    factors,
    gaussians,
    linear_regressors,
    margin_connectors,
    projections,
    regressors,
)
from qkd_jax.losses import TABLE

__all__ = ["ADAPTORS", "build", "teacher_margins"]

ADAPTORS: dict[str, Callable[..., nn.Module | None]] = {
    "": views,
    "maps_and_vectors": maps_and_vectors,
    "regressors": regressors,
    "linear_regressors": linear_regressors,
    "connectors": connectors,
    "projections": projections,
    "margin_connectors": margin_connectors,
    "gaussians": gaussians,
    "factors": factors,
    "review": review,
    "calibration": calibration,
    "embeddings": embeddings,
    "temperature": temperature,
    "shallow_heads": shallow_heads,
    "branches": branches,
}


def build(
    loss: str,
    student: tuple[tuple[int, ...], ...] = (),
    teacher: tuple[tuple[int, ...], ...] = (),
    classes: int = 0,
    /,
    **options: Any,
) -> nn.Module | None:
    """Returns the adaptor of a loss between features of these shapes, or None if none is needed.

    `classes` is the number of logits, which classifiers need.

    Raises:
        ValueError: an option that the adaptor does not know, or one out of range.
    """
    row = TABLE[loss]
    builder = ADAPTORS[row.adaptor]
    parameters = inspect.signature(builder).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if not row.adaptor:
            others = [name for name, other in TABLE.items() if other.adaptor]
            raise ValueError(
                f"loss {loss!r} has no adaptor, so it takes no options ({', '.join(options)}); "
                f"adaptors belong to {', '.join(others)}."
            )
        if option not in known:
            raise checks.unknown("option", option, known)
    shapes = (student, teacher, classes) if row.has_heads else (student, teacher)
    return builder(*shapes, **options)
