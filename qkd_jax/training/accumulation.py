"""Gradient accumulation: a batch in micro-batches, one after another, for one update.

Each of A micro-batches runs forward and backward by itself, and its gradients are added to those
of the others: the memory of the activations is that of batch / A examples. Values are divided by
the number of examples of the whole batch, so that loss, gradients and metrics are the whole
batch's. What is not, because it looks at more than one example at a time:

* BatchNorm normalises by the statistics of a micro-batch, and moves its running averages A times;
* a dynamic range of granularity "tensor" is that of a micro-batch;
* losses that relate the examples of a batch, or keep a memory of them, are refused by `plan_step`.

Micro-batch i holds the examples i, i + A, i + 2A, ...: of a batch that is divided over devices,
each device then has an equal part of every micro-batch in place.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.training.objective import Batch, adaptor_params, example_count, gradients
from qkd_jax.training.plan import StepStructure
from qkd_jax.training.state import TrainState, join, split


def accumulated_gradients(
    structure: StepStructure,
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Any],
    *,
    axis_name: str | None = None,
) -> tuple[tuple[jax.Array, Any], tuple[dict[str, Any], dict[str, Any]]]:
    """Returns what `objective.gradients` does, computed in `structure.accumulate` micro-batches.

    Args:
        structure: what is compiled.
        state: before the step.
        batch: arrays [batch, ...].
        frozen: {slot: variables} of the nets that only teach.
        axis_name: the mapped axis, or None.

    Raises:
        ValueError: the batch (under a mapped axis: a device's share of it) is not divisible.
    """
    parts = structure.accumulate
    if parts == 1:
        return gradients(structure, state, batch, frozen, axis_name=axis_name)
    whole = example_count(batch)
    if axis_name is not None:
        whole = jax.lax.psum(whole, axis_name)
    learned = {slot: split(variables)[0] for slot, variables in state.nets.items()}
    carried = {slot: split(variables)[1] for slot, variables in state.nets.items()}

    def add_part(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        (carried, loss_state), total = carry
        index, rows = part
        nets = {slot: join(tree, carried[slot]) for slot, tree in learned.items()}
        (loss, (carried, loss_state, metrics)), grads = gradients(
            structure,
            state.replace(nets=nets, loss_state=loss_state),
            rows,
            frozen,
            axis_name=axis_name,
            whole=whole,
            part=index,
        )
        total = jax.tree.map(jnp.add, total, grads)
        return ((carried, loss_state), total), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, (learned, adaptor_params(state)))
    ((carried, loss_state), grads), of_parts = jax.lax.scan(
        add_part,
        ((carried, state.loss_state), zeros),
        (jnp.arange(parts), micro_batches(batch, parts)),
    )
    loss, metrics = jax.tree.map(lambda values: jnp.sum(values, 0), of_parts)
    return (loss, (carried, loss_state, metrics)), grads


def micro_batches(batch: Batch, parts: int) -> dict[str, jax.Array]:
    """Returns arrays [parts, batch / parts, ...]; part i has the rows i, i + parts, ...

    Raises:
        ValueError: the number of rows is not divisible.
    """
    rows = batch["label"].shape[0]
    if rows % parts:
        raise ValueError(
            f"accumulate is {parts}, which does not divide the {rows} examples that a device has "
            "of a batch; use a batch size that is a multiple of accumulate times the devices of "
            "the data axis, or another accumulate."
        )

    def cut(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(rows // parts, parts, *array.shape[1:]), 1, 0)

    return {name: cut(array) for name, array in batch.items()}
