"""Taps: the features of a net that losses compare, by name.

A tap is a feature that the model sows ("stage2", "pooled"; see `qkd_jax.models`) or the path of one
of its modules ("stage2_block0/conv1"), whose output is meant. Five words mean what most models
have: "stages" all features but the pooled one in order, "last" the last of them, "shallow" all but
the last, "middle" the one in the middle (the earlier of two), "pre" all of them before their
activations.

Shapes come from `jax.eval_shape`: nothing is computed, and any net has taps.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.distillation.forward import CARRIED_NEVER, mode_arguments, pick_taps
from qkd_jax.quantize import QuantizedModel

WORDS = ("last", "middle", "shallow", "stages", "pre")
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class DataShape:
    """Shapes of the data that plans depend on.

    Attributes:
        image: (height, width, channels).
        examples: number of training examples, the size of a memory bank.
    """

    image: tuple[int, ...]
    examples: int


@dataclasses.dataclass(frozen=True)
class Features:
    """The taps of a net with their shapes for a batch of 2, in the order of execution."""

    sown: Shapes
    modules: Shapes
    logits: jax.ShapeDtypeStruct

    def shape(self, tap: str) -> jax.ShapeDtypeStruct:
        """Shape of a tap."""
        return self.sown[tap] if tap in self.sown else self.modules[tap]

    def stages(self) -> list[str]:
        """Sown features that are neither pooled nor before an activation; without any, all."""
        return [n for n in self.sown if n != "pooled" and not n.endswith("_pre")]


@functools.lru_cache(maxsize=256)
def features_of(net: QuantizedModel, image: tuple[int, ...]) -> Features:
    """Returns the taps of a net for images [2, *image].

    Args:
        net: the net.
        image: (height, width, channels).
    """
    order: dict[str, list[str]] = {}

    def run(images: jax.Array) -> tuple[Shapes, Shapes, Any]:
        variables = net.init(jax.random.key(0), images)
        logits, collections = net.apply(
            variables,
            images,
            mutable=list(CARRIED_NEVER),
            capture_intermediates=lambda _, method: method == "__call__",
            **mode_arguments(net, False),
        )
        both = [pick_taps({name: collections.get(name, {})}) for name in CARRIED_NEVER]
        # A trace returns dicts sorted by name, so the order of execution is recorded here.
        order.update(zip(CARRIED_NEVER, map(list, both), strict=True))
        return both[0], both[1], logits

    sown, modules, logits = jax.eval_shape(run, jax.ShapeDtypeStruct((2, *image), np.float32))
    return Features(
        {name: sown[name] for name in order["features"]},
        {name: modules[name] for name in order["intermediates"]},
        logits,
    )


def resolve_taps(where: str, features: Features, wanted: Any) -> tuple[str, ...]:
    """Returns the names of the taps that a config's words and names stand for.

    Args:
        where: the field, for messages.
        features: of the net.
        wanted: "last", "middle", "shallow", "stages", "pre", a tap, or a sequence of these.

    Raises:
        ValueError: A tap that the net has not (with the nearest), a word for a net that sows no
            feature, or none but the last, or "pre" for one that does not sow its stages before
            their activations.
    """
    if not isinstance(wanted, str):
        checks.at_least_one(where, wanted)
        return tuple(name for part in wanted for name in resolve_taps(where, features, part))
    if wanted in WORDS:
        stages = features.stages()
        if not stages:
            raise ValueError(
                f"{where} is {wanted!r}, but the net sows no feature. Name modules whose output is "
                f"meant, such as {_some(features.modules)}."
            )
        if wanted == "pre":
            for name in (n for n in stages if f"{n}_pre" not in features.sown):
                raise ValueError(
                    f"{where} is 'pre', but the net sows {name!r} without a '{name}_pre', so "
                    f"{name!r} may be behind an activation. Sow that too (the same array, where "
                    "there is no activation), or name modules whose output is meant, such as "
                    f"{_some(features.modules)}."
                )
            return tuple(f"{name}_pre" for name in stages)
        if wanted == "shallow" and len(stages) < 2:
            raise ValueError(
                f"{where} is {wanted!r}, but {stages[0]!r} is the only feature that the net sows "
                "before its head. Take a deeper net, or name modules whose output is meant, such "
                f"as {_some(features.modules)}."
            )
        middle = (len(stages) - 1) // 2
        words = {"stages": stages, "shallow": stages[:-1], "last": stages[-1:]}
        return tuple({**words, "middle": stages[middle : middle + 1]}[wanted])
    if wanted not in features.sown and wanted not in features.modules:
        raise ValueError(
            f"unknown tap {wanted!r} in {where}; the net sows "
            f"{', '.join(features.sown) or '(nothing)'}, and every path of a module is a tap, "
            f"such as {_some(features.modules)}."
            f"{checks.nearest(wanted, [*features.sown, *features.modules])}"
        )
    return (wanted,)


def _some(modules: Shapes, count: int = 4) -> str:
    names = list(modules)
    step = max(len(names) // count, 1)
    return ", ".join(repr(name) for name in names[::step][:count])
