"""Sweeps: lists of (name, overrides) for `get_sweep`.

A config file with a sweep has

    SWEEP = dict(seeds=3)  # arguments of the sweep alone, with their defaults


    def get_sweep(arg=""):
        args, _ = sweeps.split(arg, SWEEP)
        return sweeps.grid(seed=range(args.seeds))

and `--config=configs/<file>.py:seeds=8,bits=w4a4 --sweep` has both kinds of arguments in one text:
those of `SWEEP` say which runs there are, all others go to `get_config` of every run.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import arguments

Runs = list[tuple[str, dict[str, Any]]]


def split(arg: str | None, own: Mapping[str, Any]) -> tuple[ConfigDict, dict[str, str]]:
    """Returns the arguments of a sweep, typed by their defaults, and the text of all others.

    Args:
        arg: the text behind the colon.
        own: the file's `SWEEP`: {argument: default}.
    """
    items = [item.strip() for item in (arg or "").split(",") if item.strip()]
    mine = [item for item in items if item.partition("=")[0].strip() in own]
    others = [item.partition("=")[::2] for item in items if item not in mine]
    return arguments.parse(",".join(mine), **own), {k.strip(): v.strip() for k, v in others}


def chosen(text: str, every: Iterable[str] = ()) -> list[str]:
    """Returns the words of a "+"-separated text; "all" and "" stand for every one there is."""
    return list(every) if text in ("", "all") else [word for word in text.split("+") if word]


def seeds(count: int, others: Mapping[str, str]) -> range:
    """Returns so many seeds, from the `seed` among a config's arguments on."""
    first = int(others.get("seed", 0))
    return range(first, first + count)


def name_of(overrides: Mapping[str, Any]) -> str:
    """Returns a name for a run: "loss-kd_seed-0" of {"loss": "kd", "seed": 0}.

    A field goes by its last word, and what a folder's name cannot hold becomes "-".
    """
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items()]
    return re.sub(r"[^A-Za-z0-9_]+", "-", "_".join(words)).strip("-")


def grid(**values: Iterable[Any]) -> Runs:
    """Returns a run for every combination of values; the last name varies fastest.

    grid(bits=("w4a4", "w2a2"), seed=range(3))      # 6 runs, "bits-w4a4_seed-0" and so on
    grid(**{"config.stages.qat.epochs": (10, 20)})  # a field: "epochs-10", "epochs-20"
    """
    found = []
    for combination in itertools.product(*map(tuple, values.values())):
        overrides = dict(zip(values, combination, strict=True))
        found.append((name_of(overrides), overrides))
    return found


def with_seeds(runs: Iterable[Mapping[str, Any]], seed: Iterable[int]) -> Runs:
    """Returns each of some runs at each seed, seed by seed.

    A sweep that was stopped early then has as many seeds of one run as of another.
    """
    runs = list(runs)
    return [(name_of(o), o) for s in seed for run in runs if (o := {**run, "seed": s})]
