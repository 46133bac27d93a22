"""Rules: which layers' operands are quantized, and how."""

import dataclasses
import functools
import re

from qkd_jax import checks
from qkd_jax.numerics import Spec
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantizers import QUANTIZERS, check


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which layers' weight, input and output get which spec.

    Attributes:
        pattern: a regular expression; it must match a layer's whole path.
        weight: spec of the kernel or embedding table; None leaves it in float.
        input: spec of the layer's input (of both operands of an attention product). A layer without
            one whose input is the very tensor that a module with an `output` spec returns reads
            that.
        output: spec of what the module returns; it may sit on any module, the net included (path
            ""). What a table's `attend` returns has a quantizer of its own.
        other: spec of the second operand of an attention product; None takes `input`.
    """

    pattern: str
    weight: Spec | None = None
    input: Spec | None = None
    output: Spec | None = None
    other: Spec | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(f"Rule.pattern is {self.pattern!r}; it must be a regular expression.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"Rule.pattern {self.pattern!r} is not a regular expression: {error}."
            ) from None
        for operand in ("weight", "input", "output", "other"):
            spec = getattr(self, operand)
            where = f"Rule({self.pattern!r}).{operand}"
            if spec is None:
                continue
            if not isinstance(spec, Spec):
                raise ValueError(f"{where} is {spec!r}; it must be a Spec or None.")
            if spec.quantizer not in QUANTIZERS:
                raise checks.unknown(f"quantizer of {where}", spec.quantizer, QUANTIZERS)
            observer = OBSERVERS.get(spec.observer or "")
            check(spec, observer_options=getattr(observer, "OPTIONS", ()))
            _check_granularity(where, operand, spec)

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)  # `re` itself remembers 512 of them

    def matches(self, path: str) -> bool:
        """Whether the pattern matches all of a path."""
        return self._regex.fullmatch(path) is not None


def _check_granularity(where: str, operand: str, spec: Spec) -> None:
    if operand == "weight" and spec.granularity in ("token", "example"):
        raise ValueError(
            f"{where} has granularity {spec.granularity!r}, which is for inputs. Use 'tensor', "
            "'channel' or a group size."
        )
    blocks = isinstance(spec.granularity, int) and spec.dynamic and operand != "output"
    allowed = spec.granularity in ("tensor", "token", "example") or blocks
    if operand != "weight" and not allowed:
        raise ValueError(
            f"{where} has granularity {spec.granularity!r}; an {operand} is quantized per tensor, "
            "for a scale that varies along the contraction can't be taken out of an integer "
            "product. Use granularity='tensor', or with dynamic=True 'token', 'example' or, for "
            "what goes into a sum, a block size."
        )


def first_match(rules: tuple[Rule, ...], path: str) -> Rule | None:
    """Returns the rule that decides for a path: the first whose pattern matches all of it."""
    return next((rule for rule in rules if rule.matches(path)), None)
