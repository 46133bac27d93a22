"""Traces a function into a `Graph`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qkd_jax.graph.dataflow import Constants, Graph
from qkd_jax.graph.execution import INLINED, Node, called_jaxpr, literal
from qkd_jax.graph.families import MARKERS, parse_marker
from qkd_jax.trees import path_name

_JAXPRS = (core.ClosedJaxpr, core.Jaxpr)
# Candidates for the batch size to trace with: primes that no ordinary dimension is a multiple of.
PRIMES = (1009, 1013, 2003, 2011, 4001, 4003, 8009, 8011)


def trace(
    fn: Callable[..., Any],
    variables: Any,
    *args: Any,
    evaluate: bool = True,
    any_batch: bool = False,
) -> Graph:
    """Traces `fn(variables, *args)` into a `Graph`; nothing of the forward pass is computed.

    Args:
        fn: a function of the variables and arrays, e.g. `net.trace_apply`.
        variables: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
        evaluate: give values that depend on variables alone in `Graph.constants`; ignored when a
            variable is only a shape.
        any_batch: replace the first axis of every argument by a size that is recognised later, so
            that the graph runs at any batch size. What depends on the batch size is then no
            constant.

    Returns:
        The graph. Module scopes drop the root module's own name.

    Raises:
        ValueError: with `any_batch`, for arguments without a common first axis, and for a model
            whose numbers (not only shapes) depend on the batch size.
    """
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), (variables, args))
    make = jax.make_jaxpr(lambda v, a: fn(v, *a), return_shape=True)
    batch: int | None = None
    if any_batch:
        batch, other = _batch_sizes(abstract)
        closed, out_shape = make(abstract[0], _with_batch(abstract[1], batch))
        again, _ = make(abstract[0], _with_batch(abstract[1], other))
        _same_numbers(closed.jaxpr, again.jaxpr)
    else:
        closed, out_shape = make(*abstract)

    builder = _Builder(batch)
    paths = jax.tree_util.tree_flatten_with_path(variables)[0]
    values = [builder.new(v.aval) for v in closed.jaxpr.invars]
    leaves = {v: path_name(path) for v, (path, _) in zip(values, paths, strict=False)}
    for v, path in leaves.items():
        builder.sources[v] = frozenset([path])
    outputs = tuple(builder.inline(closed.jaxpr, closed.consts, values, ()))

    concrete = all(isinstance(leaf, jax.Array | np.ndarray) for _, leaf in paths)
    concrete = concrete and not any(isinstance(leaf, jax.core.Tracer) for _, leaf in paths)
    if evaluate and concrete:
        builder.known.update(
            (v, np.asarray(leaf)) for v, (_, leaf) in zip(values, paths, strict=False)
        )
        fixed = set(builder.sources)
    else:
        fixed = set(builder.known)

    live, needed = [], set(outputs)
    for node in reversed(builder.nodes):
        if needed.intersection(node.outputs):
            live.append(node)
            needed.update(node.inputs)
    live.reverse()
    pending = [n for n in live if fixed.issuperset(n.outputs)]
    # Nodes among constants vanish; a marker stays, because passes look for it.
    kept = tuple(n for n in live if n.op in MARKERS or not fixed.issuperset(n.outputs))
    read = {v for n in kept for v in n.inputs} | set(outputs)
    return Graph(
        nodes=kept,
        inputs=tuple(values[len(paths) :]),
        outputs=outputs,
        leaves={v: p for v, p in leaves.items() if v in needed},
        constants=Constants(
            {v: builder.known[v] for v in builder.known if v in needed}, pending, leaves, read
        ),
        sources={v: s for v, s in builder.sources.items() if v in needed or v in read},
        avals=builder.avals,
        batch=batch,
        out_tree=jax.tree.structure(out_shape),
    )


def bodies(node: Node) -> list[Graph]:
    """The functions inside an operation that stays whole, as graphs to look at, not to run.

    Those are the branches of a `cond`, the condition and body of a `while`; markers have none.
    """
    if node.op in MARKERS:
        return []
    found = []
    for value in jax.tree.leaves(dict(node.params), is_leaf=lambda v: isinstance(v, _JAXPRS)):
        if not isinstance(value, _JAXPRS):
            continue
        closed = core.ClosedJaxpr(value, ()) if isinstance(value, core.Jaxpr) else value
        builder = _Builder(None)
        inputs = [builder.new(v.aval) for v in closed.jaxpr.invars]
        stack = ("", *node.scope.split("/")) if node.scope else ("",)
        outputs = builder.inline(closed.jaxpr, closed.consts, inputs, stack)
        found.append(
            Graph(
                nodes=tuple(builder.nodes),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                leaves={},
                constants=Constants(builder.known, ()),
                sources=builder.sources,
                avals=builder.avals,
                batch=None,
                out_tree=None,
            )
        )
    return found


def _with_batch(args: Any, batch: int) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), args)


def _same_numbers(first: Any, second: Any) -> None:
    """Raises ValueError where two traces at different batch sizes hold different numbers."""
    for one, two in zip(first.eqns, second.eqns, strict=False):
        marker = parse_marker(one.params.get("name", ""))
        if marker is not None and marker.dynamic_axes:
            continue  # a dynamic range counts its elements, and reads no such number
        pairs = zip(one.invars, two.invars, strict=False)
        numbers = [
            (a.val, b.val)
            for a, b in pairs
            if isinstance(a, core.Literal) and isinstance(b, core.Literal)
        ]
        if one.primitive != two.primitive or any(
            not np.array_equal(a, b, equal_nan=np.issubdtype(np.result_type(a), np.inexact))
            for a, b in numbers
        ):
            scope = str(one.source_info.name_stack) or "the root module"
            raise ValueError(
                f"a number in {scope!r} depends on the batch size; such a model cannot run at "
                "another one. Compute it from the data (a mean instead of a sum over n), or take "
                "the batch size out of the forward pass."
            )
        for a, b in zip(_bodies(one), _bodies(two), strict=False):
            _same_numbers(a, b)


def _bodies(equation: Any) -> list[Any]:
    """The jaxprs inside an equation: of a call, a loop, a branch."""
    values = equation.params.values()
    closed = [v.jaxpr for v in values if isinstance(v, core.ClosedJaxpr)]
    return closed + [v for v in values if isinstance(v, core.Jaxpr)]


def _batch_sizes(abstract: Any) -> tuple[int, int]:
    """Returns two prime batch sizes that no dimension of variables or arguments divides by."""
    sizes = [a.shape[:1] for a in jax.tree.leaves(abstract[1])]
    if not sizes or len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(
            f"the arguments' first axes are {sizes}; they must be one batch axis of one size."
        )
    sizes_used = {d for a in jax.tree.leaves(abstract[0]) for d in a.shape}
    sizes_used |= {d for a in jax.tree.leaves(abstract[1]) for d in a.shape[1:]}
    free = [p for p in PRIMES if all(d % p or not d for d in sizes_used)]
    if len(free) < 2:
        raise ValueError(f"most of {PRIMES} divide a dimension; trace without any_batch.")
    return free[0], free[1]


class _Builder:
    """Collects nodes while jaxprs are inlined into each other."""

    def __init__(self, batch: int | None):
        self.batch = batch
        self.nodes: list[Node] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self.known: dict[int, Any] = {}  # literals and closed-over arrays
        self.sources: dict[int, frozenset[str]] = {}  # of values that no input reaches

    def new(self, aval: Any) -> int:
        self.avals[len(self.avals)] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return len(self.avals) - 1

    def constant(self, array: Any, scope: str) -> int:
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            raise ValueError(f"{scope or 'the root'!r} draws random numbers; trace eval mode.")
        array = np.asarray(array)
        if self.batch and array.ndim == 0 and array.dtype.kind in "iuf":
            if array != 0 and np.isfinite(array) and array % self.batch == 0:
                raise ValueError(
                    f"a number in {scope or 'the root module'!r} depends on the batch size; such a "
                    "model cannot serve any batch size: compute it from the data instead."
                )
        value = self.new(array)
        self.known[value] = array
        self.sources[value] = frozenset()
        return value

    def add(
        self, op: str, inputs: Any, avals: Any, params: Any, scope: str, primitive: Any = None
    ) -> list[int]:
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
            inner_stack = (*stack, *_modules(eqn))
            results = self.equation(eqn, values, inner_stack)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[int], stack: tuple[str, ...]) -> list[int]:
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
        return self.add(op, values, avals, params, scope, eqn.primitive)

    def unroll(self, eqn: Any, values: list[int], stack: tuple[str, ...]) -> list[int]:
        """Writes a scan out; refuses one over the batch axis, whose length is not known."""
        params, scope = eqn.params, "/".join(stack[1:])
        length, inner = params["length"], params["jaxpr"]
        if self.batch and length % self.batch == 0:
            raise ValueError(
                f"a scan over the batch in {scope or 'the root module'!r} has no fixed length; "
                "write it with jax.vmap instead."
            )
        split = params["num_consts"] + params["num_carry"]
        fixed, carry = values[: params["num_consts"]], values[params["num_consts"] : split]
        stacks: list[list[int]] = []
        for i in reversed(range(length)) if params["reverse"] else range(length):
            slices = [self.index(v, i, scope) for v in values[split:]]
            results = self.inline(inner.jaxpr, inner.consts, [*fixed, *carry, *slices], stack)
            carry = results[: params["num_carry"]]
            stacks.append(results[params["num_carry"] :])
        if params["reverse"]:
            stacks.reverse()
        return [*carry, *(self.stack(column, scope) for column in zip(*stacks, strict=True))]

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

    def stack(self, values: Sequence[int], scope: str) -> int:
        """Adds the values stacked along a new first axis."""
        aval = self.avals[values[0]]
        shape, axes = (1, *aval.shape), tuple(range(1, len(aval.shape) + 1))
        one = jax.ShapeDtypeStruct(shape, aval.dtype)
        params = {"shape": shape, "broadcast_dimensions": axes, "sharding": None}
        rows = [
            self.add("broadcast_in_dim", [v], [one], params, scope, jax.lax.broadcast_in_dim_p)[0]
            for v in values
        ]
        whole = jax.ShapeDtypeStruct((len(rows), *aval.shape), aval.dtype)
        return self.add(
            "concatenate", rows, [whole], {"dimension": 0}, scope, jax.lax.concatenate_p
        )[0]


def _modules(eqn: Any) -> list[str]:
    """Returns the module names that an equation's name stack adds ("layer.method" -> "layer")."""
    stack = str(eqn.source_info.name_stack)
    return [part.partition(".")[0] for part in stack.split("/") if part and "(" not in part]
