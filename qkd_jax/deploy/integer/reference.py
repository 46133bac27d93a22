"""An integer-only net in plain NumPy: what hardware has to compute, written to be read.

`run` walks the same program as `integer_apply` does for `convert(..., integer_only=True)` and gives
the same integers, bit for bit. No jax here: int32 sums, int64 only inside the fixed-point product,
where hardware has its 64-bit multiplier. Arrays are the model's, as NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["convolve", "dot", "high_multiply", "rescale", "rounding_shift", "run", "unpack"]


def run(
    program: Any, arrays: Mapping[str, Any], images: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Runs an integer-only program.

    Args:
        program: `IntegerModel.program` of an integer-only model.
        arrays: `IntegerModel.arrays`.
        images: [batch, ...], float32: the only floats, until the logits' codes are scaled.

    Returns:
        (the net's output, codes of every quantized activation by name, int32).
    """
    given: dict[str, np.ndarray] = {k: np.asarray(a) for k, a in arrays.items()}
    (entry,) = program.inputs
    env: dict[int, np.ndarray] = dict(program.numbers)
    env.update((v, given[key]) for v, key in program.arrays.items())
    env[entry] = np.asarray(images)
    batch = len(env[entry])
    captured: dict[str, np.ndarray] = {}
    for step in program.steps:
        kind = type(step).__name__
        if kind == "Encode":
            scale, zero_point = given[step.scale], given[step.zero_point]
            codes = np.rint(env[step.input] * (np.float32(1) / scale))
            codes = np.clip(codes, step.lo, step.hi).astype(np.int32)
            _keep(captured, step.name, codes + zero_point.astype(np.int32))
            env[step.codes] = codes
        elif kind == "Weight":
            codes = unpack(given[step.key], step.shape, step.format, step.stride)
            if step.zero_point is not None:
                codes = codes - given[step.zero_point].astype(np.int32)
            env[step.codes] = codes
        elif kind == "Multiply":
            lhs, rhs = (env[v] for v in step.inputs)
            product = convolve if step.node.op == "conv_general_dilated" else dot
            env[step.output] = product(lhs, rhs, step.node.params)
        elif kind == "Rescale":
            total = given[step.bias]
            for value, m0, exponent in step.terms:
                total = total + rescale(env[value], given[m0], given[exponent])
            codes = np.clip(rounding_shift(total, step.shift), step.lo, step.hi)
            if step.zero_point:
                _keep(captured, step.name, codes + given[step.zero_point].astype(np.int32))
            env[step.codes] = codes
        elif kind == "Table":
            x = env[step.input] if step.sign is None else env[step.input] * given[step.sign]
            codes = sum((x >= t).astype(np.int32) for t in given[step.thresholds]) + step.lo
            _keep(captured, step.name, codes + given[step.zero_point].astype(np.int32))
            env[step.codes] = codes
        elif kind == "Decode":
            env[step.output] = env[step.codes].astype(np.float32) * given[step.scale]
        else:
            values = [env[v] for v in step.inputs]
            params = {k: _sized(v, program.batch, batch) for k, v in step.params.items()}
            results = MOVES[step.op](params, *values)
            env[step.outputs[0]] = np.asarray(results)
    return env[program.outputs[0]], captured


def _keep(captured: dict[str, np.ndarray], name: str, codes: np.ndarray) -> None:
    count, unique = 1, name
    while unique in captured:
        count += 1
        unique = f"{name}#{count}"
    captured[unique] = codes.astype(np.int32)


def high_multiply(x: np.ndarray, m0: np.ndarray) -> np.ndarray:
    """Returns floor((x * |m0| + 2^30) / 2^31), negated where m0 is negative."""
    wide = (x.astype(np.int64) * np.abs(np.asarray(m0, np.int64)) + 2**30) >> 31
    return np.where(np.asarray(m0) < 0, -wide, wide).astype(np.int32)


def rounding_shift(x: np.ndarray, shift: Any) -> np.ndarray:
    """Returns x / 2^shift, rounded half away from zero."""
    wide, half = np.abs(x.astype(np.int64)), (1 << np.asarray(shift, np.int64)) >> 1
    return (np.sign(x) * ((wide + half) >> shift)).astype(np.int32)


def rescale(x: np.ndarray, m0: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Fixed-point x * m0 * 2^(exponent - 31): left shift, high half, rounding right shift."""
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
    return rounding_shift(high_multiply(x.astype(np.int32) << left, m0), right)


def unpack(packed: np.ndarray, shape: tuple[int, ...], format: Any, stride: int = 1) -> np.ndarray:
    """Codes from bytes: fields in the low bits first; code = field * stride + qmin."""
    width = max(((format.qmax - format.qmin) // stride).bit_length(), 1)
    if width > 4:
        return packed.astype(np.int32).reshape(shape)
    size = math.prod(shape)
    bits = np.unpackbits(packed, bitorder="little")[: size * width].reshape(size, width)
    fields = bits.astype(np.int32) @ (1 << np.arange(width, dtype=np.int32))
    return (fields * stride + format.qmin).reshape(shape)


def dot(lhs: np.ndarray, rhs: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """`dot_general` in int32: batch axes first, then what is left of lhs, then of rhs."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    names: list[list[int]] = [[-1] * lhs.ndim, [-1] * rhs.ndim]
    count = 0
    pairs = [*zip(lhs_batch, rhs_batch, strict=True), *zip(lhs_sum, rhs_sum, strict=True)]
    for a, b in pairs:
        names[0][a] = names[1][b] = count
        count += 1
    for side in names:
        for axis, name in enumerate(side):
            if name < 0:
                side[axis], count = count, count + 1
    summed = set(range(len(lhs_batch), len(pairs)))
    out = [*range(len(lhs_batch)), *(n for side in names for n in side if n >= len(lhs_batch))]
    out = [n for n in dict.fromkeys(out) if n not in summed]
    return np.einsum(lhs.astype(np.int32), names[0], rhs.astype(np.int32), names[1], out)


def convolve(lhs: np.ndarray, rhs: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """`conv_general_dilated` in int32: a sum over the window of products of shifted maps."""
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise ValueError(
            "a convolution has batch_group_count above 1, which no layer of linen has."
        )
    x = _dilated(lhs.transpose(numbers.lhs_spec).astype(np.int32), params["lhs_dilation"])
    w = rhs.transpose(numbers.rhs_spec).astype(np.int32)  # [out, in / groups, *window]
    x = _padded(x, [(0, 0), (0, 0), *params["padding"]], 0)
    window, steps, dilation = w.shape[2:], params["window_strides"], params["rhs_dilation"]
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape[2:], window, dilation, steps, strict=True)
    ]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    w = w.reshape(groups, -1, *w.shape[1:])
    out = np.zeros((x.shape[0], groups, w.shape[1], *sizes), np.int32)
    for at in np.ndindex(*window):
        places = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(at, dilation, sizes, steps, strict=True)
        )
        out += np.einsum("ngi...,goi->ngo...", x[(..., *places)], w[(slice(None),) * 3 + at])
    out = out.reshape(out.shape[0], -1, *sizes)
    return out.transpose(np.argsort(numbers.out_spec))


def _dilated(x: np.ndarray, by: Sequence[int]) -> np.ndarray:
    shape = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], by, strict=True)]
    out = np.zeros((*x.shape[:2], *shape), x.dtype)
    out[(..., *(slice(None, None, d) for d in by))] = x
    return out


def _padded(x: np.ndarray, amounts: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Pads, or crops where an amount is negative."""
    x = np.pad(x, [(max(a, 0), max(b, 0)) for a, b in amounts], constant_values=value)
    crops = tuple(
        slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(x.shape, amounts, strict=True)
    )
    return x[crops]


def _windows(params: Mapping[str, Any], x: np.ndarray, fill: int, combine: Any) -> np.ndarray:
    if any(d != 1 for d in params["base_dilation"]):
        raise ValueError("a pool dilates its input, which no layer of linen does.")
    x = _padded(x, params["padding"], fill)
    window, steps = params["window_dimensions"], params["window_strides"]
    dilation = params["window_dilation"]
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape, window, dilation, steps, strict=True)
    ]
    out = np.full(sizes, fill, x.dtype)
    for at in np.ndindex(*window):
        places = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(at, dilation, sizes, steps, strict=True)
        )
        out = combine(out, x[places])
    return out


def _pad(params: Mapping[str, Any], x: np.ndarray, value: np.ndarray) -> np.ndarray:
    return _padded(x, [(low, high) for low, high, _ in params["padding_config"]], int(value))


def _slice(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    steps = params["strides"] or (1,) * x.ndim
    spans = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return x[tuple(slice(*span) for span in spans)]


def _broadcast(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


MOVES: dict[str, Any] = {
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "squeeze": lambda p, x: np.squeeze(x, p["dimensions"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "pad": _pad,
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "max": lambda _, x, y: np.maximum(x, y),
    "reduce_sum": lambda p, x: x.sum(p["axes"], dtype=np.int32),
    "reduce_max": lambda p, x: x.max(p["axes"]),
    "reduce_window_sum": lambda p, x: _windows(p, x, 0, np.add),
    "reduce_window_max": lambda p, x: _windows(p, x, -(2**31), np.maximum),
}
"""Operations that move integers, or add and compare them, by the name of their JAX primitive."""


def _sized(value: Any, traced: int | None, batch: int) -> Any:
    """Replaces sizes that are multiples of the traced batch by those of this one."""
    if traced is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value and value % traced == 0:
        return value // traced * batch
    if type(value) in (tuple, list):
        return type(value)(_sized(v, traced, batch) for v in value)
    return value
