"""Evaluation of a term's classifiers beside the net that they teach."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.distillation.forward import forward_taps
from qkd_jax.distillation.terms import Term
from qkd_jax.metrics import classification
from qkd_jax.quantize import QuantizedModel


@functools.lru_cache(maxsize=16)
def eval_heads(net: QuantizedModel, term: Term) -> Callable[..., tuple[tuple[Any, jax.Array], ...]]:
    """Returns a compiled evaluation of a term's classifiers and of their ensemble with the net.

    The ensemble answers with the mean of the probabilities of the net and of all classifiers or,
    where they have a gate, with the logits that it makes of theirs.

    Args:
        net: the net that learns.
        term: a term whose loss has `heads_logits`.

    Returns:
        fn(variables, state, batch) -> (sums as from `metrics.classification`, logits) of each
        classifier and, last, of the ensemble; `state` is the term's, and examples whose "mask" is
        False count nowhere.
    """

    @jax.jit
    def evaluate(
        variables: Mapping[str, Any], state: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[Any, jax.Array], ...]:
        logits, _, values = forward_taps(net, variables, batch["image"], taps=term.taps)
        carried = {name: state[name] for name in ("params", "batch_stats") if name in state}
        features = tuple(values[tap] for tap in term.taps)
        outputs = term.adaptor.apply(carried, features, (), train=False)
        heads = outputs["heads_logits"]
        mask = batch["mask"].astype(bool)
        return tuple(
            (classification(z, batch["label"], where=mask), z)
            for z in (*heads, _ensemble((logits, *heads), outputs.get("gate")))
        )

    return evaluate


def _ensemble(logits: Sequence[jax.Array], gate: jax.Array | None) -> jax.Array:
    """Logarithm of the mean of several probabilities, or the sum of logits weighed by a gate."""
    if gate is not None:
        return jnp.sum(gate[:, :, None] * jnp.stack(logits, axis=1), axis=1)
    scores = jnp.stack([jax.nn.log_softmax(z) for z in logits])
    return jax.nn.logsumexp(scores, axis=0) - jnp.log(float(len(logits)))
