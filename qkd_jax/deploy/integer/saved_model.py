"""An integer model as two files: `model.safetensors` (arrays) and `model.json` (everything else).

`model.json` holds the version of the format, the program as an explicit list of steps (`serial`),
names, shapes and positions of the arrays, and, if given, preprocessing and class names. Nothing in
it is code, and neither file needs the model's Python source. Arrays below `ALONE` bytes travel
together, one tensor for each dtype, since a tensor's entry in the header takes more room than a
quantizer's step.

Each file holds the other's SHA-256, so files of two exports are not mixed up unnoticed. `load`
trusts nothing beyond that: it checks every shape and dtype, and evaluates the shapes of the whole
program before anything is computed.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.deploy.description import Description
from qkd_jax.deploy.integer import cost_bounds
from qkd_jax.deploy.integer.outputs import with_plain_outputs
from qkd_jax.deploy.integer.pack import field_bits, is_packed, pack, packed_bytes
from qkd_jax.deploy.integer.program import IntegerModel, Program, Unpack, run
from qkd_jax.deploy.integer.serial import decode, dtype_of, encode
from qkd_jax.weights.files import damaged, parse_safetensors, read_bytes, safetensors_bytes
from qkd_jax.whole_files import replace_file

TENSORS, JSON = "model.safetensors", "model.json"
FORMAT, VERSION = "qkd_jax integer model", 2
READ = (1, VERSION)  # version 1 has codes of 5 to 7 bits, and odd ones of 9, one to an integer
ALONE = 1024  # bytes
TRIAL = 31  # no ordinary dimension
BATCH = "batch"
FIELDS = ("format", "version", "written_by", "description", "outputs", "arrays", "program")
REPAIR = "export the model again"


def save(
    integer: IntegerModel,
    folder: str | os.PathLike[str],
    *,
    description: Description | None = None,
) -> dict[str, int]:
    """Writes an integer model into a folder.

    What the model returns is read back as arrays, lists, tuples and dicts; a dataclass, a named
    tuple or another pytree becomes a dict of its fields.

    Args:
        integer: from `convert`.
        folder: created if it does not exist; files of an earlier export are replaced.
        description: preprocessing and class names, for `deploy.predict`.

    Returns:
        {file name: bytes}.

    Raises:
        ValueError: the program has an operation or a value that a file cannot hold.
    """
    arrays = {name: np.asarray(a) for name, a in integer.arrays.items()}
    program = with_plain_outputs(integer.program)
    tensors, entries = _join(arrays)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {name: importlib.metadata.version(name) for name in ("jax", "numpy")},
        "description": None if description is None else description.to_json(),
        "outputs": [_signature(a) for a in _shapes(program, arrays)],
        "arrays": entries,
        "program": encode(program),
    }
    data = safetensors_bytes(tensors, {"json": _digest(body)})
    text = _text({**body, "tensors": {"sha256": hashlib.sha256(data).hexdigest()}})
    folder = Path(folder)
    replace_file(folder / TENSORS, data)
    replace_file(folder / JSON, text.encode())
    return {TENSORS: len(data), JSON: len(text.encode())}


def load(folder: str | os.PathLike[str]) -> IntegerModel:
    """Reads an integer model; it computes the logits of the one that was saved, bit for bit.

    Raises:
        ValueError: a file is missing, cut off, damaged, of another version or of another export;
            a shape, dtype or operation in it does not fit. The message names the file.
    """
    folder = Path(folder)
    body = _read(folder)
    content = read_bytes(folder / TENSORS)
    tensors, metadata = parse_safetensors(content, folder / TENSORS)
    sealed = body.pop("tensors")
    digest = hashlib.sha256(content).hexdigest()
    if sealed != {"sha256": digest} or metadata != {"json": _digest(body)}:
        raise ValueError(
            f"{folder / JSON} and {folder / TENSORS} are not of one export, or one was changed: "
            f"their SHA-256 differ; {REPAIR}."
        )
    try:
        arrays = _split(tensors, body["arrays"])
        program = decode(body["program"])
        if not isinstance(program, Program):
            raise ValueError(f"the program is {program!r:.80}.")
        if body["version"] == 1:
            arrays |= _packed(program, arrays)
        outputs = [_signature(a) for a in _shapes(program, arrays)]
        if outputs != body["outputs"]:
            raise ValueError(f"its results are {outputs}, and {body['outputs']!r:.80} is declared")
    except (ValueError, RecursionError) as error:
        raise damaged(folder / JSON, str(error).rstrip("."), REPAIR) from error
    return IntegerModel({k: jnp.asarray(a) for k, a in arrays.items()}, program)


def describe(folder: str | os.PathLike[str]) -> Description | None:
    """Returns a saved model's preprocessing and class names, or None if it was saved without.

    Raises:
        ValueError: there is no `model.json`, or it is damaged.
    """
    data = _read(Path(folder))["description"]
    try:
        return None if data is None else Description.from_json(data)
    except ValueError as error:
        raise damaged(Path(folder) / JSON, str(error).rstrip("."), REPAIR) from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / JSON
    try:
        body = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        if not path.is_file():
            raise ValueError(
                f"{folder} is no folder of a saved model: it has no {JSON}. Give the folder that "
                "`qkd_jax.deploy.save` or --mode=export wrote."
            ) from error
        raise damaged(path, error, REPAIR) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise damaged(path, f"its format is not {FORMAT!r}", REPAIR)
    if body.get("version") not in READ or isinstance(body["version"], bool):
        raise ValueError(
            f"{path} has version {body.get('version')!r:.20}, and this qkd_jax reads versions "
            f"1 to {VERSION}; read it with the qkd_jax that wrote it, or {REPAIR}."
        )
    if set(body) != {*FIELDS, "tensors"}:
        raise damaged(path, f"its fields are {', '.join(sorted(body))}", REPAIR)
    return body


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _text(body: Mapping[str, Any]) -> str:
    """JSON with one line for each step, array and field: small, and good to read."""
    compact = lambda value: json.dumps(value, separators=(",", ":"))
    steps = compact("steps") + ":[\n" + ",\n".join(map(compact, body["program"]["steps"])) + "]"
    lines = []
    for name, value in body.items():
        if name == "program":
            rest = [f"{compact(k)}:{compact(v)}" for k, v in value.items() if k != "steps"]
            lines.append('"program":{' + ",\n".join([*rest, steps]) + "}")
        elif name == "arrays":
            items = ",\n".join(f"{compact(k)}:{compact(v)}" for k, v in value.items())
            lines.append('"arrays":{\n' + items + "}")
        else:
            lines.append(f"{compact(name)}:{compact(value)}")
    return "{" + ",\n".join(lines) + "}\n"


def _join(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Returns (tensors, {array: {"dtype", "shape", "tensor", "start"}})."""
    tensors, entries = {}, {}
    small: dict[str, list[np.ndarray]] = {}
    for name, array in sorted(arrays.items()):
        entry: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
        if array.nbytes >= ALONE:
            tensors[f"array:{name}"] = array
            entry["tensor"] = f"array:{name}"
        else:
            joined = small.setdefault(array.dtype.name, [])
            entry |= {"tensor": array.dtype.name, "start": sum(a.size for a in joined)}
            joined.append(array.reshape(-1))
        entries[name] = entry
    return {**tensors, **{name: np.concatenate(parts) for name, parts in small.items()}}, entries


def _split(tensors: Mapping[str, np.ndarray], entries: Any) -> dict[str, np.ndarray]:
    """Inverts `_join`; every element must belong to exactly one array."""
    if not isinstance(entries, dict):
        raise ValueError(f"arrays is {entries!r:.80}")
    arrays, used = {}, dict.fromkeys(tensors, 0)
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) - {"start"} != {"dtype", "shape", "tensor"}:
            raise ValueError(f"the entry of array {name!r} is {entry!r:.80}")
        tensor, start, shape = entry["tensor"], entry.get("start", 0), entry["shape"]
        if not isinstance(tensor, str) or tensor not in tensors:
            raise ValueError(f"array {name!r} lies in {tensor!r:.80}, which is not there")
        sizes = shape if isinstance(shape, list) else [None]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in [start, *sizes]):
            raise ValueError(f"array {name!r} has shape {shape!r:.80} from {start!r:.80}")
        whole, size = tensors[tensor], math.prod(sizes)
        fits = whole.dtype == dtype_of(entry["dtype"]) and min([0, *sizes]) >= 0
        fits = fits and start == used[tensor] and start + size <= whole.size
        if not fits or ("start" not in entry and list(whole.shape) != sizes):
            raise ValueError(
                f"array {name!r} is {entry['dtype']} {sizes} from {start}, and tensor {tensor!r} "
                f"is {whole.dtype} {list(whole.shape)}"
            )
        arrays[name] = whole.reshape(-1)[start : start + size].reshape(sizes)
        used[tensor] += size
    left = [name for name, tensor in tensors.items() if used[name] != tensor.size]
    if left:
        raise ValueError(f"tensor {left[0]!r} has elements of no array")
    return arrays


def _packed(program: Program, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the codes of version 1 that are fields now, packed."""
    packed = {}
    for step in program.steps:
        if not isinstance(step, Unpack) or step.key not in arrays:
            continue
        array, format = arrays[step.key], step.format
        plain = array.dtype == format.storage and array.shape == step.shape
        if plain and field_bits(format, step.stride) > 4 and is_packed(format, step.stride):
            packed[step.key] = pack(array, format, step.stride)
    return packed


def _signature(aval: Any) -> dict[str, Any]:
    shape = [BATCH if i == 0 and n == TRIAL else n for i, n in enumerate(aval.shape)]
    return {"dtype": aval.dtype.name, "shape": shape}


def _shapes(program: Program, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """Returns the shapes of a program's results at a batch of `TRIAL`; computes nothing.

    Raises:
        ValueError: the program does not fit its arrays or itself, or would cost too much.
    """
    for step in program.steps:
        if isinstance(step, Unpack) and step.key in arrays:
            array, size = arrays[step.key], packed_bytes(step.shape, step.format, step.stride)
            if is_packed(step.format, step.stride):
                kind, shape = np.dtype(np.uint8), (size,)
            else:
                kind, shape = step.format.storage, step.shape
            if array.dtype != kind or array.shape != shape:
                raise ValueError(
                    f"the weight {step.key!r} is {array.dtype} {array.shape}, and "
                    f"{step.format.name} {step.shape} takes {size:,} bytes"
                )
    # Numbers go in as arguments, so that nothing is computed from them here.
    numbers = {f"number {v}": number for v, number in program.numbers.items()}
    named = {v: f"number {v}" for v in program.numbers}
    traced = dataclasses.replace(program, numbers={}, arrays={**named, **program.arrays})
    inputs = [
        jax.ShapeDtypeStruct((TRIAL, *a.shape[1:]) if program.batch else a.shape, a.dtype)
        for a in program.signature
    ]
    try:
        closed = jax.make_jaxpr(
            lambda arrays, images: inspect.unwrap(run)(
                IntegerModel(arrays, traced), images, False, "int32"
            )
        )({**arrays, **numbers}, inputs)
    except Exception as error:  # of many types
        lines = str(error).splitlines()
        raise ValueError(
            f"its program does not fit together: {lines[0] if lines else type(error).__name__}"
        ) from error
    equations: list[Any] = closed.jaxpr.eqns
    for eqn in equations:
        if eqn.primitive.name == "reshape":  # the one whose primitive does not check
            (before,), (after,) = eqn.invars, eqn.outvars
            if math.prod(before.aval.shape) != math.prod(after.aval.shape):
                raise ValueError(
                    f"its program reshapes {before.aval.shape} to {after.aval.shape}, which does "
                    "not fit together"
                )
    cost_bounds.check(equations, inputs, arrays, TRIAL if program.batch else 1)
    return list(closed.out_avals)
