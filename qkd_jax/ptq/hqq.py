"""Half-quadratic quantization: the scales and zero points of weights, without any data.

A range from smallest to largest weight serves its outliers. Badri and Shaji, 2023 ("Half-Quadratic
Quantization of Large Machine Learning Models", the `hqq` package) minimise sum |w - w_hat|^p with
p < 1 instead, under which few large errors count little, by half-quadratic splitting, as Krishnan
and Fergus (NIPS 2009) solve for images.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.core import unfreeze

from qkd_jax import checks
from qkd_jax.numerics import MIN_SCALE, IntFormat, scale_format
from qkd_jax.ptq.leaves import entries, put_entries
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.traced import known_grid, quantizer_params, trace_net
from qkd_jax.quantize.variables import quantizers, refuse_folded
from qkd_jax.quantizers import facts


class Fitted(NamedTuple):
    """A grid of weights [..., 1], one for each row, and the weights' codes on it."""

    scale: np.ndarray
    zero_point: np.ndarray
    codes: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """x_hat = (codes - zero_point) * scale."""
        return (self.codes - self.zero_point) * self.scale


def shrink(error: np.ndarray, beta: float, p: float) -> np.ndarray:
    """Returns sign(x) max(0, |x| - |x|^(p-1) / beta), the proximal step of the p-norm.

    Large errors pass nearly whole, so that what is fitted to the rest ignores them; small ones give
    zero.
    """
    size = np.abs(error)
    # 0^(p-1) is infinite, which is what leaves a zero at zero.
    with np.errstate(divide="ignore"):
        return np.sign(error) * np.maximum(size - size ** (p - 1) / beta, 0)


def fitted_codes(
    weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, format: IntFormat
) -> Fitted:
    """Rounds weights [..., n] to the grid of scales and zero points [..., 1]."""
    codes = np.clip(np.rint(weight / scale + zero_point), format.qmin, format.qmax)
    return Fitted(scale, zero_point, codes)


def updated_zero_point(weight: np.ndarray, fitted: Fitted, error: np.ndarray) -> np.ndarray:
    """Returns the mean of codes - (w - e) / scale: the best zero point beside the errors e."""
    return np.mean(fitted.codes - (weight - error) / fitted.scale, axis=-1, keepdims=True)


def updated_scale(weight: np.ndarray, fitted: Fitted, error: np.ndarray) -> np.ndarray:
    """Returns <w - e, q> / <q, q> for the centred codes q: the best scale beside the errors e."""
    q = fitted.codes - fitted.zero_point
    squares = (q * q).sum(axis=-1, keepdims=True)
    scale = ((weight - error) * q).sum(axis=-1, keepdims=True) / np.where(squares, squares, 1)
    return np.where((squares > 0) & (scale > MIN_SCALE), scale, fitted.scale)


def half_quadratic(
    weight: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    format: IntFormat,
    *,
    affine: bool,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    steps: int = 20,
) -> Fitted:
    """Minimises sum |w - w_hat|^p over the grid of each row.

        e = shrink(w - w_hat, beta),   |w - w_hat - e|^2 over z, then over s,   beta <- kappa beta

    Errors are measured in steps of the grid that comes in, so that a weight's unit does not matter
    to beta; the package measures them in the weight's own unit, in which those of most nets shrink
    to zero and p makes no difference. Zero points stay integers within the codes, as files keep
    them. Each row keeps the best grid that it met, the one that came in included.

    Args:
        weight: [..., n].
        scale: [..., 1], above 0.
        zero_point: [..., 1], integers.
        format: of the codes.
        affine: whether zero points are updated.
        p: of the norm, 0 to 1.
        beta: the weight of the quadratic term.
        kappa: its growth a step.
        steps: how many.

    Returns:
        The fitted grids, float64.
    """
    unit = np.asarray(scale, np.float64)
    w = np.asarray(weight, np.float64) / unit
    fitted = fitted_codes(w, np.ones_like(unit), np.asarray(zero_point, np.float64), format)
    best, least = fitted, _norm(w - fitted.values, p)
    for _ in range(steps):
        error = shrink(w - fitted.values, beta, p)
        zero = fitted.zero_point
        if affine:
            zero = np.clip(np.rint(updated_zero_point(w, fitted, error)), format.qmin, format.qmax)
        moved = fitted._replace(zero_point=zero)
        fitted = fitted_codes(w, updated_scale(w, moved, error), zero, format)
        norm = _norm(w - fitted.values, p)
        better = norm < least
        best = Fitted(*(np.where(better, a, b) for a, b in zip(fitted, best, strict=True)))
        least = np.where(better, norm, least)
        beta *= kappa
    return best._replace(scale=best.scale * unit)


def _norm(error: np.ndarray, p: float) -> np.ndarray:
    return (np.abs(error) ** p).sum(axis=-1, keepdims=True)


def hqq(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    steps: int = 20,
    report: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Fits the scales and zero points of weights to the bulk of them; needs no data.

    Minimises sum |w - w_hat|^p (see `half_quadratic`) over each tensor, channel or group by itself,
    whatever shares a scale. Weights stay as they are and are rounded to nearest. A symmetric spec
    has its scale fitted, an affine one (`symmetric=False`) its zero point too. Zero points are
    integers here, so that every file and engine can hold them; the authors' own kernels take
    fractions.

    Args:
        net: the net.
        variables: calibrated.
        images: example input; only its shape is used.
        p: of the norm, above 0, at most 1.
        beta: the weight of the quadratic term, in steps of the calibrated grid.
        kappa: its growth a step.
        steps: how many.
        report: called with a line for each layer, e.g. `print`.
        **kwargs: further arguments of the model's call.

    Returns:
        Variables with other scales (and zero points) of weights.

    Raises:
        ValueError: variables that are not calibrated or whose BatchNorms are folded into quantized
            layers; numbers out of range; a weight quantizer without a scale that it would keep, or
            with power-of-two scales.

    Example:
        >>> import flax.linen as nn, jax, qkd_jax as qk
        >>> net = qk.quantize(nn.Dense(4), [qk.Rule("", weight=qk.Spec(4, granularity=8))])
        >>> x = jax.random.normal(jax.random.key(1), (8, 32))
        >>> variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
        >>> fitted = qk.ptq.hqq(net, variables, x)
        >>> fitted["quant"]["weight_quantizer"]["scale"].shape
        (4, 1, 4)
    """
    checks.number("p", p, low=0, high=1, low_allowed=False)
    checks.number("beta", beta, low=0, low_allowed=False)
    checks.number("kappa", kappa, low=1)
    checks.integer_in("steps", steps, 1)
    if not any(operand == "weight" for _, operand, _ in quantizers(variables)):
        raise ValueError("variables has no weight quantizers to fit. Call `calibrate` first.")
    traced = trace_net(net, variables, images, **kwargs)
    refuse_folded("hqq", traced.multipliers)
    graph, result = traced.graph, unfreeze(dict(variables))
    done: set[int] = set()
    for node in graph.nodes:
        if node.op != "quantizer" or len(node.inputs) < 2 or node.params["operand"] != "weight":
            continue
        path, spec = node.params["path"], traced.spec(node)
        params = quantizer_params(traced, node)
        name, grid = facts(spec.quantizer).step, known_grid(params, spec)
        formatted = spec.power_of_two or scale_format(spec) != "float32"
        if spec.dynamic or not name or grid is None or formatted:
            raise ValueError(
                f"weight of layer {path!r} ({spec.label}): hqq fits static scales, and here "
                "they come from the weights at every call, are powers of two or in a format of "
                "their own, or are none. Use quantizer='uniform' with dynamic=False, "
                "power_of_two=False and float32 scales."
            )
        places = dict(zip(sorted(params), node.inputs[1:], strict=True))
        if node.inputs[0] not in graph.constants or places[name] in done:
            continue  # a layer that runs twice has one grid
        done.add(places[name])
        weight = np.asarray(graph.constants[node.inputs[0]], np.float32)
        shape = np.shape(grid.scale)
        rows = _rows(weight, shape, spec.granularity)
        own = [n for n in shape if n > 1]
        scale, zero = (
            np.broadcast_to(v, shape).reshape(*own, 1) for v in (grid.scale, grid.zero_point)
        )
        fitted = half_quadratic(
            rows,
            scale,
            zero,
            grid.format,
            affine=not spec.symmetric,
            p=p,
            beta=beta,
            kappa=kappa,
            steps=steps,
        )
        new = {name: fitted.scale}
        if "zero_point" in params:
            new["zero_point"] = fitted.zero_point
        elif "offset" in params:
            new["offset"] = -fitted.zero_point * fitted.scale
        for key, value in new.items():
            found = entries(graph, places[key])
            if found is None:
                raise ValueError(
                    f"weight of layer {path!r}: its {key} is computed by the model and not a "
                    "variable, so there is nowhere to store what is fitted. Leave the layer in "
                    "float with a rule without specs before the others."
                )
            result = put_entries(result, *found, value.reshape(np.shape(params[key])))
        if report is not None:
            before = fitted_codes(rows.astype(np.float64), scale, zero, grid.format)
            errors = [float(np.mean(np.abs(rows - f.values) ** p)) for f in (before, fitted)]
            report(f"fitted {path}: mean |error|^{p:g} {errors[0]:.3g} -> {errors[1]:.3g}")
    return result


def _rows(weight: np.ndarray, shape: tuple[int, ...], granularity: str | int) -> np.ndarray:
    """Returns a weight as [..., n], where n entries share one of a parameter of some shape."""
    if len(shape) == weight.ndim + 1:
        weight = _cut(weight, shape, int(granularity))
    own = [i for i, n in enumerate(shape) if n > 1]
    shared = [i for i in range(weight.ndim) if i not in own]
    return weight.transpose(*own, *shared).reshape(*(shape[i] for i in own), -1)


def _cut(weight: np.ndarray, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Cuts the axis of a weight into groups that parameters of some shape have entries for."""
    for axis, length in enumerate(weight.shape):
        cut = (*weight.shape[:axis], length // size, size, *weight.shape[axis + 1 :])
        whole = length % size == 0 and shape[axis] * size == length and shape[axis + 1] == 1
        if whole and all(a in (1, b) for a, b in zip(shape, cut, strict=True)):
            return weight.reshape(cut)
    raise AssertionError(f"parameters of shape {shape} fit no groups of {size} in {weight.shape}")
