"""Calibration: initial parameters of every quantizer from statistics of the float net on data.

One pass over the batches takes sums and counts of each operand (and the observer's own state); a
second follows only for observers that search a grid whose width the first pass measured. All layers
are observed at once, on float activations.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.numerics import Spec, stats
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.observation import Key, Specs, Tree, observe
from qkd_jax.quantize.variables import (
    ATTENDED,
    OPERANDS,
    TABLES,
    parameter_modules,
    quantizer_path,
    quantizers,
    refuse_own_names,
    split_multipliers,
    without_quantizers,
)
from qkd_jax.quantizers import QUANTIZERS, calibrated_params
from qkd_jax.trees import flatten, merged, nested


def calibrate(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    observer: str | None = None,
    observer_options: Mapping[str, Any] | None = None,
    operands: Sequence[str] | None = None,
    **kwargs: Any,
) -> Tree:
    """Gives a net the `quant` collection: from then on it is quantized.

    Args:
        net: the net; its rules say what is quantized, by which quantizer.
        variables: its float variables. Old quantizers are replaced, but for those of operands that
            have a spec and that these calls do not reach (of a decoder, where `method="encode"` is
            called), which stay. What `fold_bn` left for float layers stays.
        batches: an iterable of model inputs: arrays [batch, ...], dicts with the key "image" (and
            "mask", which leaves out padding), or tuples of positional arguments, flags and None
            among them. Batches of one shape compile once. A second pass is made for observers that
            need one, so all batches are held in memory.
        observer: a key of `OBSERVERS` for every quantizer, or None: what each spec says, else each
            quantizer's own initialisation (LSQ's from the mean magnitude, the others' from the
            range). Dynamic operands need none and are left out.
        observer_options: the observer's own numbers, such as `{"power": 2.4}` of "mse" or
            `{"percentile": 99.9}`, in place of those that specs have (`Spec.options`).
        operands: which of "weight", "input", "other" and "output" to calibrate; None means all.
            With some of them, the quantizers of the others stay as they are and act while these are
            observed: weights first and inputs later, say, or inputs again, on quantized weights.
        **kwargs: further arguments of the model's call, such as `train=False`.

    Returns:
        The variables with `quant` added; everything else is as it was.

    Raises:
        ValueError: no batch; a rule that matches nothing; no layer quantized; non-finite data; an
            input that is 0 throughout; an operand with negative values under an unsigned symmetric
            spec; an unknown observer, option or operand; variables whose BatchNorms were folded
            into quantized layers. The message names the layer.
    """
    check_observer("", observer, observer_options)
    checks.list_of_batches(batches)
    inputs = [model_arguments(batch) for batch in batches]
    if not inputs:
        raise ValueError("batches is empty; give at least one batch of real inputs.")
    chosen = _chosen(OPERANDS if operands is None else operands)
    specs = Specs(net, observer, observer_options)
    _refuse_multipliers(variables)
    refuse_own_names(flatten(variables.get("params", {})))
    start = without_quantizers(variables, chosen)

    first, stacked, frame = observe(net, start, inputs, kwargs, specs, chosen)
    # `init` has checked this, but a net may start from a float checkpoint without it.
    modules, layers = frame.modules, set(frame.seen)
    if kwargs.get("method") not in (None, "__call__"):  # it may reach a part of the net
        modules |= parameter_modules(variables)
        layers |= parameter_modules(variables, TABLES)
    net.check_rules(modules, layers)
    if not first:
        raise ValueError(
            "no operand of this net is quantized: none of its rules gives a layer it uses a "
            f"{' or '.join(operands or OPERANDS)} spec. `coverage` lists what the rules reach."
        )
    measured = {key: _named(key, _finished, state["sums"]) for key, state in first.items()}
    searching = {key for key in first if OBSERVERS[specs.observer(*key)].NEEDS_STATS}
    second: dict[Key, Tree] = {}
    if searching:
        known = {key: measured[key] for key in searching}
        second, *_ = observe(net, start, inputs, kwargs, specs, chosen, known)

    found: dict[str, Tree] = {}
    for key, moments in measured.items():
        path, operand = key
        spec, axes = specs(path, operand), stacked[key]
        assert spec is not None
        moments = axes.in_front(moments)
        if spec.dynamic:
            # Little is kept but that the operand is quantized from now on.
            mark = jax.numpy.ones_like(moments.count)  # one for each step of a scanned layer
            kept = {"dynamic": mark, **calibrated_params(moments, spec)}
            found[quantizer_path(path, operand)] = axes.in_place(kept)
            continue
        _check_sign(path, operand, spec, moments)
        _check_silent(path, operand, moments)
        state = second[key]["observer"] if key in searching else first[key]["observer"]
        state = axes.in_front(state)
        lo, hi = _named(key, OBSERVERS[specs.observer(path, operand)].range, state, spec)
        params = QUANTIZERS[spec.quantizer].init(moments._replace(lo=lo, hi=hi), spec)
        found[quantizer_path(path, operand)] = axes.in_place(params)
    for path, operand, params in quantizers(variables):
        if operand in chosen and (path, operand) not in measured and net.spec_of(path, operand):
            found[quantizer_path(path, operand)] = params
    return merged({**start, "quant": start.get("quant", {})}, nested(found))


def check_observer(where: str, observer: str | None, options: Mapping[str, Any] | None) -> None:
    """Raises ValueError for an unknown observer, or options that are not its own.

    Args:
        where: what stands before the arguments' names in messages, such as "stages.calibrate.".
        observer: a key of `OBSERVERS`, or None.
        options: its options, or None.
    """
    if observer is not None and observer not in OBSERVERS:
        raise checks.unknown(f"{where}observer", observer, OBSERVERS)
    if not options:
        return
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{where}observer_options is {options!r}; give a dict, such as {{'power': 2.4}}."
        )
    having = [name for name, module in OBSERVERS.items() if hasattr(module, "OPTIONS")]
    if observer not in having:
        raise ValueError(
            f"{where}observer_options came with observer={observer!r}, which has none; the "
            f"observers with options are {', '.join(having)}."
        )
    assert observer is not None
    for name in options:
        if name not in OBSERVERS[observer].OPTIONS:
            raise checks.unknown(
                f"option of {where}observer {observer!r}", name, OBSERVERS[observer].OPTIONS
            )
    try:
        OBSERVERS[observer].init((), Spec(8, observer=observer, options=options))
    except ValueError as error:
        raise ValueError(f"{where}observer_options: {error}") from None


def _chosen(operands: Sequence[str]) -> tuple[str, ...]:
    if isinstance(operands, str) or not operands:
        raise ValueError(
            f"operands is {operands!r}; give a list of names, such as ('weight',): any of "
            f"{', '.join(OPERANDS)}."
        )
    for operand in operands:
        if operand not in OPERANDS:
            raise checks.unknown("operand", operand, OPERANDS)
    return (*operands, ATTENDED) if "output" in operands else tuple(operands)


def _refuse_multipliers(variables: Mapping[str, Any]) -> None:
    for path in split_multipliers(variables)[1]:
        raise ValueError(
            f"layer {path!r} has a BatchNorm folded into its output multiplier, which holds "
            "for its old scales alone; calibrate the variables from before `fold_bn`, or fold "
            "the float net first."
        )


def model_arguments(batch: Any) -> tuple[Any, ...]:
    """Returns the arguments of a model's call for one batch, without its padding."""
    if isinstance(batch, Mapping):
        if "image" not in batch:
            raise ValueError(
                f"a batch has the keys {sorted(batch)}; a dict needs 'image', or give a tuple of "
                "the model's arguments."
            )
        image = np.asarray(batch["image"])
        # A padded last batch: what the mask leaves out was never seen by the net.
        return (image[np.asarray(batch["mask"]) > 0] if "mask" in batch else image,)
    return tuple(batch) if isinstance(batch, tuple) else (batch,)


_finish = jax.jit(stats.finish)  # one call for an operand, not one for each operation


def _finished(sums: stats.Sums) -> stats.Stats:
    stats.check_data(sums.lo, sums.hi, empty=sums.count == 0)
    return _finish(sums)


def _named(key: Key, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        path, operand = key
        raise ValueError(f"{operand} of layer {path!r}: {error}") from None


def _check_sign(path: str, operand: str, spec: Spec, moments: stats.Stats) -> None:
    lowest = float(np.min(np.asarray(moments.lo)))
    if spec.symmetric and not spec.signed and lowest < 0:
        raise ValueError(
            f"{operand} of layer {path!r} goes down to {lowest:.4g}, but its spec is unsigned and "
            "symmetric: all negative values would become 0. Use signed=True, or symmetric=False "
            "for an affine grid; a preset signs such inputs itself: "
            "presets.rules(name, model=model, images=images)."
        )


def _check_silent(path: str, operand: str, moments: stats.Stats) -> None:
    """An all-zero weight is exact on any grid, but the range of a silent input is not known."""
    if operand in ("input", "other") and not np.any(moments.lo) and not np.any(moments.hi):
        raise ValueError(
            f"{operand} of layer {path!r} is 0 in all the calibration data, so its range is not "
            "known: real values would meet a grid of step 1. Give batches of real inputs; where "
            "the layer before it is dead, leave this one in float with a rule without specs before "
            "the others."
        )
