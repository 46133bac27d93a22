"""Which bits for which layer: an exact integer program over a table of sensitivities."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.optimize

from qkd_jax import checks
from qkd_jax.mixed_precision.candidates import Bits, Candidate, Sensitivity, label
from qkd_jax.quantize import Rule
from qkd_jax.quantize.rules import first_match


def allocate(
    table: Sensitivity,
    *,
    budget_bytes: int | None = None,
    budget_bops: int | None = None,
    pin: Mapping[str, Bits] | None = None,
) -> tuple[Rule, ...]:
    """Picks one choice of bits for each layer: least total loss within the budget.

        min  sum_ij loss_ij z_ij    z_ij in {0, 1},  sum_j z_ij = 1 for each layer i
        s.t. sum_ij bits_ij z_ij <= 8 bytes - other bits,  and the same of bit operations

    An exact integer program (a knapsack with one item of each class), solved by HiGHS through
    `scipy.optimize.milp`.

    Args:
        table: of `sensitivity`.
        budget_bytes: the most that `inspection.size(...).bytes` of the whole net may be, or None.
        budget_bops: the most bit operations for one example, or None.
        pin: pattern -> choice of the layers whose whole path matches it; the first pattern wins.

    Returns:
        One rule for each layer, its path escaped, and then those of the net's own rules that still
        decide for something, such as the products of attention, whose bit operations count with the
        bits that they have: an argument of `quantize`.

    Raises:
        ValueError: no budget, one that no choice meets (the least that can be met is named), or a
            pin that matches no layer or names bits that were not measured.
    """
    budgets: dict[str, tuple[str, float]] = {}  # what of a candidate -> (argument, room)
    for name, budget, kind, room in (
        ("budget_bytes", budget_bytes, "bits", lambda n: 8 * n - table.other_bits),
        ("budget_bops", budget_bops, "bops", lambda n: n - table.other_bops),
    ):
        if budget is not None:
            checks.number(name, budget, low=0)
            budgets[kind] = (name, math.floor(room(budget)))
    if not budgets:
        raise ValueError("no budget was given; give budget_bytes, budget_bops, or both.")
    pinned = _pinned(table, pin or {})
    rows = [
        [c for b, c in zip(table.bits, row, strict=True) if pinned.get(path, b) == b]
        for path, row in table.layers.items()
    ]
    limits = {kind: room for kind, (_, room) in budgets.items()}
    picked = _solve(rows, lambda c: c.loss, limits)
    if picked is None:
        raise ValueError(_too_small(table, rows, budgets))
    return (*(c.rule for c in picked), *_other_rules(table))


def _other_rules(table: Sensitivity) -> list[Rule]:
    """The net's own rules that decide for anything else: products without a weight, outputs.

    A rule that nothing is left for, or that has operands to quantize and meets none, is refused by
    `quantize`.
    """
    kept = []
    for rule in table.rules:
        left = [
            path
            for path in table.modules
            if path not in table.layers and first_match(table.rules, path) is rule
        ]
        if rule.pattern == ".*" or not set(table.other_layers).isdisjoint(left):
            kept.append(rule)
        elif left:  # it gives these an output, or keeps them from the rules behind it
            kept.append(Rule(rule.pattern, output=rule.output))
    return kept


def _solve(
    rows: Sequence[Sequence[Candidate]],
    cost: Callable[[Candidate], float],
    limits: Mapping[str, float],
) -> list[Candidate] | None:
    """The candidates, one a row, of the least cost within the limits; None if there are none."""
    flat = [c for row in rows for c in row]
    ends = np.cumsum([0, *(len(row) for row in rows)])
    costs = np.array([cost(c) for c in flat], np.float64)
    # HiGHS stops at an absolute gap of 1e-6: in these units that is a 1e-12th of the largest cost.
    costs *= 1e6 / max(np.abs(costs).max(initial=0), np.finfo(np.float64).tiny * 1e6)
    one_of_each = np.zeros((len(rows), len(flat)))
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        one_of_each[i, start:end] = 1
    constraints = [scipy.optimize.LinearConstraint(one_of_each, 1, 1)]
    for kind, room in limits.items():
        amounts = [getattr(c, kind) for c in flat]
        unit = max(math.gcd(*amounts), 1)
        least = math.floor(room / unit)
        constraints.append(
            scipy.optimize.LinearConstraint(
                np.array([[a // unit for a in amounts]], np.float64), -np.inf, least
            )
        )
    while True:
        found = scipy.optimize.milp(
            costs,
            integrality=np.ones(len(flat)),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if found.status == 2:
            return None
        if found.status != 0:
            raise RuntimeError(f"HiGHS did not solve the integer program: {found.message}")
        parts = np.split(np.asarray(found.x), ends[1:-1])
        picked = [row[int(np.argmax(part))] for row, part in zip(rows, parts, strict=True)]
        if all(sum(getattr(c, kind) for c in picked) <= room for kind, room in limits.items()):
            return picked
        # Over the limit by less than the solver's tolerance: this one is cut off, nothing else.
        this = np.concatenate([np.arange(len(p)) == np.argmax(p) for p in parts])
        constraints.append(
            scipy.optimize.LinearConstraint(this[None].astype(np.float64), -np.inf, len(rows) - 1)
        )


def _too_small(
    table: Sensitivity,
    rows: Sequence[Sequence[Candidate]],
    budgets: Mapping[str, tuple[str, float]],
) -> str:
    units = {"bits": (8, table.other_bits), "bops": (1, table.other_bops)}
    lines = []
    for kind, (name, room) in budgets.items():
        per, other = units[kind]
        least = -(-(sum(min(getattr(c, kind) for c in row) for row in rows) + other) // per)
        lines.append(f"{name} is {(room + other) // per}, and {least} is the least possible")
        if len(budgets) > 1:
            (rival,) = set(budgets) - {kind}
            joint = _solve(rows, lambda c, kind=kind: getattr(c, kind), {rival: budgets[rival][1]})
            if joint is not None:
                within = -(-(sum(getattr(c, kind) for c in joint) + other) // per)
                lines[-1] += f" ({within} within {budgets[rival][0]})"
    return (
        f"no choice of bits meets the budget: {'; '.join(lines)} with the choices "
        f"{', '.join(label(b) for b in table.bits)} and the pins. Raise the budget, measure fewer "
        "bits, or unpin layers."
    )


def _pinned(table: Sensitivity, pin: Mapping[str, Bits]) -> dict[str, Bits]:
    found: dict[str, Bits] = {}
    for pattern, choice in pin.items():
        choice = tuple(choice) if isinstance(choice, list) else choice
        if choice not in table.bits:
            raise ValueError(
                f"pin[{pattern!r}] is {choice!r}; the table has {', '.join(map(str, table.bits))}. "
                "Add it to the bits of `sensitivity`."
            )
        matching = [path for path in table.layers if re.fullmatch(pattern, path)]
        if not matching:
            raise ValueError(
                f"pin {pattern!r} matches no layer of the table: {', '.join(table.layers)}."
                f"{checks.nearest(pattern, table.layers)}"
            )
        for path in matching:
            found.setdefault(path, choice)
    return found
