"""Adaptors: what stands between two nets' features and a loss, and learns beside the student.

`ADAPTORS` maps the name of a loss to a builder. A builder gets the shapes of the student's and the
teacher's features (tuples, without the batch) and options by keyword, and returns a linen module
called as

    module(student_features, teacher_features, train=...) -> {input name of the loss: array}

or None where nothing has to be adapted. Features come as tuples, shallow to deep; the teacher's
are detached, so an adaptor on them learns and the teacher does not. What the module returns under
"adaptor_loss" ([batch]) is added to the step's loss as it is until the term starts, for parts that
learn from a target of their own (`BEFORE_START`). A collection "teacher" is filled from the
teacher's variables when a stage starts.

Losses in `HEADS` have classifiers for adaptors, which give "heads_logits" also without the
teacher's features; their builders get the number of classes as a third argument.

A loss that is not listed gets features as the nets have them. To add an adaptor, write the module
in a file of this package, its builder, and a line in `ADAPTORS`; `TAPS` says where it looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from qkd_jax import checks
from qkd_jax.distillation.adaptors.fusion import ctkd, embeddings, reviewkd, semckd
from qkd_jax.distillation.adaptors.heads import byot, one
from qkd_jax.distillation.adaptors.maps import Views
from qkd_jax.distillation.adaptors.margins import teacher_margins
from qkd_jax.distillation.adaptors.regressors import ab, fitnet, fsp, ft, ickd, ofd, vid

__all__ = [
    "ADAPTORS",
    "BEFORE_START",
    "HEADS",
    "SELF_TAUGHT",
    "TAPS",
    "UNPAIRED",
    "build",
    "default_taps",
    "head_names",
    "teacher_margins",
]

ADAPTORS: dict[str, Callable[..., nn.Module | None]] = {
    "fitnet": fitnet,
    "ab": ab,
    "vid": vid,
    "ofd": ofd,
    "fsp": fsp,
    "ft": ft,
    "ickd": ickd,
    "reviewkd": reviewkd,
    "semckd": semckd,
    "crd": embeddings,
    "crd_in_batch": embeddings,
    "cc_adjacent": embeddings,
    "ctkd": ctkd,
    "byot": byot,
    "one": one,
}
# Losses whose adaptors are classifiers.
HEADS = ("byot", "one")
# Losses whose teacher is the net itself, unless the row has a source.
SELF_TAUGHT = ("byot",)

# Where a loss looks unless its row says so: (taps of the student, taps of the teacher).
TAPS: dict[str, tuple[Any, Any]] = {
    "fitnet": ("middle", "middle"),
    "ab": ("pre", "pre"),
    "ofd": ("pre", "pre"),
    "reviewkd": (("stages", "pooled"), ("pre", "pooled")),
    "simkd": ("projected", "last"),
    "irg": (("stages", "pooled"), ("stages", "pooled")),
    "byot": ("shallow", "last"),
    "one": ("stages", ()),
    **dict.fromkeys(
        ("rkd", "cc", "cc_adjacent", "pkt", "crd", "crd_in_batch"), ("pooled", "pooled")
    ),
}
# Parts of an adaptor that learn by its own "adaptor_loss" until the term starts, and are frozen
# from then on. Such a term needs a start, or a stage before that it continues.
BEFORE_START: dict[str, tuple[str, ...]] = {
    "ft": ("paraphraser", "decoder0", "decoder1", "decoder2"),
}
# Losses that take vectors among maps for what they are.
MIXED = ("irg",)
# Losses whose two sides need not have as many taps.
UNPAIRED = ("semckd", "byot", "one")


def default_taps(loss: str, inputs: tuple[str, ...]) -> tuple[Any, Any]:
    """Where a loss looks in either net: its entry of TAPS, else all stages or the last."""
    several = "student_features" in inputs
    return TAPS.get(loss, ("stages", "stages") if several else ("last", "last"))


def head_names(loss: str, taps: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Names of the classifiers of a loss in `HEADS`: their taps, where each has its own."""
    return taps if loss == "byot" else tuple(f"branch{k}" for k in range(1, count + 1))


def build(
    loss: str,
    student: tuple[tuple[int, ...], ...] = (),
    teacher: tuple[tuple[int, ...], ...] = (),
    classes: int = 0,
    /,
    **options: Any,
) -> nn.Module | None:
    """The adaptor of a loss between features of these shapes, or None where none is needed.

    `classes` is the number of logits, which losses in `HEADS` need.

    Raises:
        ValueError: an option that the adaptor does not know, or one out of range.
    """
    builder = ADAPTORS.get(loss)
    if builder is None:
        if options:
            raise ValueError(
                f"loss {loss!r} has no adaptor, so it takes no options ({', '.join(options)}); "
                f"adaptors belong to {', '.join(ADAPTORS)}."
            )
    else:
        known = [
            p.name
            for p in inspect.signature(builder).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        for option in options:
            if option not in known:
                raise checks.unknown("option", option, known)
        shapes = (student, teacher, classes) if loss in HEADS else (student, teacher)
        module = builder(*shapes, **options)
        if module is not None:
            return module
    ranks = {len(shape) for shape in (*student, *teacher)}
    if loss in MIXED:
        return Views(vectors=True) if 2 in ranks else None
    return Views() if ranks - {1} and ranks != {3} else None
