"""A reference of integer-only nets in plain NumPy: the arithmetic that hardware has to compute.

`run` walks the same program as `integer_apply` does for `convert(..., integer_only=True)` and gives
the same integers, bit for bit, without JAX: int32 sums, int64 only inside the fixed-point product,
where hardware has its 64-bit multiplier. Arrays are the model's, as NumPy.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax.deploy.integer.program import (
    Decode,
    Encode,
    Multiply,
    Program,
    Rescale,
    Table,
    Unpack,
    unique_name,
)
from qkd_jax.graph import NUMPY


def run(
    program: Program, arrays: Mapping[str, Any], images: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Runs an integer-only program.

    Args:
        program: `IntegerModel.program` of an integer-only model.
        arrays: `IntegerModel.arrays`.
        images: [batch, ...], float32: the only floats, until the logits' codes are scaled.

    Returns:
        (the net's output, codes of every quantized activation by name, int32).
    """
    stored: dict[str, np.ndarray] = {k: np.asarray(a) for k, a in arrays.items()}
    (entry,) = program.inputs
    env: dict[int, np.ndarray] = dict(program.numbers)
    env.update((v, stored[key]) for v, key in program.arrays.items())
    env[entry] = np.asarray(images)
    batch = len(env[entry])
    captured: dict[str, np.ndarray] = {}
    for step in program.steps:
        if isinstance(step, Unpack):
            codes = unpack(stored[step.key], step.shape, step.format, step.stride)
            if step.zero_point is not None:
                codes = codes - stored[step.zero_point].astype(np.int32)
            env[step.codes] = codes
        elif isinstance(step, Multiply):
            lhs, rhs = (env[v] for v in step.inputs)
            contract = convolve if step.node.op == "conv_general_dilated" else dot
            env[step.output] = contract(lhs, rhs, step.node.params)
        elif isinstance(step, Encode | Rescale | Table):
            env[step.codes] = _codes(step, env, stored)
            if step.zero_point:
                codes = env[step.codes] + stored[step.zero_point].astype(np.int32)
                captured[unique_name(captured, step.name)] = codes.astype(np.int32)
        elif isinstance(step, Decode):
            env[step.output] = env[step.codes].astype(np.float32) * stored[step.scale]
        else:
            values = [env[v] for v in step.inputs]
            params = {k: _sized(v, program.batch, batch) for k, v in step.params.items()}
            env[step.outputs[0]] = np.asarray(MOVES[step.op](params, *values))
    return env[program.outputs[0]], captured


def _codes(
    step: Encode | Rescale | Table, env: Mapping[int, np.ndarray], stored: Mapping[str, np.ndarray]
) -> np.ndarray:
    if isinstance(step, Encode):
        codes = np.rint(env[step.input] * (np.float32(1) / stored[step.scale]))
        return np.clip(codes, step.lo, step.hi).astype(np.int32)
    if isinstance(step, Table):
        x = env[step.input] if step.sign is None else env[step.input] * stored[step.sign]
        return np.asarray(sum((x >= t).astype(np.int32) for t in stored[step.thresholds])) + step.lo
    total = stored[step.bias]
    for value, m0, exponent in step.terms:
        total = total + rescale(env[value], stored[m0], stored[exponent])
    return np.clip(rounding_shift(total, step.shift), step.lo, step.hi)


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
    count = itertools.count()
    names: list[dict[int, int]] = [{}, {}]  # of each operand: axis -> letter of the einsum
    for pairs in (zip(lhs_batch, rhs_batch, strict=True), zip(lhs_sum, rhs_sum, strict=True)):
        for a, b in pairs:
            names[0][a] = names[1][b] = next(count)
    out = [names[0][a] for a in lhs_batch]
    for side, x in zip(names, (lhs, rhs), strict=True):
        for axis in range(x.ndim):
            if axis not in side:
                side[axis] = next(count)
                out.append(side[axis])
    lhs_letters, rhs_letters = ([side[axis] for axis in range(len(side))] for side in names)
    return np.einsum(lhs.astype(np.int32), lhs_letters, rhs.astype(np.int32), rhs_letters, out)


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
    sizes, slices = _windows(
        x.shape[2:], w.shape[2:], params["window_strides"], params["rhs_dilation"]
    )
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    w = w.reshape(groups, -1, *w.shape[1:])
    out = np.zeros((x.shape[0], groups, w.shape[1], *sizes), np.int32)
    for at, window in slices.items():
        out += np.einsum("ngi...,goi->ngo...", x[(..., *window)], w[(slice(None),) * 3 + at])
    out = out.reshape(out.shape[0], -1, *sizes)
    return out.transpose(np.argsort(numbers.out_spec))


def _windows(
    shape: Sequence[int], window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], dict[tuple[int, ...], tuple[slice, ...]]]:
    """Returns the output's sizes, and for each tap of the window the slices that it reads."""
    axes = list(zip(shape, window, strides, dilation, strict=True))
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in axes]
    slices = {
        at: tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, n, (_, _, s, d) in zip(at, sizes, axes, strict=True)
        )
        for at in np.ndindex(*window)
    }
    return sizes, slices


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


def _pool(params: Mapping[str, Any], x: np.ndarray, fill: int, combine: Any) -> np.ndarray:
    if any(d != 1 for d in params["base_dilation"]):
        raise ValueError("a pool dilates its input, which no layer of linen does.")
    x = _padded(x, params["padding"], fill)
    window, strides = params["window_dimensions"], params["window_strides"]
    sizes, slices = _windows(x.shape, window, strides, params["window_dilation"])
    out = np.full(sizes, fill, x.dtype)
    for reads in slices.values():
        out = combine(out, x[reads])
    return out


def _pad(params: Mapping[str, Any], x: np.ndarray, value: np.ndarray) -> np.ndarray:
    return _padded(x, [(low, high) for low, high, _ in params["padding_config"]], int(value))


def _slice(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    steps = params["strides"] or (1,) * x.ndim
    spans = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return x[tuple(slice(*span) for span in spans)]


# Operations that move integers, or add and compare them, by the name of their JAX primitive.
MOVES: dict[str, Callable[..., Any]] = {
    **{op: NUMPY[op] for op in "reshape transpose squeeze rev broadcast_in_dim copy max".split()},
    "slice": _slice,
    "pad": _pad,
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "reduce_sum": lambda p, x: x.sum(p["axes"], dtype=np.int32),
    "reduce_max": lambda p, x: x.max(p["axes"]),
    "reduce_window_sum": lambda p, x: _pool(p, x, 0, np.add),
    "reduce_window_max": lambda p, x: _pool(p, x, -(2**31), np.maximum),
}


def _sized(value: Any, traced: int | None, batch: int) -> Any:
    """Replaces sizes that are multiples of the traced batch size by those of this batch."""
    if traced is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value and value % traced == 0:
        return value // traced * batch
    if type(value) in (tuple, list):
        return type(value)(_sized(v, traced, batch) for v in value)
    return value
