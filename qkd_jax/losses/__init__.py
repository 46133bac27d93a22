"""Losses: pure functions of arrays, one value per example.

`LOSSES` maps the names used in a config's `learn` table to functions; `qkd_jax.losses.kd` and
`LOSSES["kd"]` are the same object. To add a loss, write the function in the file of its family
(`response.py` for what compares logits, `decoupled.py` for what splits off the labelled class,
`predictions.py` for logits over a batch, `teachers.py` for several teachers; `feature.py`,
`gram.py` and `activation.py` for hidden features; `relation.py` and `contrastive.py` for what
relates examples; `hierarchical.py` for what knows a class tree; `heads.py` for further classifiers
on hidden features), import it here and give it a line in `LOSSES`: the tests in
`tests/losses/test_losses.py` are parametrised over the table and read the signature.

Signature rules that the training step relies on. Positional names say what it passes:

* `logits` or `student_logits`, [batch, classes], come from the net that learns; `teacher_logits`
  from the net named by `source`, `teachers_logits`, a tuple of such, from several. `labels`,
  int [batch], and `index`, int32 [batch], the examples' ids, come from the batch.
* `student_feature` and `teacher_feature` are one array each: a map [batch, height, width, channels]
  or a vector [batch, channels]. `student_features` and `teacher_features` are tuples of such
  arrays, shallow to deep (`semckd`: the student's is a tuple of tuples). They arrive as they are to
  be compared: learned regressors and connectors belong to the training step. Maps of unlike size
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
  memory), and has a companion in `MEMORY` that makes the first one:
  `MEMORY[name](num_examples, dim, key=key)`. On several devices all hold the same memory.

The others:

* Hyper-parameters are keyword-only and have defaults. Those with a float default may arrive as
  traced scalars, so that runs which differ in numbers share one compiled step; Python numbers are
  validated.
* A loss that relates the examples of a batch takes `axis_name`: the mapped axis over whose devices
  the batch is spread, or None. The values are then those of this device's rows in the global batch.
* `where` comes last: a [batch] mask. An example that it leaves out contributes 0 and no gradient,
  whatever its inputs hold; the others get what they would get in a batch without it.
* The result has shape [batch], at least float32; the step reduces once, as sum over count. Where a
  loss is published as a mean over pairs or triples, the mean of the rows is that value.
* `stop_gradient` on `teacher_logits`, `teachers_logits`, `teacher_feature` and `teacher_features`
  happens inside the loss.
"""

from __future__ import annotations

from collections.abc import Callable
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

LOSSES: dict[str, Callable[..., Any]] = {
    "ce": ce,
    "kd": kd,
    "logit_regression": logit_regression,
    "dml": dml,
    "hard_target": hard_target,
    "lskd": lskd,
    "dkd": dkd,
    "nkd": nkd,
    "tf_kd": tf_kd,
    "dist": dist,
    "mlkd": mlkd,
    "ctkd": ctkd,
    "sqakd": sqakd,
    "apprentice": apprentice,
    "kd_mean": kd_mean,
    "kd_sum": kd_sum,
    "ca_mkd": ca_mkd,
    "byot": byot,
    "one": one,
    "fitnet": fitnet,
    "simkd": simkd,
    "at": at,
    "vid": vid,
    "ft": ft,
    "reviewkd": reviewkd,
    "semckd": semckd,
    "nst": nst,
    "fsp": fsp,
    "ickd": ickd,
    "ab": ab,
    "ofd": ofd,
    "rkd": rkd,
    "cc": cc,
    "cc_adjacent": cc_adjacent,
    "sp": sp,
    "pkt": pkt,
    "irg": irg,
    "crd": crd,
    "crd_in_batch": crd_in_batch,
    "hxe": hxe,
    "tree_soft_labels": tree_soft_labels,
    "lca_alignment": lca_alignment,
}

# Losses that look at a teacher's logits by the softmax of all classes alone. The k largest logits
# and the sum over the others tell them most; any other loss needs each logit.
BY_SOFTMAX = ("kd", "dml", "hard_target", "ctkd", "sqakd", "apprentice", "kd_mean", "kd_sum")

# Makers of the first memory of the losses that keep one.
MEMORY: dict[str, Callable[..., dict[str, jax.Array]]] = {"crd": crd_memory}

__all__ = [
    "BY_SOFTMAX",
    "LOSSES",
    "MEMORY",
    "ab",
    "apprentice",
    "at",
    "byot",
    "ca_mkd",
    "cc",
    "cc_adjacent",
    "ce",
    "crd",
    "crd_in_batch",
    "crd_memory",
    "ctkd",
    "dist",
    "dkd",
    "dml",
    "fitnet",
    "fsp",
    "ft",
    "hard_target",
    "hxe",
    "ickd",
    "irg",
    "kd",
    "kd_mean",
    "kd_sum",
    "lca_alignment",
    "logit_regression",
    "lskd",
    "mlkd",
    "nkd",
    "nst",
    "ofd",
    "ofd_margin",
    "one",
    "pkt",
    "reviewkd",
    "rkd",
    "semckd",
    "simkd",
    "sp",
    "sqakd",
    "tf_kd",
    "tree_soft_labels",
    "vid",
]
