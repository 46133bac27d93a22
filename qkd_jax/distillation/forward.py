"""One forward pass of a net: its mode, its batch statistics, and features at its taps."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax

from qkd_jax.quantize import QuantizedModel

# Other names for the mode: a model with one of them would run in its default mode throughout.
FOREIGN_MODES = ("training", "is_training", "is_train", "inference", "testing")
# Sown features and captured outputs: returned on request, never part of the variables.
CARRIED_NEVER = ("features", "intermediates")


@functools.lru_cache(maxsize=256)
def _mode_argument(model_class: type) -> str | None:
    """Returns the name of the argument for training mode, or None."""
    names = inspect.signature(model_class.__call__).parameters
    known = next((n for n in ("train", "deterministic") if n in names), None)
    foreign = next((n for n in FOREIGN_MODES if n in names), None)
    if known is None and foreign is not None:
        raise ValueError(
            f"{model_class.__name__}.__call__ takes {foreign!r}, which nothing sets here; rename "
            "it to `train` (True while training) or `deterministic` (False while training)."
        )
    return known


def mode_arguments(net: QuantizedModel, train: bool) -> dict[str, Any]:
    """Returns the keyword arguments that put a model into training or evaluation mode.

    A model may take `train`, linen's `deterministic`, or neither.

    Raises:
        ValueError: it takes another name for the mode, such as `training`.
    """
    name = _mode_argument(type(net.model))
    return {} if name is None else {name: train if name == "train" else not train}


def forward_taps(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    taps: tuple[str, ...] = (),
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    """Runs a net and returns its features at taps beside its logits.

    Args:
        net: the net.
        variables: its variables.
        images: [batch, height, width, channels] float32.
        taps: names of sown features, or paths of modules, whose output is meant.
        train: training mode: batch statistics are used and updated.
        rngs: keys of the random streams: the model's own (dropout), and stochastic rounding's.
        axis_name: the mapped axis under pmap, else None.

    Returns:
        (logits [batch, classes] float32, carried collections after the pass, {tap: array}).
    """
    carried = {n: tree for n, tree in variables.items() if n not in ("params", "quant")}
    arguments: dict[str, Any] = mode_arguments(net, train)
    if axis_name is not None:
        arguments["axis_name"] = axis_name
    if rngs is not None:
        arguments["rngs"] = dict(rngs)
    mutable = list(carried) if train else []
    if taps:
        mutable += CARRIED_NEVER
        arguments["capture_intermediates"] = lambda module, method: (
            method == "__call__" and "/".join(module.path) in taps
        )
    if not mutable:
        return net.apply(variables, images, **arguments), carried, {}
    logits, updated = net.apply(variables, images, mutable=mutable, **arguments)
    features = pick_taps(updated, taps)
    updated = {name: tree for name, tree in updated.items() if name not in CARRIED_NEVER}
    return logits, {**carried, **updated}, features


def forward(
    net: QuantizedModel, variables: Mapping[str, Any], images: jax.Array, **options: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns (logits, carried collections after the pass); options of `forward_taps`."""
    return forward_taps(net, variables, images, **options)[:2]


def pick_taps(
    collections: Mapping[str, Any], taps: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Returns {tap: array} of the collections of a pass, sown features before modules' outputs.

    Args:
        collections: "features" and "intermediates", as linen returns them.
        taps: which; None gives all that are arrays, in the order of execution.
    """
    features: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str, last: str) -> None:
        for name, value in tree.items():
            path = f"{prefix}/{name}".lstrip("/")
            if isinstance(value, Mapping):
                walk(value, path, last)
            elif hasattr(value[0], "shape"):  # linen appends at every call: the first is taken
                key = path.removesuffix("__call__").rstrip("/") if last else path
                if key:  # the net as a whole is no tap
                    features.setdefault(key, value[0])

    walk(collections.get("features", {}), "", "")
    walk(collections.get("intermediates", {}), "", "__call__")
    return features if taps is None else {name: features[name] for name in taps}
