"""An interceptor around the calls of a model's layers, which quantizes their operands.

The model's own code is not touched and nothing global is patched. While a net runs, a method
interceptor sets a public field of each bound layer for the length of one call, and restores it:
`Conv` and `Dense` receive our contraction through `conv_general_dilated_cls` / `dot_general_cls`,
attention through its two einsum fields, `Einsum`, `ConvTranspose` and `Embed` through
`promote_dtype`, which hands over the operands.

The quantizers' variables lie under their layer (`conv1/weight_quantizer/step`) and travel inside
the `params` collection while the model runs, since `nn.scan` and `nn.vmap` lift no collection that
they have not heard of.

A `Frame` is one application of a net. To do something else with its operands, give it another hook
(see `operands`); there is nothing in it to override.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import _Conv
from jax import lax

from qkd_jax.numerics import Spec
from qkd_jax.quantize.contraction import (
    Contraction,
    OperandGrid,
    conv_contraction,
    dot_contraction,
    einsum_contraction,
    quantized_contraction,
    straight_codes,
)
from qkd_jax.quantize.layer_fields import (
    ContractionFactory,
    MasterKernel,
    Promotion,
    bias_in_output,
    check_positions,
    describe,
    injected,
    outermost_module,
    set_fields,
)
from qkd_jax.quantize.operands import (
    ROUNDING,
    OperandAxes,
    OperandHook,
    OperandUse,
    batch_axes_of,
    left_axes,
    mark_skipped,
    other_axes,
    parameter_axes,
    quantize_operand,
    read_variable,
    right_axes,
)
from qkd_jax.quantize.rotations import rotated
from qkd_jax.quantize.variables import ATTENDED, FOLDED, ROTATION, quantizer_key
from qkd_jax.quantizers import QUANTIZERS

ATTENTION_PARTS = {
    "qk_attn_weights_einsum_cls": "query_key",
    "attn_weights_value_einsum_cls": "weights_value",
}
"""Attention's fields for its products, and the names under which rules know these."""


@dataclasses.dataclass
class LayerUse:
    """A layer as one application used it: its kind and the shapes of its operands."""

    kind: str
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    weight_channels: tuple[int, ...] = ()
    group_axis: int = -1  # of the weight


class Frame:
    """One application of a quantized model.

    Args:
        spec_of: (path, operand) -> Spec or None.
        hook: what happens to every operand with a spec; fake quantization by default.
        axis_name: the mapped axis over which batch normalization reduces.
        traced: whether the application is traced for a graph (with the hook `mark_operand`):
            operands without a spec are marked too.
        mark_outputs: with `traced`, mark what every module returns, with a spec or without.
        shared: what equal applications have in common, as `intercepting` takes it.

    A layer whose rule gives its input no spec, but whose input is, unchanged, what a module with an
    `output` spec returned, reads that module's codes.
    """

    def __init__(
        self,
        spec_of: Callable[[str, str], Spec | None],
        hook: OperandHook = quantize_operand,
        *,
        axis_name: str | None = None,
        traced: bool = False,
        mark_outputs: bool = False,
        shared: Hashable | None = None,
    ):
        self.spec_of = spec_of
        self.shared = shared
        self.hook = hook
        self.axis_name = axis_name
        self.traced = traced
        self.mark_outputs = mark_outputs
        # id of a module's quantized output -> the output, which keeps the id its own, x_hat, grid
        self._on_grid: dict[int, tuple[jax.Array, jax.Array, OperandGrid | None]] = {}
        self.seen: dict[str, LayerUse] = {}
        self.modules: set[str] = set()
        self._active: dict[object, tuple[int, str]] = {}
        self._paths: list[str] = []
        self._called: set[str] = set()  # paths of modules whose `__call__` has run
        self._root: type[nn.Module] | None = None
        self._detached = False  # inside a module that runs on parameters handed in

    # -- the interceptor ---------------------------------------------------------------------

    def __call__(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Intercepts one method call of one module; see `flax.linen.intercept_methods`."""
        module, method = context.module, context.method_name
        outside = outermost_module(module)
        self._root = self._root or type(outside)
        if self._detached:
            return next_fun(*args, **kwargs)
        if method not in ("__call__", "attend") or (id(module), method) in self._active.values():
            # `super().__call__` of a subclass is intercepted a second time.
            return next_fun(*args, **kwargs)
        # A lifted root (`nn.remat(nn.Dense)`) runs an object of the class that it derives from.
        if not outside.path and not issubclass(self._root, type(outside)):
            # `layer.apply({"params": ...}, x)` in a model's own code: its path is none of the net's
            # and no quantizer can be kept with it. Its products are like `x @ w`.
            self._detached = True
            try:
                return next_fun(*args, **kwargs)
            finally:
                self._detached = False
        path, key = "/".join(module.path), object()
        # So is a lifted layer (`nn.remat(nn.Dense)`), as two objects at one path: its operands
        # belong to the inner one, whose scope is the live one, its output to the outer.
        outermost = path not in self._paths
        self._active[key] = (id(module), method)
        self._paths.append(path)
        try:
            out = self._run(module, path, method, next_fun, args, kwargs)
            return self._output(module, path, method, out) if outermost else out
        finally:
            self._paths.pop()
            del self._active[key]

    def _run(
        self,
        module: nn.Module,
        path: str,
        method: str,
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        self.modules.add(path)
        fields: dict[str, Any] = {}
        if isinstance(module, nn.BatchNorm):
            if read_variable(module, "", FOLDED) is not None:
                return args[0] if args else kwargs["x"]
            fields = {"axis_name": module.axis_name or self.axis_name}
        elif isinstance(module, _Conv) and module.shared_weights:
            check_positions(module, path, self.spec_of(path, "input"))
            base = injected(module.conv_general_dilated_cls, module.conv_general_dilated)
            master = MasterKernel(module)
            function = self._contraction(
                module, path, "conv", conv_contraction, base or lax.conv_general_dilated, master
            )
            factory = ContractionFactory(function, base)
            fields = {"conv_general_dilated_cls": factory, "promote_dtype": master}
        elif isinstance(module, nn.Dense | nn.DenseGeneral):
            base = injected(module.dot_general_cls, module.dot_general)
            master = MasterKernel(module)
            function = self._contraction(
                module, path, "dense", dot_contraction, base or lax.dot_general, master
            )
            factory = ContractionFactory(function, base)
            fields = {"dot_general_cls": factory, "promote_dtype": master}
        elif isinstance(module, nn.MultiHeadDotProductAttention):
            fields = self._attention(module, path)
        elif isinstance(module, nn.Einsum | nn.ConvTranspose | nn.Embed):
            return self._promoted(module, path, method, next_fun, args, kwargs)
        with set_fields(module, **fields):
            return next_fun(*args, **kwargs)

    # -- layers ------------------------------------------------------------------------------

    def _contraction(
        self,
        module: nn.Module,
        path: str,
        kind: str,
        described: Callable[..., Contraction],
        base: Callable[..., Any],
        kernel: MasterKernel,
    ) -> Callable[..., jax.Array]:
        """A drop-in for a lax contraction that quantizes its operands and scales its sums once."""

        def contract(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            contraction = described(lhs, rhs, *args, base=base, **kwargs)
            self._use(path, kind, contraction)
            folded = read_variable(module, "", FOLDED) or {}
            if ROTATION in folded:
                lhs = rotated(lhs, folded[ROTATION], marked=path if self.traced else None)
            x_hat, x_grid = self._operand(
                module, path, "input", lhs, left_axes(contraction), batch_axes=batch_axes_of(lhs)
            )
            w = rhs if self.spec_of(path, "weight") is None else kernel.master(rhs)
            w_hat, w_grid = self._operand(module, path, "weight", w, right_axes(contraction))
            if self.traced and "multiplier" in folded:
                raise ValueError(f"layer {path!r} is folded already; trace it unfolded.")
            if x_grid is None or w_grid is None or not contraction.takes_out(x_grid, w_grid):
                out = contraction.fn(x_hat.astype(lhs.dtype), w_hat.astype(rhs.dtype))
            else:
                multiplier, dtype = folded.get("multiplier"), contraction.dtype(lhs, rhs)
                out = quantized_contraction(
                    contraction, x_hat, w_hat, x_grid, w_grid, multiplier, dtype
                )
            if "bias" in folded:
                out = out + jnp.reshape(folded["bias"], (1,) * (out.ndim - 1) + (-1,))
            return self._output_gradient(module, path, out)

        return contract

    def _attention(self, module: nn.MultiHeadDotProductAttention, path: str) -> dict[str, Any]:
        """The two einsum fields of attention, for the contractions that a rule quantizes."""
        parts = ATTENTION_PARTS
        named = {field: f"{path}/{part}" if path else part for field, part in parts.items()}
        self.modules.update(named.values())
        wanted = any(self.spec_of(layer, "input") is not None for layer in named.values())
        own = any(injected(getattr(module, field), None) is not None for field in parts)
        if not self.traced and not wanted:
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
            field: ContractionFactory(self._einsum(module, part, named[field]), None)
            for field, part in parts.items()
        }

    def _einsum(self, module: nn.Module, part: str, layer: str) -> Callable[..., jax.Array]:
        def einsum(equation: str, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            contraction = einsum_contraction(equation, lhs, rhs)
            self._use(layer, "attention")
            x_hat, x_grid = self._operand(
                module,
                layer,
                "input",
                lhs,
                left_axes(contraction),
                part=part,
                batch_axes=batch_axes_of(lhs),
            )
            masked = part == ATTENTION_PARTS["attn_weights_value_einsum_cls"]
            other = other_axes(contraction, masked=masked)
            y_hat, y_grid = self._operand(
                module, layer, "other", rhs, other, part=part, batch_axes=batch_axes_of(rhs)
            )
            if x_grid is None or y_grid is None or not contraction.takes_out(x_grid, y_grid):
                return contraction.fn(x_hat.astype(lhs.dtype), y_hat.astype(rhs.dtype))
            dtype = contraction.dtype(lhs, rhs)
            out = quantized_contraction(contraction, x_hat, y_hat, x_grid, y_grid, dtype=dtype)
            return self._output_gradient(module, layer, out)

        return einsum

    def _promoted(
        self,
        module: nn.Einsum | nn.ConvTranspose | nn.Embed,
        path: str,
        method: str,
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> jax.Array:
        """Runs a layer that shows its operands through `promote_dtype` but keeps the contraction.

        In place of the operands the layer is given their codes; the output is scaled, and the bias
        added, here.
        """
        promote = module.promote_dtype
        if isinstance(promote, Promotion):
            promote = promote.base
        scaling: dict[str, Any] = {}

        def quantized(*arrays: Any, **options: Any) -> tuple[Any, ...]:
            before, arrays = arrays, tuple(promote(*arrays, **options))
            if isinstance(module, nn.Embed):
                at, w, bias = -1, arrays[-1], None
                x = arrays[0] if method == "attend" else None  # a lookup has no second operand
            else:
                at, (x, w, bias) = 1, arrays
            assert w is not None
            contraction, kind = describe(module, args, kwargs, x, w)
            self._use(path, kind, contraction)
            own = w if self.spec_of(path, "weight") is None else before[at]
            w_hat, w_grid = self._operand(module, path, "weight", own, right_axes(contraction))
            if x is None:
                return (w_hat.astype(w.dtype),)
            x_hat, x_grid = self._operand(
                module, path, "input", x, left_axes(contraction), batch_axes=batch_axes_of(x)
            )
            if x_grid is None or w_grid is None or not contraction.takes_out(x_grid, w_grid):
                both = x_hat.astype(x.dtype), w_hat.astype(w.dtype)
                return both if isinstance(module, nn.Embed) else (*both, bias)
            x_scale, w_scale = (lax.stop_gradient(grid.scale) for grid in (x_grid, w_grid))
            scaling["multiplier"] = contraction.scales_in_output(x_scale, w_scale)
            scaling["dtype"] = x.dtype
            codes = straight_codes(x_hat, x_scale), straight_codes(w_hat, w_scale)
            if isinstance(module, nn.Embed):
                return codes
            if bias is not None:
                scaling["bias"] = bias_in_output(module, contraction, bias)
                bias = jnp.zeros_like(bias)
            return (*codes, bias)

        with set_fields(module, promote_dtype=Promotion(quantized, promote)):
            out = next_fun(*args, **kwargs)
        if "multiplier" in scaling:
            out = (out * _fit(scaling["multiplier"], out)).astype(scaling["dtype"])
        if "bias" in scaling:
            out = out + _fit(scaling["bias"], out)
        return self._output_gradient(module, path, out)

    def _output_gradient(self, module: nn.Module, path: str, out: jax.Array) -> jax.Array:
        """A layer's output, whose gradient the quantizer of its input may round."""
        spec = self.spec_of(path, "input")
        if spec is None or self.traced:
            return out
        function = getattr(QUANTIZERS[spec.quantizer], "output_gradient", None)
        if function is None:
            return out
        assert module.scope is not None
        key = module.make_rng(ROUNDING) if module.scope.has_rng(ROUNDING) else None
        return function(out, spec, batch_axes=batch_axes_of(out), key=key)

    def _output(self, module: nn.Module, path: str, method: str, out: Any) -> Any:
        if method == "__call__":
            self._called.add(path)
        if self.spec_of(path, "output") is None:
            if self.mark_outputs and isinstance(out, jax.Array):
                return mark_skipped(path, "output", out)
            return out
        if not isinstance(out, jax.Array) or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                f"a rule gives module {path!r} an `output` spec, but it returns "
                f"{type(out).__name__}; `output` needs a module that returns one float array."
            )
        # A module's output has no contraction here: its rows are what its last axis is a vector of.
        axes = OperandAxes(rows=tuple(range(out.ndim - 1)))
        operand = self._output_operand(module, path, method)
        x_hat, grid = self._operand(module, path, operand, out, axes, batch_axes=batch_axes_of(out))
        out = x_hat.astype(out.dtype)
        self._on_grid[id(out)] = (out, x_hat, grid)
        return out

    def _output_operand(self, module: nn.Module, path: str, method: str) -> str:
        """The operand that a module's output is: a table's lookups are no logits.

        A module of which `attend` alone was calibrated may keep that under the name of the output.
        """
        if method == "__call__":
            return "output"
        own, shared = (
            read_variable(module, "", quantizer_key(name)) for name in (ATTENDED, "output")
        )
        old = own is None and shared is not None and path not in self._called
        return "output" if old else ATTENDED

    # -- one operand -------------------------------------------------------------------------

    def _use(self, path: str, kind: str, contraction: Contraction | None = None) -> None:
        """Notes a layer, with the axes of its weight."""
        self.modules.add(path)
        use = self.seen.setdefault(path, LayerUse(kind))
        if contraction is not None:
            use.weight_channels = contraction.weight_channels
            use.group_axis = -1 if contraction.group_axis is None else contraction.group_axis

    def _operand(
        self,
        module: nn.Module,
        path: str,
        operand: str,
        x: jax.Array,
        axes: OperandAxes,
        *,
        part: str = "",
        batch_axes: tuple[int, ...] = (),
    ) -> tuple[jax.Array, OperandGrid | None]:
        """Returns (x_hat, grid) of an operand, of the hook or of the module whose output it is."""
        if path in self.seen:
            self.seen[path].shapes[operand] = tuple(x.shape)
        spec = self.spec_of(path, operand)
        if spec is None:
            if id(x) in self._on_grid:
                return self._on_grid[id(x)][1:]
            return (mark_skipped(path, operand, x) if self.traced else x), None
        own, group = parameter_axes(spec, axes, path, operand, x)
        # A range over all examples is one over all devices; other ranges lie within an example.
        shared = operand != "weight" and spec.granularity == "tensor"
        return self.hook(
            OperandUse(
                path=path,
                operand=operand,
                x=x,
                spec=spec,
                axes=own,
                group=group,
                module=module,
                part=part,
                batch_axes=batch_axes,
                axis_name=self.axis_name if shared else None,
            )
        )


def _fit(a: jax.Array, out: jax.Array) -> jax.Array:
    """Drops leading axes of size 1 that a layer's unbatched output does not have."""
    return jnp.reshape(a, a.shape[a.ndim - out.ndim :]) if jnp.ndim(a) > out.ndim else a
