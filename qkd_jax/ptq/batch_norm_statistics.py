"""Re-estimating BatchNorm's statistics after training.

The running averages that training leaves behind lag the weights, and at 4 bits and below, where
weights hop between neighbouring codes until the end, they belong to a net that no longer exists
(Nagel et al., 2022, arXiv 2203.11086, section 4.1). Here they are replaced by the exact mean and
variance of the normalised inputs over the given batches.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.ptq.stream import check_finite
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.calibration import model_arguments
from qkd_jax.quantize.calls import explaining_failures, jit_of_call, split_arrays
from qkd_jax.quantize.interceptors import intercepting
from qkd_jax.quantize.variables import is_folded

Tree = dict[str, Any]


def reestimate_batch_norm(
    net: QuantizedModel, variables: Mapping[str, Any], batches: Iterable[Any], **kwargs: Any
) -> Tree:
    """Replaces `batch_stats` by the population statistics over `batches`.

        mean = sum_b n_b mean_b / N
        var  = sum_b n_b (var_b + (mean_b - mean)^2) / N,   N = sum_b n_b

    The sums are taken in float64, so the result does not depend on the order or the momentum, and a
    shorter last batch counts for what it holds. Every BatchNorm normalises with its batch's own
    statistics meanwhile, so a later layer sees what it saw in training; use batches of about the
    training size.

    The variance is the biased one (divided by N): it is what flax uses to normalise, in training
    too. PyTorch's running variance is larger by N / (N - 1).

    Args:
        net: the net.
        variables: float or calibrated, not folded.
        batches: model inputs: arrays [batch, ...], dicts with the key "image" (rows where "mask" is
            0 are left out), or tuples of positional arguments.
        **kwargs: further arguments of the model's call, those for evaluation (train=False):
            BatchNorm alone runs as in training.

    Returns:
        The variables with new `batch_stats`.

    Raises:
        ValueError: no batch, no BatchNorm, or a BatchNorm that is folded already.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> model = nn.Sequential((nn.Dense(4), nn.BatchNorm(use_running_average=True)))
        >>> net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(4))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> new = qk.ptq.reestimate_batch_norm(net, variables, [x])
        >>> new["batch_stats"]["layers_1"]["mean"].shape
        (4,)
    """
    variables = unfreeze(dict(variables))
    if not variables.get("batch_stats"):
        raise ValueError(
            "variables has no 'batch_stats'; this net has no BatchNorm to re-estimate."
        )
    if is_folded(variables):
        raise ValueError("a BatchNorm of this net is folded; re-estimate first, then fold.")

    @jit_of_call
    def statistics(variables: Tree, arguments: tuple[Any, ...]) -> Tree:
        """Runs flax's BatchNorm in train mode with momentum 0: it stores the batch's statistics."""
        with intercepting(_exact):
            _, updated = net.apply(variables, *arguments, mutable=["batch_stats"], **kwargs)
        return updated["batch_stats"]

    seen: list[tuple[int, Tree]] = []
    for index, batch in enumerate(batches):
        arguments = tuple(batch) if isinstance(batch, list) else model_arguments(batch)
        arrays = split_arrays(arguments)[0]
        count = arrays[0].shape[0]
        if count:
            for argument in arrays:
                check_finite(f"batches[{index}]", argument)
            with explaining_failures(arguments):
                stats = statistics(variables, arguments)
            seen.append((count, jax.tree.map(lambda a: np.asarray(a, np.float64), stats)))
    checks.at_least_one("batches", seen)
    merged = _merged(seen)
    stats = jax.tree.map(
        lambda new, old: jax.numpy.asarray(new, old.dtype), merged, variables["batch_stats"]
    )
    return {**variables, "batch_stats": stats}


def _exact(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    before = module.momentum, module.use_running_average
    # The bound module is a clone that belongs to this call; linen's own guard is for users.
    object.__setattr__(module, "momentum", 0.0)
    object.__setattr__(module, "use_running_average", None)
    try:
        return next_fun(*args[:1], **{**kwargs, "use_running_average": False})
    finally:
        object.__setattr__(module, "momentum", before[0])
        object.__setattr__(module, "use_running_average", before[1])


def _merged(seen: list[tuple[int, Tree]]) -> Tree:
    """Merges trees of {"mean", "var"} by the law of total variance."""
    if all(set(tree) == {"mean", "var"} for _, tree in seen):
        total = sum(n for n, _ in seen)
        mean = sum(n * t["mean"] for n, t in seen) / total
        return {
            "mean": mean,
            "var": sum(n * (t["var"] + (t["mean"] - mean) ** 2) for n, t in seen) / total,
        }
    if not all(isinstance(value, Mapping) for value in seen[0][1].values()):
        raise ValueError(
            f"batch_stats holds {sorted(seen[0][1])} where a BatchNorm has mean and var; only "
            "flax's own BatchNorm can be re-estimated."
        )
    return {key: _merged([(n, t[key]) for n, t in seen]) for key in seen[0][1]}
