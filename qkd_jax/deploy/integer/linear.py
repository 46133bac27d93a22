"""Values of an integer-only program as clipped sums of scaled integers, and their arithmetic."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Raw:
    """The net's own input, moved and still float."""

    value: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A value clip(sum of multiplier * integers + bias, low, high); constants broadcast to `shape`.

    Attributes:
        terms: (value of the integers, multiplier, largest magnitude of the integers).
        bias: float64.
        shape: with a batch of 1.
        low: lowest value, or -inf.
        high: highest value, or inf.
    """

    terms: tuple[tuple[int, np.ndarray, int], ...]
    bias: np.ndarray
    shape: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def of(cls, value: int, multiplier: Any, largest: int, shape: tuple[int, ...]) -> Linear:
        """Returns multiplier * integers, the integers at most `largest` in magnitude."""
        term = value, np.asarray(multiplier, np.float64), largest
        return cls((term,), np.zeros(()), shape)

    @property
    def is_clipped(self) -> bool:
        """Whether the sum has a lowest or a highest value."""
        return self.low > -math.inf or self.high < math.inf

    @property
    def is_codes(self) -> bool:
        """Whether it is integers times one number, nothing else."""
        one = len(self.terms) == 1 and self.terms[0][1].size == 1
        return one and not self.is_clipped and not self.bias.any()

    @property
    def is_positive(self) -> bool:
        """Whether it is integers times one positive number."""
        return self.is_codes and bool(self.terms[0][1] > 0)

    def reach(self, unit: float = 1.0) -> float:
        """Returns the largest magnitude of the sum, unclipped, in a unit."""
        return np.abs(self.bias).max() / unit + sum(
            np.abs(m).max() * largest / unit for _, m, largest in self.terms
        )

    def negated(self) -> Linear:
        """Returns the value with the other sign."""
        terms = tuple((v, -m, largest) for v, m, largest in self.terms)
        return dataclasses.replace(
            self, terms=terms, bias=-self.bias, low=-self.high, high=-self.low
        )

    def scaled(self, by: np.ndarray) -> Linear | None:
        """Returns the value times a constant: its ends too, which a negative number exchanges.

        None where the ends would differ along the constant.
        """
        ends = self.low, self.high
        if self.is_clipped:
            if by.size > 1 and not (np.all(by >= 0) and ends == (0.0, math.inf)):
                return None
            if by.size == 1:
                factor = float(by.reshape(()))
                if factor == 0:
                    return None
                ends = tuple(sorted(end * factor for end in ends))
        terms = tuple((v, m * by, largest) for v, m, largest in self.terms)
        return dataclasses.replace(
            self, terms=terms, bias=self.bias * by, low=ends[0], high=ends[1]
        )

    def shifted(self, by: np.ndarray) -> Linear | None:
        """Returns the value plus a constant; None where its ends would differ along that."""
        if self.is_clipped and by.size > 1:
            return None
        shift = float(by.reshape(-1)[0]) if self.is_clipped else 0.0
        return dataclasses.replace(
            self, bias=self.bias + by, low=self.low + shift, high=self.high + shift
        )

    def clipped(self, low: float, high: float) -> Linear | None:
        """Returns the value within two ends; None where its own do not meet them."""
        low, high = max(self.low, low), min(self.high, high)
        return dataclasses.replace(self, low=low, high=high) if low <= high else None


def compressed(array: np.ndarray) -> np.ndarray:
    """Shrinks every axis along which a constant does not vary to size 1; a scalar if none does."""
    array = np.asarray(array, np.float64)
    for axis, size in enumerate(array.shape):
        first = array.take([0], axis)
        if size > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array.reshape(()) if array.size == 1 else array
