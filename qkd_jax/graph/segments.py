"""Runs a traced function in segments, of which equal ones are compiled once.

A net of a hundred equal layers is one program of a hundred layers to XLA, whose compilation takes
longer than the few batches that run through it. Cut at the calls of one function, which stands
beside every layer, it is the same segment a hundred times.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qkd_jax.graph.execution import INLINED, bind, called_jaxpr, literal

_JIT = frozenset({"jit", "pjit"})


class _Literal:
    """A number written into an equation; equal to those of the same bits."""

    def __init__(self, value: np.ndarray):
        self.value = value
        self.key = str(value.dtype), value.shape, value.tobytes()


@dataclasses.dataclass(frozen=True)
class _Equation:
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int | _Literal, ...]
    outputs: tuple[int, ...]
    effects: bool
    cut: bool  # whether it is a segment of its own

    def reads(self) -> list[int]:
        return [v for v in self.inputs if isinstance(v, int)]


@dataclasses.dataclass(frozen=True)
class _Segment:
    run: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last: tuple[int, ...]  # values that no later segment reads


class Segments:
    """A traced function that runs segment by segment.

    Every array lives until the last segment that reads it has run. What no result depends on does
    not run. Segments are cut where the function calls others, but not inside of loops and branches,
    which stay whole.

    Args:
        closed: the jaxpr of the function.
        cut: the name of a function under `jax.jit`; each of its calls is a segment, and what lies
            between two of them another.

    Attributes:
        programs: the number of segments that differ.
    """

    def __init__(self, closed: core.ClosedJaxpr, cut: str):
        self._cut, self._equations, self._count = cut, [], 0
        self._constants: dict[int, Any] = {}
        self._inputs = self._new(len(closed.jaxpr.invars))
        self._outputs = self._inline(closed, self._inputs)
        self._segments = self._cut_up()
        self.programs = len({id(segment.run) for segment in self._segments})

    def __call__(self, *args: Any) -> list[Any]:
        """Runs the function on arrays: the jaxpr's inputs, in order."""
        env = {**self._constants, **dict(zip(self._inputs, args, strict=True))}
        for segment in self._segments:
            results = segment.run(*[env[v] for v in segment.inputs])
            env.update(zip(segment.outputs, results, strict=True))
            for value in segment.last:
                del env[value]
        return [v.value if isinstance(v, _Literal) else env[v] for v in self._outputs]

    def _new(self, count: int) -> tuple[int, ...]:
        self._count += count
        return tuple(range(self._count - count, self._count))

    def _inline(
        self, closed: core.ClosedJaxpr, inputs: Sequence[int | _Literal]
    ) -> tuple[int | _Literal, ...]:
        """Adds a jaxpr's equations; returns the values of its results."""
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        constants = self._new(len(closed.consts))
        self._constants.update(zip(constants, closed.consts, strict=True))
        env.update(zip(jaxpr.constvars, constants, strict=True))

        def read(v: Any) -> int | _Literal:
            return _Literal(literal(v)) if isinstance(v, core.Literal) else env[v]

        for eqn in jaxpr.eqns:
            values = tuple(map(read, eqn.invars))
            name = eqn.primitive.name
            # Functions under `jit` stay whole: JAX traces them once for all of their calls.
            if name in INLINED and (name not in _JIT or self._holds_cut(eqn)):
                results = self._inline(called_jaxpr(eqn.params), values)
            else:
                results = self._new(len(eqn.outvars))
                self._equations.append(
                    _Equation(
                        eqn.primitive,
                        eqn.params,
                        values,
                        results,
                        bool(eqn.effects),
                        self._is_cut(eqn),
                    )
                )
            env.update(zip(eqn.outvars, results, strict=True))
        return tuple(map(read, jaxpr.outvars))

    def _is_cut(self, eqn: Any) -> bool:
        return eqn.primitive.name in _JIT and eqn.params["name"] == self._cut

    def _holds_cut(self, eqn: Any) -> bool:
        return not self._is_cut(eqn) and any(
            self._is_cut(inner) or (inner.primitive.name in INLINED and self._holds_cut(inner))
            for inner in called_jaxpr(eqn.params).jaxpr.eqns
        )

    def _cut_up(self) -> list[_Segment]:
        parts: list[list[_Equation]] = []
        for equation in self._live():
            if equation.cut or not parts or parts[-1][0].cut:
                parts.append([])
            parts[-1].append(equation)
        needed = {v for v in self._outputs if isinstance(v, int)}
        compiled: dict[Any, Callable[..., Any]] = {}
        segments = []
        for part in reversed(parts):
            written = {v: None for equation in part for v in equation.outputs}
            inputs = tuple(dict.fromkeys(v for e in part for v in e.reads() if v not in written))
            outputs = tuple(v for v in written if v in needed)
            last = tuple(v for v in inputs if v not in needed)
            needed.update(inputs)
            key = _key(part, inputs, outputs)
            if key not in compiled:
                compiled[key] = _function(part, inputs, outputs)
            segments.append(_Segment(compiled[key], inputs, outputs, last))
        return segments[::-1]

    def _live(self) -> list[_Equation]:
        """The equations that a result depends on, and those with effects."""
        live, needed = [], {v for v in self._outputs if isinstance(v, int)}
        for equation in reversed(self._equations):
            if equation.effects or not needed.isdisjoint(equation.outputs):
                live.append(equation)
                needed.update(equation.reads())
        return live[::-1]


def _key(part: Sequence[_Equation], inputs: Sequence[int], outputs: Sequence[int]) -> Any:
    """Returns what equal segments share: all but the numbers of their values."""
    own = {v: i for i, v in enumerate(inputs)}
    for equation in part:
        for v in equation.outputs:
            own[v] = len(own)
    equations = tuple(
        (
            equation.primitive,
            tuple((name, _hashable(value)) for name, value in sorted(equation.params.items())),
            tuple(own[v] if isinstance(v, int) else v.key for v in equation.inputs),
        )
        for equation in part
    )
    return equations, tuple(own[v] for v in outputs)


def _hashable(value: Any) -> Any:
    if isinstance(value, float):
        return float, value.hex()  # 0.0 and -0.0 are equal
    try:
        hash(value)
    except TypeError:
        return id(value)  # the equations keep it alive
    return type(value), value


def _function(
    part: Sequence[_Equation], inputs: Sequence[int], outputs: Sequence[int]
) -> Callable[..., Any]:
    def run(*values: Any) -> list[Any]:
        env = dict(zip(inputs, values, strict=True))
        for equation in part:
            given = [env[v] if isinstance(v, int) else v.value for v in equation.inputs]
            results = bind(equation.primitive, given, equation.params)
            env.update(zip(equation.outputs, results, strict=True))
        return [env[v] for v in outputs]

    # A cut is a function under `jit` already, which stays compiled when this program is gone.
    return run if part[0].cut else jax.jit(run)
