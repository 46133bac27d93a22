"""The mesh of devices: how batches, nets, optimizers and quantizers are divided over (data, model).

A `MeshLayout` arranges the devices in two axes. The rows of a batch are divided over the first; the
second divides arrays of the nets by rules, (pattern of a path, axes of the mesh), such as
("stage3_.*/kernel", ("model",)). Paths are those of `params` ("stem/kernel"). Axes belong to the
last axes of an array: ("model",) divides its last one, which in kernels and tables are the output
channels; ("model", "") the one before it. "data" divides too, by which an array lies on one device
of each column in parts (as in ZeRO; Rajbhandari et al. 2019, arXiv 1910.02054).

What belongs to a weight is divided as it is: its moments in the optimizer, its average, its stale
copy, its codes while oscillations are tracked, and the parameters of its quantizer along the
channels that they have in common. All other arrays lie whole on every device. XLA adds the
communication; a step computes what it would on one device.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qkd_jax import checks
from qkd_jax.trees import path_name

PMAP_AXIS = "batch"
"""Name of the one axis of pmap, over which a step reduces."""
# Kernels and tables by their output channels.
DEFAULT_RULES = ((".*/(kernel|embedding)", ("model",)),)
_WEIGHTS = ("kernel", "embedding")

Rules = tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Devices as a mesh of two axes, and the rules by which arrays are divided over it.

    Attributes:
        model: number of devices along the second axis; the first has all others.
        rules: ((pattern, axes), ...): a pattern must match the whole path of an array in `params`,
            axes are names of the mesh's axes or "" and belong to the array's last axes. An array
            that is not divisible stays whole. Empty, with `model` above 1, stands for
            `DEFAULT_RULES`.
        axes: names of the two axes.
    """

    model: int = 1
    rules: Rules = ()
    axes: tuple[str, str] = ("data", "model")

    def __post_init__(self) -> None:
        """Checks what does not depend on devices and arrays.

        Raises:
            ValueError: names of axes that collide, a rule that is none, names an axis that is not
                there or one twice, or two rules of one pattern.
        """
        checks.integer_in("model", self.model, 1)
        first, second = self.axes
        if first == second:
            raise ValueError(
                f"axes are {self.axes!r}: both have the same name, so that no rule can say which "
                "it means. Name them apart, such as ('data', 'model')."
            )
        if PMAP_AXIS in self.axes:
            raise ValueError(
                f"axes are {self.axes!r}, but {PMAP_AXIS!r} is the axis over which a step under "
                "pmap sums its shares; under a mesh nothing may be summed twice. Take another "
                "name, such as 'data'."
            )
        patterns: set[str] = set()
        for index, rule in enumerate(self.rules):
            _check_rule(f"rules[{index}]", rule, self.axes)
            if rule[0] in patterns:
                raise ValueError(
                    f"rules[{index}] has the pattern {rule[0]!r} a second time; keep one of them."
                )
            patterns.add(rule[0])

    @property
    def is_sharded(self) -> bool:
        """Whether any array of a net may be divided."""
        return self.model > 1 or bool(self.rules)

    def check_devices(self, mode: str, count: int) -> None:
        """Raises ValueError for a mode that divides no nets, or a number that is not divisible."""
        if self.is_sharded and mode == "pmap":
            raise ValueError(
                f"mode is 'pmap', which keeps whole nets on every device, and model is "
                f"{self.model} with {len(self.rules)} rules. Take mode='jit', or model=1 without "
                "rules."
            )
        if count % self.model:
            fitting = [n for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"model is {self.model}, which does not divide {count} devices. Use one of "
                f"{', '.join(map(str, fitting))}, or another number of devices."
            )

    def mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        """Returns the devices as [devices / model, model]."""
        shape = len(devices) // self.model, self.model
        return jax.make_mesh(shape, self.axes, axis_types=(AxisType.Auto,) * 2, devices=devices)

    def sizes(self, count: int) -> dict[str, int]:
        """Returns {axis: number of devices along it} of so many devices."""
        return dict(zip(self.axes, (count // self.model, self.model), strict=True))

    def specs(self, tree: Any, count: int) -> Any:
        """Returns a tree of `PartitionSpec`, one for each array.

        Args:
            tree: a training state, nets by slot or by name, or one net's variables; arrays or
                shapes. What lies in a quantizer, an optimizer, ... follows the weight beside it.
            count: number of devices.

        Raises:
            ValueError: two rules divide one array unlike.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        shapes = {path_name(path): tuple(np.shape(leaf)) for path, leaf in leaves}
        found: dict[str, PartitionSpec] = {}
        for path, shape in shapes.items():
            _, collection, name = _parts(path)
            if collection == "params":
                found[path] = self._of_weight(name, shape, self.sizes(count))
        for path, shape in shapes.items():
            if path not in found:
                found[path] = _beside(path, shape, shapes, found)
        return jax.tree.unflatten(structure, [found[path] for path in shapes])

    def shardings(self, mesh: Mesh, tree: Any) -> Any:
        """Returns a tree of `NamedSharding`; see `specs`."""
        specs = self.specs(tree, mesh.size)
        return jax.tree.map(functools.partial(NamedSharding, mesh), specs)

    def check_nets(self, nets: Mapping[str, Any], count: int) -> None:
        """Checks the rules against all nets of an experiment.

        Args:
            nets: {name: variables or their shapes}.
            count: number of devices.

        Raises:
            ValueError: two rules divide one array unlike; a rule matches no array of any net, or
                none that it can divide.
        """
        sizes = self.sizes(count)
        arrays = {
            (net, name): tuple(np.shape(leaf))
            for net, tree in nets.items()
            for keys, leaf in jax.tree_util.tree_leaves_with_path({"params": tree["params"]})
            for name in [path_name(keys).removeprefix("params/")]
        }
        for (net, name), shape in arrays.items():
            try:
                self._of_weight(name, shape, sizes)
            except ValueError as error:
                raise ValueError(f"net {net!r}: {error}") from error
        paths = {name for _, name in arrays}
        for index, (pattern, axes) in enumerate(self.rules):
            matching = {key: a for key, a in arrays.items() if re.fullmatch(pattern, key[1])}
            if not matching:
                raise ValueError(
                    f"rules[{index}] {pattern!r} matches no array. A pattern must match a whole "
                    f"path, such as {sorted(paths)[0]!r}.{checks.nearest(pattern, paths)}"
                )
            if not any(_divides(axes, shape, sizes) for shape in matching.values()):
                (net, name), shape = next(iter(matching.items()))
                wanted = " and ".join(f"{axis!r} of {sizes[axis]}" for axis in axes if axis)
                raise ValueError(
                    f"rules[{index}] {pattern!r} divides nothing by {axes!r} over {wanted} "
                    f"devices: {name!r} of net {net!r}, for one, is of shape {shape}, whose last "
                    "axes are no multiples of that. Divide another axis, or take another mesh."
                )

    def _of_weight(self, name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Any:
        """The division of an array of `params`."""
        rules = self.rules or (DEFAULT_RULES if self.model > 1 else ())
        matching = [(pattern, axes) for pattern, axes in rules if re.fullmatch(pattern, name)]
        for other, axes in matching[1:]:
            one, first = matching[0]
            if _trimmed(axes) != _trimmed(first):
                raise ValueError(
                    f"rules {one!r} and {other!r} collide: both match {name!r}, and divide it by "
                    f"{first!r} and {axes!r}. Give one of them a pattern that leaves it out."
                )
        if not matching or not _divides(matching[0][1], shape, sizes):
            return PartitionSpec()
        axes = _trimmed(matching[0][1])
        return PartitionSpec(*(None,) * (len(shape) - len(axes)), *(axis or None for axis in axes))

    def describe(self, count: int) -> str:
        """Returns a line such as "4 devices: data 2 x model 2"."""
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.sizes(count).items())
        return f"{count} device{'' if count == 1 else 's'}: {sizes}"


WHOLE_NETS = MeshLayout()
"""All devices share the batch, and each has whole nets."""


def bytes_on_a_device(tree: Any, specs: Any, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Returns the bytes of all arrays, and those that lie on one device.

    Args:
        tree: arrays or shapes.
        specs: of `MeshLayout.specs`.
        sizes: of `MeshLayout.sizes`.
    """
    whole = part = 0
    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        size = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        whole, part = whole + size, part + size // int(np.prod([sizes[a] for a in spec if a]))
    return whole, part


def _check_rule(where: str, rule: Any, known: tuple[str, str]) -> None:
    example = "('head/kernel', ('model',))"
    if not isinstance(rule, tuple) or len(rule) != 2 or not isinstance(rule[0], str):
        raise ValueError(f"{where} is {rule!r}; a rule is (pattern, axes), such as {example}.")
    pattern, axes = rule
    if not isinstance(axes, tuple) or not any(axes):
        raise ValueError(f"{where} has the axes {axes!r}; name some, such as {example}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} {pattern!r} is no regular expression: {error}.") from None
    named = [axis for axis in axes if axis]
    for axis in named:
        if axis not in known:
            raise checks.unknown(f"axis in {where} ('' leaves one whole)", str(axis), known)
        if named.count(axis) > 1:
            raise ValueError(
                f"{where} divides two axes of an array by {axis!r}: {axes!r}. Each axis of the "
                "mesh can divide one."
            )


def _trimmed(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes without empty ones in front, which say nothing."""
    first = next((i for i, axis in enumerate(axes) if axis), len(axes))
    return tuple(axes[first:])


def _divides(axes: Sequence[str], shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    """Whether an array has these axes, all multiples of the devices that they belong to."""
    axes = _trimmed(axes)
    lengths = shape[len(shape) - len(axes) :]
    pairs = zip(axes, lengths, strict=False)
    return len(axes) <= len(shape) and not any(axis and n % sizes[axis] for axis, n in pairs)


def _parts(path: str) -> tuple[str, str, str]:
    """Splits "opt/net0/inner/trace/params/stem/kernel" behind "trace" and behind "params"."""
    parts = path.split("/")
    for index, part in enumerate(parts):
        if part in ("params", "quant"):
            return "/".join(parts[:index]), part, "/".join(parts[index + 1 :])
    return path, "", ""


def _beside(
    path: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, PartitionSpec],
) -> PartitionSpec:
    """The division of an array that belongs to a weight, or of one that belongs to none."""
    before, collection, name = _parts(path)
    weight = None
    if collection == "quant" and "/weight_quantizer/" in f"/{name}":
        layer = f"/{name}".split("/weight_quantizer/")[0]
        named = ("/".join(filter(None, [before, f"params{layer}", n])) for n in _WEIGHTS)
        weight = next((candidate for candidate in named if candidate in found), None)
    elif "/hygiene/weights/" in path:  # opt/<slot>/hygiene/weights/<layer>/<array of its shape>
        slot, layer = path.removeprefix("opt/").split("/hygiene/weights/")
        layer = layer.rpartition("/")[0]
        named = ("/".join(filter(None, ["nets", slot, "params", layer, n])) for n in _WEIGHTS)
        weight = next((candidate for candidate in named if candidate in found), None)
    if weight is None or len(shapes[weight]) != len(shape):
        return PartitionSpec()
    if not found[weight]:
        return PartitionSpec()
    same = zip(found[weight], shape, shapes[weight], strict=True)
    return PartitionSpec(*(axis if own == whole else None for axis, own, whole in same))
