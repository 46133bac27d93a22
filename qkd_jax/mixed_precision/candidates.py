"""The table of layers and bits that `sensitivity` fills and `allocate` reads."""

import dataclasses
from collections.abc import Mapping

from qkd_jax.quantize import Rule

Bits = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layer at one choice of bits.

    Attributes:
        loss: of the net with this layer alone quantized, in the table's metric.
        bits: storage of the layer's parameters in bits, as `inspection.layers` counts them.
        bops: bit operations for one example: multiply-accumulates * weight bits * input bits, with
            32 for float (van Baalen et al., 2020, arXiv 2005.07093).
        rule: the rule that quantizes the layer so.
    """

    loss: float
    bits: int
    bops: int
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Loss and cost of each layer at each choice of bits; prints as a table.

    Attributes:
        metric: "mse", "kl" or "hessian".
        bits: the choices, the columns: weight bits, or (weight bits, input bits).
        layers: path -> one candidate for each choice, in the order in which the layers run.
        other_bits: storage in bits of all parameters outside these layers.
        other_bops: bit operations of all other products, with the bits that the net's rules give.
        rules: the rules of the net, which hold for everything else.
        modules: paths of the net's modules and of its products without a weight.
        other_layers: those of them that have operands and are not among `layers`: products without
            a weight (attention), layers whose weight has no spec.
    """

    metric: str
    bits: tuple[Bits, ...]
    layers: Mapping[str, tuple[Candidate, ...]]
    other_bits: int
    other_bops: int
    rules: tuple[Rule, ...]
    modules: tuple[str, ...]
    other_layers: tuple[str, ...]

    def __str__(self) -> str:
        wide = max([len(path) for path in self.layers] + [len("total KiB, rest included")])
        lines = [f"{self.metric:{wide}}" + "".join(f"{label(b):>11}" for b in self.bits)]
        for path, row in self.layers.items():
            lines.append(f"{path:{wide}}" + "".join(f"{c.loss:11.3g}" for c in row))
        columns = list(zip(*self.layers.values(), strict=True))
        kib = [(self.other_bits + sum(c.bits for c in column)) / 8192 for column in columns]
        bops = [self.other_bops + sum(c.bops for c in column) for column in columns]
        lines.append(f"{'total KiB, rest included':{wide}}" + "".join(f"{n:11.2f}" for n in kib))
        lines.append(f"{'total bit operations':{wide}}" + "".join(f"{n:11.3g}" for n in bops))
        return "\n".join(lines)


def label(choice: Bits) -> str:
    """Returns "4" for weight bits, "W4A8" for weight and input bits."""
    return f"W{choice[0]}A{choice[1]}" if isinstance(choice, tuple) else str(choice)
