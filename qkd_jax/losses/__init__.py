"""Losses: pure functions of arrays, one value per example.

`LOSSES` maps the names used in a config's `learn` table to functions; `qkd_jax.losses.kd` and
`LOSSES["kd"]` are the same object. To add a loss, write the function in the file of its family
(`response.py` for what compares logits, `decoupled.py` for what splits off the labelled class,
`predictions.py` for logits over a batch, `teachers.py` for several teachers; `feature.py`,
`gram.py` and `activation.py` for hidden features; `relation.py` and `contrastive.py` for what
relates examples; `hierarchical.py` for what knows a class tree; `branches.py` for further
classifiers on hidden features), import it here and give it a row in `TABLE`, which holds all that
the signature does not say. Training, configs, caches and the tests in `tests/losses/test_losses.py`
read signature and row.

Signature rules that the training step relies on. Positional names say what it passes:

* `logits` or `student_logits`, [batch, classes], come from the net that learns; `teacher_logits`
  from the net named by `source`, `teachers_logits`, a tuple of such, from several. `labels`,
  int [batch], and `index`, int32 [batch], the examples' ids, come from the batch.
* `student_feature` and `teacher_feature` are one array each: a map [batch, height, width, channels]
  or a vector [batch, channels]. `student_features` and `teacher_features` are tuples of such
  arrays, shallow to deep (`semckd`: the student's is a tuple of tuples). They arrive as they are to
  be compared: learned regressors and connectors are adaptors. Maps of unlike size
  are pooled inside the loss, the larger to the size of the smaller (`adaptive_avg_pool`).
* `student_embedding` and `teacher_embedding`, [batch, dim], are features behind a learned embedding
  of either net. The gradient flows into both: what is detached is the teacher's feature, before
  its embedding.
* `heads_logits`, a tuple of arrays [batch, classes], come from classifiers that the term of the
  loss owns; they and what is below them learn. `gate`, [batch, heads + 1], weighs the net itself
  and them.
* What else a loss needs comes as a further array under its own name: `variance`, `attention`,
  `temperature`, into which the gradient flows, and `margins`, a tuple of constants.
* A loss with `memory`, a dict of arrays, also takes `key`, a random key, returns (values, new
  memory), and its row has a function that makes the first one:
  `TABLE[name].memory(num_examples, dim, key=key)`. On several devices all hold the same memory.

The others:

* Hyper-parameters are keyword-only and have defaults. Those with a float default may arrive as
  traced scalars, so that runs which differ in numbers share one compiled step; Python numbers are
  validated.
* A loss that relates the examples of a batch takes `axis_name`: the mapped axis over whose devices
  the batch is distributed, or None. The values are then those of this device's examples in the
  global batch.
* `where` comes last: a [batch] mask. An example that it leaves out contributes 0 and no gradient,
  whatever its inputs hold; the others get what they would get in a batch without it.
* The result has shape [batch], at least float32; the step reduces once, as sum over count. Where a
  loss is published as a mean over pairs or triples, the mean over examples is that value.
* `stop_gradient` on `teacher_logits`, `teachers_logits`, `teacher_feature` and `teacher_features`
  happens inside the loss.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qkd_jax.losses.activation import ab, ofd, ofd_margin
from qkd_jax.losses.branches import byot, one
from qkd_jax.losses.contrastive import crd, crd_in_batch, crd_memory
from qkd_jax.losses.decoupled import dkd, nkd, tf_kd
from qkd_jax.losses.feature import at, fitnet, ft, reviewkd, semckd, simkd, vid
from qkd_jax.losses.gram import fsp, ickd, nst
from qkd_jax.losses.hierarchical import hxe, lca_alignment, tree_soft_labels
from qkd_jax.losses.predictions import dist, mlkd
from qkd_jax.losses.relation import cc, cc_adjacent, irg, pkt, rkd, sp
from qkd_jax.losses.response import (
    apprentice,
    ce,
    ctkd,
    dml,
    hard_target,
    kd,
    logit_regression,
    lskd,
    sqakd,
)
from qkd_jax.losses.teachers import ca_mkd, kd_mean, kd_sum


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss with all that its users must know of it.

    Attributes:
        function: the loss.
        ce_weight: weight of the cross-entropy with labels beside it; 0 leaves that out.
        recipe: its weight and hyper-parameters as published, fields of a row of the `learn` table;
            `start`, `end`, `warmup` and a ramp's `steps` are fractions of the whole training. None
            for a loss by which no config of all losses learns.
        taps: where it looks in the student and in the teacher (`distillation.taps`); by default in
            all stages if it takes several features, else in the last.
        adaptor: key of `distillation.adaptors.ADAPTORS`; "" for features as the nets have them.
        paired: whether both nets must have as many taps.
        self_taught: whether the net is its own teacher unless the row names a source.
        by_softmax: whether it looks at a teacher's logits by the softmax of all classes alone. The
            k largest logits and the sum over the others then tell it most.
        memory: makes the first memory of a loss that keeps one.
        before_start: parts of its adaptor that learn from a target of their own until the term
            starts, and are frozen from then on. Such a term needs a start, or a stage before that
            it continues.
    """

    function: Callable[..., Any]
    ce_weight: float = 1.0
    recipe: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: {"weight": 1.0})
    taps: tuple[Any, Any] | None = None
    adaptor: str = ""
    paired: bool = True
    self_taught: bool = False
    by_softmax: bool = False
    memory: Callable[..., dict[str, jax.Array]] | None = None
    before_start: tuple[str, ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the positional arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @functools.cached_property
    def keywords(self) -> dict[str, inspect.Parameter]:
        """The keyword-only arguments: hyper-parameters, `axis_name` and `where`."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}

    @functools.cached_property
    def default_taps(self) -> tuple[Any, Any]:
        """Taps of the student and of the teacher where the `learn` table names none."""
        return self.taps or (
            ("stages", "stages") if "student_features" in self.inputs else ("last", "last")
        )

    @property
    def has_taps(self) -> bool:
        """True if it compares features."""
        return self.taps is not None or any(
            "feature" in name or "embedding" in name for name in self.inputs
        )

    @property
    def has_teacher(self) -> bool:
        """True if it compares with a teacher; otherwise it is a loss of the labels."""
        return any(name.startswith("teacher") for name in self.inputs)

    @property
    def has_several_teachers(self) -> bool:
        """True if it takes the logits of several teachers at once."""
        return "teachers_logits" in self.inputs

    @property
    def has_heads(self) -> bool:
        """True if its adaptor is a set of classifiers on the student's hidden features."""
        return "heads_logits" in self.inputs

    @property
    def borrows_classifier(self) -> bool:
        """True if the student must end in its teacher's classifier."""
        return self.taps is not None and "projected" in self.taps


POOLED = ("pooled", "pooled")

# Weights are those of the authors or, for losses that came before, of RepDistiller's commands (Tian
# et al. 2019, arXiv 1910.10699), both for CIFAR-100; 20, 30 or 10 epochs of their 240 are fractions
# here.
TABLE: dict[str, Loss] = {
    # Labels and logits.
    "ce": Loss(ce, recipe=None),
    "kd": Loss(kd, 0.1, dict(weight=0.9, temperature=4.0), by_softmax=True),
    # 2 / classes for ten: a mean squared error.
    "logit_regression": Loss(logit_regression, 0.0, dict(weight=0.2)),
    "dml": Loss(dml, by_softmax=True),
    "hard_target": Loss(hard_target, 0.5, dict(weight=0.5), by_softmax=True),
    "lskd": Loss(lskd, 0.1, dict(weight=9.0, temperature=2.0)),
    "dkd": Loss(dkd, 1.0, dict(weight=1.0, alpha=1.0, beta=8.0, temperature=4.0, warmup=20 / 240)),
    "nkd": Loss(nkd, 1.0, dict(weight=1.0, gamma=3.5, temperature=3.0)),
    # The authors' multiplier of 100 undoes their mean over 100 classes.
    "tf_kd": Loss(tf_kd, 0.9, dict(weight=0.1, correct=0.99, temperature=20.0)),
    "dist": Loss(dist, 1.0, dict(weight=2.0, beta=1.0, gamma=1.0, temperature=4.0)),
    # The authors' code takes kd's weights, at a batch of 64 over 100 classes. Its products of
    # classes grow as (batch / classes)^2, 400 times from there to 128 over ten, where those
    # weights ruin a net in a few steps.
    "mlkd": Loss(mlkd, 1.0, dict(weight=0.01, temperature=4.0)),
    "ctkd": Loss(
        ctkd,
        0.1,
        dict(weight=0.9, reversal=dict(begin=0.0, end=1.0, shape="cosine", steps=10 / 240)),
        adaptor="temperature",
        by_softmax=True,
    ),
    # No labels: the method.
    "sqakd": Loss(sqakd, 0.0, dict(weight=1.0, temperature=4.0), by_softmax=True),
    # Has the labels' term itself.
    "apprentice": Loss(apprentice, 0.0, dict(weight=1.0, beta=0.5, gamma=0.5), by_softmax=True),
    # Several teachers; of two in `kd_sum` and `ca_mkd`, whose authors' code, at weight 1, divides
    # by their number once more. Its second loss, on features at 50, is not part of `ca_mkd`.
    "kd_mean": Loss(kd_mean, 0.1, dict(weight=0.9, temperature=4.0), by_softmax=True),
    "kd_sum": Loss(kd_sum, 0.1, dict(weight=0.45, temperature=4.0), by_softmax=True),
    "ca_mkd": Loss(ca_mkd, 1.0, dict(weight=0.5, temperature=4.0)),
    # Classifiers on hidden features. byot's learn from a teacher in the recipe; without one
    # (configs/byot.py) from their own net. Common code's numbers.
    "byot": Loss(
        byot,
        1.0,
        dict(weight=1.0, alpha=0.1, temperature=3.0, hint=1.28e-4),
        taps=("shallow", "last"),
        adaptor="shallow_heads",
        paired=False,
        self_taught=True,
    ),
    "one": Loss(one, recipe=None, taps=("stages", ()), adaptor="branches", paired=False),
    # Features.
    "fitnet": Loss(
        fitnet, 1.0, dict(weight=100.0), taps=("middle", "middle"), adaptor="regressors"
    ),
    # The student's own classifier is the teacher's.
    "simkd": Loss(simkd, 0.0, taps=("projected", "last")),
    "at": Loss(at, 1.0, dict(weight=1000.0, mode="code")),
    "vid": Loss(vid, adaptor="gaussians"),
    # The paraphraser learns alone until the term starts.
    "ft": Loss(
        ft,
        1.0,
        dict(weight=200.0, start=30 / 240),
        adaptor="factors",
        before_start=("paraphraser", "decoder0", "decoder1", "decoder2"),
    ),
    "reviewkd": Loss(
        reviewkd,
        1.0,
        dict(weight=5.0, warmup=20 / 240),
        taps=(("stages", "pooled"), ("pre", "pooled")),
        adaptor="review",
    ),
    # 400 in the authors' code, with kd at weight 1 as well, and heavy-ball momentum at a rate of
    # 0.05: Nesterov's at 0.1 leaves the finite numbers with it (the adaptors' last convolutions),
    # and in two of three seeds with a quarter of it.
    "semckd": Loss(semckd, 1.0, dict(weight=10.0), adaptor="calibration", paired=False),
    "nst": Loss(nst, 1.0, dict(weight=50.0)),
    # Stages of their own in the paper, fsp and ab: first these alone, then the labels.
    # 50 in RepDistiller at a rate of 0.05, which leaves the finite numbers at this recipe's.
    "fsp": Loss(fsp, 1.0, dict(weight=5.0, end=30 / 240), adaptor="projections"),
    "ickd": Loss(ickd, 1.0, dict(weight=2.5), adaptor="connectors"),
    "ab": Loss(
        ab,
        1.0,
        dict(weight=3e-3, margin=1.0, end=30 / 240),
        taps=("pre", "pre"),
        adaptor="linear_regressors",
    ),
    "ofd": Loss(ofd, 1.0, dict(weight=1e-3), taps=("pre", "pre"), adaptor="margin_connectors"),
    # Relations and contrasts.
    "rkd": Loss(rkd, 1.0, dict(weight=1.0, distance=25.0, angle=50.0), taps=POOLED),
    "cc": Loss(cc, 1.0, dict(weight=100.0, gamma=0.4), taps=POOLED),  # a re-implementation's
    "cc_adjacent": Loss(cc_adjacent, 1.0, dict(weight=0.02), taps=POOLED, adaptor="embeddings"),
    "sp": Loss(sp, 1.0, dict(weight=3000.0)),
    "pkt": Loss(pkt, 1.0, dict(weight=30000.0), taps=POOLED),
    # A re-implementation's.
    "irg": Loss(
        irg,
        1.0,
        dict(weight=1.0, vertex=0.1, edge=5.0, transformation=5.0),
        taps=(("stages", "pooled"), ("stages", "pooled")),
        adaptor="maps_and_vectors",
    ),
    "crd": Loss(
        crd,
        1.0,
        dict(weight=0.8, negatives=16384, mode="exact", temperature=0.07),
        taps=POOLED,
        adaptor="embeddings",
        memory=crd_memory,
    ),
    # As crd: none is published.
    "crd_in_batch": Loss(
        crd_in_batch, 1.0, dict(weight=0.8, temperature=0.07), taps=POOLED, adaptor="embeddings"
    ),
    # Labels and a class tree.
    "hxe": Loss(hxe, 0.0, dict(weight=1.0, alpha=0.1)),
    "tree_soft_labels": Loss(tree_soft_labels, 0.0, dict(weight=1.0, beta=10.0)),
    # Has the labels' term itself, at 0.03: the authors' for a linear classifier on fixed features.
    "lca_alignment": Loss(lca_alignment, 0.0),
}

LOSSES: dict[str, Callable[..., Any]] = {name: row.function for name, row in TABLE.items()}

__all__ = ["LOSSES", "TABLE", "Loss", "crd_memory", "ofd_margin", *LOSSES]
