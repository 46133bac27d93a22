"""Traces a function into a `Graph`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qkd_jax.graph.any_batch import JAXPRS, Ambiguous, batch_sizes, compare, difference
from qkd_jax.graph.builder import Builder
from qkd_jax.graph.dataflow import Constants, Graph
from qkd_jax.graph.execution import Node
from qkd_jax.graph.families import MARKERS
from qkd_jax.trees import path_name


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and type of an array as JAX holds it: NumPy's int64 tokens are int32."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(np.shape(array), dtype)


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
            whose numbers or Python depend on the batch size, or that cuts or joins its batch.
    """
    abstract = jax.tree.map(shape_of, (variables, args))

    def jaxpr(batch: int | None) -> tuple[Any, Any]:
        shapes = abstract[1]
        if batch is not None:
            shapes = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), shapes
            )
        return jax.make_jaxpr(lambda v, a: fn(v, *a), return_shape=True)(abstract[0], shapes)

    def graph(closed: Any, results: Any, batch: int | None) -> Graph:
        return _graph(closed, jax.tree.structure(results), variables, evaluate, batch)

    if not any_batch:
        return graph(*jaxpr(None), None)
    ambiguous: Ambiguous | None = None
    for first, second in batch_sizes(abstract):
        try:
            closed, results = jaxpr(first)
            found = graph(closed, results, first)
            for size in sorted({2, jax.tree.leaves(abstract[1])[0].shape[0]}):
                if other := difference(closed, jaxpr(size)[0], (first, size)):
                    compare(found, graph(*jaxpr(second), second))
                    raise other
            return found
        except Ambiguous as error:
            ambiguous = ambiguous or error
    assert ambiguous is not None
    raise ambiguous


def _graph(closed: Any, out_tree: Any, variables: Any, evaluate: bool, batch: int | None) -> Graph:
    """Builds the graph of a jaxpr whose first arguments are the variables."""
    builder = Builder(batch)
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
        out_tree=out_tree,
    )


def bodies(node: Node) -> list[Graph]:
    """The functions inside an operation that stays whole, as graphs to look at, not to run.

    Those are the condition and body of a `while`; markers have none.
    """
    if node.op in MARKERS:
        return []
    found = []
    for value in jax.tree.leaves(dict(node.params), is_leaf=lambda v: isinstance(v, JAXPRS)):
        if not isinstance(value, JAXPRS):
            continue
        closed = core.ClosedJaxpr(value, ()) if isinstance(value, core.Jaxpr) else value
        builder = Builder(None)
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
