"""Arrays of other libraries' layouts, translated: names, axes, and attention's heads.

PyTorch keeps a convolution's weight as [out, in / groups, height, width] (OIHW), linen as HWIO; a
dense weight as [out, in], linen the other way round. A normalization's `weight` is `scale`, and
BatchNorm's `running_mean` and `running_var` are the statistics `mean` and `var`. Attention's
query, key and value are one dense layer or three there, and have an axis of heads here. The names
of the layers are in `other_names`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.quantize.variables import is_folded
from qkd_jax.trees import flatten, nested, unboxed
from qkd_jax.weights.other_names import LACKING, LAYOUTS, RESNET, Layout

# Kind of a layer -> PyTorch's name of an array -> (collection, name here).
_AFFINE = {"weight": ("params", "kernel"), "bias": ("params", "bias")}
ARRAYS: dict[str, dict[str, tuple[str, str]]] = {
    "conv": _AFFINE,
    "dense": _AFFINE,
    "heads": _AFFINE,
    "out": _AFFINE,
    "norm": {
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    },
    "layer_norm": {"weight": ("params", "scale"), "bias": ("params", "bias")},
}
# Kinds whose arrays hold those of several layers -> PyTorch's name -> (layers, name here).
_ALL, _LAST = ("query", "key", "value"), ("key", "value")
JOINED: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "qkv": {
        "weight": (_ALL, "kernel"),
        "bias": (_ALL, "bias"),
        "in_proj_weight": (_ALL, "kernel"),
        "in_proj_bias": (_ALL, "bias"),
    },
    "qkv_bias": {"q_bias": (("query",), "bias"), "v_bias": (("value",), "bias")},
    "kv": {"weight": (_LAST, "kernel"), "bias": (_LAST, "bias")},
}
CONV_AXES = (2, 3, 1, 0)
IGNORED = "num_batches_tracked"
HEAD_SIZE = 64  # of every published net that the layouts are for


def is_torch(names: Any) -> bool:
    """Whether names of arrays are those of a PyTorch state dict: dots, and no collection."""
    return any("." in name for name in names) and not any("/" in name for name in names)


def from_torch(
    arrays: Mapping[str, Any], layout: str | None = None, *, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Translates a PyTorch state dict.

    Args:
        arrays: {"layer1.0.conv1.weight": array}; a leading "module." is dropped, and so are
            BatchNorm's counters and what a layout leaves out (mask tokens, a text model).
        layout: a key of `other_names.LAYOUTS`; None finds it by the names.
        like: variables of the net that the weights are for, or their shapes: they say how many
            heads attention has, which no file does. Without it a head has 64 channels, as in the
            published nets, and an attention of another size is one head.

    Returns:
        Float variables, {"params", "batch_stats"}, for `load_float`.

    Raises:
        ValueError: an unknown layout, names that it does not have, two names of one array, weights
            of the wrong rank, or positions of another grid than those of `like`.
    """
    names = {full: full.removeprefix("module.") for full in arrays}
    chosen = chosen_layout(arrays, layout)
    if like is not None and "params" not in like:
        raise ValueError(
            f"like has the keys {sorted(like)}; it must be a variables tree with 'params', as a "
            "model's init gives it."
        )
    wanted = {} if like is None else flatten({"params": unboxed(like["params"])})
    flat: dict[str, np.ndarray] = {}
    for full, name in names.items():
        if _left_out(chosen, name):
            continue
        for where, array in _translated(chosen, full, name, np.asarray(arrays[full]), wanted):
            if where in flat:
                raise ValueError(
                    f"{full!r} is the array of {where!r}, which came already: the state dict has "
                    'names with and without "module.", or of two families. Keep one of them.'
                )
            flat[where] = array
    _check_positions(flat, wanted)
    return nested(flat)


def chosen_layout(arrays: Iterable[str], layout: str | None = None) -> Layout:
    """Returns the layout of a file with arrays of these names.

    Raises:
        ValueError: an unknown layout, or names that no layout has, with the nearest one.
    """
    names = [name.removeprefix("module.") for name in arrays]
    if layout is not None and layout not in LAYOUTS:
        raise checks.unknown("layout", layout, LAYOUTS)
    foreign = {
        key: [name for name in names if not _known(each, name) and not _left_out(each, name)]
        for key, each in LAYOUTS.items()
    }
    best = min(foreign, key=lambda key: len(foreign[key]))
    chosen = layout or best
    strange = foreign[chosen]
    # Before any shape: a net of another kind may well have a "conv1" of its own.
    if strange or not any(_known(LAYOUTS[chosen], name) for name in names):
        strange = sorted(strange)
        listed = ", ".join(strange[:5]) + (" ..." if len(strange) > 5 else "")
        parts = [part for at, part in LACKING.items() if any(re.fullmatch(at, n) for n in strange)]
        lacking = f" They are of {', '.join(parts)}, which no net here has." if parts else ""
        nearest = f" The nearest layout is {best!r}, {LAYOUTS[best].title};"
        if 2 * len(foreign[best]) > len(names):
            nearest = f" Layouts are {', '.join(LAYOUTS)};"
        raise ValueError(
            f"{len(strange)} of {len(names)} arrays have names of no known layer: "
            f"{listed or '(none)'}.{lacking}{nearest} this is the file of another net, unless "
            "these alone are strange. Give every array the name of its linen parameter, "
            '"params/<layer>/kernel" and so on, with linen\'s order of axes.'
        )
    return LAYOUTS[chosen]


def _left_out(layout: Layout, name: str) -> bool:
    return name.endswith(IGNORED) or bool(re.fullmatch(layout.left_out, name))


def _known(layout: Layout, name: str) -> bool:
    if layout.array(name):
        return True
    layer, _, leaf = name.rpartition(".")
    found = layout.layer(layer)
    return found is not None and (
        leaf in ARRAYS.get(found[1], ()) or leaf in JOINED.get(found[1], ())
    )


def _translated(
    layout: Layout, full: str, name: str, array: np.ndarray, wanted: Mapping[str, Any]
) -> list[tuple[str, np.ndarray]]:
    """Returns [(path with its collection, array)] of one array of a file."""
    if found := layout.array(name):
        path, kind = found
        if kind == "vector":
            return [(f"params/{path}", array.reshape(-1))]
        if array.ndim not in (2, 3):
            checks.rank(full, array, 3, "[1, tokens, width]")
        return [(f"params/{path}", array.reshape(1, -1, array.shape[-1]))]
    layer, _, leaf = name.rpartition(".")
    path, kind = layout.layer(layer) or ("", "")
    if kind in JOINED:
        layers, own = JOINED[kind][leaf]
        wanted_axes = (2, "[out, in]") if own == "kernel" else (1, "[channels]")
        checks.rank(full, array, *wanted_axes)
        if len(array) % len(layers):
            raise ValueError(
                f"{full} has shape {array.shape}; its first axis must hold {', '.join(layers)}, so "
                f"{len(layers)} equal parts."
            )
        parts = np.split(array, len(layers))
        return [
            (f"params/{path}/{each}/{own}", _axes("heads", full, own, part, path, wanted))
            for each, part in zip(layers, parts, strict=True)
        ]
    collection, own = ARRAYS[kind][leaf]
    attention = path.rpartition("/")[0]
    return [(f"{collection}/{path}/{own}", _axes(kind, full, own, array, attention, wanted))]


def _axes(
    kind: str, full: str, own: str, array: np.ndarray, attention: str, wanted: Mapping[str, Any]
) -> np.ndarray:
    """Returns an array of a layer with linen's axes; `attention` is the path that has its heads."""
    if own != "kernel":
        checks.rank(full, array, 1, "[channels]")
        return array.reshape(_heads(attention, len(array), wanted)) if kind == "heads" else array
    if kind == "conv":
        checks.rank(full, array, 4, "[out, in, height, width]")
        return array.transpose(CONV_AXES)
    if kind == "dense" and array.shape[2:] == (1, 1):  # written as a 1x1 convolution
        array = array[:, :, 0, 0]
    checks.rank(full, array, 2, "[out, in]")
    array = array.T
    if kind == "heads":
        return array.reshape(len(array), *_heads(attention, array.shape[1], wanted))
    if kind == "out":
        return array.reshape(*_heads(attention, len(array), wanted), array.shape[1])
    return array


def _heads(attention: str, width: int, wanted: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (heads, channels of one) of an attention layer of so many channels."""
    shape = getattr(wanted.get(f"params/{attention}/query/kernel"), "shape", ())
    heads = shape[1] if len(shape) == 3 else width // HEAD_SIZE
    return (heads, width // heads) if heads and width % heads == 0 else (1, width)


def _check_positions(flat: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError for positions of a grid that is not the net's."""
    given, own = flat.get("params/positions"), wanted.get("params/positions")
    if given is None or own is None or tuple(given.shape) == tuple(own.shape):
        return
    tokens = ("params/token", "params/token_distilled", "params/registers")
    if given.shape[-1] != own.shape[-1] or any((t in flat) != (t in wanted) for t in tokens):
        return  # `load_float` names the parameters that differ: no grid would help
    # Of the file's tokens none, those but registers, or all of them may have positions.
    counts = [flat[token].shape[1] if token in flat else 0 for token in tokens]
    sides = {n: math.isqrt(max(0, given.shape[1] - n)) for n in (0, sum(counts[:2]), sum(counts))}
    square = [n for n, side in sides.items() if side and side * side + n == given.shape[1]]
    fields = {0: ["positions='patches'"], sum(counts[:2]): ["positions='all'"]}
    if not square:
        repair = "its grid of patches is not square, or another net's, and no net here has it"
    elif square[0] not in fields:
        repair = "registers have positions in it, which no net here has"
    else:
        more = fields[square[0]] if counts[0] else []
        repair = "build the net with " + " and ".join([f"grid={sides[square[0]]}", *more])
        repair += ", and it resamples them to each image's grid"
    raise ValueError(
        f"the file has positions of {given.shape[1]} tokens and the net has {own.shape[1]}; "
        f"{repair}."
    )


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Translates a ResNet's variables to a PyTorch state dict: the inverse of `from_torch`.

    A quantized net gives the float weights behind its codes, without its quantizers.

    Raises:
        ValueError: a layer that those ResNets do not have, or BatchNorms that are folded.
    """
    flat = flatten({k: v for k, v in variables.items() if k != "quant"})
    if is_folded(variables):
        raise ValueError(
            "the BatchNorms of variables are folded into multipliers, which a PyTorch ResNet does "
            "not have; give the variables from before fold_bn."
        )
    out = {}
    foreign = []
    for name, array in flat.items():
        collection, _, rest = name.partition("/")
        path, _, leaf = rest.rpartition("/")
        found = _torch_layer(path)
        back = {v: k for k, v in ARRAYS[found[1]].items()} if found else {}
        if found is None or (collection, leaf) not in back:
            foreign.append(name)
            continue
        layer, kind = found
        array = np.asarray(array)
        if leaf == "kernel":
            array = np.ascontiguousarray(
                array.transpose(np.argsort(CONV_AXES) if kind == "conv" else (1, 0))
            )
        out[f"{layer}.{back[collection, leaf]}"] = array
    if foreign:
        raise ValueError(
            f"variables has {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}, which "
            f"{RESNET.title} do not have; write layout='flax' instead."
        )
    return out


def _torch_layer(path: str) -> tuple[str, str] | None:
    """Returns (PyTorch's name, kind) of a layer here."""
    for pattern, here, kind in RESNET.layers:
        if match := re.fullmatch(here.replace("{}", r"(\d+)"), path):
            for digits in match.groups():
                pattern = re.sub(r"\(\\d\+?\)", digits, pattern, count=1)
            return pattern.replace("\\.", "."), kind
    return None
