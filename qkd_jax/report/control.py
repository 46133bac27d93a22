"""The control of a comparison: which row each row is compared with."""

import dataclasses
from collections.abc import Mapping, Sequence

from qkd_jax import checks
from qkd_jax.report.arms import RowKey

FullKey = tuple[str, str, str]
"""(arm, net, method)."""


@dataclasses.dataclass(frozen=True)
class Control:
    """What rows are compared with.

    Attributes:
        text: for captions.
        pairs: (row, its control), in the order of the rows.
        without: rows that have no control.
    """

    text: str
    pairs: tuple[tuple[FullKey, FullKey], ...]
    without: tuple[FullKey, ...]


def find_control(rows: Mapping[str, Sequence[RowKey]], against: str) -> Control:
    """Finds the control that a name means.

    | name | each row's control |
    |---|---|
    | an arm | the same net and method in that arm; where the method is called otherwise there, the net's only row |
    | "net/method", a method, or a net with one row | that row of its own arm, which has the same runs |
    | "arm/net/method" | that one row |

    Args:
        rows: {arm: its (net, method)}.
        against: the name.

    Raises:
        ValueError: nothing has the name, or several rows of an arm have.
    """  # noqa: E501
    names = {(arm, *key): "/".join((arm, *key)) for arm, keys in rows.items() for key in keys}
    if against in rows:
        if len(rows) == 1:
            raise ValueError(
                f"--against={against} is the only arm; name a row in it: "
                f"{', '.join('/'.join(key) for key in rows[against])}."
            )
        found = {key: _counterpart(rows, key, against) for key in names if key[0] != against}
        return _control(f"the same net in {against}", found)
    one = [key for key, name in names.items() if name == against]
    if one:
        found = {key: one[0] for key in names if key != one[0]}
        return _control(f"{one[0][0]} / {one[0][1]} / {one[0][2]}", found)
    for spelled in (lambda n, m: (f"{n}/{m}", f"{n}: {m}"), lambda n, m: (m,), lambda n, m: (n,)):
        of_arm = {
            arm: [key for key in keys if against in spelled(*key)] for arm, keys in rows.items()
        }
        if not any(of_arm.values()):
            continue
        several = next((keys for keys in of_arm.values() if len(keys) > 1), None)
        if several:
            listed = ", ".join("/".join(key) for key in several)
            raise ValueError(f"--against={against} may be {listed}; give one of them as it stands.")
        found = {}
        for arm, net, method in names:
            mine = (arm, *of_arm[arm][0]) if of_arm[arm] else None
            if mine != (arm, net, method):
                found[arm, net, method] = mine
        return _control(f"{against} of the same runs", found)
    keys = [key for keys in rows.values() for key in keys]
    options = [*rows, *(m for _, m in keys), *("/".join(key) for key in keys)]
    raise checks.unknown("control in --against", against, dict.fromkeys(options))


def _control(text: str, found: Mapping[FullKey, FullKey | None]) -> Control:
    pairs = tuple((key, other) for key, other in found.items() if other is not None)
    return Control(text, pairs, tuple(key for key, other in found.items() if other is None))


def _counterpart(
    rows: Mapping[str, Sequence[RowKey]], key: FullKey, control: str
) -> FullKey | None:
    arm, net, method = key
    if (net, method) in rows[control]:
        return control, net, method
    theirs = [other for other in rows[control] if other[0] == net]
    ours = [other for other in rows[arm] if other[0] == net]
    return (control, *theirs[0]) if len(theirs) == len(ours) == 1 else None
