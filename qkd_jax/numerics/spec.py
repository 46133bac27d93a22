"""`Spec`, the quantization of one tensor. Plain data: frozen, hashable, static under `jit`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qkd_jax import checks
from qkd_jax.numerics.formats import MAX_BITS, IntFormat

GRANULARITIES = ("tensor", "channel", "token", "example")
MASKS = ("strict", "rounded", "none")
SCALINGS = ("cover", "qmax", "qmax_half")
ROUNDINGS = ("even", "away", "floor", "stochastic")
BACKWARDS = ("ste", "ewgs", "dsq", "sigmoid")

Option = bool | int | float | str | tuple
Options = tuple[tuple[str, Option], ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The quantization of one tensor: format, quantizer, range, gradient.

    A symmetric spec has x_hat = code * scale; an affine one (`symmetric=False`) has
    x_hat = (code - zero_point) * scale, with codes 0 to 2^bits-1 when `signed=False`, else
    -2^(bits-1) to 2^(bits-1)-1.

    Args:
        bits: number of bits of a code, 1 to 16.
        quantizer: a key of `qkd_jax.quantizers.QUANTIZERS`.
        signed: whether codes may be negative. A symmetric unsigned spec is for tensors without
            negative values, such as the output of a ReLU.
        symmetric: False adds a zero point.
        narrow_range: whether the lowest signed code is left out. None takes True for signed
            symmetric specs of 8 bits and more, where one code in 256 buys exact BatchNorm folding
            and integer kernels that negate freely; False elsewhere. (A quantizer may be narrow at
            every width, as `qil` is: `quantizers.code_format`.)
        granularity: which elements share parameters. "tensor": all. "channel": those of an output
            channel (weights). A number: that many neighbours along the weight's last contraction
            axis (a convolution's input channels, with the whole window), per output channel; it
            must divide that axis. For inputs of dynamic specs: "token" (one for each vector that a
            product reads: a row of a dense layer's input, each query, key and value of a head, each
            position of a sequence that is convolved, but each whole image), under which no position
            sees a later one; and "example" (one per entry of axis 0), which sees all of them, as
            "tensor" sees the whole batch.
        observer: a key of `qkd_jax.observers.OBSERVERS` that finds the range from calibration
            data, or None for the quantizer's own initial value.
        mask: which elements pass the gradient: "strict", "rounded" or "none" (see
            `quantizers.uniform`). None takes the quantizer's own.
        scaling: from a symmetric range to its scale. "cover": max(lo / qmin, hi / qmax), clips
            nothing and uses the whole grid (torchao's SYMMETRIC_NO_CLIPPING_ERR). "qmax":
            max|x| / qmax (ONNX, LiteRT). "qmax_half": max|x| / (qmax + 1/2), which clips the
            largest value by half a step (qwix, AQT, torchao's SYMMETRIC).
        power_of_two: whether the scale is rounded up to a power of two, so that rescaling is a
            shift.
        rounding: "even" (half to even), "away" (half away from zero), "floor", or "stochastic": up
            with the probability of the fraction while training, half to even otherwise.
        backward: the gradient through the rounding, within the grid: "ste", or one of the
            surrogates of `numerics.through_rounding`.
        strength: the surrogate's own number: delta of "ewgs" (1e-3), alpha of "dsq" (0.2), the
            temperature of "sigmoid" (5). None takes the number in brackets.
        dynamic: take the parameters from the tensor itself, at every call, by the quantizer's
            `init` on the tensor's own statistics; nothing is learned. Calibration only marks the
            operand as quantized.
        options: what only this quantizer or observer knows (its `OPTIONS`): a dict, kept as a
            sorted tuple of pairs.

    Raises:
        ValueError: a field outside what is allowed, or fields that exclude each other.
    """

    bits: int
    _: dataclasses.KW_ONLY
    quantizer: str = "uniform"
    signed: bool = True
    symmetric: bool = True
    narrow_range: bool | None = None
    granularity: str | int = "tensor"
    observer: str | None = None
    mask: str | None = None
    scaling: str = "cover"
    power_of_two: bool = False
    rounding: str = "even"
    backward: str = "ste"
    strength: float | None = None
    dynamic: bool = False
    options: Mapping[str, Option] | Options = ()

    def __post_init__(self) -> None:
        checks.integer_in("bits", self.bits, 1, MAX_BITS)
        for name in ("signed", "symmetric", "power_of_two", "dynamic"):
            checks.one_of(name, getattr(self, name), (True, False))
        checks.one_of("narrow_range", self.narrow_range, (None, True, False))
        checks.one_of("mask", self.mask, (None, *MASKS))
        checks.one_of("scaling", self.scaling, SCALINGS)
        checks.one_of("rounding", self.rounding, ROUNDINGS)
        checks.one_of("backward", self.backward, BACKWARDS)
        if self.rounding == "floor" and self.backward != "ste":
            raise ValueError(
                f"rounding='floor' came with backward={self.backward!r}, whose staircase has its "
                "steps half way between codes. Use backward='ste', or rounding='even'."
            )
        self._check_strength()
        for name in ("quantizer", "observer"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "observer" and value is None):
                raise ValueError(
                    f"{name} is {value!r} ({type(value).__name__}); it must be a name, such as "
                    f"{'lsq' if name == 'quantizer' else 'minmax'!r}."
                )
        if isinstance(self.granularity, str):
            checks.one_of("granularity", self.granularity, GRANULARITIES)
        else:
            checks.integer_in("granularity", self.granularity, 1)
        if self.granularity in ("token", "example") and not self.dynamic:
            raise ValueError(
                f"granularity={self.granularity!r} came with dynamic=False; a range for each "
                f"{self.granularity} exists only at run time. Use dynamic=True, or "
                "granularity='tensor'."
            )
        if self.dynamic and self.observer is not None:
            raise ValueError(
                f"dynamic=True came with observer={self.observer!r}; a dynamic range comes from "
                "the tensor itself at every call. Drop one of the two."
            )
        object.__setattr__(self, "options", _options(self.options))
        _ = self.format  # checks narrow_range

    def _check_strength(self) -> None:
        if self.strength is None:
            return
        if self.backward == "ste":
            raise ValueError(
                f"strength={self.strength!r} came with backward='ste', which has none. Name the "
                f"backward it belongs to: {', '.join(BACKWARDS[1:])}."
            )
        below_one = dict(high=math.nextafter(1, 0)) if self.backward == "dsq" else {}
        checks.number(
            f"strength of backward={self.backward!r}",
            self.strength,
            low=0,
            low_allowed=self.backward == "ewgs",
            **below_one,
        )

    @property
    def format(self) -> IntFormat:
        """The codes' format, with `narrow_range=None` resolved."""
        narrow = self.narrow_range
        if narrow is None:
            narrow = self.signed and self.symmetric and self.bits >= 8
        return IntFormat(self.bits, self.signed, narrow)

    def option(self, name: str, default: Option) -> Any:
        """Returns one of `options`, or its default."""
        return dict(self.options).get(name, default)

    @property
    def label(self) -> str:
        """A short description for reports, such as "int2 lsq per channel"."""
        words = [self.format.name, self.quantizer]
        if not self.symmetric:
            words.append("affine")
        if self.dynamic:
            words.append("dynamic")
        if isinstance(self.granularity, int):
            words.append(f"per group of {self.granularity}")
        elif self.granularity != "tensor":
            words.append(f"per {self.granularity}")
        if self.option("scale_format", "float32") != "float32":
            words.append(f"with {self.option('scale_format', '')} scales")
        return " ".join(words)


def _options(given: Any) -> Options:
    """Returns options as a sorted tuple of pairs, lists as tuples: hashable, equal if equal."""
    try:
        pairs = dict(given)
    except (TypeError, ValueError):
        raise ValueError(
            f"options is {given!r}; it must be a dict of the quantizer's own options, such as "
            "{'delta': 0.001}."
        ) from None
    for name, value in pairs.items():
        if isinstance(value, list):
            pairs[name] = value = tuple(value)
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str | tuple):
            raise ValueError(
                f"options[{name!r}] is {value!r}; names are text and values numbers, booleans, "
                "text, or tuples of them."
            )
    return tuple(sorted(pairs.items()))


def refuse_one_bit(spec: Spec) -> None:
    """Raises ValueError for the signed symmetric one-bit grid, {-1, 0} times the scale."""
    if spec.format.qmax == 0 and spec.symmetric:
        raise ValueError(
            f"quantizer {spec.quantizer!r} came with bits=1, signed=True and symmetric=True; that "
            "grid is {-1, 0}. Use quantizer='binary' (codes -1, 1), bits=2 with narrow_range=True "
            "(codes -1, 0, 1), signed=False for tensors without negative values, or "
            "symmetric=False."
        )


def refuse_fields(spec: Spec, *defaults: str, because: str = "", **wanted: Any) -> None:
    """Raises ValueError unless each named field of a spec has its default, or the value wanted.

    Args:
        spec: the spec.
        *defaults: fields that must have their default.
        because: why, a clause without its full stop.
        **wanted: the only value that a field may have.
    """
    for name, value in {**{name: getattr(Spec, name) for name in defaults}, **wanted}.items():
        given = getattr(spec, name)
        if given != value:
            raise ValueError(
                f"quantizer {spec.quantizer!r} came with {name}={given!r}; it works with "
                f"{name}={value!r} alone{'; ' + because if because else ''}. Leave {name} out, or "
                "use another quantizer (quantizer='uniform' takes every choice)."
            )


def refuse_learned_power_of_two(spec: Spec) -> None:
    """Raises ValueError for power_of_two, which the first update of a learned step would end."""
    refuse_fields(
        spec,
        "power_of_two",
        because="its step is learned and would not stay one (quantizer='tqt' learns powers of two)",
    )


def refuse_odd_codes_of_16_bits(spec: Spec) -> None:
    """Raises ValueError where the odd codes of signed specs, one bit wider, find no format."""
    if spec.signed and spec.bits >= MAX_BITS:
        raise ValueError(
            f"quantizer {spec.quantizer!r} came with bits={spec.bits} and signed=True; its odd "
            f"codes take a bit more. Use at most {MAX_BITS - 1}."
        )


def check_option(spec: Spec, name: str, default: Option, **span: Any) -> None:
    """Raises ValueError unless an option is a number in a range, or True or False.

    Args:
        spec: the spec.
        name: the option.
        default: its value where the spec does not give it.
        **span: the range, as `checks.number` takes it; none for a flag.
    """
    label = f"option {name} of quantizer {spec.quantizer!r}"
    value = spec.option(name, default)
    if span:
        checks.number(label, value, **span)
    elif not isinstance(value, bool):
        raise ValueError(f"{label} is {value!r}; allowed: True, False.")
