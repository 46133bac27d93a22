"""`Spec`: how one tensor is quantized. Plain data: frozen, hashable, static under `jit`."""

from __future__ import annotations

import dataclasses

from qkd_jax import checks
from qkd_jax.numerics.formats import MAX_BITS, IntFormat

__all__ = ["GRANULARITIES", "MASKS", "Spec"]

GRANULARITIES = ("tensor", "channel")
MASKS = ("strict", "rounded", "none")


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one tensor is quantized.

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
            and integer kernels that negate freely, and of `qil`, whose grid is symmetric; False
            elsewhere.
        granularity: "tensor" (one scale), "channel" (one per output channel), or a group size.
        observer: a key of `qkd_jax.observers.OBSERVERS` that finds the range from calibration
            data, or None for the quantizer's own initial value.
        mask: which elements pass the gradient: "strict", "rounded" or "none" (see
            `quantizers.uniform`, which alone honours it). None takes the quantizer's own.

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

    def __post_init__(self) -> None:
        checks.integer_in("bits", self.bits, 1, MAX_BITS)
        for name in ("signed", "symmetric"):
            checks.one_of(name, getattr(self, name), (True, False))
        checks.one_of("narrow_range", self.narrow_range, (None, True, False))
        checks.one_of("mask", self.mask, (None, *MASKS))
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
        if self.format.qmax == 0 and self.symmetric:
            raise ValueError(
                "bits=1 came with signed=True and symmetric=True; that grid is {-1, 0}. Use bits=2 "
                "with narrow_range=True (codes -1, 0, 1), signed=False for tensors without "
                "negative values, or symmetric=False."
            )

    @property
    def format(self) -> IntFormat:
        """The codes' format, with `narrow_range=None` resolved."""
        narrow = self.narrow_range
        if narrow is None:
            # A trainable interval (QIL) is symmetric about zero at any width.
            wide = self.bits >= 8 or self.quantizer == "qil"
            narrow = self.signed and self.symmetric and wide
        return IntFormat(self.bits, self.signed, narrow)

    @property
    def label(self) -> str:
        """A short description for reports, such as "int2 lsq per channel"."""
        words = [self.format.name, self.quantizer]
        if not self.symmetric:
            words.append("affine")
        if self.granularity == "channel":
            words.append("per channel")
        elif self.granularity != "tensor":
            words.append(f"per group of {self.granularity}")
        return " ".join(words)
