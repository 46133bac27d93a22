"""A quantized weight as it is stored: codes, their format, and scales.

Every deployed file is written from this: `stored_tensor` takes a weight of a traced net off its
grid, and what it returns gives back the fake-quantized weight bit for bit, or it raises.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qkd_jax.graph import Node
from qkd_jax.numerics import (
    TENSOR_SCALE,
    FloatFormat,
    IntFormat,
    TableFormat,
    check_scale,
    check_zero_point,
    codes_of,
    scale_codes,
    scale_format,
    scale_values,
)
from qkd_jax.quantize.traced import TracedNet, is_quantizer, known_params, named
from qkd_jax.quantizers import QUANTIZERS, code_grid


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A weight's codes and what they mean.

        x_hat = (format.decode(codes) - zero_point) * scale

    computed in float32 with the axis that groups cut as [.., groups, size, ..], bit for bit (of a
    zero the sign may differ).

    Attributes:
        codes: int32, in the weight's own shape: integers (the zero point included), bit patterns,
            or indices into a table.
        format: what a code is; it has `bits`, `name`, `storage` and `decode`.
        scale: float32, a number or of the weight's rank with its groups cut.
        zero_point: the code of 0, int32, like `scale`; 0 but for affine grids.
        group: (axis, size) of the groups that cut an axis, or None.
        scale_format: the format that holds `scale`, or `block_scale` where there is a
            `tensor_scale`, without loss: "float32", "float16", "bfloat16", "e8m0" or "e4m3fn".
        tensor_scale: float32 number of a scale in two levels, or None. Members that a vmap stacks
            have one each: it broadcasts against `block_scale` then.
        block_scale: float32, the first level: scale = block_scale * tensor_scale. `scale` itself
            where there is one level.
        stride: the distance of neighbouring codes; 2 where they are odd integers (binary weights).
    """

    codes: np.ndarray
    format: IntFormat | FloatFormat | TableFormat
    scale: np.ndarray
    zero_point: np.ndarray
    group: tuple[int, int] | None
    scale_format: str
    tensor_scale: np.ndarray | None
    block_scale: np.ndarray
    stride: int = 1

    @property
    def uniform(self) -> bool:
        """Whether codes are integers, which products can be computed on."""
        return isinstance(self.format, IntFormat)

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Returns an array of the weight's shape with its groups cut."""
        return _cut(array, self.group)

    def values(self) -> np.ndarray:
        """Returns the fake-quantized weight, float32, in its own shape."""
        numbers = np.asarray(self.format.decode(jnp.asarray(self.cut(self.codes))), np.float32)
        numbers = numbers - self.zero_point.astype(np.float32)
        return (numbers * self.scale).reshape(self.codes.shape)


def stored_tensor(traced: TracedNet, marker: Node) -> StoredTensor:
    """Takes the codes of a calibrated weight off its grid.

    Args:
        traced: the net.
        marker: the quantizer of a weight (or of another constant).

    Raises:
        ValueError: the marker is of an activation or not calibrated; its quantizer states no codes;
            a scale that is NaN, infinite, zero or negative; a zero point that is no code;
            values that are not exactly codes times scales.
    """
    where = named(traced, marker)
    if not is_quantizer(marker) or marker.inputs[0] not in traced.graph.constants:
        raise ValueError(
            f"{where} is no calibrated weight, whose codes are known beforehand. Calibrate the "
            "net; activations get their codes at run time."
        )
    spec, params = traced.spec(marker), known_params(traced, marker)
    grid = None if params is None else code_grid(params, spec)
    if params is None or grid is None:
        raise ValueError(
            f"{where} has values that its quantizer states no codes for. Use another quantizer, "
            "or give the quantizer's module a `code_grid`."
        )
    check_scale(f"the scale of {where}", grid.scale)
    if isinstance(grid.format, IntFormat):
        check_zero_point(where, grid.zero_point, grid.format)
    quantizer, group = QUANTIZERS[spec.quantizer], marker.params["group"]
    scale = np.asarray(grid.scale, np.float32)
    zero_point = np.asarray(grid.zero_point)
    hat = np.asarray(traced.graph.constants[marker.outputs[0]], np.float32)
    name = scale_format(spec)
    second = np.asarray(params[TENSOR_SCALE]) if TENSOR_SCALE in params else None
    if second is not None and (second == second.flat[0]).all():
        second = second.reshape(-1)[0]
    first = scale if name == "float32" else np.asarray(params["scale"], np.float32)
    if (np.asarray(scale_values(scale_codes(jnp.asarray(first), name), name)) != first).any():
        raise ValueError(
            f"{where} has scales that {name} does not have, though its option scale_format says "
            "so. Something has changed them since calibration; calibrate again."
        )
    codes = _codes(_cut(hat, group), scale, zero_point, grid.format)
    stored = StoredTensor(
        codes=codes.reshape(hat.shape),
        format=grid.format,
        scale=scale,
        zero_point=np.rint(zero_point).astype(np.int32),
        group=group,
        scale_format=name,
        tensor_scale=second,
        block_scale=first,
        stride=quantizer.code_stride(spec) if hasattr(quantizer, "code_stride") else 1,
    )
    wrong = stored.values() != hat
    if wrong.any():
        raise ValueError(
            f"{where} has {int(wrong.sum()):,} of {hat.size:,} values that are not codes of "
            f"{grid.format.name} times their scale, such as {hat[wrong][0]!r}. Calibrate again on "
            "finite data."
        )
    return stored


def _cut(array: np.ndarray, group: tuple[int, int] | None) -> np.ndarray:
    if group is None:
        return array
    axis, size = group
    return array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])


def _codes(
    hat: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    format: IntFormat | FloatFormat | TableFormat,
) -> np.ndarray:
    """Returns the codes of values on a grid, int32; of values off it, those of some neighbours."""
    with np.errstate(invalid="ignore", over="ignore"):
        if isinstance(format, IntFormat):
            codes = codes_of(hat, scale) + zero_point
            return np.clip(np.nan_to_num(codes), format.qmin, format.qmax).astype(np.int32)
        units = hat * (1 / scale)
    return np.asarray(format.encode(jnp.asarray(units)), np.int32)
