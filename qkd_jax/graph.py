"""A model's forward pass as a small labelled graph, read from its jaxpr.

Coverage, BatchNorm folding, conversion to integers and the ONNX export all read this graph, so they
see what a model computes and not how its code is written: calls (jit, remat, custom derivatives)
are inlined, a `scan` of known length is unrolled, leaves carry their path in the variables, and
everything that depends on the variables alone is a constant. An evaluated BatchNorm is therefore
"subtract, multiply, add" by constants however the model spelled it.

Two kinds of call stay whole, because a pass wants to see them as one thing: a jitted call named
`quantizer:<layer path>:<operand>` becomes a node with op "quantizer", and one named
`skipped:<layer path>:<operand>` (a layer that a rule leaves in float) one with op "skipped".

To support another call-like primitive, add its name to `INLINED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

__all__ = ["Graph", "Node", "bodies", "execute", "path_name", "trace"]

INLINED = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_lin".split()
)
MARKERS = ("quantizer", "skipped")
_JAXPRS = (core.ClosedJaxpr, core.Jaxpr)
# Candidates for the batch size to trace with: primes that no ordinary dimension is a multiple of.
PRIMES = (1009, 1013, 2003, 2011, 4001, 4003, 8009, 8011)


def _broadcast_in_dim(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


# Constants are many and small: these operations give the same bits in NumPy, without a compilation
# for each shape.
NUMPY: dict[str, Callable[..., Any]] = {
    "abs": lambda _, x: np.abs(x),
    "add": lambda _, x, y: x + y,
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    "copy": lambda _, x: x,
    "div": lambda _, x, y: x / y if x.dtype.kind == "f" else jax.lax.div(x, y),
    "max": lambda _, x, y: np.maximum(x, y),
    "min": lambda _, x, y: np.minimum(x, y),
    "mul": lambda _, x, y: x * y,
    "neg": lambda _, x: -x,
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "round": lambda p, x: np.rint(x) if int(p["rounding_method"]) else jax.lax.round(x),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "squeeze": lambda p, x: np.squeeze(x, p["dimensions"]),
    "stop_gradient": lambda _, x: x,
    "sub": lambda _, x, y: x - y,
    "transpose": lambda p, x: x.transpose(p["permutation"]),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        op: name of the JAX primitive, or "quantizer" / "skipped" for a marker.
        inputs: values read, in the primitive's order. For a quantizer: the tensor, then its
            parameters sorted by key.
        outputs: values written.
        params: the primitive's parameters; for a marker {"path", "operand", "jaxpr"}, and "own"
            for one whose range is found at run time: a "1" for each axis with ranges of its own.
        scope: path of the module that ran the operation, without the root's name ("" at the root).
        primitive: what `execute` binds; None for a marker.
    """

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    scope: str
    primitive: Any = None

    def describe(self) -> str:
        """Returns "op at scope" for messages."""
        return f"{self.op!r} in {self.scope or 'the root module'!r}"


@dataclasses.dataclass(eq=False)
class Graph:
    """A traced function: values are integers, nodes are in topological order.

    Attributes:
        nodes: live operations whose result depends on the inputs, and all live markers.
        inputs: one value per array among the traced arguments (`jax.tree.leaves` order).
        outputs: one value per array among the results.
        leaves: value -> path of a variable, e.g. "params/conv/kernel".
        constants: value -> array, for leaves, literals and all that is computed from variables
            alone (evaluated when first read). Without concrete variables: literals only.
        sources: value -> paths of the leaves it depends on, for values fixed by the variables.
        avals: value -> shape and dtype.
        batch: the size of the traced batch axis if the graph serves any batch size, else None.
        out_tree: structure of the results.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    leaves: dict[int, str]
    constants: Mapping[int, np.ndarray]
    sources: dict[int, frozenset[str]]
    avals: dict[int, jax.ShapeDtypeStruct]
    batch: int | None
    out_tree: Any

    def __post_init__(self) -> None:
        self._producer = {v: node for node in self.nodes for v in node.outputs}
        self._consumers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for v in dict.fromkeys(node.inputs):
                self._consumers.setdefault(v, []).append(node)

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns a value's shape (the batch axis as it was traced, see `batch`)."""
        return tuple(self.avals[value].shape)

    def dtype(self, value: int) -> np.dtype:
        """Returns a value's dtype."""
        return self.avals[value].dtype

    def producer(self, value: int) -> Node | None:
        """Returns the node that writes a value, a constant's too; None for inputs and leaves."""
        pending = getattr(self.constants, "pending", {})
        return self._producer.get(value) or pending.get(value)

    def consumers(self, value: int) -> list[Node]:
        """Returns the nodes that read a value; being a result of the graph does not show here."""
        return self._consumers.get(value, [])

    def sole_consumer(self, value: int) -> Node | None:
        """Returns the only reader of a value, or None if there are several or it is a result."""
        readers = self.consumers(value)
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def run(self, *args: Any) -> Any:
        """Executes the graph as it was traced, at any batch size if it was traced so."""
        flat = jax.tree.leaves(args)
        env: dict[int, Any] = dict(zip(self.inputs, flat, strict=True))
        batch = flat[0].shape[0] if self.batch else None
        for node in self.nodes:
            if all(v in self.constants for v in node.outputs):
                continue
            values = [env[v] if v in env else self.constants[v] for v in node.inputs]
            results = execute(node, values, self.batch, batch)
            env.update(zip(node.outputs, results, strict=True))
        results = [env[v] if v in env else self.constants[v] for v in self.outputs]
        return jax.tree.unflatten(self.out_tree, results)


class Constants(Mapping[int, np.ndarray]):
    """Arrays known before the inputs are; computed when first read, then kept."""

    def __init__(self, known: dict[int, Any], nodes: Sequence[Node]):
        self.known = known
        self.pending = {v: node for node in nodes for v in node.outputs}

    def __getitem__(self, value: int) -> np.ndarray:
        if value not in self.known:
            node = self.pending[value]
            # Also when first read while something else is traced.
            with jax.ensure_compile_time_eval():
                results = execute(node, [self[v] for v in node.inputs])
            self.known.update(
                (v, np.asarray(r)) for v, r in zip(node.outputs, results, strict=True)
            )
        return self.known[value]

    def __contains__(self, value: object) -> bool:
        return value in self.known or value in self.pending

    def __iter__(self) -> Iterator[int]:
        return iter({**self.known, **self.pending})

    def __len__(self) -> int:
        return len({**self.known, **self.pending})


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
    marker: int | None = None
    if any_batch:
        marker, other = _markers(abstract)
        closed, out_shape = make(abstract[0], _with_batch(abstract[1], marker))
        again, _ = make(abstract[0], _with_batch(abstract[1], other))
        _same_numbers(closed.jaxpr, again.jaxpr)
    else:
        closed, out_shape = make(*abstract)

    builder = _Builder(marker)
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
        constants=Constants({v: builder.known[v] for v in builder.known if v in needed}, pending),
        sources={v: s for v, s in builder.sources.items() if v in needed or v in read},
        avals=builder.avals,
        batch=marker,
        out_tree=jax.tree.structure(out_shape),
    )


def execute(
    node: Node, inputs: Sequence[Any], traced: int | None = None, batch: int | None = None
) -> list[Any]:
    """Runs one node on arrays; sizes that are multiples of `traced` become those of `batch`."""
    if node.op in MARKERS:
        jaxpr = node.params["jaxpr"]
        return _interpret(jaxpr.jaxpr, jaxpr.consts, inputs, traced, batch)
    return _bind(node.primitive, inputs, node.params, traced, batch)


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


def path_name(path: Sequence[Any]) -> str:
    """Returns "params/conv/kernel" for a `jax.tree_util` key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _with_batch(args: Any, batch: int) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), args)


def _same_numbers(first: Any, second: Any) -> None:
    """Raises ValueError where two traces at different batch sizes hold different numbers."""
    for one, two in zip(first.eqns, second.eqns, strict=False):
        kind, _, rest = str(one.params.get("name", "")).partition(":")
        if kind in MARKERS and "@" in rest.rpartition(":")[2]:
            continue  # a range found at run time counts its elements, and reads no such number
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


def _markers(abstract: Any) -> tuple[int, int]:
    """Returns two prime batch sizes that no dimension of variables or arguments divides by."""
    sizes = [a.shape[:1] for a in jax.tree.leaves(abstract[1])]
    if not sizes or len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(
            f"the arguments' first axes are {sizes}; they must be one batch axis of one size."
        )
    taken = {d for a in jax.tree.leaves(abstract[0]) for d in a.shape}
    taken |= {d for a in jax.tree.leaves(abstract[1]) for d in a.shape[1:]}
    free = [p for p in PRIMES if all(d % p or not d for d in taken)]
    if len(free) < 2:
        raise ValueError(f"most of {PRIMES} divide a dimension; trace without any_batch.")
    return free[0], free[1]


def _rebatched(value: Any, traced: int | None, batch: int | None) -> Any:
    """Replaces sizes that are multiples of the traced batch in an operation's parameters."""
    if traced is None or batch is None or isinstance(value, bool):
        return value
    if isinstance(value, int | np.integer):
        return value // traced * batch if value and value % traced == 0 else value
    if type(value) in (tuple, list):
        return type(value)(_rebatched(v, traced, batch) for v in value)
    if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
        raise ValueError("control flow cannot run at another batch size than it was traced with.")
    return value


def _bind(
    primitive: Any, inputs: Sequence[Any], params: Mapping[str, Any], traced: Any, batch: Any
) -> list[Any]:
    params = {k: _rebatched(v, traced, batch) for k, v in params.items()}
    if primitive.name in NUMPY and all(isinstance(a, np.ndarray | np.generic) for a in inputs):
        with np.errstate(all="ignore"):
            return [np.asarray(NUMPY[primitive.name](params, *inputs))]
    bound = primitive.get_bind_params(params)
    # Some versions of JAX return the functions among the parameters apart.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = primitive.bind(*functions, *inputs, **params)
    return list(results) if primitive.multiple_results else [results]


def _interpret(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], traced: Any, batch: Any
) -> list[Any]:
    """Evaluates a jaxpr equation by equation, with batch sizes replaced."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(v: Any) -> Any:
        return _literal(v) if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if eqn.primitive.name in INLINED:
            inner = _inner(eqn.params)
            results = _interpret(inner.jaxpr, inner.consts, values, traced, batch)
        else:
            results = _bind(eqn.primitive, values, eqn.params, traced, batch)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _literal(v: Any) -> np.ndarray:
    return np.asarray(v.val, v.aval.dtype)


def _inner(params: Mapping[str, Any]) -> core.ClosedJaxpr:
    """Returns the jaxpr that a call-like equation runs."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if isinstance(params.get(key), core.ClosedJaxpr):
            return params[key]
        if isinstance(params.get(key), core.Jaxpr):
            return core.ClosedJaxpr(params[key], ())
    raise ValueError(f"a call has no jaxpr among its parameters {sorted(params)}.")


class _Builder:
    """Collects nodes while jaxprs are inlined into each other."""

    def __init__(self, marker: int | None):
        self.marker = marker
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
        if self.marker and array.ndim == 0 and array.dtype.kind in "iuf":
            if array != 0 and np.isfinite(array) and array % self.marker == 0:
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
        if self.marker:
            fixed = fixed and not any(d and d % self.marker == 0 for a in avals for d in a.shape)
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
                return self.constant(_literal(v), scope)
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
        name = str(params.get("name", "")) if op in ("jit", "pjit") else ""
        kind, _, rest = name.partition(":")
        if kind in MARKERS and rest:
            path, _, operand = rest.rpartition(":")
            operand, _, own = operand.partition("@")
            marked = {"path": path, "operand": operand, "jaxpr": _inner(params)}
            marked |= {"own": own} if own else {}
            return self.add(kind, values, avals, marked, scope)
        if op in INLINED:
            inner = _inner(params)
            return self.inline(inner.jaxpr, inner.consts, values, stack)
        if op == "scan":
            return self.unroll(eqn, values, stack)
        return self.add(op, values, avals, params, scope, eqn.primitive)

    def unroll(self, eqn: Any, values: list[int], stack: tuple[str, ...]) -> list[int]:
        """Writes a scan out; refuses one over the batch axis, whose length is not known."""
        params, scope = eqn.params, "/".join(stack[1:])
        length, inner = params["length"], params["jaxpr"]
        if self.marker and length % self.marker == 0:
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
