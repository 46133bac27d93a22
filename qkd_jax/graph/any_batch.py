"""Finds the batch axis of a traced function: traces of several sizes, compared.

A size that is the same in all is no batch. One that is a multiple k of the batch size is k batches,
and whatever runs the graph recognises it by that multiple, so it is traced with a prime. Every
other size, a batch and one more example say, has no meaning at another batch size and is refused.

The other sizes are the example's own and two, where Python that reads the batch size may do
something else (`if x.shape[0] > 8`): a graph is one program for all. Where they differ, a trace of
a second prime says more of it.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qkd_jax.graph.dataflow import Graph
from qkd_jax.graph.execution import Node, literal
from qkd_jax.graph.families import modules, parse_marker

JAXPRS = (core.ClosedJaxpr, core.Jaxpr)
PRIMES = (1009, 1013, 2003, 2011, 4001, 4003, 8009, 8011)
OWN_BATCH = (
    "`convert` and `to_onnx` take any_batch=False, which keeps the batch size of the example"
)


class Ambiguous(ValueError):
    """A size that no batch has is a multiple of the one that was traced with."""


def batch_sizes(abstract: Any) -> Iterator[tuple[int, int]]:
    """Yields pairs of prime batch sizes that no dimension of variables or arguments divides by."""
    sizes = [a.shape[:1] for a in jax.tree.leaves(abstract[1])]
    if not sizes or len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(
            f"the arguments' first axes are {sizes}; they must be one batch axis of one size. "
            f"{OWN_BATCH}."
        )
    used = {d for a in jax.tree.leaves(abstract[0]) for d in a.shape}
    used |= {d for a in jax.tree.leaves(abstract[1]) for d in a.shape[1:]}
    free = [p for p in PRIMES if all(d % p or not d for d in used)]
    if len(free) < 2:
        raise ValueError(f"most of {PRIMES} divide a dimension; {OWN_BATCH}.")
    yield from zip(free[::2], free[1::2], strict=False)


def compare(first: Graph, second: Graph) -> None:
    """Checks that two traces of prime batch sizes differ by those alone.

    Raises:
        Ambiguous: the first batch size stands for something else too; other sizes may not.
        ValueError: a size, position or number that depends on the batch in another way.
    """
    nodes, others = (
        [*g.nodes, *dict.fromkeys(g.constants.pending.values())] for g in (first, second)
    )
    comparison = _Comparison(first.batch, second.batch)
    for one, two in zip(nodes, others, strict=False):
        if (one.op, one.inputs, one.outputs) != (two.op, two.inputs, two.outputs):
            raise comparison.differs(one)
        comparison.params(one, one.params, two.params)
        for value in (*one.inputs, *one.outputs):
            comparison.sizes(one, first.shape(value), second.shape(value))
        for value in one.inputs:
            known = [g.constants.known.get(value) for g in (first, second)]
            comparison.numbers(one, *known)
    if len(nodes) != len(others) or first.outputs != second.outputs:
        raise comparison.differs(nodes[-1] if nodes else None)


def difference(
    first: core.ClosedJaxpr, other: core.ClosedJaxpr, sizes: tuple[int, int]
) -> ValueError | None:
    """Says where a function computes something else at one batch size than at another.

    Args:
        first: traced with the first of `sizes`, a prime that no number but the batch's has.
        other: traced with the second, which may be any. Of a single example, whose axis of size 1
            JAX itself treats otherwise, the results' shapes alone are compared.
        sizes: the two batch sizes.
    """
    large, small = sizes
    scaled = lambda n: n // large * small if n % large == 0 else n
    where = None
    if small == 1:
        results: Any = (first.out_avals, other.out_avals)  # arrays all
        shapes = [tuple(map(scaled, a.shape)) for a in results[0]]
        if shapes != [a.shape for a in results[1]]:
            where = "with results of another shape"
    else:
        pairs = itertools.zip_longest(_program(first, scaled), _program(other, lambda n: n))
        for pair in (pair for pair in pairs if pair[0] != pair[1]):
            here = [f"{a[1]!r} in {a[0] or 'the root module'!r}" if a else "nothing" for a in pair]
            where = f"with {here[1]}, there {here[0]}"
            break
    if where is None:
        return None
    return ValueError(
        f"the model's code reads the batch size: traced with {small} examples it is another "
        f"program than with {large}, {where}. What is to run at any batch size is one program: "
        f"leave the choice out of the forward pass. {OWN_BATCH}."
    )


def _program(closed: core.ClosedJaxpr, size: Callable[[int], int]) -> Iterator[tuple[Any, ...]]:
    """Yields what a jaxpr computes, to be compared: (scope, operation, what else decides it).

    Integers go through `size`: those of the code that are no sizes have no multiple of a batch.
    """

    def integers(value: Any) -> Any:
        if isinstance(value, JAXPRS):
            return "program"  # compared by itself
        if isinstance(value, tuple | list):
            return [integers(v) for v in value]
        if isinstance(value, int | np.integer) and not isinstance(value, bool):
            return size(int(value))
        return value if isinstance(value, bool | float | str) else type(value).__name__

    def array(value: Any) -> Any:
        shape = [size(n) for n in np.shape(value)]
        if not isinstance(value, jax.Array | np.ndarray | np.generic):
            return shape
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
            return shape
        rows = np.asarray(value)
        if not rows.ndim and rows.dtype.kind in "iu":
            return size(int(rows))
        for axis, n in enumerate(rows.shape):  # what is repeated along the batch is no other
            first = rows.take([0], axis) if n > 1 else rows
            rows = first if np.array_equal(np.broadcast_to(first, rows.shape), rows) else rows
        return shape, rows.dtype.name, rows.tobytes()

    def walk(jaxpr: Any, consts: Any, stack: tuple[str, ...], counted: bool) -> Any:
        scope = "/".join(stack[1:])
        numbers: dict[Any, int] = {}  # of variables, in the order in which they come up

        def atom(v: Any) -> Any:
            if not isinstance(v, core.Literal):
                value = numbers.setdefault(v, len(numbers))
            else:
                value = None if counted else array(literal(v))
            return value, [size(n) for n in v.aval.shape], str(v.aval.dtype)

        for const in consts:
            yield scope, "constant", array(const)
        for eqn in _live(jaxpr):
            inner = (*stack, *modules(eqn))
            marker = parse_marker(eqn.params.get("name", ""))
            # A dynamic range counts its elements, and reads no such number.
            counts = counted or bool(marker is not None and marker.dynamic_axes)
            params = [(k, integers(v)) for k, v in eqn.params.items()]
            atoms = [atom(v) for v in (*eqn.invars, *eqn.outvars)]
            yield "/".join(inner[1:]), eqn.primitive.name, params, atoms
            for value in jax.tree.leaves(dict(eqn.params), is_leaf=lambda v: isinstance(v, JAXPRS)):
                if isinstance(value, JAXPRS):
                    yield from walk(
                        getattr(value, "jaxpr", value), getattr(value, "consts", ()), inner, counts
                    )
        yield scope, "result", [atom(v) for v in jaxpr.outvars]

    return walk(closed.jaxpr, closed.consts, (), False)


def _live(jaxpr: Any) -> list[Any]:
    """The equations that a jaxpr's results need, in order; nothing needs an array of no numbers."""
    live: list[Any] = []
    needed: set[Any] = set()

    def need(variables: Any) -> None:
        needed.update(v for v in variables if not isinstance(v, core.Literal) and v.aval.size)

    need(jaxpr.outvars)
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            live.append(eqn)
            need(eqn.invars)
    return live[::-1]


class _Comparison:
    def __init__(self, first: Any, second: Any):
        self.batches = int(first), int(second)

    def differs(self, node: Node | None) -> Ambiguous:
        where = node.scope if node is not None and node.scope else "the root module"
        return Ambiguous(
            f"a number in {where!r} depends on the batch size; such a model cannot run at "
            "another one. Compute it from the data (a mean instead of a sum over n), or take "
            f"the batch size out of the forward pass. {OWN_BATCH}."
        )

    def sizes(self, node: Node, one: tuple[int, ...], two: tuple[int, ...]) -> None:
        if len(one) != len(two):
            raise self.differs(node)
        for a, b in zip(one, two, strict=True):
            self.size(node, a, b)

    def size(self, node: Node, one: int, two: int) -> None:
        first, second = self.batches
        if one == two and one and one % first == 0:
            raise Ambiguous(
                f"{node.describe()} has a size of {one}, a multiple of the batch size that it was "
                f"traced with. {OWN_BATCH}."
            )
        if one == two or (one % first == 0 and one // first * second == two):
            return
        slope, rest = divmod(two - one, second - first)
        size = f"the batch size {one - slope * first:+d}" if slope == 1 and not rest else one
        raise ValueError(
            f"{node.describe()} has an axis or a position of {size}, and depends on the batch "
            "size so that it serves no other one: only whole batches can be moved, cut and "
            "joined. Work on each example by itself (a constant beside the batch can be joined to "
            f"every example instead). {OWN_BATCH}."
        )

    def numbers(self, node: Node, one: Any, two: Any) -> None:
        if one is two:
            return
        one, two = np.asarray(one), np.asarray(two)
        inexact = one.dtype.kind in "fc"
        if one.shape == two.shape and not np.array_equal(one, two, equal_nan=inexact):
            raise self.differs(node)

    def params(self, node: Node, one: Any, two: Any, counts: bool = False) -> None:
        """Compares the parameters of an operation; with `counts`, not the numbers inside."""
        for key, value in one.items():
            self.param(node, value, two.get(key), counts)

    def param(self, node: Node, one: Any, two: Any, counts: bool) -> None:
        if isinstance(one, JAXPRS):
            self.bodies(node, getattr(one, "jaxpr", one), getattr(two, "jaxpr", two), counts)
        elif type(one) in (tuple, list):
            if len(one) != len(two):
                raise self.differs(node)
            for a, b in zip(one, two, strict=True):
                self.param(node, a, b, counts)
        elif isinstance(one, int | np.integer) and not isinstance(one, bool):
            self.size(node, int(one), int(two))
        elif isinstance(one, float):
            self.numbers(node, one, two)

    def bodies(self, node: Node, one: Any, two: Any, counts: bool) -> None:
        """Compares the jaxprs of a marker or a loop."""
        # A dynamic range counts its elements, and reads no such number.
        counts = counts or bool(node.params.get("dynamic_axes"))
        if len(one.eqns) != len(two.eqns):
            raise self.differs(node)
        for eqn, other in zip(one.eqns, two.eqns, strict=True):
            if eqn.primitive != other.primitive:
                raise self.differs(node)
            marker = parse_marker(eqn.params.get("name", ""))
            inside = counts or bool(marker is not None and marker.dynamic_axes)
            read = zip(eqn.invars, other.invars, strict=True)
            written = zip(eqn.outvars, other.outvars, strict=True)
            for a, b in (*read, *written):
                self.sizes(node, a.aval.shape, b.aval.shape)
                if isinstance(a, core.Literal) and isinstance(b, core.Literal) and not counts:
                    self.numbers(node, literal(a), literal(b))
            self.params(node, eqn.params, other.params, inside)
