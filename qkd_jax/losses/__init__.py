"""Losses: pure functions of arrays, one value per example.

`LOSSES` maps the names used in a config's `learn` table to functions; `qkd_jax.losses.kd` and
`LOSSES["kd"]` are the same object. To add a loss, write the function in the file of its family
(`response.py` for what compares logits, `decoupled.py` for what splits off the labelled class),
import it here and give it a line in `LOSSES`: the tests in `tests/losses/test_losses.py` are
parametrised over the table and read the signature.

Signature rules that the training step relies on:

* Positional names say what the step passes: `logits` or `student_logits` come from the net that
  learns, every `teacher_...` from the net named by `source`, `labels` from the batch.
* Hyper-parameters are keyword-only and have defaults. Those with a float default may arrive as
  traced scalars, so that runs which differ in numbers share one compiled step; Python numbers are
  validated.
* `where` comes last: a [batch] mask. An example that it leaves out contributes 0 and no gradient,
  whatever its inputs hold.
* The result has shape [batch], at least float32; the step reduces once, as sum over count.
* `stop_gradient` on everything of the teacher's happens inside the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from qkd_jax.losses.decoupled import dkd, nkd
from qkd_jax.losses.response import ce, dml, hard_target, kd, logit_regression, lskd

LOSSES: dict[str, Callable[..., jax.Array]] = {
    "ce": ce,
    "kd": kd,
    "logit_regression": logit_regression,
    "dml": dml,
    "hard_target": hard_target,
    "lskd": lskd,
    "dkd": dkd,
    "nkd": nkd,
}

__all__ = [
    "LOSSES",
    "ce",
    "dkd",
    "dml",
    "hard_target",
    "kd",
    "logit_regression",
    "lskd",
    "nkd",
]
