"""Diagnostics of a calibrated net: range, clipping and noise of each quantized operand on data.

    print(diagnose(net, variables, batches))

Where a low-bit net has lost its accuracy: an input whose range is clipped, a weight that uses three
of its sixteen codes, a layer whose signal-to-quantization-noise ratio is far below its
neighbours'. The net runs quantized, so each operand is what it is behind quantized layers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import Spec, codes_of, compute_dtype
from qkd_jax.quantize.calibration import model_arguments
from qkd_jax.quantize.calls import explaining_failures, jit_of_call, split_arrays
from qkd_jax.quantize.contraction import OperandGrid
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.lifted import like
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.operands import OperandHook, OperandUse
from qkd_jax.quantize.variables import DIAGNOSED, split_states, state_key, states
from qkd_jax.quantizers import QUANTIZERS, in_use, learns_bits
from qkd_jax.trees import insert, join, merged

Tree = dict[str, Any]
_KIND = DIAGNOSED
# Where a grid has no codes to ask, its ends are what these two are rounded to.
_FAR = 1e15


@dataclasses.dataclass(frozen=True)
class Diagnosed:
    """One quantized operand of a layer, over all the data that it was shown.

    Attributes:
        path: the layer's path; a step of a scanned layer has its number behind, "block/dense[2]".
        operand: "weight", "input", "other" (of an attention product) or "output".
        bits: bits of its spec, or those in use where they are learned.
        label: its format and quantizer, such as "int4 lsq per channel".
        count: number of elements.
        lo: smallest value.
        hi: largest value.
        grid_lo: smallest value that the quantizer can give, over channels (rows, if it is dynamic).
        grid_hi: largest one.
        clipped: share of the elements beyond the grid's ends by more than half a step (by anything,
            for a grid that is not uniform, or where the quantizer clips before it scales).
        zeros: share of the elements that become 0.
        used: how many codes occur, all channels taken together; of a weight whose grid is not
            uniform the distinct values of the channel that has most; None for other operands on
            such a grid.
        levels: how many codes there are.
        sqnr: signal-to-quantization-noise ratio 10 log10(sum x^2 / sum (x - x_hat)^2) in dB; inf if
            the operand lies on its grid already, NaN if it is 0 throughout.
        oscillating: share of a weight's codes that oscillate in training, where that was tracked.
    """

    path: str
    operand: str
    bits: int
    label: str
    count: int
    lo: float
    hi: float
    grid_lo: float
    grid_hi: float
    clipped: float
    zeros: float
    used: int | None
    levels: int
    sqnr: float
    oscillating: float | None = None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All quantized operands of a net in the order in which they run; prints as a table."""

    operands: tuple[Diagnosed, ...]

    def records(self) -> list[dict[str, Any]]:
        """The operands as dicts, for JSON or a data frame."""
        return [dataclasses.asdict(operand) for operand in self.operands]

    def __str__(self) -> str:
        headings = ["layer", "operand", "grid", "data", "grid range", "clipped", "zero", "codes"]
        headings.append("SQNR dB")
        tracked = any(d.oscillating is not None for d in self.operands)
        headings += ["oscillating"] if tracked else []
        rows = [
            [*_cells(d), *([_percent(d.oscillating)] if tracked else [])] for d in self.operands
        ]
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        return "\n".join(
            "  ".join(
                text.ljust(width) if column < 3 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [headings, *rows]
        )


def _cells(d: Diagnosed) -> list[str]:
    used = "-" if d.used is None else f"{d.used}"
    return [
        d.path,
        d.operand,
        d.label,
        f"{d.lo:.3g} .. {d.hi:.3g}",
        f"{d.grid_lo:.3g} .. {d.grid_hi:.3g}",
        _percent(d.clipped),
        _percent(d.zeros),
        f"{used}/{d.levels}",
        f"{d.sqnr:.1f}",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def diagnose(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    oscillating: Mapping[str, float] | None = None,
    **kwargs: Any,
) -> Diagnosis:
    """Measures every quantized operand of a net on data.

    One compiled pass; what is kept of a batch are sums and counts, so batches of different sizes
    add up to what one batch of all of them gives.

    Args:
        net: the net.
        variables: its calibrated variables, before or after training.
        batches: an iterable of model inputs, as `calibrate` takes them.
        oscillating: {layer path: share of its weights that oscillate}, where training tracked it.
        **kwargs: further arguments of the model's call, such as `train=False`.

    Returns:
        A `Diagnosis`; print it, or ask for `.operands` or `.records()`. Layers of a branch that no
        batch takes are not among them.

    Raises:
        ValueError: no batch, an empty one, or a net of which nothing is quantized yet.
    """
    total = operand_sums(net, variables, batches, **kwargs)
    if not total:
        raise ValueError(
            "nothing of this net is quantized: its variables have no quantizers. Calibrate it "
            "first; `coverage` lists what its rules plan."
        )
    shares = oscillating or {}
    return Diagnosis(
        tuple(_finished(net, *key, found, shares.get(key[0])) for key, found in total.items())
    )


def operand_sums(
    net: QuantizedModel, variables: Mapping[str, Any], batches: Iterable[Any], **kwargs: Any
) -> dict[tuple[str, str, int | None], dict[str, Any]]:
    """Returns {(path, operand, step of a scan or None): sums, counts and extremes} over batches.

    Among them are "noise", the sum of (x - x_hat)^2, and "signal", that of x^2. Arguments and
    errors are those of `diagnose`.
    """
    checks.list_of_batches(batches)
    run, order = _runner(net, kwargs)
    total: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    number = -1
    for number, batch in enumerate(batches):
        arguments = model_arguments(batch)
        if any(np.shape(a)[:1] == (0,) for a in jax.tree.leaves(arguments)):
            raise ValueError(f"batch {number} of batches is empty; leave it out.")
        for key, found in _separate(jax.device_get(run(variables, arguments)), order):
            if key not in total or not total[key]["count"]:  # 0: of a branch that did not run
                total[key] = found
            elif key[1] != "weight":  # the same in every batch
                total[key] = _added(total[key], found)
    if number < 0:
        raise ValueError("batches is empty; give at least one batch of real inputs.")
    return {key: found for key, found in total.items() if found["count"]}


def _runner(
    net: QuantizedModel, kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Tree], dict[tuple[str, str], int]]:
    """Returns (compiled function of variables and arguments, {operand in running order: rank})."""
    order: dict[tuple[str, str], int] = {}
    empty: Tree = {}  # the sums of nothing, where branches must agree in what they write

    def measured(use: OperandUse) -> tuple[jax.Array, OperandGrid | None, Tree | None]:
        x_hat, grid, params = use.quantize()
        if params is None:
            return x_hat, grid, None
        return x_hat, grid, _sums(use.cut(use.x), use.cut(x_hat), use.spec, params, use.operand)

    def hook(use: OperandUse) -> tuple[jax.Array, OperandGrid | None]:
        """Quantizes an operand and adds what it does to the sums next to its quantizer."""
        x_hat, grid, sums = measured(use)
        if sums is not None:
            key = state_key(use.operand, _KIND)
            before, rank = use.read(key), use.x.ndim
            if before is not None:  # a layer that the net calls again, or one in a branch
                before = like(before, sums)
                if use.operand == "weight":
                    known = before["count"] > 0
                    sums = {n: jnp.where(known, before[n], value) for n, value in sums.items()}
                else:
                    sums = _added(before, sums)
            # All of the operand's rank, so that a lifted layer stacks them along one axis.
            fill = {name: (1,) * (rank - value.ndim) for name, value in sums.items()}
            use.write(key, {n: jnp.reshape(v, fill[n] + v.shape) for n, v in sums.items()})
            order[use.path, use.operand] = rank
        return x_hat, grid

    def build(use: OperandUse) -> tuple[jax.Array, OperandGrid | None]:
        """Quantizes an operand and keeps its empty sums."""
        nonlocal empty
        x_hat, grid, sums = measured(use)
        if sums is not None:
            with jax.ensure_compile_time_eval():  # a branch's tracers end with it
                nothing = {
                    name: jnp.full(
                        (1,) * (use.x.ndim - a.ndim) + a.shape, _of_nothing(name), a.dtype
                    )
                    for name, a in sums.items()
                }
            empty = insert(empty, join(use.path, state_key(use.operand, _KIND)), nothing)
        return x_hat, grid

    def run(variables: Mapping[str, Any], before: Tree, hook: OperandHook, arguments: Any) -> Tree:
        given = {**variables, "params": merged(variables.get("params", {}), before)}
        frame = Frame(net.spec_of, hook)
        _, out = net.apply_in(frame, given, *arguments, mutable=["params"], **kwargs)
        return split_states(out["params"], _KIND)

    compiled = jit_of_call(lambda variables, before, a: run(variables, before, hook, a))

    def call(variables: Mapping[str, Any], arguments: tuple[Any, ...]) -> Tree:
        try:
            with explaining_failures(None):
                return compiled(variables, empty, arguments)
        except TypeError as error:
            if "branch" not in str(error) or empty:
                raise
        arrays, form = split_arrays(arguments)
        jax.eval_shape(lambda v, a: run(v, {}, build, form(a)), variables, arrays)
        return compiled(variables, empty, arguments)

    return call, order


def _separate(summed: Tree, ranks: Mapping[tuple[str, str], int]):
    """Yields ((path, operand, step of a scan or None), sums) of one batch, in running order."""
    found = {(path, operand): sums for path, operand, sums in states(summed, _KIND)}
    for (path, operand), rank in ranks.items():
        sums = found[path, operand]
        shape = np.shape(sums["count"])
        # The steps of a scanned or vmapped layer are layers, each with quantizers of its own.
        stacked = [axis for axis, size in enumerate(shape) if size != 1]
        flat = {name: np.moveaxis(a, stacked, range(len(stacked))) for name, a in sums.items()}
        for step in range(math.prod(shape)):
            key = (path, operand, step if len(shape) > rank else None)
            of_step = {n: a.reshape(math.prod(shape), -1)[step] for n, a in flat.items()}
            yield key, {n: a if n == "codes" else a[0] for n, a in of_step.items()}


def _sums(x: Any, x_hat: Any, spec: Spec, params: Any, operand: str) -> Tree:
    """Returns sums, counts and extremes of one operand, to which other batches can be added."""
    module = QUANTIZERS[spec.quantizer]
    learned = learns_bits(spec)
    x, x_hat = (jax.lax.stop_gradient(a.astype(compute_dtype(a))) for a in (x, x_hat))
    params = jax.lax.stop_gradient(params)
    grid = module.integer_view(params, spec)
    if grid is None:
        low, high = _asked(params, spec)
        slack, extra = 0.0, {}
        if operand == "weight":
            extra["distinct"] = _distinct(x_hat, params)
    else:
        scale, zero_point, format = grid
        # The grid has the format of the upper bound of learned bits.
        ends = (scale * (code - zero_point) for code in (format.qmin, format.qmax))
        low, high = _asked(params, spec) if learned else ends
        slack = scale / 2
        codes = codes_of(x_hat, scale) + zero_point - format.qmin
        extra = {"codes": jnp.zeros(format.levels, bool).at[codes.astype(jnp.int32)].set(True)}
    ends = (low - slack, high + slack)
    if hasattr(module, "clip_range"):
        ends = module.clip_range(params, spec)
    beyond = (x < ends[0]) | (x > ends[1])
    return {
        "lo": jnp.min(x),
        "hi": jnp.max(x),
        "grid_lo": jnp.min(low),
        "grid_hi": jnp.max(high),
        "count": jnp.asarray(x.size, jnp.int32),
        "clipped": jnp.sum(beyond, dtype=jnp.int32),
        "zeros": jnp.sum(x_hat == 0, dtype=jnp.int32),
        "signal": jnp.sum(jnp.square(x)),
        "noise": jnp.sum(jnp.square(x - x_hat)),
        **({"bits": jnp.max(params["bits"])} if learned else {}),
        **extra,
    }


def _asked(params: Any, spec: Spec) -> Iterator[jax.Array]:
    """Yields the ends of a grid as its quantizer gives them."""
    shape = jax.tree.leaves(params)[0].shape
    for far in (-_FAR, _FAR):
        yield QUANTIZERS[spec.quantizer].fake_quant(jnp.full(shape, far), params, spec)


def _distinct(x_hat: jax.Array, params: Any) -> jax.Array:
    """Distinct values of the channel that has most, for channels differ in their scales."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == x_hat.ndim]
    own = [a for a in range(x_hat.ndim) if any(s[a] == x_hat.shape[a] != 1 for s in shapes)]
    rows = jnp.moveaxis(x_hat, own, range(len(own)))
    rows = rows.reshape(math.prod(x_hat.shape[a] for a in own), -1)
    rows = jnp.sort(rows, axis=1)
    return 1 + jnp.max(jnp.sum(rows[:, 1:] != rows[:, :-1], axis=1))


_EXTREMES = {
    "lo": "minimum",
    "grid_lo": "minimum",
    "hi": "maximum",
    "grid_hi": "maximum",
    "bits": "maximum",
}


def _of_nothing(name: str) -> float:
    """The value of a sum, count or extreme before any data."""
    return {"minimum": math.inf, "maximum": -math.inf}.get(_EXTREMES.get(name, ""), 0)


def _added(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
    """Joins two parts of the data, traced or on the host (there without rounding or overflow)."""
    traced = any(isinstance(v, jax.Array) for v in a.values())
    np_, wide = (jnp, lambda v: v) if traced else (np, _wide)
    out = {}
    for key in a:
        if key in _EXTREMES:
            out[key] = getattr(np_, _EXTREMES[key])(a[key], b[key])
        elif key == "codes":
            out[key] = a[key] | b[key]
        else:
            out[key] = wide(a[key]) + wide(b[key])
    return out


def _wide(value: Any) -> Any:
    return int(value) if np.issubdtype(np.asarray(value).dtype, np.integer) else float(value)


def _finished(
    net: QuantizedModel,
    path: str,
    operand: str,
    step: int | None,
    found: Mapping[str, Any],
    oscillating: float | None,
) -> Diagnosed:
    spec = net.spec_of(path, operand)
    assert spec is not None
    spec = in_use(spec, {name: np.asarray(found[name]) for name in ("bits",) if name in found})
    count = int(found["count"])
    signal, noise = float(found["signal"]), float(found["noise"])
    if noise > 0:
        sqnr = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    else:
        sqnr = math.inf if signal > 0 else math.nan
    if noise != noise or signal != signal:
        sqnr = math.nan
    levels, used = 2**spec.bits, None
    if "codes" in found:
        used = int(np.sum(found["codes"]))
        # Codes of every second integer (DoReFa's weights, binary ones) take a wider format.
        levels = min(levels, len(found["codes"]))
    elif "distinct" in found:
        used = int(found["distinct"])
    return Diagnosed(
        path=path if step is None else f"{path}[{step}]",
        operand=operand,
        bits=spec.bits,
        label=spec.label,
        count=count,
        lo=float(found["lo"]),
        hi=float(found["hi"]),
        grid_lo=float(found["grid_lo"]),
        grid_hi=float(found["grid_hi"]),
        clipped=int(found["clipped"]) / count,
        zeros=int(found["zeros"]) / count,
        used=used,
        levels=levels,
        sqnr=sqnr,
        oscillating=oscillating if operand == "weight" else None,
    )
