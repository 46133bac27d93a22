"""The names and axes of other libraries' ResNets, both ways.

torchvision, timm and RepDistiller name a ResNet's layers alike:

    conv1, bn1                              stem, stem_bn
    layer2.0.conv1, layer2.0.bn1            stage2_block0/conv1, stage2_block0/bn1
    layer2.0.downsample.0, ...downsample.1  stage2_block0/shortcut, stage2_block0/shortcut_bn
    fc                                      head

PyTorch keeps a convolution's weight as [out, in / groups, height, width] (OIHW), linen as HWIO; a
dense weight as [out, in], linen the other way round. BatchNorm's `weight`, `bias`, `running_mean`
and `running_var` are `scale`, `bias` and the statistics `mean` and `var`.

To read another family, add its layers to `LAYERS`; a name is translated by the first line that
matches it wholly.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.quantize.variables import is_folded
from qkd_jax.trees import flatten, nested

# Layer in PyTorch, as a pattern; its path here; what kind of layer it is.
LAYERS: tuple[tuple[str, str, str], ...] = (
    (r"conv1", "stem", "conv"),
    (r"bn1", "stem_bn", "norm"),
    (r"layer(\d+)\.(\d+)\.conv(\d+)", "stage{}_block{}/conv{}", "conv"),
    (r"layer(\d+)\.(\d+)\.bn(\d+)", "stage{}_block{}/bn{}", "norm"),
    (r"layer(\d+)\.(\d+)\.downsample\.0", "stage{}_block{}/shortcut", "conv"),
    (r"layer(\d+)\.(\d+)\.downsample\.1", "stage{}_block{}/shortcut_bn", "norm"),
    (r"fc", "head", "dense"),
)
# Kind -> PyTorch's name -> (collection, name here).
ARRAYS: dict[str, dict[str, tuple[str, str]]] = {
    "conv": {"weight": ("params", "kernel"), "bias": ("params", "bias")},
    "dense": {"weight": ("params", "kernel"), "bias": ("params", "bias")},
    "norm": {
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    },
}
AXES = {"conv": (2, 3, 1, 0), "dense": (1, 0)}
IGNORED = "num_batches_tracked"
FAMILIES = "the ResNets of torchvision, timm and RepDistiller"


def is_torch(names: Any) -> bool:
    """Whether names of arrays are those of a PyTorch state dict: dots, and no collection."""
    return any("." in name for name in names) and not any("/" in name for name in names)


def from_torch(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a ResNet's PyTorch state dict.

    Args:
        arrays: {"layer1.0.conv1.weight": array}; a leading "module." is dropped, and so are
            BatchNorm's counters.

    Returns:
        Float variables, {"params", "batch_stats"}, for `load_float`.

    Raises:
        ValueError: names that are in no line of `LAYERS`, two names of one array, or weights of
            the wrong rank.
    """
    names = {full: full.removeprefix("module.").rpartition(".") for full in arrays}
    layers = {full: (*parts[::2], _layer(parts[0])) for full, parts in names.items()}
    known = {
        full: (ARRAYS[found[1]][leaf], *found)
        for full, (_, leaf, found) in layers.items()
        if found is not None and leaf in ARRAYS[found[1]]
    }
    foreign = [f for f, (_, leaf, _) in layers.items() if f not in known and leaf != IGNORED]
    # Before any shape: a net of another kind may well have a "conv1" of its own.
    if foreign or not known:
        listed = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise ValueError(
            f"{len(foreign)} of {len(arrays)} arrays have names of no known layer: "
            f"{listed or '(none)'}. Read are {FAMILIES}; this is the file of another net, unless "
            "these alone are strange. Give every array the name of its linen parameter, "
            '"params/<layer>/kernel" and so on, with linen\'s order of axes.'
        )
    flat: dict[str, np.ndarray] = {}
    for full, ((collection, leaf), path, kind) in known.items():
        array = np.asarray(arrays[full])
        if leaf == "kernel":
            wanted = "[out, in, height, width]" if kind == "conv" else "[out, in]"
            checks.rank(full, array, len(AXES[kind]), wanted)
            array = array.transpose(AXES[kind])
        else:
            checks.rank(full, array, 1, "[channels]")
        where = f"{collection}/{path}/{leaf}"
        if where in flat:
            raise ValueError(
                f"{full!r} is the array of {where!r}, which came already: the state dict has names "
                'with and without "module.", or of two families. Keep one of them.'
            )
        flat[where] = array
    return nested(flat)


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
            array = np.ascontiguousarray(array.transpose(np.argsort(AXES[kind])))
        out[f"{layer}.{back[collection, leaf]}"] = array
    if foreign:
        raise ValueError(
            f"variables has {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}, which "
            f"{FAMILIES} do not have; write layout='flax' instead."
        )
    return out


def _layer(name: str) -> tuple[str, str] | None:
    """Returns (path here, kind) of a PyTorch layer."""
    for pattern, path, kind in LAYERS:
        if match := re.fullmatch(pattern, name):
            return path.format(*match.groups()), kind
    return None


def _torch_layer(path: str) -> tuple[str, str] | None:
    """Returns (PyTorch's name, kind) of a layer here."""
    for pattern, here, kind in LAYERS:
        if match := re.fullmatch(here.replace("{}", r"(\d+)"), path):
            for digits in match.groups():
                pattern = re.sub(r"\(\\d\+?\)", digits, pattern, count=1)
            return pattern.replace("\\.", "."), kind
    return None
