"""The quantized weights of a net as they lie in its variables, outside a forward pass."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qkd_jax.numerics import Spec, codes_of
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.operands import split_groups
from qkd_jax.quantize.variables import TABLES, quantizer_params, quantizers
from qkd_jax.quantizers import QUANTIZERS, live
from qkd_jax.trees import get, join, put

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of a net: the path of its layer, and the name of its array in `params`."""

    path: str
    name: str
    spec: Spec

    @property
    def array(self) -> str:
        """Path of the float array in a net's variables."""
        return join("params", self.path, self.name)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A weight on its grid, all in the array's own shape but for the groups that are cut.

    Where a lifted layer (`nn.scan`, `nn.vmap`) stacks steps or members between the groups' two
    axes, those of the groups' entries lie behind them, as in the parameters.

    Attributes:
        values: the float weights, in float32 or wider.
        on_grid: the values that the quantizer gives.
        codes: centred codes, whole numbers as floats.
        scale: broadcasts against `codes`; `on_grid` is codes * scale.
        low: lowest value of the grid, like `scale`.
        high: highest one.
    """

    values: jax.Array
    on_grid: jax.Array
    codes: jax.Array
    scale: jax.Array
    low: jax.Array
    high: jax.Array


def quantized_weights(net: QuantizedModel, learned: Tree) -> Iterator[StoredWeight]:
    """Yields the weights with a quantizer and codes of integers, in the order of "quant".

    Those of dynamic specs are left out: their grid is another one at every call.

    Args:
        net: the net.
        learned: {"params", "quant"} of a net.
    """
    for path, operand, params in quantizers(learned):
        if operand != "weight":
            continue
        spec = net.spec_of(path, "weight")
        layer = get(learned["params"], path)
        name = next((n for n in TABLES if n in layer), None)
        if spec is None or name is None or spec.dynamic:
            continue
        weight = StoredWeight(path, name, spec)
        if QUANTIZERS[spec.quantizer].integer_view(params, spec) is not None:
            yield weight


def rounded(learned: Tree, weight: StoredWeight) -> Rounded:
    """Puts a weight on its grid; nothing of it has a gradient."""
    array = jax.lax.stop_gradient(get(learned, weight.array))
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    params = dict(quantizer_params(learned, weight.path, "weight"))
    params = jax.tree.map(jax.lax.stop_gradient, params)
    spec, quantizer = weight.spec, QUANTIZERS[weight.spec.quantizer]
    if isinstance(spec.granularity, int):
        size = spec.granularity
        axis, entries = _group_axes(wide.shape, size, jax.tree.leaves(params)[0].shape)
        wide = jnp.moveaxis(split_groups(wide, axis, size), axis + 1, entries)
    params = live(wide, params, spec)
    on_grid = quantizer.fake_quant(wide, params, spec)
    scale, *_ = quantizer.integer_view(params, spec)
    # Asked, not read from the format, whose ends are those of the upper bound of learned bits.
    beyond = jnp.full_like(scale, jnp.inf)
    low, high = (quantizer.fake_quant(end, params, spec) for end in (-beyond, beyond))
    return Rounded(wide, on_grid, codes_of(on_grid, scale), scale, low, high)


def with_weight(learned: Tree, weight: StoredWeight, values: jax.Array) -> dict[str, Any]:
    """Returns the tree with other values of a weight, in the shape of `Rounded`."""
    shape, size = get(learned, weight.array).shape, weight.spec.granularity
    if isinstance(size, int):
        params = quantizer_params(learned, weight.path, "weight")
        axis, entries = _group_axes(shape, size, jax.tree.leaves(params)[0].shape)
        values = jnp.moveaxis(values, entries, axis + 1)
    return put(learned, weight.array, jnp.reshape(values, shape))


def _group_axes(array: tuple[int, ...], size: int, params: tuple[int, ...]) -> tuple[int, int]:
    """Returns (the axis of an array that groups cut, the axis of their entries in parameters)."""
    for entries, one in enumerate(params):
        if one != 1:
            continue
        rest = (*params[:entries], *params[entries + 1 :])
        for axis in range(min(entries, len(array))):
            fits = [n in (1, m) for n, m in zip(rest, array, strict=True)]
            fits[axis] = rest[axis] * size == array[axis]
            if all(fits):
                return axis, entries
    raise ValueError(
        f"parameters of shape {params} fit no groups of {size} in a weight of shape {array}. "
        "Calibrate again."
    )
