"""The rows of a net that learns by any loss, at the weights and temperatures as published.

The numbers are the loss's own, `recipe` and `ce_weight` in `qkd_jax.losses.TABLE`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from configs import common

if TYPE_CHECKING:
    from qkd_jax.losses import Loss


def entry(loss: str) -> Loss:
    """Returns the `qkd_jax.losses.Loss` of a loss that has a published recipe.

    Raises:
        ValueError: any other name, with those that have one.
    """
    from qkd_jax.losses import TABLE

    known = {name: row for name, row in TABLE.items() if row.recipe is not None}
    if loss not in known:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(known)}.")
    return known[loss]


def published() -> list[str]:
    """Returns the losses that have a published recipe."""
    from qkd_jax.losses import TABLE

    return [name for name, row in TABLE.items() if row.recipe is not None]


def learn(
    loss: str, source: str | tuple[str, ...], *, done: float = 0.0, share: float = 1.0
) -> dict[str, Any]:
    """Returns the rows of a net that learns from `source` by a loss, and from labels beside it.

    Fractions in a recipe are of the whole training. A stage that is a part of it takes its part of
    them: a warm-up or a first phase that is over by then does not come again.

    Args:
        loss: a loss with a published recipe.
        source: the net that teaches, or several; losses of the labels have none.
        done: share of the whole training in which this net has learned so from this source before.
        share: share of the whole training that this stage is.

    Raises:
        ValueError: a loss without a recipe, with those that have one; a schedule that reaches from
            one stage into the next.
    """
    row = entry(loss)
    recipe = row.recipe or {}
    fields = {name: _in_stage(loss, name, v, done, share) for name, v in recipe.items()}
    # Where the loss is a stage of its own, the labels wait for its end.
    if "end" in fields and not fields["end"]:
        return dict(ce=dict(common.ce(row.ce_weight), start=0.0))
    rows = {loss: common.term(loss, source if row.has_teacher else "", **fields)}
    if row.ce_weight:
        rows["ce"] = dict(common.ce(row.ce_weight), start=fields.get("end", 0.0))
    return rows


def _in_stage(loss: str, name: str, value: Any, done: float, share: float) -> Any:
    """A field of a recipe for a stage that has `share` of the whole after `done` of it."""
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
    length = max(until - done, 0.0) / share
    if not ramp:
        return length
    return dict(value, steps=length) if length else value["end"]
