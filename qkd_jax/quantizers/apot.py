"""APoT: additive powers of two with a learned clipping level (Li et al., 2019, arXiv 1909.13144).

Each level is a sum of a few powers of two, so that a product with it is a few shifts and adds; the
levels lie densely near zero, as weights do.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from qkd_jax import numerics
from qkd_jax.numerics import (
    Array,
    Axes,
    Grid,
    Key,
    OnGrid,
    Params,
    Spec,
    Stats,
    TableFormat,
    Values,
)

__all__ = [
    "check",
    "clip_range",
    "code_grid",
    "fake_quant",
    "init",
    "integer_view",
    "levels",
    "live",
]

OPTIONS = {"normalize": False}
SIZE = ("alpha",)
# With more bits a grid of 2^b levels gains nothing, and finding a level costs 2^b comparisons.
MAX_BITS = 6


def check(spec: Spec) -> None:
    """Raises ValueError for more than 6 bits, an affine spec, a mask, or a free choice."""
    if not 2 - int(not spec.signed) <= spec.bits <= MAX_BITS:
        raise ValueError(
            f"quantizer 'apot' came with bits={spec.bits} and signed={spec.signed}; it has 2 to "
            f"{MAX_BITS} bits, and 1 without a sign. Use quantizer='lsq' for other widths."
        )
    numerics.refuse_fields(
        spec,
        "symmetric",
        "mask",
        "rounding",
        "backward",
        "scaling",
        "power_of_two",
        "narrow_range",
        because="its levels and its gradient are the paper's",
    )
    numerics.check_option(spec, "normalize", OPTIONS["normalize"])
    if spec.option("normalize", False) and not spec.signed:
        raise ValueError(
            "option normalize of quantizer 'apot' came with signed=False; it is for weights, which "
            "have both signs. Drop it."
        )


def levels(bits: int) -> tuple[int, ...]:
    """The magnitudes of `bits` bits in units of the smallest one, ascending.

    Two bits choose one of three powers of two or 0, n = bits // 2 times, and an odd bit is left:

        even  sum_i p_i,      p_i in {0, 2^-i, 2^-(i + n), 2^-(i + 2n)},  i = 0 .. n - 1
        odd   sum_i p_i + r,  p_i in {0, 2^-i, 2^-(i + n), 2^-(i + 2n + 1)},  r in {0, 2^-2n}

    Section 2.2 of the paper with k = 2 bits a term: (0, 1), (0, 1, 2, 4) and (0, 1, 2, 3, 4, 6, 8,
    10) for 1 to 3 bits. All sums differ.
    """
    terms, odd = divmod(bits, 2)
    choices: list[tuple[int, ...]]
    choices = [(i, i + terms, i + 2 * terms + odd) for i in range(terms)]
    if odd:
        choices.append((2 * terms,))
    last = max(itertools.chain(*choices))
    picked = itertools.product(*([0, *(2 ** (last - e) for e in c)] for c in choices))
    return tuple(sorted(map(sum, picked)))


def _levels(spec: Spec) -> tuple[int, ...]:
    return levels(spec.bits - int(spec.signed))


def _unit(alpha: Array, size: Array | None, spec: Spec) -> Array:
    """The smallest magnitude, of which all levels are whole multiples.

    Args:
        alpha: the clipping level, in units of `size` where that is given.
        size: the weights' deviation with `normalize`, else None.
        spec: the spec.
    """
    unit = jnp.maximum(alpha, numerics.MIN_SCALE) * (1 / _levels(spec)[-1])
    return unit if size is None else unit * size


def init(stats: Stats, spec: Spec) -> Params:
    """The first clipping level `alpha`: 3 sigma, at most the largest magnitude, in input units.

    For unsigned data sigma is that of the Gaussian before a ReLU, as for EWGS: std / sqrt(1 - 2 /
    pi). With `spec.observer` named it is the range's farther end. All-zero data give 1. (The
    paper's code starts at 3 for its normalized weights, and at 8 for inputs, which suits its nets.)
    With `normalize` alpha is in units of the weights' deviation, and `mean` and `deviation` are
    parameters too.
    """
    check(spec)
    numerics.check_sign(stats.lo, spec.format)
    far = jnp.maximum(-stats.lo, stats.hi) if spec.signed else stats.hi
    sigma = stats.std if spec.signed else stats.std / (1 - 2 / jnp.pi) ** 0.5
    if spec.observer is None:
        far = jnp.minimum(far, jnp.maximum(3 * sigma, jnp.abs(stats.mean)))
    if not spec.option("normalize", False):
        return {"alpha": numerics.guarded(far)}
    deviation = numerics.guarded(stats.std)
    return {"alpha": numerics.guarded(far / deviation), "mean": stats.mean, "deviation": deviation}


def live(x: Values, params: Params, spec: Spec) -> Params:
    """With `normalize`, the mean and deviation of these weights, without gradient."""
    return _live(x, params) if spec.option("normalize", False) else params


@jax.jit  # not one operation at a time, which rounds more
def _live(x: Values, params: Params) -> Params:
    wide = jax.lax.stop_gradient(x).astype(numerics.compute_dtype(x))
    mean = numerics.mean_of(lambda x: x, wide, params["mean"])
    variance = numerics.mean_of(lambda x: jnp.square(x - mean), wide, params["mean"])
    deviation = numerics.guarded(jnp.sqrt(variance))
    return {"alpha": params["alpha"], "mean": mean, "deviation": deviation}


def integer_view(params: Params, spec: Spec) -> None:
    """None: the levels are not evenly spaced, and products run on x_hat.

    They are whole multiples of the smallest one, but the multiples need a bit or more on top of
    their own (4-bit weights reach 10 units), and no engine rounds an input to them.
    """
    del params, spec


def code_grid(params: Params, spec: Spec) -> Grid:
    """The grid: x_hat is a sum of powers of two, in units of the smallest, times that unit."""
    size = params["deviation"] if spec.option("normalize", False) else None
    magnitudes = _levels(spec)
    below = tuple(-m for m in reversed(magnitudes[1:])) if spec.signed else ()
    name = f"{'' if spec.signed else 'u'}apot{spec.bits}"
    table = TableFormat(name, tuple(map(float, (*below, *magnitudes))))
    return Grid.symmetric(_unit(params["alpha"], size, spec), table)


def clip_range(params: Params, spec: Spec) -> tuple[Array, Array]:
    """-alpha to alpha, 0 to alpha for unsigned specs; with `normalize` in units of the weights."""
    alpha = jnp.maximum(params["alpha"], numerics.MIN_SCALE)
    if not spec.signed:
        return jnp.zeros_like(alpha), alpha
    if not spec.option("normalize", False):
        return -alpha, alpha
    reach = alpha * params["deviation"]
    return params["mean"] - reach, params["mean"] + reach


def fake_quant(
    x: Values, params: Params, spec: Spec, *, batch_axes: Axes = (), key: Key = None
) -> OnGrid:
    """Clips `x` at alpha and takes the nearest level.

        u = x / alpha;  x_hat = alpha Q(clip(u, -1, 1))   (unsigned: clip(u, 0, 1))
        dx = g * [|u| <= 1]
        d alpha = gs * sum g * (Q(u) - u  where |u| <= 1,  sign(u) beyond)

    Q takes the nearest of +-`levels` / the highest, the lower of two at equal distance; b bits have
    a sign and b - 1 bits of magnitude, unsigned specs b bits of magnitude. gs = 1 / sqrt(N p) as
    LSQ's, p = 2^(b-1) - 1 (unsigned 2^b - 1). Sections 2.2 and 2.3 of the paper, whose gradient
    of alpha has the rounding residual that PACT leaves out.

    With the option `normalize` the weights are first brought to mean 0 and deviation 1 (section
    2.4): u = (x - mean) / (deviation alpha), x_hat = deviation alpha Q(u), of whose mean and
    deviation no gradient is taken, as in the paper's code.

    An alpha below MIN_SCALE counts as MIN_SCALE.

    Note:
        Three deviations. d alpha has the factor gs. Weights beyond alpha have no gradient, by the
        paper's equation; its code lets it pass. And normalized weights are multiplied by their
        deviation again, so that the layer stays a drop-in up to the mean, where the paper leaves
        the size to a BatchNorm.

    Example:
        >>> import jax.numpy as jnp, qkd_jax as qk
        >>> x, spec = jnp.array([-0.9, -0.2, 0.1, 0.6]), qk.Spec(3, quantizer="apot")
        >>> qk.quantizers.apot.fake_quant(x, {"alpha": jnp.array(1.0)}, spec)
        Array([-1.  , -0.25,  0.  ,  0.5 ], dtype=float32)
    """
    del key
    normal = spec.option("normalize", False)
    names = ("alpha", "mean", "deviation") if normal else ("alpha",)
    numerics.check_operand(x, params, names)
    alpha = params["alpha"]
    factor = numerics.gradient_scale(x.shape, alpha.size, spec.format.qmax, batch_axes=batch_axes)
    if not normal:
        return _fake_quant(x, alpha, None, spec, factor)
    mean, deviation = (jax.lax.stop_gradient(params[k]) for k in ("mean", "deviation"))
    wide = x.astype(numerics.compute_dtype(x))
    out = _fake_quant((wide - mean) * (1 / deviation), alpha, deviation, spec, factor)
    return out.astype(x.dtype)


def _in_units(x: Array, alpha: Array, spec: Spec) -> Array:
    return x.astype(numerics.compute_dtype(x)) * (1 / _unit(alpha, None, spec))


def _nearest(u: Array, spec: Spec) -> Array:
    if not spec.signed:
        return numerics.nearest_level(jnp.maximum(u, 0), _levels(spec))
    return jnp.copysign(numerics.nearest_level(jnp.abs(u), _levels(spec)), u)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quant(x: Array, alpha: Array, size: Array | None, spec: Spec, factor: float) -> Array:
    """The nearest level times `size`, of which no gradient is taken."""
    del factor
    nearest = _nearest(_in_units(x, alpha, spec), spec)
    return (nearest * _unit(alpha, size, spec)).astype(x.dtype)


def _forward(x, alpha, size, spec, factor):
    return _fake_quant(x, alpha, size, spec, factor), (x, alpha, size)


def _backward(spec, factor, residuals, g):
    x, alpha, size = residuals
    if size is not None:
        g = g * size
    high = _levels(spec)[-1]
    low = -high if spec.signed else 0

    def slope(x, g):
        u = _in_units(x, alpha, spec)
        return jnp.where((low <= u) & (u <= high), g, 0)

    def terms(x, g, _):
        u = _in_units(x, alpha, spec)
        # Beyond the ends the nearest level is the end.
        inside = jnp.where((low <= u) & (u <= high), u, 0)
        return (g.astype(u.dtype) * ((_nearest(u, spec) - inside) * (1 / high)),)

    dx, dalpha = numerics.cotangents(x, g, (alpha,), slope, terms, factor=factor)
    return dx, dalpha, None if size is None else jnp.zeros_like(size)


_fake_quant.defvjp(_forward, _backward)
