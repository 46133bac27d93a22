"""One operation of a graph, and running it on arrays at any batch size."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from qkd_jax.graph.families import MARKERS

INLINED = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_lin custom_vmap_call".split()
)


def _broadcast_in_dim(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _reordered(x: np.ndarray, dimensions: Any) -> np.ndarray:
    return x if dimensions is None else x.transpose(dimensions)


def _slices(params: Mapping[str, Any]) -> tuple[slice, ...]:
    ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(ends[0])
    return tuple(map(slice, *ends, steps))


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
    "reshape": lambda p, x: _reordered(x, p["dimensions"]).reshape(p["new_sizes"]),
    "round": lambda p, x: np.rint(x) if int(p["rounding_method"]) else jax.lax.round(x),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "slice": lambda p, x: x[_slices(p)],
    "squeeze": lambda p, x: np.squeeze(x, p["dimensions"]),
    "stop_gradient": lambda _, x: x,
    "sub": lambda _, x, y: x - y,
    "transpose": lambda p, x: x.transpose(p["permutation"]),
}


# Beside these, operations on single elements that compiled programs round as they do alone. Not
# "div": compilers multiply by the reciprocal of a constant.
EXACT = frozenset(NUMPY) - {"div"} | frozenset(
    "and clamp eq floor ge gt integer_pow is_finite le lt ne not or rsqrt select_n sign slice "
    "sqrt square".split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        op: name of the JAX primitive, or "quantizer" / "skipped" for a marker.
        inputs: values read, in the primitive's order. For a quantizer: the tensor, then its
            parameters sorted by key.
        outputs: values written.
        params: the primitive's parameters; for a marker {"path", "operand", "dynamic_axes",
            "group", "jaxpr"}, as `families` describes them.
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


def is_exact(node: Node) -> bool:
    """Whether a node's result does not depend on what is compiled with it, to the last bit.

    Sums do, which are formed in another order, and divisions. In a quantizer divisions are by
    scales, whose reciprocal is written out.
    """
    if node.op in MARKERS:
        return _all_exact(node.params["jaxpr"].jaxpr)
    return node.op in EXACT


def _all_exact(jaxpr: Any) -> bool:
    return all(
        _all_exact(called_jaxpr(eqn.params).jaxpr)
        if eqn.primitive.name in INLINED
        else eqn.primitive.name in EXACT | {"div", "optimization_barrier"}
        for eqn in jaxpr.eqns
    )


def execute(
    node: Node, inputs: Sequence[Any], traced: int | None = None, batch: int | None = None
) -> list[Any]:
    """Runs one node on arrays; sizes that are multiples of `traced` become those of `batch`."""
    if node.op in MARKERS:
        jaxpr = node.params["jaxpr"]
        return _interpret(jaxpr.jaxpr, jaxpr.consts, inputs, traced, batch)
    return _bind(node.primitive, inputs, node.params, traced, batch)


def _rebatched(value: Any, traced: int | None, batch: int | None) -> Any:
    """Replaces sizes that are multiples of the traced batch in an operation's parameters."""
    if traced is None or batch is None or isinstance(value, bool):
        return value
    if isinstance(value, int | np.integer):
        return value // traced * batch if value and value % traced == 0 else value
    if type(value) in (tuple, list):
        return type(value)(_rebatched(v, traced, batch) for v in value)
    if isinstance(value, core.ClosedJaxpr):  # the condition and body of a loop
        shaped: Any = value.in_avals  # arrays all; newer stubs name their base class
        inputs = [jax.ShapeDtypeStruct(_rebatched(a.shape, traced, batch), a.dtype) for a in shaped]
        run = lambda *args: _interpret(value.jaxpr, value.consts, args, traced, batch)
        return jax.make_jaxpr(run)(*inputs)
    if isinstance(value, core.Jaxpr):  # newer releases of JAX have closed ones alone
        return _rebatched(core.ClosedJaxpr(value, ()), traced, batch).jaxpr
    return value


def _bind(
    primitive: Any, inputs: Sequence[Any], params: Mapping[str, Any], traced: Any, batch: Any
) -> list[Any]:
    params = {k: _rebatched(v, traced, batch) for k, v in params.items()}
    known = all(isinstance(a, np.ndarray | np.generic) for a in inputs)
    # NumPy has no shapes with a symbolic batch, as `jax.export` traces with.
    if primitive.name in NUMPY and known and (batch is None or isinstance(batch, int)):
        with np.errstate(all="ignore"):
            return [np.asarray(NUMPY[primitive.name](params, *inputs))]
    return bind(primitive, inputs, params)


def bind(primitive: Any, inputs: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
    """Runs one operation as JAX does, traced or not."""
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
        return literal(v) if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if eqn.primitive.name in INLINED:
            inner = called_jaxpr(eqn.params)
            results = _interpret(inner.jaxpr, inner.consts, values, traced, batch)
        else:
            results = _bind(eqn.primitive, values, eqn.params, traced, batch)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def literal(v: Any) -> np.ndarray:
    """Returns the value of a jaxpr's literal."""
    return np.asarray(v.val, v.aval.dtype)


def called_jaxpr(params: Mapping[str, Any]) -> core.ClosedJaxpr:
    """Returns the jaxpr that a call-like equation runs."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if isinstance(params.get(key), core.ClosedJaxpr):
            return params[key]
        if isinstance(params.get(key), core.Jaxpr):
            return core.ClosedJaxpr(params[key], ())
    raise ValueError(f"a call has no jaxpr among its parameters {sorted(params)}.")
