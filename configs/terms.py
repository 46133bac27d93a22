"""What a student learns by, for any loss: weights, temperatures and courses, as published.

`TERMS[loss]` is (weight of the cross-entropy beside it, fields of the loss's row). Weights are
those of the authors or, for losses that came before, of RepDistiller's commands (Tian et al. 2019,
arXiv 1910.10699), both for CIFAR-100; courses of 20, 30 or 10 epochs of their 240 are fractions
here.
Taps and adaptors are the loss's own (`training/adaptors`).
"""

from __future__ import annotations

from typing import Any

from configs import common

__all__ = ["OF_LABELS", "SEVERAL", "TERMS", "learn"]

# Losses of several teachers at once.
SEVERAL = ("kd_mean", "kd_sum", "ca_mkd")
# Losses of the labels: a net teaches itself, or a class tree does.
OF_LABELS = ("tf_kd", "hxe", "tree_soft_labels", "lca_alignment")

TERMS: dict[str, tuple[float, dict[str, Any]]] = {
    # Logits.
    "kd": (0.1, dict(weight=0.9, temperature=4.0)),
    "lskd": (0.1, dict(weight=9.0, temperature=2.0)),
    "dkd": (1.0, dict(weight=1.0, alpha=1.0, beta=8.0, temperature=4.0, warmup=20 / 240)),
    "nkd": (1.0, dict(weight=1.0, gamma=3.5, temperature=3.0)),
    "dist": (1.0, dict(weight=2.0, beta=1.0, gamma=1.0, temperature=4.0)),
    # The authors' code takes kd's weights, at a batch of 64 over 100 classes. Its products of
    # classes grow as (batch / classes)^2, 400 times from there to 128 over ten, where those
    # weights ruin a net in a few steps.
    "mlkd": (1.0, dict(weight=0.01, temperature=4.0)),
    "ctkd": (
        0.1,
        dict(weight=0.9, reversal=dict(begin=0.0, end=1.0, shape="cosine", steps=10 / 240)),
    ),
    "sqakd": (0.0, dict(weight=1.0, temperature=4.0)),  # no labels: the method
    "apprentice": (0.0, dict(weight=1.0, beta=0.5, gamma=0.5)),  # has the labels' term itself
    "dml": (1.0, dict(weight=1.0)),
    "hard_target": (0.5, dict(weight=0.5)),
    "logit_regression": (0.0, dict(weight=0.2)),  # 2 / classes for ten: a mean squared error
    "kd_mean": (0.1, dict(weight=0.9, temperature=4.0)),
    "kd_sum": (0.1, dict(weight=0.45, temperature=4.0)),  # two teachers
    # 1 over two teachers: the authors' code, at weight 1, divides by their number once more. Its
    # second loss, on features at 50, is not part of this one.
    "ca_mkd": (1.0, dict(weight=0.5, temperature=4.0)),
    # Its heads learn from a teacher here; without one (configs/byot.py) from their own net. Common
    # code's numbers.
    "byot": (1.0, dict(weight=1.0, alpha=0.1, temperature=3.0, hint=1.28e-4)),
    # Labels. The authors' multiplier of 100 undoes their mean over 100 classes.
    "tf_kd": (0.9, dict(weight=0.1, correct=0.99, temperature=20.0)),
    "hxe": (0.0, dict(weight=1.0, alpha=0.1)),
    "tree_soft_labels": (0.0, dict(weight=1.0, beta=10.0)),
    # Has the labels' term itself, at 0.03: the authors' for a linear classifier on fixed features.
    "lca_alignment": (0.0, dict(weight=1.0)),
    # Features.
    "fitnet": (1.0, dict(weight=100.0)),
    "at": (1.0, dict(weight=1000.0, mode="code")),
    "nst": (1.0, dict(weight=50.0)),
    "vid": (1.0, dict(weight=1.0)),
    "ofd": (1.0, dict(weight=1e-3)),
    "reviewkd": (1.0, dict(weight=5.0, warmup=20 / 240)),
    # 400 in the authors' code, with kd at weight 1 as well, and heavy-ball momentum at a rate of
    # 0.05: Nesterov's at 0.1 leaves the finite numbers with it (the adaptors' last convolutions),
    # and in two of three seeds with a quarter of it.
    "semckd": (1.0, dict(weight=10.0)),
    "ickd": (1.0, dict(weight=2.5)),
    "simkd": (0.0, dict(weight=1.0)),  # the student's own classifier is the teacher's
    # Stages of their own in the paper: first these alone, then the labels.
    # 50 in RepDistiller at a rate of 0.05, which leaves the finite numbers at this recipe's.
    "fsp": (1.0, dict(weight=5.0, end=30 / 240)),
    "ab": (1.0, dict(weight=3e-3, margin=1.0, end=30 / 240)),
    # The paraphraser learns alone until the term starts.
    "ft": (1.0, dict(weight=200.0, start=30 / 240)),
    # Relations and contrasts.
    "rkd": (1.0, dict(weight=1.0, distance=25.0, angle=50.0)),
    "cc": (1.0, dict(weight=100.0, gamma=0.4)),  # a re-implementation's
    "cc_adjacent": (1.0, dict(weight=0.02)),
    "sp": (1.0, dict(weight=3000.0)),
    "pkt": (1.0, dict(weight=30000.0)),
    # Those of a re-implementation.
    "irg": (1.0, dict(weight=1.0, vertex=0.1, edge=5.0, transformation=5.0)),
    "crd": (1.0, dict(weight=0.8, negatives=16384, mode="exact", temperature=0.07)),
    "crd_in_batch": (1.0, dict(weight=0.8, temperature=0.07)),  # as crd: none is published
}


def learn(
    loss: str, source: str | tuple[str, ...], *, done: float = 0.0, share: float = 1.0
) -> dict[str, Any]:
    """Returns the rows of a net that learns from `source` by a loss, and from labels beside it.

    Courses of the table are shares of the whole training. A stage that is a part of it takes its
    part of them: what is over by then (a stage of its own, a warm-up) does not come again.

    Args:
      loss: a key of `TERMS`.
      source: the net that teaches, or several; losses of the labels have none.
      done: share of the whole training in which this net has learned so from this source before.
      share: share of the whole training that this stage is.

    Raises:
      ValueError: for a loss without a row, with those that have one; a course that goes on from
        one stage to the next.
    """
    if loss not in TERMS:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(TERMS)}.")
    of_labels, fields = TERMS[loss]
    course = {name: _place(loss, name, value, done, share) for name, value in fields.items()}
    # Where the loss is a stage of its own, the labels wait for its end.
    if "end" in fields and not course["end"]:
        return dict(ce=dict(common.ce(of_labels), start=0.0))
    source = "" if loss in OF_LABELS else source
    rows: dict[str, Any] = {loss: common.term(loss, source, **course)}
    if of_labels:
        rows["ce"] = dict(common.ce(of_labels), start=course.get("end", 0.0))
    return rows


def _place(loss: str, name: str, value: Any, done: float, share: float) -> Any:
    """A field of the table for a stage that has `share` of the whole after `done` of it."""
    ramp = isinstance(value, dict)
    if not ramp and name not in ("start", "end", "warmup"):
        return value
    until = value["steps"] if ramp else value
    if until > done + share or (done and until > done):
        raise ValueError(
            f"{name} of loss {loss!r} goes on until {until:g} of the training, and the stage from "
            f"{done:g} to {done + share:g} holds a part of it; let the first stage with this loss "
            "be that long."
        )
    place = max(until - done, 0.0) / share
    if not ramp:
        return place
    return dict(value, steps=place) if place else value["end"]
