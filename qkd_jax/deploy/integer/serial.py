"""An integer program as plain JSON values, and back: no code, no pickle, a closed set of types.

Numbers, text, booleans and null stand for themselves, tuples are lists, and everything else is an
object that says what it is:

    {"is": "multiply", "path": "stem", "node": {"is": "operation", "op": "dot_general", ...}, ...}

The fields of a structure are those of its dataclass, without those that have their default; the
operations are those of `operations.OPERATIONS`. A new kind of step is a line in `STRUCTURES`.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qkd_jax import checks
from qkd_jax.deploy.integer import program as programs
from qkd_jax.deploy.integer.operations import attributes, parameters, primitive
from qkd_jax.deploy.integer.outputs import plain
from qkd_jax.graph import Node
from qkd_jax.numerics import FloatFormat, IntFormat, Spec, TableFormat

STRUCTURES: dict[str, type] = {
    "program": programs.Program,
    "quantize": programs.Quantize,
    "weight": programs.Unpack,
    "multiply": programs.Multiply,
    "encode": programs.Encode,
    "rescale": programs.Rescale,
    "table": programs.Table,
    "decode": programs.Decode,
    "layer_size": programs.LayerSize,
    "spec": Spec,
    "int_format": IntFormat,
    "float_format": FloatFormat,
    "table_format": TableFormat,
    "conv_dimensions": jax.lax.ConvDimensionNumbers,
    "gather_dimensions": jax.lax.GatherDimensionNumbers,
}
ENUMS: dict[str, type[enum.Enum]] = {
    "precision": jax.lax.Precision,
    "rounding": jax.lax.RoundingMethod,
    "gather_mode": jax.lax.GatherScatterMode,
}
NAMES: dict[type, str] = {cls: name for name, cls in (STRUCTURES | ENUMS).items()}
DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 bfloat16"
).split()


def dtype_of(name: Any) -> np.dtype:
    """Returns a dtype by its name.

    Raises:
        ValueError: a name that is not in `DTYPES`.
    """
    checks.one_of("dtype", name, DTYPES)
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def encode(value: Any) -> Any:
    """Returns a value of a program as JSON has it.

    Raises:
        ValueError: a value or an operation that a file cannot hold.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, enum.Enum):
        return {"is": NAMES[type(value)], "name": value.name}
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if math.isfinite(value) else {"is": "float", "name": str(value)}
    if type(value) in NAMES:
        return {"is": NAMES[type(value)], **_fields(value)}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, Node):
        kept = attributes(value.op, value.params, value.scope)
        return {
            "is": "operation",
            "op": value.op,
            "inputs": list(value.inputs),
            "outputs": list(value.outputs),
            "scope": value.scope,
            **({"attributes": {k: encode(v) for k, v in kept.items()}} if kept else {}),
        }
    if isinstance(value, Mapping):
        return {"is": "map", "items": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, jax.ShapeDtypeStruct):
        return {"is": "array", "dtype": value.dtype.name, "shape": list(value.shape)}
    if isinstance(value, np.ndarray | np.generic) and np.ndim(value) == 0:
        return {"is": "number", "dtype": value.dtype.name, "value": encode(value.item())}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"is": "dtype", "name": np.dtype(value).name}
    if isinstance(value, jax.tree_util.PyTreeDef):
        tree = plain(jax.tree.unflatten(value, list(range(value.num_leaves))))
        return {"is": "tree", "of": _encode_tree(tree)}
    raise ValueError(f"a program holds {value!r:.100} ({type(value).__name__}); files cannot.")


def _fields(value: Any) -> dict[str, Any]:
    """Encodes the fields of a structure that have no default, or another value than that."""
    if not dataclasses.is_dataclass(value):
        return {name: encode(v) for name, v in zip(value._fields, value, strict=True)}
    return {
        f.name: encode(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if f.default is dataclasses.MISSING or getattr(value, f.name) not in (None, f.default)
    }


def _encode_tree(tree: Any) -> Any:
    if tree is None or isinstance(tree, int):
        return tree
    if isinstance(tree, dict):
        return {k: _encode_tree(v) for k, v in tree.items()}
    return [type(tree).__name__, *(_encode_tree(v) for v in tree)]


def decode(data: Any) -> Any:
    """Inverts `encode`.

    Raises:
        ValueError: anything that `encode` does not write; no other exception.
    """
    if data is None or isinstance(data, bool | str | int | float):
        return data
    if isinstance(data, list):
        return tuple(decode(v) for v in data)
    kind = data.get("is") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"an object does not say what it is: {data!r:.80}.")
    fields = {k: v for k, v in data.items() if k != "is"}
    if kind in STRUCTURES:
        return _structure(kind, {k: decode(v) for k, v in fields.items()})
    if kind in ENUMS:
        (name,) = _fields_of(kind, fields, "name")
        checks.one_of(f"name of a {kind}", name, [member.name for member in ENUMS[kind]])
        return ENUMS[kind][name]
    if kind not in READERS:
        raise checks.unknown("kind of object", kind, [*STRUCTURES, *ENUMS, *READERS])
    names, read = READERS[kind]
    if kind == "operation":
        fields = {"attributes": {}, **fields}
    return read(*_fields_of(kind, fields, *names))


def _fields_of(kind: str, fields: Mapping[str, Any], *names: str) -> list[Any]:
    if set(fields) != set(names):
        raise ValueError(
            f"a {kind} has the fields {', '.join(sorted(fields))}; it must have {', '.join(names)}."
        )
    return [fields[name] for name in names]


def _structure(kind: str, fields: dict[str, Any]) -> Any:
    cls = STRUCTURES[kind]
    hints = _hints(cls)
    for name, value in fields.items():
        if name not in hints:
            raise checks.unknown(f"field of a {kind}:", name, hints)
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} of a {kind} is {value!r:.80}; it must be {hints[name]}.")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"a {kind} lacks fields: {error}.") from error


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return {name: tuple[int, ...] for name in cls._fields}


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of an annotated type; `Any` takes everything."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_fits, value, args))
    if origin is not None and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else ((None, None),)
        return all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in pairs)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is np.ndarray:
        return isinstance(value, np.ndarray)
    return isinstance(value, type(None) if hint is None else hint)


def _integers(name: str, data: Any) -> tuple[int, ...]:
    values = decode(data)
    if not _fits(values, tuple[int, ...]):
        raise ValueError(f"{name} is {data!r:.80}; it must be a list of integers.")
    return values


def _operation(op: Any, inputs: Any, outputs: Any, scope: Any, kept: Any) -> Node:
    if not isinstance(op, str) or not isinstance(scope, str) or not isinstance(kept, dict):
        raise ValueError(f"an operation has op {op!r:.40} in scope {scope!r:.40}.")
    params = parameters(op, {k: decode(v) for k, v in kept.items()})
    reads, writes = (
        _integers(f"{name} of an operation", data)
        for name, data in (("inputs", inputs), ("outputs", outputs))
    )
    return Node(op, reads, writes, params, scope, primitive(op))


def _map(items: Any) -> dict[Any, Any]:
    pairs = decode(items)
    if not isinstance(pairs, tuple) or not all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], int | str) for p in pairs
    ):
        raise ValueError(f"items of a map are {items!r:.80}; they must be pairs of key and value.")
    return dict(pairs)


def _array(dtype: Any, shape: Any) -> jax.ShapeDtypeStruct:
    sizes = _integers("shape of an array", shape)
    if any(n < 0 for n in sizes):
        raise ValueError(f"shape of an array is {shape!r:.80}; sizes are at least 0.")
    return jax.ShapeDtypeStruct(sizes, dtype_of(dtype))


def _number(name: Any, data: Any) -> np.ndarray:
    dtype, value = dtype_of(name), decode(data)
    if not isinstance(value, bool | int | float):
        raise ValueError(f"a number is {value!r:.80}.")
    try:
        return np.asarray(value, dtype)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{value!r:.80} is no {name}.") from error


def _float(name: Any) -> float:
    checks.one_of("name of a float", name, ("inf", "-inf", "nan"))
    return float(name)


def _tree(data: Any) -> Any:
    leaves: list[int] = []

    def build(branch: Any) -> Any:
        if isinstance(branch, bool):
            raise ValueError("a tree has a boolean for a leaf.")
        if branch is None:
            return None
        if isinstance(branch, int):
            leaves.append(branch)
            return branch
        if isinstance(branch, dict):
            return {k: build(v) for k, v in branch.items()}
        if isinstance(branch, list) and branch and branch[0] in ("list", "tuple"):
            return {"list": list, "tuple": tuple}[branch[0]](build(v) for v in branch[1:])
        raise ValueError(f"a tree has the branch {branch!r:.80}.")

    tree = build(data)
    if jax.tree.leaves(tree) != list(range(len(leaves))):
        raise ValueError(f"the leaves of a tree are {leaves!r:.80}; they must be 0, 1, 2, ...")
    return jax.tree.structure(tree)


# Kind -> its fields, and what reads them.
READERS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "operation": (("op", "inputs", "outputs", "scope", "attributes"), _operation),
    "map": (("items",), _map),
    "array": (("dtype", "shape"), _array),
    "number": (("dtype", "value"), _number),
    "float": (("name",), _float),
    "tree": (("of",), _tree),
    "dtype": (("name",), dtype_of),
}
