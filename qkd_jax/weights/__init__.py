"""Weights in and out: reading and writing a net's variables in files that others use.

    variables = weights.load("resnet50.safetensors")        # torchvision, timm, RepDistiller, ours
    variables = weights.load("vit.safetensors", like=shapes)  # timm, torchvision, Hugging Face
    variables = weights.load("runs/mine#student")           # a run's checkpoint
    weights.save("student.safetensors", variables, layout="torch")

    python -m qkd_jax.weights runs/mine#student student.safetensors --layout=torch

A config's `init_from` takes whatever `load` takes. Nothing is unpickled: a .pth or .bin file is
refused with the command that converts it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.record.restoring import check_folder, first_line, read_latest
from qkd_jax.trees import flatten, nested
from qkd_jax.weights.files import (
    damaged,
    npz_bytes,
    read_npz,
    read_safetensors,
    read_sharded,
    safetensors_bytes,
)
from qkd_jax.weights.layouts import from_torch, is_torch, to_torch
from qkd_jax.weights.other_names import LAYOUTS
from qkd_jax.whole_files import replace_file

__all__ = [
    "LAYOUTS",
    "from_torch",
    "is_source",
    "load",
    "npz_bytes",
    "read_npz",
    "save",
    "to_torch",
]

SUFFIXES = (".npz", ".safetensors")
INDEX = ".safetensors.index.json"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".pickle")
COLLECTIONS = ("params", "batch_stats", "quant")
DEEPEST = 100  # parts of an array's path
WRITTEN = ("flax", "torch")
FORMS = (
    f"<run folder>#<net>, a .safetensors or .npz file, the {INDEX} of a file in parts, or the "
    "folder of an Orbax checkpoint"
)


def is_source(text: str) -> bool:
    """Whether a text means a file or folder, and not the name of a net."""
    return os.sep in text or "#" in text or text.endswith((*SUFFIXES, INDEX, *PICKLED))


def load(
    source: str | os.PathLike[str],
    *,
    layout: str | None = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Reads a net's variables.

    Args:
        source: "<run folder>#<net>"; a .safetensors or .npz file of flat names
            ("params/stem/kernel") or of PyTorch's ("layer1.0.conv1.weight", see `from_torch`); the
            .safetensors.index.json of a file in parts; or the folder of an Orbax checkpoint of
            variables.
        layout: of a file of PyTorch's names, a key of `LAYOUTS`; None finds it by the names.
        like: variables of the net that the weights are for, or their shapes (`jax.eval_shape` of
            its `init`). Vision transformers need it where a head has not 64 channels.

    Returns:
        {"params", "batch_stats", "quant"}, of which the file has at least the first. `load_float`
        puts them into a net and checks that every array fits.

    Raises:
        ValueError: no such file, net or format, a damaged file, names of no known layout.
    """
    source = os.fspath(source)
    path, _, name = source.partition("#")
    if path.endswith(PICKLED):
        raise ValueError(_refusal(path))
    if path.endswith(".npz"):
        return _variables(read_npz(path), path, layout, like)
    if path.endswith(".safetensors"):
        return _variables(read_safetensors(path)[0], path, layout, like)
    if path.endswith(INDEX):
        return _variables(read_sharded(path), path, layout, like)
    if (Path(path) / "checkpoints").is_dir():
        return _from_run(path, name)
    if Path(path).is_dir() and not name:
        return _from_orbax(path)
    raise ValueError(f"there are no weights at {source!r}; give {FORMS}.")


def save(
    path: str | os.PathLike[str], variables: Mapping[str, Any], *, layout: str = "flax"
) -> None:
    """Writes a net's variables to a .safetensors or .npz file.

    Args:
        path: the file; its ending selects the format.
        variables: of one net.
        layout: "flax": flat names, everything, also the quantizers. "torch": names and axes of
            PyTorch's ResNets, without the quantizers (see `to_torch`).

    Raises:
        ValueError: another ending or layout, a net that the layout does not know, or a .npz file
            for arrays of bfloat16.
    """
    path = Path(path)
    checks.one_of("the ending of path", path.suffix, SUFFIXES)
    checks.one_of("layout", layout, WRITTEN)
    flat = to_torch(variables) if layout == "torch" else flatten(dict(variables))
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in flat.items()}
    for name, array in arrays.items():
        if path.suffix == ".npz" and array.dtype.kind not in "biufc":
            raise ValueError(
                f"array {name!r} is {array.dtype}, whose type a .npz file does not keep; give "
                "path the ending '.safetensors'."
            )
    if path.suffix == ".npz":
        data = npz_bytes(arrays)
    else:
        data = safetensors_bytes(arrays, {"format": "pt" if layout == "torch" else "flax"})
    replace_file(path, data)


def _variables(
    flat: Mapping[str, np.ndarray],
    path: str,
    layout: str | None,
    like: Mapping[str, Any] | None,
) -> dict[str, Any]:
    if layout is not None or is_torch(flat):
        try:
            return from_torch(flat, layout, like=like)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    # Sorted by their parts, what lies under an array comes right behind it.
    paths = sorted(name.split("/") for name in flat)
    for before, parts in zip([[], *paths], paths, strict=False):
        under = bool(before) and parts[: len(before)] == before
        if under or not all(parts) or len(parts) > DEEPEST:
            name = "/".join(parts)
            why = f"{name!r:.200} is no path of an array, or lies under another array"
            raise damaged(path, why)
    found = nested(flat)
    if not set(found) <= set(COLLECTIONS) or not isinstance(found.get("params"), dict):
        raise ValueError(
            f"{path} has arrays named {', '.join(sorted(flat)[:4])} ...; wanted are names such as "
            "'params/stem/kernel' and 'batch_stats/stem_bn/mean', or those of PyTorch."
        )
    return found


def _from_run(path: str, name: str) -> dict[str, Any]:
    saved, _ = read_latest(Path(path) / "checkpoints")
    nets = nested(saved.tree).get("nets", {}) if saved else {}
    if name not in nets:
        raise checks.unknown(f"net in {path + '#' + name!r}", name, nets)
    return nets[name]


def _from_orbax(path: str) -> dict[str, Any]:
    """Reads variables saved by another program's Orbax checkpointer."""
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    inner = folder / "default"  # where a CheckpointManager puts a single item
    folder = inner if inner.is_dir() else folder
    if not (folder / "_METADATA").is_file():
        inside = [p.name for p in sorted(folder.iterdir()) if p.name.endswith((*SUFFIXES, INDEX))]
        hint = f" It has {', '.join(inside[-3:])}: give the path of one." if inside else ""
        raise ValueError(
            f"{path!r} is neither a run folder nor an Orbax checkpoint; give {FORMS}.{hint}"
        )
    try:
        check_folder(folder)
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder).item_metadata.tree
            restore = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
            kinds = jax.tree.map(restore, metadata, is_leaf=lambda leaf: leaf is None)
            tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))
    except Exception as error:  # of whatever type the storage raises
        raise damaged(path, first_line(error) or type(error).__name__) from error
    tree = tree.get("variables", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
        raise ValueError(
            f"{path!r} holds {sorted(tree) if isinstance(tree, dict) else type(tree).__name__}; "
            "wanted is a tree with 'params' (and 'batch_stats'), as a model's init gives it."
        )
    return {name: tree[name] for name in COLLECTIONS if name in tree}


def _refusal(path: str) -> str:
    target = Path(path).with_suffix(".safetensors").name
    return (
        f"{path} may be a pickle, which can run code when it is opened, and is not read. Convert "
        f'it where PyTorch is installed: python -c "import torch; from safetensors.torch import '
        f"save_file; s = torch.load('{path}', map_location='cpu', weights_only=True); "
        f"s = s.get('state_dict', s.get('model', s)); save_file({{k: v.contiguous() for k, v in "
        f"s.items()}}, '{target}')\""
    )
