"""Calibration: initial parameters of every quantizer from statistics of the float net on data.

One pass over the batches takes sums and counts of each operand (and the observer's own state); a
second follows only for observers that search a grid whose width the first pass measured. All layers
are observed at once, on float activations.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.errors import ModifyScopeVariableError

from qkd_jax import checks
from qkd_jax.numerics import Spec, stats
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantize.calls import jit_of_call, split_arrays
from qkd_jax.quantize.contraction import OperandGrid
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.lifted import StackedAxes, like, of_rank, probes, stacked_axes
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.operands import OperandHook, OperandUse
from qkd_jax.quantize.variables import (
    ATTENDED,
    OBSERVED,
    OPERANDS,
    TABLES,
    parameter_modules,
    quantizer_path,
    quantizers,
    refuse_own_names,
    split_multipliers,
    split_states,
    state_key,
    states,
    without_quantizers,
)
from qkd_jax.quantizers import QUANTIZERS, is_uniform
from qkd_jax.trees import flatten, insert, join, merged

Tree = dict[str, Any]
Key = tuple[str, str]  # (layer path, operand)
_KIND = OBSERVED


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
    specs = _Specs(net, observer, observer_options)
    _refuse_multipliers(variables)
    refuse_own_names(flatten(variables.get("params", {})))
    start = without_quantizers(variables, chosen)

    frames: list[Frame] = []
    first, stacked = _observe(net, start, inputs, kwargs, specs, chosen, frames=frames)
    # `init` has checked this, but a net may start from a float checkpoint without it.
    modules, layers = frames[0].modules, set(frames[0].seen)
    if kwargs.get("method") not in (None, "__call__"):  # it may reach a part of the net
        modules |= parameter_modules(variables)
        layers |= parameter_modules(variables, TABLES)
    net.check_rules(modules, layers)
    if not first:
        raise ValueError(
            "no operand of this net is quantized: none of its rules gives a layer it uses a "
            f"{' or '.join(operands or OPERANDS)} spec. `coverage` lists what the rules reach."
        )
    measured = {key: _named(key, stats.finish, found["sums"]) for key, found in first.items()}
    searching = {key for key in first if OBSERVERS[specs.observer(*key)].NEEDS_STATS}
    second: dict[Key, Tree] = {}
    if searching:
        known = {key: measured[key] for key in searching}
        second, _ = _observe(net, start, inputs, kwargs, specs, chosen, known)

    result = {**start, "quant": start.get("quant", {})}
    for key, moments in measured.items():
        path, operand = key
        spec, axes = specs(path, operand), stacked[key]
        assert spec is not None
        moments = axes.in_front(moments)
        if spec.dynamic:
            # Nothing is kept but that the operand is quantized from now on.
            mark = jax.numpy.ones_like(moments.count)  # one for each step of a scanned layer
            result = insert(result, quantizer_path(path, operand), axes.in_place({"dynamic": mark}))
            continue
        _check_sign(path, operand, spec, moments)
        _check_silent(path, operand, moments)
        state = second[key]["observer"] if key in searching else first[key]["observer"]
        state = axes.in_front(state)
        lo, hi = _named(key, OBSERVERS[specs.observer(path, operand)].range, state, spec)
        params = QUANTIZERS[spec.quantizer].init(moments._replace(lo=lo, hi=hi), spec)
        result = insert(result, quantizer_path(path, operand), axes.in_place(params))
    for path, operand, params in quantizers(variables):
        if operand in chosen and (path, operand) not in measured and net.spec_of(path, operand):
            result = insert(result, quantizer_path(path, operand), params)
    return result


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


class _Specs:
    """The specs of a net, with `calibrate`'s observer in place of their own."""

    def __init__(
        self, net: QuantizedModel, observer: str | None, options: Mapping[str, Any] | None
    ):
        self.net, self.override, self.options = net, observer, dict(options or {})

    def __call__(self, path: str, operand: str) -> Spec | None:
        spec = self.net.spec_of(path, operand)
        if spec is None or self.override is None or spec.dynamic:
            return spec
        options = {**dict(spec.options), **self.options}
        return dataclasses.replace(spec, observer=self.override, options=options)

    def observer(self, path: str, operand: str) -> str:
        spec = self(path, operand)
        name = "minmax" if spec is None or spec.observer is None else spec.observer
        if name not in OBSERVERS:
            raise checks.unknown(f"observer of {operand} of {path!r}", name, OBSERVERS)
        if getattr(OBSERVERS[name], "OF_CODES", False) and spec and not is_uniform(spec):
            raise ValueError(
                f"observer {name!r} of {operand} of {path!r} counts evenly spaced codes, and "
                f"quantizer {spec.quantizer!r} has none; use 'mse', 'percentile' or 'minmax'."
            )
        return name


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


def _observing(
    observed: Sequence[str],
    record: Callable[[Tree | None, OperandUse, tuple[int, ...]], Tree | None],
) -> OperandHook:
    """Returns a hook that records some operands in float; others are quantized if calibrated.

    `record` returns what is kept of an operand, or None to leave the variables as they are.
    """

    def hook(use: OperandUse) -> tuple[jax.Array, OperandGrid | None]:
        if use.operand not in observed:
            x_hat, grid, _ = use.quantize()
            # Layers that read a module's output without a spec of their own read it as a float.
            return x_hat, None if use.operand in ("output", ATTENDED) else grid
        key = state_key(use.operand, _KIND)
        # Of a dynamic operand nothing is kept but that it is quantized.
        state = record(use.read(key), use, () if use.spec.dynamic else use.axes)
        if state is not None:
            use.write(key, state)
        return use.x, None

    return hook


def _observe(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    inputs: Sequence[tuple[Any, ...]],
    kwargs: Mapping[str, Any],
    specs: _Specs,
    chosen: Sequence[str],
    known: Mapping[Key, Any] | None = None,
    frames: list[Frame] | None = None,
) -> tuple[dict[Key, Tree], dict[Key, StackedAxes]]:
    """Runs the net over all inputs; returns each operand's state and its stacked axes.

    Args:
        net: the net.
        variables: quantizers among them are active.
        inputs: the arguments of each batch.
        kwargs: further arguments of the model's call.
        specs: specs and observers of the operands.
        chosen: the operands to observe.
        known: None in the first pass, which takes sums of every operand and the state of observers
            that need no more; in the second one the moments of the operands whose observers search.
        frames: list to which the frames of the traces are added.
    """
    options = {name: value for name, value in kwargs.items() if name != "mutable"}
    # A cache may be written while a net is observed; it is dropped after each batch.
    writable = [name for name in {"params": None, **variables} if name != "batch_stats"]

    def run(floats: Any, before: Tree, arguments: tuple[Any, ...], record: Any) -> Tree:
        frame = Frame(specs, _observing(chosen, record))
        given = {**floats, "params": merged(floats.get("params", {}), before)}
        try:
            _, out = net.apply_in(frame, given, *arguments, mutable=writable, **options)
        except ValueError as error:
            if not any(word in str(error) for word in ("broadcasted variable", "out_axes")):
                raise
            raise ValueError(
                "a quantized layer shares its parameters over the steps of nn.scan or nn.vmap (as "
                "nn.RNN's cells do), where statistics can't be kept. Leave it in float with a rule "
                f"without specs before the others, or unroll the loop. ({error})"
            ) from error
        except ModifyScopeVariableError as error:
            if '"batch_stats"' in str(error):
                raise ValueError(
                    "the model updates its running averages: it runs in training mode. Give "
                    "`calibrate` the argument of its call for evaluation, such as train=False. "
                    f"({error})"
                ) from error
            if '"params"' not in str(error):
                raise
            raise ValueError(
                "a quantized layer lies inside a module that hands it its parameters read-only "
                "(nn.WeightNorm, nn.SpectralNorm, nn.while_loop), where statistics can't be kept. "
                f"Leave it in float with a rule without specs before the others. ({error})"
            ) from error
        if frames is not None:
            frames.append(frame)
        return split_states(out["params"], _KIND)

    kept: dict[Key, tuple[int, bool]] = {}  # (rank, whether all of the operand shares parameters)

    def keep(tree: Tree, use: OperandUse, axes: tuple[int, ...]) -> Tree:
        kept[use.path, use.operand] = rank, shared = use.cut(use.x).ndim, not axes
        return of_rank(tree, rank, shared=shared)

    def empty(use: OperandUse, axes: tuple[int, ...]) -> Tree:
        key, x = (use.path, use.operand), use.cut(use.x)
        shape = tuple(n if i in axes else 1 for i, n in enumerate(x.shape)) if axes else ()
        observer = OBSERVERS[specs.observer(*key)]
        state: Tree = {"sums": stats.empty(shape)} if known is None else {}
        has_state = not observer.NEEDS_STATS if known is None else key in known
        if has_state:
            state["observer"] = observer.init(shape, use.spec)
            if known is not None:
                state["stats"] = stats.Stats(*[jax.numpy.zeros(shape)] * len(stats.Stats._fields))
        return state

    def start(_: Tree | None, use: OperandUse, axes: tuple[int, ...]) -> Tree:
        state = empty(use, axes)
        return keep({name: state[name] for name in state if name != "stats"}, use, axes)

    def states_of_branches() -> Tree:
        """Builds the states outside of the net: its branches must agree in what they write."""
        built: Tree = {}

        def build(_: Tree | None, use: OperandUse, axes: tuple[int, ...]) -> None:
            nonlocal built
            with jax.ensure_compile_time_eval():  # a branch's tracers end with it
                alike = dataclasses.replace(use, x=jax.numpy.zeros(use.x.shape))
                state = start(None, alike, axes)
            built = insert(built, join(use.path, state_key(use.operand, _KIND)), state)

        jax.eval_shape(lambda v, a: run(v, {}, form(a), build), variables, arrays)
        try:  # the model runs, so that only the states can be what doesn't fit
            jax.eval_shape(lambda v, s, a: run(v, s, form(a), start), variables, built, arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "a net has quantized layers in branches (nn.cond, nn.switch) or in nn.scan and "
                "nn.vmap, not both: their statistics can't be kept together. Leave those of one "
                "kind in float with a rule without specs before the others, or unroll the loop. "
                f"({error})"
            ) from error
        return built

    def probe(_: Tree | None, use: OperandUse, axes: tuple[int, ...]) -> Tree:
        return probes(kept[use.path, use.operand][0])

    def update(state: Tree | None, use: OperandUse, axes: tuple[int, ...]) -> Tree:
        # The moments lie beside the state, so that a scanned layer sees its own slice of them.
        state, template, new = state or {}, empty(use, axes), {}
        state = like(state, {name: template[name] for name in state})
        x = jax.lax.stop_gradient(use.cut(use.x))
        if "sums" in state:
            new["sums"] = stats.merge(state["sums"], stats.measure(x, channel_axes=axes))
        if "observer" in state:
            observer = OBSERVERS[specs.observer(use.path, use.operand)]
            moments = {"stats": state["stats"]} if "stats" in state else {}
            new.update(moments)
            new["observer"] = observer.update(
                state["observer"], x, use.spec, channel_axes=axes, **moments
            )
        return keep(new, use, axes)

    arrays, form = split_arrays(inputs[0])
    # The states' tree comes from a run of which nothing but the empty states is computed.
    try:
        observed = jax.jit(lambda v, a: run(v, {}, form(a), start))(variables, arrays)
    except jax.errors.UnexpectedTracerError as error:  # a TypeError too
        raise ValueError(
            "a quantized layer is called through a closure inside a function that JAX traces by "
            "itself (a branch of nn.cond or lax.cond, the body of a loop), where no statistics can "
            "be kept. Call it through the module that nn.cond or nn.switch hands on, "
            "`lambda m, x: m.layer(x)`, or leave it in float with a rule without specs before the "
            "others."
        ) from error
    except TypeError as error:
        if "branch" not in str(error):
            raise
        observed = states_of_branches()
    found = {key: StackedAxes(*kept[key]) for key in kept}
    if any(s["sums"].lo.ndim > kept[p, o][0] for p, o, s in states(observed, _KIND) if "sums" in s):
        shapes = jax.eval_shape(lambda v, a: run(v, {}, form(a), probe), variables, arrays)
        probed = {(path, operand): state for path, operand, state in states(shapes, _KIND)}
        found = {key: stacked_axes(*kept[key], probed[key]) for key in kept}
    for (path, operand), moments in (known or {}).items():
        observed = insert(observed, join(path, state_key(operand, _KIND), "stats"), moments)
    # The variables are arguments: XLA would fold the statistics of constants, slowly.
    step = jit_of_call(lambda v, s, a: run(v, s, a, update))
    for arguments in inputs:
        observed = step(variables, observed, arguments)
    seen = {(path, operand): state for path, operand, state in states(observed, _KIND) if state}
    return seen, found


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
