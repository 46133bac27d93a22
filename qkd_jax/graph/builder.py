"""Collects the nodes of a graph while jaxprs are inlined into each other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qkd_jax.graph.any_batch import Ambiguous
from qkd_jax.graph.execution import INLINED, Node, called_jaxpr, literal
from qkd_jax.graph.families import modules, parse_marker


class Builder:
    """Collects nodes while jaxprs are inlined into each other."""

    def __init__(self, batch: int | None):
        self.batch = batch
        self.nodes: list[Node] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self.known: dict[int, Any] = {}  # literals and closed-over arrays
        self.sources: dict[int, frozenset[str]] = {}  # of values that no input reaches

    def new(self, aval: Any) -> int:
        """Returns a new value of a shape and dtype."""
        self.avals[len(self.avals)] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return len(self.avals) - 1

    def constant(self, array: Any, scope: str) -> int:
        """Adds a literal or an array that the function closes over."""
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            raise ValueError(f"{scope or 'the root'!r} draws random numbers; trace eval mode.")
        array = np.asarray(array)
        if self.batch and array.size and array.dtype.kind in "iufb":
            if array.ndim == 0 and array.dtype.kind in "iu" and array and array % self.batch == 0:
                # An index counted from the end, say. It becomes what any batch can compute.
                dtype, batches = array.dtype, array.dtype.type(array // self.batch)
                largest = lambda: jax.lax.reduce_max(jax.lax.iota(dtype, self.batch), (0,))
                return self.call(lambda: (largest() + dtype.type(1)) * batches, [], scope)[0]
            first = tuple(slice(0, 1 if n % self.batch == 0 else n) for n in array.shape)
            row = array[first]
            if row.size < array.size and np.array_equal(np.broadcast_to(row, array.shape), array):
                axes = tuple(range(array.ndim))
                repeat = lambda x: jax.lax.broadcast_in_dim(x, array.shape, axes)
                return self.call(repeat, [self.constant(row, scope)], scope)[0]
        value = self.new(array)
        self.known[value] = array
        self.sources[value] = frozenset()
        return value

    def call(self, function: Callable[..., Any], values: Sequence[int], scope: str) -> list[int]:
        """Adds the operations of a function of values."""
        closed = jax.make_jaxpr(function)(*(self.avals[v] for v in values))
        return self.inline(closed.jaxpr, closed.consts, values, ("", scope) if scope else ("",))

    def add(
        self, op: str, inputs: Any, avals: Any, params: Any, scope: str, primitive: Any = None
    ) -> list[int]:
        """Adds a node; returns the values of its results."""
        outputs = [self.new(a) for a in avals]
        fixed = all(v in self.sources for v in inputs)
        if self.batch:
            fixed = fixed and not any(d and d % self.batch == 0 for a in avals for d in a.shape)
        if fixed:
            sources = frozenset().union(*(self.sources[v] for v in inputs))
            self.sources.update((v, sources) for v in outputs)
        self.nodes.append(Node(op, tuple(inputs), tuple(outputs), params, scope, primitive))
        return outputs

    def inline(self, jaxpr: Any, consts: Any, inputs: Sequence[int], stack: tuple[str, ...]) -> Any:
        """Adds a jaxpr's equations; returns the values of its results."""
        scope = "/".join(stack[1:])
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(
            (v, self.constant(c, scope)) for v, c in zip(jaxpr.constvars, consts, strict=True)
        )

        def read(v: Any) -> int:
            if isinstance(v, core.Literal):
                return self.constant(literal(v), scope)
            return env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            inner_stack = (*stack, *modules(eqn))
            results = self.equation(eqn, values, inner_stack)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[int], stack: tuple[str, ...]) -> list[int]:
        """Adds what an equation computes; returns the values of its results."""
        op, params, scope = eqn.primitive.name, eqn.params, "/".join(stack[1:])
        avals = [v.aval for v in eqn.outvars]
        marker = parse_marker(params.get("name", "")) if op in ("jit", "pjit") else None
        if marker is not None:
            marked = {**marker._asdict(), "jaxpr": called_jaxpr(params)}
            return self.add(marker.kind, values, avals, marked, scope)
        if op in INLINED:
            inner = called_jaxpr(params)
            return self.inline(inner.jaxpr, inner.consts, values, stack)
        if op == "scan":
            return self.unroll(eqn, values, stack)
        if op == "cond":
            return self.choose(params["branches"], values, stack)
        if op == "tile":
            return self.call(lambda x: _tiled(x, params["reps"], avals[0].shape), values, scope)
        if op == "stack":
            return [self.stack(values, scope, params["axis"])]
        if op == "unstack":
            axis, count = params["axis"], len(avals)
            item = lambda x, i: jax.lax.index_in_dim(x, i, axis, keepdims=False)
            return self.call(lambda x: [item(x, i) for i in range(count)], values, scope)
        if op == "concatenate":
            full = [v for v in values if self.avals[v].shape[params["dimension"]]]
            if len(full) == 1:
                return full  # beside parts of no entries, such as `jnp.pad` makes
            values = full or values
        return self.add(op, values, avals, params, scope, eqn.primitive)

    def unroll(self, eqn: Any, values: list[int], stack: tuple[str, ...]) -> list[int]:
        """Writes a scan out; refuses one over the batch axis, whose length is not known."""
        params, scope = eqn.params, "/".join(stack[1:])
        length, inner = params["length"], params["jaxpr"]
        if self.batch and length % self.batch == 0:
            raise Ambiguous(
                f"a scan over the batch in {scope or 'the root module'!r} has no fixed length; "
                "write it with jax.vmap instead."
            )
        # What is scanned over has an axis more outside; versions of JAX count it by other names.
        outer = [[v.aval.ndim for v in side] for side in (eqn.invars, eqn.outvars)]
        own = [[a.ndim for a in side] for side in (inner.in_avals, inner.out_avals)]
        scanned, stacked = (
            sum(a > b for a, b in zip(*sides, strict=True))
            for sides in zip(outer, own, strict=True)
        )
        split, count = len(values) - scanned, len(eqn.outvars) - stacked
        fixed, carry = values[: split - count], values[split - count : split]
        stacks: list[list[int]] = []
        for i in reversed(range(length)) if params["reverse"] else range(length):
            slices = [self.index(v, i, scope) for v in values[split:]]
            results = self.inline(inner.jaxpr, inner.consts, [*fixed, *carry, *slices], stack)
            carry = results[:count]
            stacks.append(results[count:])
        if params["reverse"]:
            stacks.reverse()
        return [*carry, *(self.stack(column, scope) for column in zip(*stacks, strict=True))]

    def choose(
        self, branches: Sequence[Any], values: list[int], stack: tuple[str, ...]
    ) -> list[int]:
        """Writes out every branch of a `cond` or `switch`, of which one result is selected."""
        index, *operands = values
        if index in self.known:
            branches = [branches[int(np.clip(self.known[index], 0, len(branches) - 1))]]
        cases = [self.inline(b.jaxpr, b.consts, operands, stack) for b in branches]
        if len(cases) == 1:
            return cases[0]

        def select(index: Any, *cases: Any) -> Any:
            return jax.lax.select_n(index if len(cases) > 2 else index != 0, *cases)

        scope = "/".join(stack[1:])
        return [
            column[0] if len(set(column)) == 1 else self.call(select, [index, *column], scope)[0]
            for column in zip(*cases, strict=True)
        ]

    def index(self, value: int, i: int, scope: str) -> int:
        """Adds value[i]."""
        aval = self.avals[value]
        one = jax.ShapeDtypeStruct((1, *aval.shape[1:]), aval.dtype)
        bounds = {
            "start_indices": (i, *(0 for _ in aval.shape[1:])),
            "limit_indices": (i + 1, *aval.shape[1:]),
            "strides": None,
        }
        (sliced,) = self.add("slice", [value], [one], bounds, scope, jax.lax.slice_p)
        item = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
        return self.add(
            "squeeze", [sliced], [item], {"dimensions": (0,)}, scope, jax.lax.squeeze_p
        )[0]

    def stack(self, values: Sequence[int], scope: str, axis: int = 0) -> int:
        """Adds the values stacked along a new axis."""
        aval = self.avals[values[0]]
        shape = (*aval.shape[:axis], 1, *aval.shape[axis:])
        axes = tuple(a for a in range(len(shape)) if a != axis)
        one = jax.ShapeDtypeStruct(shape, aval.dtype)
        params = {"shape": shape, "broadcast_dimensions": axes, "sharding": None}
        rows = [
            self.add("broadcast_in_dim", [v], [one], params, scope, jax.lax.broadcast_in_dim_p)[0]
            for v in values
        ]
        if len(rows) == 1:
            return rows[0]
        shape = (*shape[:axis], len(rows), *shape[axis + 1 :])
        whole = jax.ShapeDtypeStruct(shape, aval.dtype)
        return self.add(
            "concatenate", rows, [whole], {"dimension": axis}, scope, jax.lax.concatenate_p
        )[0]


def _tiled(x: jax.Array, reps: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Repeats an array along its axes as a broadcast, which every format has."""
    sizes: list[int] = []
    own = []
    for size, count in zip(x.shape, reps, strict=True):
        sizes += [count] if size != 1 and count != 1 else []
        own.append(len(sizes))
        sizes.append(size if size != 1 else count)
    x = jax.lax.broadcast_in_dim(x, sizes, own)
    return x if x.shape == shape else jax.lax.reshape(x, shape)
