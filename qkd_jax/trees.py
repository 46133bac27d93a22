"""Pytrees as flat dicts of named arrays, and the entries of nested dicts by path.

A leaf's name is its path with "/" between the parts, e.g. "nets/net0/params/stem/kernel" or
"opt/net0/0/trace/stem/kernel". Every container that JAX knows has such paths (dicts, FrozenDict,
tuples, optax's named tuples, flax structs), so `flatten` and `unflatten_like` serve all of them.
The other functions take nested dicts, keep the order of their keys and never change them in place.
Those that follow a path enter what lies inside a dict too (a parameter that is a tuple or a
dataclass), and see through flax's boxes (`nn.Partitioned`): an array comes out of its box, and one
that replaces it goes back in.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata, Partitioned


def path_name(path: Sequence[Any]) -> str:
    """Returns "params/conv/kernel" for a JAX key path: dict keys, attribute names and indices."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Returns ([(name, leaf)], treedef); two leaves of one name are an error."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = [(path_name(path), leaf) for path, leaf in pairs]
    seen: set[str] = set()
    for name, _ in named:
        if name in seen:
            raise ValueError(
                f"tree has two leaves named {name!r}; a key that contains '/' meets a nested one. "
                "Rename one of them."
            )
        seen.add(name)
    return named, treedef


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {"a/b/c": leaf} for any pytree; leaves are passed through untouched.

    A tree that is flat already comes back equal.

    Raises:
        ValueError: if two leaves get the same name.
    """
    return dict(_named_leaves(tree)[0])


def join(*parts: str) -> str:
    """Returns "quant/conv/folded/bias"; empty parts (the root module) are skipped."""
    return "/".join(part for part in parts if part)


def _level(tree: Any) -> tuple[Mapping[str, Any], Any]:
    """Returns ({name: child}, treedef) of one container; an array has no children."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    return {path_name(path): child for path, child in pairs if path}, treedef


def unboxed(tree: Any) -> Any:
    """Returns a tree with every parameter out of its box (`nn.Partitioned` and its like)."""

    def unbox(leaf: Any) -> Any:
        if isinstance(leaf, Partitioned):  # otherwise it would also be moved to a mesh's devices
            return leaf.unbox(apply_constraint=False)
        return leaf.unbox() if isinstance(leaf, AxisMetadata) else leaf

    return jax.tree.map(unbox, tree, is_leaf=lambda leaf: isinstance(leaf, AxisMetadata))


def get(tree: Any, path: str) -> Any:
    """Returns the entry of a tree at "a/b/c"; the tree itself at "".

    Raises:
        KeyError: there is none.
    """
    for key in path.split("/") if path else ():
        tree = (tree if isinstance(tree, Mapping) else _level(tree)[0])[key]
    return unboxed(tree) if isinstance(tree, AxisMetadata) else tree


def find(tree: Any, path: str, default: Any = None) -> Any:
    """Returns the entry of a tree at "a/b/c", or `default` where there is none."""
    try:
        return get(tree, path)
    except KeyError:
        return default


def insert(tree: Any, path: str, value: Any) -> Any:
    """Returns a tree with the entry at "a/b/c" added or replaced; the rest is shared."""
    key, _, rest = path.partition("/")
    children, treedef = (tree, None) if isinstance(tree, Mapping) else _level(tree)
    old = children.get(key, {})
    if rest:
        value = insert(old, rest, value)
    elif isinstance(old, AxisMetadata) and not isinstance(value, AxisMetadata):
        value = old.replace_boxed(value)
    children = {**children, key: value}
    return children if treedef is None else jax.tree.unflatten(treedef, children.values())


def put(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns a tree with one array replaced, in its old dtype (float32 for a new one)."""
    old = find(tree, path)
    return insert(tree, path, jnp.asarray(value, jnp.float32 if old is None else old.dtype))


def merged(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree with the leaves of both; `other` decides where both have one."""
    out = dict(tree)
    for key, value in other.items():
        inside = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
        out[key] = merged(tree[key], value) if inside else value
    return out


def partition(
    tree: Mapping[str, Any], belongs: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (the rest of a tree, the part of it below the keys that `belongs` accepts)."""
    rest: dict[str, Any] = {}
    part: dict[str, Any] = {}
    for key, value in tree.items():
        if belongs(key):
            part[key] = value
        elif isinstance(value, Mapping):
            inner_rest, inner_part = partition(value, belongs)
            if inner_rest or not inner_part:
                rest[key] = inner_rest
            if inner_part:
                part[key] = inner_part
        else:
            rest[key] = value
    return rest, part


def entries(
    tree: Mapping[str, Any], wanted: Callable[[str], bool], path: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """Yields (path of the parent, key, value) of the entries whose key `wanted` accepts."""
    for key, value in tree.items():
        if wanted(key):
            yield path, key, value
        elif isinstance(value, Mapping):
            yield from entries(value, wanted, join(path, key))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"a": {"b": leaf}} for {"a/b": leaf}."""
    out: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = out
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def key_impl(leaf: Any) -> str | None:
    """Returns the implementation of a typed random key ("threefry2x32"), None for other leaves."""
    return str(jax.random.key_impl(leaf)) if _is_key(leaf) else None


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def host_array(name: str, leaf: Any) -> np.ndarray:
    """Returns an own copy of a leaf in host memory with the dtype and bits kept.

    Typed random keys give their uint32 data. The copy is needed: on CPU `np.asarray` of a JAX array
    is a view of a buffer that the next step may be given to write into.

    Args:
        name: the leaf's name, for the error.
        leaf: a JAX array (sharded over local devices or not), NumPy array, or Python number.

    Raises:
        ValueError: for anything else (text, objects).
    """
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    array = np.array(leaf, order="C", copy=True)
    if array.dtype.kind in "OUSMm":
        raise ValueError(
            f"leaf {name!r} is a {type(leaf).__name__} ({array.dtype}); a tree to save holds "
            "numbers and arrays only. Put text and other facts into `meta`."
        )
    return array


def arrays_sha256(
    arrays: Mapping[str, np.ndarray], impls: Mapping[str, str], extra: str = ""
) -> str:
    """Returns the sha256 (hex) of every (name, dtype, shape, bytes) in order of names, and a text.

    Args:
        arrays: {name: array in host memory}.
        impls: {name: `key_impl`} of those that are the data of random keys.
        extra: any text.
    """
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        dtype = f"key<{impls[name]}>" if name in impls else array.dtype.name
        total.update(f"{name}\0{dtype}\0{array.shape}\0".encode())
        # bfloat16 and friends have no buffer protocol, bytes have.
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    total.update(f"\0{extra}".encode())
    return total.hexdigest()


def tree_sha256(tree: Any) -> str:
    """Returns the sha256 (hex) of a pytree: names, dtypes, shapes and bytes of all its leaves.

    The same values under the same names give the same hash whatever the containers are, on any
    number of devices, as JAX or NumPy arrays.
    """
    flat = flatten(tree)
    arrays = {name: host_array(name, leaf) for name, leaf in flat.items()}
    impls = {n: impl for n, leaf in flat.items() if (impl := key_impl(leaf)) is not None}
    return arrays_sha256(arrays, impls)


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf).__name__


def _listed(names: list[str], limit: int = 12) -> str:
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def unflatten_like(flat: Mapping[str, Any], target: Any) -> Any:
    """Returns a pytree built like `target` with the leaves of `flat`.

    Args:
        flat: {"a/b/c": array}, as `flatten` or a checkpoint gives it.
        target: any pytree; its leaves give shapes and dtypes and may be arrays,
            `jax.ShapeDtypeStruct` or Python numbers (which come back as Python numbers).

    Returns:
        A pytree of target's structure. Leaves are those of `flat` (host arrays for a checkpoint):
        place them with `jax.device_put`.

    Raises:
        ValueError: listing every missing, unexpected and changed (shape or dtype) name.
    """
    named, treedef = _named_leaves(target)
    wanted = dict(named)
    problems = []
    missing = [name for name in wanted if name not in flat]
    unexpected = [name for name in flat if name not in wanted]
    if missing:
        problems.append(f"missing from the saved tree: {_listed(missing)}")
    if unexpected:
        problems.append(f"in the saved tree only: {_listed(unexpected)}")
    changed = []
    for name, leaf in wanted.items():
        if name not in flat:
            continue
        saved = flat[name]
        if tuple(np.shape(saved)) != tuple(np.shape(leaf)):
            changed.append(f"{name} saved {tuple(np.shape(saved))}, wanted {tuple(np.shape(leaf))}")
        elif hasattr(leaf, "dtype") and _dtype(saved) != _dtype(leaf):
            changed.append(f"{name} saved {_dtype(saved)}, wanted {_dtype(leaf)}")
    if changed:
        problems.append(f"changed: {_listed(changed)}")
    if problems:
        raise ValueError(
            "the saved tree does not fit: " + "; ".join(problems) + ". It was saved by another "
            "model or optimizer: use the config it was saved with."
        )
    leaves = [
        flat[name] if hasattr(leaf, "dtype") else type(leaf)(np.asarray(flat[name]).item())
        for name, leaf in named
    ]
    return jax.tree_util.tree_unflatten(treedef, leaves)
