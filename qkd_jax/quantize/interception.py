"""How quantization reaches a model: an interceptor around the calls of its layers.

The model's own code is not touched and nothing global is patched. While a net runs, a method
interceptor sets a public field of each bound layer for the length of one call, and takes it back:
`Conv` and `Dense` receive our product through `conv_general_dilated_cls` / `dot_general_cls`,
attention through its two einsum fields, `Einsum`, `ConvTranspose` and `Embed` through
`promote_dtype`, which hands over the operands.

The quantizers' variables lie under their layer (`conv1/weight_quantizer/step`) and travel inside
the `params` collection while the model runs, since `nn.scan` and `nn.vmap` lift no collection that
they have not heard of.

A `Frame` is one application: its mode says what an operand meets.
  apply    fake quantization where the layer has been calibrated, float elsewhere
  observe  statistics only, written next to the quantizer's place
  trace    one named equation per quantizer, for `graph.py`
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import _Conv
from jax import lax

from qkd_jax.numerics import Spec, codes_of
from qkd_jax.quantize import contraction as products
from qkd_jax.quantize.variables import FOLDED, OPERANDS, quantizer_key, state_key
from qkd_jax.quantizers import QUANTIZERS, found_params, live

__all__ = ["ROUNDING", "Frame", "LayerUse", "marker", "split_groups"]

ROUNDING = "rounding"
"""Name of the random stream of stochastic rounding, in the `rngs` of `apply`."""


@dataclasses.dataclass
class LayerUse:
    """What one application saw of a layer: its kind and the shapes of its operands."""

    kind: str
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    channels: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    group_axis: int = -1  # of the weight


def marker(name: str, function: Callable[..., Any], x: jax.Array, *params: jax.Array) -> jax.Array:
    """Runs `function` as one jaxpr equation that carries `name`."""

    def call(x, *params):
        return function(x, *params)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call)(x, *params)


def _unchanged(x: jax.Array, *_: jax.Array) -> jax.Array:
    # A bare identity would be forwarded around its equation, and the marker lost.
    return lax.optimization_barrier(x)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an operand lies in its product, as far as its quantizer must know.

    Attributes:
        channels: axes with a scale of their own under granularity "channel".
        rows: the same under "token".
        group_axis: the axis that groups cut, or None where there are none.
    """

    channels: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    group_axis: int | None = None


class Frame:
    """One application of a quantized model.

    Args:
        spec_of: (path, operand) -> Spec or None.
        mode: "apply", "observe" or "trace".
        axis_name: the mapped axis over which batch normalization reduces.
        observe: in mode "observe", (found, path, operand, x, spec, channel axes) -> new state.
        watch: in mode "apply", called as watch(path, operand, x, x_hat, spec, params) for every
            quantized operand, where it is quantized (so inside the trace).
        observed: in mode "observe", the operands to observe; others are quantized if calibrated.
        mark_outputs: in mode "trace", mark what every module returns, with a spec or without.

    A layer whose rule gives its input no spec, but whose input is, unchanged, what a module with an
    `output` spec returned, reads that module's codes.
    """

    def __init__(
        self,
        spec_of: Callable[[str, str], Spec | None],
        *,
        mode: str = "apply",
        axis_name: str | None = None,
        observe: Callable[..., dict[str, Any]] | None = None,
        observed: tuple[str, ...] = OPERANDS,
        watch: Callable[..., None] | None = None,
        mark_outputs: bool = False,
    ):
        self.spec_of = spec_of
        self.mode = mode
        self.axis_name = axis_name
        self.observe = observe
        self.observed = observed
        self.watch = watch
        self.mark_outputs = mark_outputs
        # id of a module's quantized output -> (the output, which keeps the id its own, its view)
        self._on_grid: dict[int, tuple[jax.Array, Any]] = {}
        self.seen: dict[str, LayerUse] = {}
        self.modules: set[str] = set()
        self._active: dict[object, tuple[int, str]] = {}
        self._paths: list[str] = []

    # -- the interceptor ---------------------------------------------------------------------

    def __call__(self, next_fun, args, kwargs, context):
        """Intercepts one method call of one module; see `flax.linen.intercept_methods`."""
        module, method = context.module, context.method_name
        if method not in ("__call__", "attend") or (id(module), method) in self._active.values():
            return next_fun(*args, **kwargs)  # `super().__call__` of a subclass comes by twice
        path, key = "/".join(module.path), object()
        # A lifted layer (`nn.remat(nn.Dense)`) comes by twice too, as two objects at one path: its
        # operands belong to the inner one, whose scope is the live one, its output to the outer.
        outermost = path not in self._paths
        self._active[key] = (id(module), method)
        self._paths.append(path)
        try:
            out = self._run(module, path, method, next_fun, args, kwargs)
            return self._output(module, path, out) if outermost else out
        finally:
            self._paths.pop()
            del self._active[key]

    def _run(self, module, path, method, next_fun, args, kwargs):
        self.modules.add(path)
        if isinstance(module, nn.BatchNorm):
            if self._variables(module, None, FOLDED) is not None:
                out = args[0] if args else kwargs["x"]
            else:
                with _fields(module, axis_name=module.axis_name or self.axis_name):
                    out = next_fun(*args, **kwargs)
        elif isinstance(module, _Conv) and module.shared_weights:
            base = _own(module.conv_general_dilated_cls, module.conv_general_dilated)
            hook = self._hook(
                module, path, "conv", products.conv_product, base or lax.conv_general_dilated
            )
            with _fields(module, conv_general_dilated_cls=_Factory(hook, base)):
                out = next_fun(*args, **kwargs)
        elif isinstance(module, nn.Dense | nn.DenseGeneral):
            base = _own(module.dot_general_cls, module.dot_general)
            hook = self._hook(module, path, "dense", products.dot_product, base or lax.dot_general)
            with _fields(module, dot_general_cls=_Factory(hook, base)):
                out = next_fun(*args, **kwargs)
        elif isinstance(module, nn.MultiHeadDotProductAttention):
            with _fields(module, **self._attention(module, path)):
                out = next_fun(*args, **kwargs)
        elif isinstance(module, nn.Einsum | nn.ConvTranspose | nn.Embed):
            out = self._operands(module, path, method, next_fun, args, kwargs)
        else:
            out = next_fun(*args, **kwargs)
        return out

    # -- layers ------------------------------------------------------------------------------

    def _hook(self, module, path, kind, describe, base):
        """A drop-in for a lax product, with the operands quantized and the scales taken out."""

        def product(lhs, rhs, *args, **kwargs):
            described = describe(lhs, rhs, *args, base=base, **kwargs)
            use = self._use(path, kind)
            use.channels["weight"] = described.weight_channels
            use.group_axis = -1 if described.group_axis is None else described.group_axis
            x_hat, x_view = self._operand(
                module, None, path, "input", lhs, _left(described), batch_axes=_batch(lhs)
            )
            w_hat, w_view = self._operand(module, None, path, "weight", rhs, _right(described))
            folded = self._variables(module, None, FOLDED) or {}
            if x_view is None or w_view is None or self.mode == "trace":
                out = described.fn(x_hat, w_hat)
                if "multiplier" in folded and self.mode == "trace":
                    raise ValueError(f"layer {path!r} is folded already; trace it unfolded.")
            else:
                out = products.quantized_product(
                    described, x_hat, w_hat, x_view, w_view, folded.get("multiplier")
                )
            if "bias" in folded:
                out = out + jnp.reshape(folded["bias"], (1,) * (out.ndim - 1) + (-1,))
            return self._output_gradient(module, path, out)

        return product

    def _attention(self, module, path):
        """The two einsum fields of attention, for the products that a rule quantizes."""
        subs = {
            "qk_attn_weights_einsum_cls": "query_key",
            "attn_weights_value_einsum_cls": "weights_value",
        }
        named = {field: f"{path}/{sub}" if path else sub for field, sub in subs.items()}
        self.modules.update(named.values())
        wanted = any(self.spec_of(layer, "input") is not None for layer in named.values())
        own = any(_own(getattr(module, field), None) is not None for field in subs)
        if self.mode != "trace" and not wanted:
            return {}
        if module.precision is not None or own:
            if wanted:
                raise ValueError(
                    f"attention {path!r} sets `precision` or its own einsum, so its products can't "
                    "be quantized; leave these fields at None, or exclude "
                    f"{path + '/query_key'!r} and {path + '/weights_value'!r} with a rule without "
                    "specs."
                )
            return {}
        return {
            field: _Factory(self._einsum(module, sub, named[field]), None)
            for field, sub in subs.items()
        }

    def _einsum(self, module, sub, layer):
        def einsum(equation, lhs, rhs):
            described = products.einsum_product(equation, lhs, rhs)
            self._use(layer, "attention")
            x_hat, x_view = self._operand(
                module, sub, layer, "input", lhs, _left(described), batch_axes=_batch(lhs)
            )
            # "token" means a row of either operand: what the product sums over shares a scale.
            other = _Place(rows=described.weight_channels)
            y_hat, y_view = self._operand(
                module, sub, layer, "other", rhs, other, batch_axes=_batch(rhs)
            )
            if x_view is None or y_view is None or self.mode == "trace":
                return described.fn(x_hat, y_hat)
            out = products.quantized_product(described, x_hat, y_hat, x_view, y_view)
            return self._output_gradient(module, layer, out)

        return einsum

    def _operands(self, module, path, method, next_fun, args, kwargs):
        """Layers that show their operands through `promote_dtype` but keep the product.

        In place of the operands the layer is given their codes; the output is scaled, and the bias
        added, here.
        """
        promote = module.promote_dtype
        if isinstance(promote, _Promote):
            promote = promote.base
        scaling: dict[str, Any] = {}

        def quantized(*arrays, **options):
            arrays = list(promote(*arrays, **options))
            if isinstance(module, nn.Embed):
                w, bias = arrays[-1], None
                x = arrays[0] if method == "attend" else None  # a lookup has no second operand
            else:
                x, w, bias = arrays
            described, kind = _describe(module, args, kwargs, x, w)
            use = self._use(path, kind)
            use.channels["weight"] = described.weight_channels
            use.group_axis = -1 if described.group_axis is None else described.group_axis
            w_hat, w_view = self._operand(module, None, path, "weight", w, _right(described))
            if x is None:
                return (w_hat,)
            x_hat, x_view = self._operand(
                module, None, path, "input", x, _left(described), batch_axes=_batch(x)
            )
            if x_view is None or w_view is None or self.mode == "trace":
                return (x_hat, w_hat) if isinstance(module, nn.Embed) else (x_hat, w_hat, bias)
            x_scale, w_scale = (lax.stop_gradient(view[0]) for view in (x_view, w_view))
            scaling["multiplier"] = described.scales_in_output(x_scale, w_scale)
            sums = products.sum_dtype(x_hat.dtype, x_view[1], w_view[1])
            scaling["dtype"] = x_hat.dtype
            codes = (
                _straight_codes(x_hat.astype(sums), x_scale),
                _straight_codes(w_hat.astype(sums), w_scale),
            )
            if isinstance(module, nn.Embed):
                return codes
            if bias is not None:
                scaling["bias"] = _bias_in_output(module, described, bias)
                bias = jnp.zeros_like(bias)
            return (*codes, bias)

        with _fields(module, promote_dtype=_Promote(quantized, promote)):
            out = next_fun(*args, **kwargs)
        if "multiplier" in scaling:
            out = (out * _fit(scaling["multiplier"], out)).astype(scaling["dtype"])
        if "bias" in scaling:
            out = out + _fit(scaling["bias"], out)
        return self._output_gradient(module, path, out)

    def _output_gradient(self, module, path, out):
        """A layer's output, whose gradient the quantizer of its input may round."""
        spec = self.spec_of(path, "input")
        if spec is None or self.mode != "apply":
            return out
        function = getattr(QUANTIZERS[spec.quantizer], "output_gradient", None)
        if function is None:
            return out
        key = module.make_rng(ROUNDING) if module.scope.has_rng(ROUNDING) else None
        return function(out, spec, batch_axes=_batch(out), key=key)

    def _output(self, module, path, out):
        if self.spec_of(path, "output") is None:
            if self.mark_outputs and isinstance(out, jax.Array):
                return marker(f"skipped:{path}:output", _unchanged, out)
            return out
        if not isinstance(out, jax.Array) or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                f"a rule gives module {path!r} an `output` spec, but it returns "
                f"{type(out).__name__}; `output` needs a module that returns one float array."
            )
        # A module's output has no product here: its rows are what its last axis is a vector of.
        place = _Place(rows=tuple(range(out.ndim - 1)))
        out, view = self._operand(module, None, path, "output", out, place, batch_axes=_batch(out))
        if self.mode != "observe":
            self._on_grid[id(out)] = (out, view)
        return out

    # -- one operand -------------------------------------------------------------------------

    def _use(self, path: str, kind: str) -> LayerUse:
        self.modules.add(path)
        return self.seen.setdefault(path, LayerUse(kind))

    def _variables(self, module, sub, name) -> Any:
        """A quantizer's variables under a layer (or under a product named inside it), or None."""
        if module.scope is None:
            return None
        if sub is None:
            return module.scope.get_variable("params", name)
        return (module.scope.get_variable("params", sub) or {}).get(name)

    def _operand(self, module, sub, path, operand, x, place, *, batch_axes=()):
        """Returns (x_hat, view): view is (scale, format, has a zero point), or None.

        None means that the product runs on x_hat: the operand is float, its grid is not uniform, or
        its scale varies along an axis that is summed over.
        """
        if path in self.seen:
            self.seen[path].shapes[operand] = tuple(x.shape)
        spec = self.spec_of(path, operand)
        if spec is None:
            if id(x) in self._on_grid:
                return self._on_grid[id(x)]
            if self.mode == "trace" and operand != "output":
                x = marker(f"skipped:{path}:{operand}", _unchanged, x)
            return x, None
        name = quantizer_key(operand)
        axes, group = _sharing(spec, place, path, operand, x)
        if self.mode == "observe" and operand in self.observed:
            state = state_key(operand, "observed")
            found = self._variables(module, sub, state)
            assert self.observe is not None
            seen = x if group is None else split_groups(x, *group)
            # Of a dynamic operand nothing is kept but that it is quantized.
            kept = () if spec.dynamic else axes
            observed = self.observe(found, path, operand, seen, spec, kept)
            self._write(module, sub, state, observed)
            return x, None
        params = self._variables(module, sub, name)
        if self.mode == "trace":
            label = f"quantizer:{path}:{operand}"
            if spec.dynamic:  # no parameter shows which axes have a range of their own
                label += "@" + "".join("01"[axis in axes] for axis in range(x.ndim))
            if params is None:
                return marker(label, _unchanged, x), None
            keys = sorted(params)

            def fake_quant(x, *leaves):
                given = dict(zip(keys, leaves, strict=True))
                return _quantized(x, given, spec, axes, group)[0]

            return marker(label, fake_quant, x, *(params[k] for k in keys)), None
        if params is None:
            return x, None
        key = None
        if spec.rounding == "stochastic" and module.scope.has_rng(ROUNDING):
            key = module.make_rng(ROUNDING)
        # A range over all examples is one over all devices; other ranges lie within an example.
        shared = operand != "weight" and spec.granularity == "tensor"
        x_hat, params = _quantized(
            x,
            params,
            spec,
            axes,
            group,
            batch_axes=batch_axes,
            key=key,
            axis_name=self.axis_name if shared else None,
        )
        if self.watch is not None:
            self.watch(path, operand, x, x_hat, spec, params)
        view = None if group else QUANTIZERS[spec.quantizer].integer_view(params, spec)
        if view is None:
            return x_hat, None
        scale, _, format = view
        return x_hat, (scale, format, not spec.symmetric)

    def _write(self, module, sub, name, value) -> None:
        if sub is not None:
            name, value = sub, {**(module.scope.get_variable("params", sub) or {}), name: value}
        module.scope.put_variable("params", name, value)


def split_groups(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cuts an axis into [..., groups, size, ...]."""
    return jnp.reshape(x, (*x.shape[:axis], -1, size, *x.shape[axis + 1 :]))


def _sharing(spec, place, path, operand, x):
    """Returns (axes with parameters of their own, (axis, size) of groups or None)."""
    if spec.granularity in ("tensor", "channel", "token", "example"):
        axes = dict(tensor=(), channel=place.channels, token=place.rows, example=_batch(x))
        return axes[spec.granularity], None
    size, axis = int(spec.granularity), place.group_axis
    if axis is None:
        raise ValueError(
            f"{operand} of layer {path!r} has granularity={size}, but nothing of it is summed over "
            "(a table that is looked up). Use granularity='channel'."
        )
    if x.shape[axis] % size:
        fitting = [n for n in range(1, x.shape[axis] + 1) if x.shape[axis] % n == 0]
        raise ValueError(
            f"{operand} of layer {path!r} has granularity={size}, which does not divide its "
            f"contraction axis of {x.shape[axis]} (axis {axis} of {tuple(x.shape)}). Use one of "
            f"{', '.join(map(str, fitting))}, or 'channel'."
        )
    kept = [a if a < axis else a + 1 for a in place.channels]
    return tuple(sorted([*kept, axis])), (axis, size)


def _quantized(x, params, spec, axes, group, *, batch_axes=(), key=None, axis_name=None):
    """Returns (x_hat, the parameters as they are for x); groups are cut and joined again."""
    quantizer, cut = QUANTIZERS[spec.quantizer], x
    if group is not None:
        cut = split_groups(x, *group)
    if spec.dynamic:
        params = found_params(cut, spec, axes, axis_name=axis_name)
    params = live(cut, params, spec)
    x_hat = quantizer.fake_quant(cut, params, spec, batch_axes=batch_axes, key=key)
    return jnp.reshape(x_hat, x.shape), params


def _left(described: products.Product) -> _Place:
    return _Place(rows=described.rows)


def _right(described: products.Product) -> _Place:
    channels = described.weight_channels
    return _Place(channels=channels, rows=channels, group_axis=described.group_axis)


@jax.custom_jvp
def _straight_codes(x_hat: jax.Array, scale: jax.Array) -> jax.Array:
    """Centred codes of a tensor on its grid, with the derivative 1 / scale."""
    return codes_of(x_hat, scale).astype(x_hat.dtype)


@_straight_codes.defjvp
def _straight_codes_jvp(primals, tangents):
    x_hat, scale = primals
    return _straight_codes(x_hat, scale), (tangents[0] * (1 / scale)).astype(x_hat.dtype)


def _batch(x: jax.Array) -> tuple[int, ...]:
    """Axes that count examples: the first, unless the layer is called on one example's features."""
    return (0,) if x.ndim > 1 else ()


def _fit(a: jax.Array, out: jax.Array) -> jax.Array:
    """Takes off leading axes of size 1 that a layer's unbatched output does not have."""
    return jnp.reshape(a, a.shape[a.ndim - out.ndim :]) if jnp.ndim(a) > out.ndim else a


def _none(lhs, rhs):
    raise NotImplementedError("this product is computed by its layer")


def _describe(module, args, kwargs, x, w) -> tuple[products.Product, str]:
    if isinstance(module, nn.Embed):  # attend: query [..., F] with table [V, F] to [..., V]
        ndim = 1 if x is None else x.ndim
        return products.Product(_none, (*range(ndim - 1), None), (ndim - 1, None), ndim), "embed"
    if isinstance(module, nn.Einsum):
        equation = module.einsum_str or (args[1] if len(args) > 1 else kwargs["einsum_str"])
        return products.einsum_product(equation, x, w), "einsum"
    # ConvTranspose: NHWC; the kernel is [..., in, out], or [..., out, in] when transposed.
    out_axis = w.ndim - 2 if module.transpose_kernel else w.ndim - 1
    rhs_out = tuple(x.ndim - 1 if i == out_axis else None for i in range(w.ndim))
    lhs_out = (0,) + (None,) * (x.ndim - 1)
    return products.Product(_none, lhs_out, rhs_out, x.ndim), "conv_transpose"


def _bias_in_output(module, described, bias):
    if isinstance(module, nn.ConvTranspose):
        return jnp.reshape(bias, (1,) * (described.ndim - 1) + (-1,))
    # Einsum: the bias has the weight's free axes, in the order of the output.
    shape, sizes = [1] * described.ndim, iter(bias.shape)
    for place in sorted(out for out in described.rhs_out if out is not None):
        shape[place] = next(sizes)
    return jnp.reshape(bias, shape)


class _Factory:
    """The zero-argument factory that a layer's `*_cls` field wants; remembers what it replaces."""

    def __init__(self, product: Callable[..., Any], base: Any):
        self.product, self.base = product, base

    def __call__(self) -> Callable[..., Any]:
        return self.product


class _Promote:
    """A `promote_dtype` of ours; remembers what it replaces."""

    def __init__(self, function: Callable[..., Any], base: Callable[..., Any]):
        self.function, self.base = function, base

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        return self.function(*arrays, **options)


def _own(factory: Any, function: Any) -> Any:
    """The product that the model itself injected into a layer, or None."""
    if isinstance(factory, _Factory):
        return factory.base
    return factory() if factory is not None else function


@contextlib.contextmanager
def _fields(module: nn.Module, **fields: Any) -> Iterator[None]:
    """Sets fields of a bound layer for one call; the bound module is a clone of this apply's."""
    before = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
