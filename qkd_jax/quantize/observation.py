"""Observing a net's operands: one run over the batches, which keeps a state of each operand.

The states lie beside the quantizers they are for, so that they come out of lifted layers as the
layers' parameters do. Statistics are one jitted function of an operand and its state. The net runs
in the segments between its calls, and of those that are equal, as of the statistics of one shape
and spec, one is compiled: a net of many layers compiles about as fast as one of few.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import ModifyScopeVariableError

from qkd_jax import checks
from qkd_jax.graph import Segments
from qkd_jax.numerics import Spec, filled, stats
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantize.calls import CallForm, explaining_failures, split_arrays
from qkd_jax.quantize.contraction import OperandGrid
from qkd_jax.quantize.interception import Frame
from qkd_jax.quantize.lifted import StackedAxes, like, of_rank, probes, stacked_axes
from qkd_jax.quantize.model import QuantizedModel
from qkd_jax.quantize.operands import OperandHook, OperandUse, joined_axes, split_groups
from qkd_jax.quantize.variables import ATTENDED, OBSERVED, split_states, state_key, states
from qkd_jax.quantizers import is_uniform
from qkd_jax.trees import join, merged, nested

Tree = dict[str, Any]
Key = tuple[str, str]  # (layer path, operand)
Record = Callable[[Tree | None, OperandUse], Tree | None]  # see `_observing`
_KIND = OBSERVED


class Specs:
    """The specs of a net, with `calibrate`'s observer in place of their own."""

    def __init__(
        self, net: QuantizedModel, observer: str | None, options: Mapping[str, Any] | None
    ):
        self.net, self.override, self.options = net, observer, dict(options or {})
        self._overridden = functools.cache(self._override)

    def __call__(self, path: str, operand: str) -> Spec | None:
        """Returns the spec of an operand."""
        spec = self.net.spec_of(path, operand)
        if spec is None or self.override is None or spec.dynamic:
            return spec
        return self._overridden(spec)

    def _override(self, spec: Spec) -> Spec:
        options = {**dict(spec.options), **self.options}
        return dataclasses.replace(spec, observer=self.override, options=options)

    def observer(self, path: str, operand: str) -> str:
        """Returns the name of the observer of an operand."""
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


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What is kept of an operand: equal for those whose statistics are one compiled function.

    Attributes:
        spec: its spec, or None where nothing that is kept depends on it.
        observer: its observer, or None where it is not shown the batches.
        axes: axes of the operand, its groups cut, that have statistics of their own.
        group: (axis, size) of its groups, or None.
        sums: whether sums are taken, as in the first pass.
        moments: whether the observer wants to know the moments of all of them.
    """

    spec: Spec | None
    observer: ModuleType | None
    axes: tuple[int, ...]
    group: tuple[int, int] | None
    sums: bool
    moments: bool

    def cut(self, x: jax.Array) -> jax.Array:
        """Returns the operand with its groups cut."""
        return x if self.group is None else split_groups(x, *self.group)

    def rank(self, x: jax.Array) -> int:
        """Returns the number of axes of the operand, its groups cut."""
        return x.ndim + (self.group is not None)

    def empty(self, shape: Sequence[int]) -> Tree:
        """Returns the state before any data, for an operand of this shape, its groups cut."""
        own = [n if i in self.axes else 1 for i, n in enumerate(shape)] if self.axes else ()
        state: Tree = {"sums": stats.empty(own)} if self.sums else {}
        if self.observer is not None:
            state["observer"] = self.observer.init(tuple(own), self.spec)
        if self.moments:
            state["stats"] = stats.Stats(*[filled(own, 0)] * len(stats.Stats._fields))
        return state

    def placed(self, state: Tree, rank: int) -> Tree:
        """Returns a state as it lies beside an operand of so many axes."""
        return of_rank(state, rank, shared=not self.axes)


@functools.partial(jax.jit, static_argnames="kept")
def _add_batch(state: Tree, x: jax.Array, kept: _Kept) -> Tree:
    """Adds a batch of an operand to its state."""
    whole = kept.cut(x)
    placed, rank = kept.empty(whole.shape), whole.ndim
    if kept.group is not None and kept.axes:
        whole, axes = joined_axes(whole, kept.axes)
        kept = dataclasses.replace(kept, axes=axes)
    x = jax.lax.stop_gradient(whole)
    # The moments lie beside the state, so that a scanned layer sees its own slice of them.
    state = like(state, kept.empty(x.shape))
    new = dict(state)
    if kept.sums:
        seen = stats.measure(x, channel_axes=kept.axes)
        new["sums"] = stats.merge(state["sums"], seen)
    if kept.observer is not None:
        moments = {"stats": state["stats"]} if kept.moments else {}
        new["observer"] = kept.observer.update(
            state["observer"], x, kept.spec, channel_axes=kept.axes, **moments
        )
    return kept.placed(like(new, placed), rank)


def _observing(observed: Sequence[str], record: Record) -> OperandHook:
    """Returns a hook that records some operands in float; others are quantized if calibrated.

    `record` returns what is kept of an operand, or None to leave the variables as they are.
    """

    def hook(use: OperandUse) -> tuple[jax.Array, OperandGrid | None]:
        if use.operand not in observed:
            x_hat, grid, _ = use.quantize()
            # Layers that read a module's output without a spec of their own read it as a float.
            return x_hat, None if use.operand in ("output", ATTENDED) else grid
        key = state_key(use.operand, _KIND)
        state = record(use.read(key), use)
        if state is not None:
            use.write(key, state)
        return use.x, None

    return hook


def observe(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    inputs: Sequence[tuple[Any, ...]],
    kwargs: Mapping[str, Any],
    specs: Specs,
    chosen: Sequence[str],
    known: Mapping[Key, stats.Stats] | None = None,
) -> tuple[dict[Key, Tree], dict[Key, StackedAxes], Frame]:
    """Runs the net over all inputs.

    Args:
        net: the net.
        variables: quantizers among them are active.
        inputs: the arguments of each batch.
        kwargs: further arguments of the model's call.
        specs: specs and observers of the operands.
        chosen: the operands to observe.
        known: None in the first pass, which takes sums of every operand and the state of observers
            that need no more; in the second one the moments of the operands whose observers search.

    Returns:
        ({operand: its state}, {operand: its stacked axes}, the frame of the first trace).
    """
    options = {name: value for name, value in kwargs.items() if name != "mutable"}
    # A cache may be written while a net is observed; it is dropped after each batch.
    writable = [name for name in {"params": None, **variables} if name != "batch_stats"]
    frames: list[Frame] = []

    def kept_of(use: OperandUse) -> _Kept:
        key = use.path, use.operand
        observer = OBSERVERS[specs.observer(*key)]
        first = known is None
        shown = not observer.NEEDS_STATS if known is None else key in known
        # Of a dynamic operand nothing is kept but that it is quantized.
        axes = () if use.spec.dynamic else use.axes
        read = shown and not getattr(observer, "ANY_SPEC", False)
        return _Kept(
            spec=use.spec if read else None,
            observer=observer if shown else None,
            axes=axes,
            group=use.group,
            sums=first,
            moments=shown and not first,
        )

    def trace(record: Record, form: CallForm, *args: Any) -> tuple[Any, Tree]:
        def run(floats: Any, before: Tree, arrays: Sequence[Any]) -> Tree:
            frame = Frame(specs, _observing(chosen, record))
            given = {**floats, "params": merged(floats.get("params", {}), before)}
            _, out = net.apply_in(frame, given, *form(arrays), mutable=writable, **options)
            frames.append(frame)
            return split_states(out["params"], _KIND)

        with explaining_failures(inputs[0] if len(inputs[0]) > 1 else None), _refusals():
            closed, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
            if any(isinstance(value, jax.core.Tracer) for value in closed.consts):
                raise jax.errors.UnexpectedTracerError("A state has left the trace of its layer.")
        return closed, shapes

    def abstract(record: Record, before: Tree) -> Tree:
        arrays, form = split_arrays(inputs[0])
        return trace(record, form, variables, before, arrays)[1]

    first, stacked = _first_states(abstract, kept_of)
    for key, moments in (known or {}).items():
        first[key] = {**first[key], "stats": moments}

    def add(state: Tree | None, use: OperandUse) -> Tree:
        return _add_batch(state or {}, use.x, kept=kept_of(use))

    variables, observed = jax.tree.map(_on_device, (dict(variables), _tree(first)))
    programs: dict[Any, tuple[Segments, Any]] = {}
    for batch in inputs:
        arrays, form = split_arrays(batch)
        given = variables, observed, [_on_device(array) for array in arrays]
        leaves, structure = jax.tree.flatten(given)
        kind = form, structure, tuple(map(jax.typeof, leaves))
        if kind not in programs:
            # The variables are arguments: XLA would fold the statistics of constants, slowly.
            closed, shapes = trace(add, form, *given)
            programs[kind] = Segments(closed, "_add_batch"), jax.tree.structure(shapes)
        segments, structure = programs[kind]
        observed = jax.tree.unflatten(structure, segments(*leaves))
    seen = {key: state for key, state in _of_operands(observed).items() if state}
    return seen, stacked, frames[0]


def _first_states(
    abstract: Callable[[Record, Tree], Tree], kept_of: Callable[[OperandUse], _Kept]
) -> tuple[dict[Key, Tree], dict[Key, StackedAxes]]:
    """Finds the states before any data, and the axes along which lifted layers stack them.

    The states' tree comes from a trace: nothing is computed but the empty states.

    Args:
        abstract: traces the net with a record and states beside its parameters; returns the states
            that it writes, as shapes.
        kept_of: what is kept of an operand.
    """
    begun: dict[Key, Tree] = {}
    ranks: dict[Key, tuple[int, bool]] = {}  # and whether all of the operand shares parameters

    @functools.cache
    def empty(kept: _Kept, shape: tuple[int, ...]) -> Tree:
        with jax.ensure_compile_time_eval():  # tracers of a layer's transform would end with it
            x = jax.eval_shape(kept.cut, jax.ShapeDtypeStruct(shape, jnp.float32))
            state = kept.empty(x.shape)
            state.pop("stats", None)
            return kept.placed(state, x.ndim)

    def begin(_: Tree | None, use: OperandUse) -> Tree:
        kept = kept_of(use)
        ranks[use.path, use.operand] = kept.rank(use.x), not kept.axes
        begun[use.path, use.operand] = state = empty(kept, use.x.shape)
        return jax.lax.optimization_barrier(state)  # traced, so that it shows where it is lost

    def probe(_: Tree | None, use: OperandUse) -> Tree:
        return probes(ranks[use.path, use.operand][0])

    try:
        shapes = abstract(begin, {})
    except TypeError as error:
        if "branch" not in str(error):
            raise
        # The branches of a net must agree in what they write: the states come from outside of it.
        abstract(lambda _, use: begin(None, use) and None, {})
        try:  # the model runs, so that only the states can be what doesn't fit
            shapes = abstract(begin, _tree(begun))
        except (TypeError, ValueError) as error:
            raise ValueError(
                "a net has quantized layers in branches (nn.cond, nn.switch) or in nn.scan and "
                "nn.vmap, not both: their statistics can't be kept together. Leave those of one "
                "kind in float with a rule without specs before the others, or unroll the loop. "
                f"({error})"
            ) from error
    wanted = _of_operands(shapes)
    stacked = {key: StackedAxes(*rank) for key, rank in ranks.items()}
    if any(_shapes(wanted[key]) != _shapes(begun[key]) for key in wanted):
        probed = _of_operands(abstract(probe, {}))
        stacked = {key: stacked_axes(*ranks[key], probed[key]) for key in wanted}
    return {key: stacked[key].stacked(begun[key], wanted[key]) for key in wanted}, stacked


def _tree(kept: Mapping[Key, Tree]) -> Tree:
    """Returns the states of operands as they lie in the variables."""
    return nested({join(p, state_key(operand, _KIND)): kept[p, operand] for p, operand in kept})


def _of_operands(tree: Tree) -> dict[Key, Tree]:
    """Returns the states that lie in variables by their operands."""
    return {(path, operand): state for path, operand, state in states(tree, _KIND)}


def _shapes(tree: Tree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _on_device(leaf: Any) -> jax.Array:
    """Returns an array that segments do not have to move."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Says what is wrong with nets in which no statistics can be kept."""
    try:
        yield
    except ValueError as error:
        if not any(word in str(error) for word in ("broadcasted variable", "out_axes")):
            raise
        raise ValueError(
            "a quantized layer shares its parameters over the steps of nn.scan or nn.vmap (as "
            "nn.RNN's cells do), where statistics can't be kept. Leave it in float with a rule "
            f"without specs before the others, or unroll the loop. ({error})"
        ) from error
    except ModifyScopeVariableError as error:
        if '"params"' not in str(error):
            raise
        raise ValueError(
            "a quantized layer lies inside a module that hands it its parameters read-only "
            "(nn.WeightNorm, nn.SpectralNorm, nn.while_loop), where statistics can't be kept. "
            f"Leave it in float with a rule without specs before the others. ({error})"
        ) from error
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "a quantized layer is called through a closure inside a function that JAX traces by "
            "itself (a branch of nn.cond or lax.cond, the body of a loop), where no statistics can "
            "be kept. Call it through the module that nn.cond or nn.switch hands on, "
            "`lambda m, x: m.layer(x)`, or leave it in float with a rule without specs before the "
            "others."
        ) from error
