"""Prefixes of schedules that runs have in common: stages whose result is the same in all of them.

The state of a run after its first k stages is a function of the seed, the data, the code, the
machine, those stages and the nets that they touch. `prefix_keys` hashes exactly that, so two runs
whose keys are equal have equal states there, bit for bit, and one of them may train for both. What
a stage depends on besides its own fields (its place in the schedule, the joint length of learning
rates that later stages continue) is part of `schedule.Stage`, and so of the key.

The rules of a net count from the first stage on that reads them. Until then a net is float,
whatever its rules will be, and the runs of several quantizers share its training.
"""

import dataclasses
import functools
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from qkd_jax import weights
from qkd_jax.experiment.schedule import Stage
from qkd_jax.record.environment import code_sha256, numeric_environment
from qkd_jax.trees import tree_sha256

# Of a config, beside `nets` and `stages`.
SHARED_FIELDS = ("seed", "target", "eval_batch_size", "log", "parallel")
# Kinds of stages that read no rules of a net that is not calibrated.
FLOAT_KINDS = ("train", "evaluate", "reestimate_bn")
RULES = ("rules", "reduce_range")
# What alone is not worth keeping.
QUICK = ("evaluate", "diagnose")


def prefix_keys(
    plain: Mapping[str, Any], stages: Sequence[Stage], fingerprint: str
) -> tuple[str, ...]:
    """Returns the SHA-256 of everything that the state after each stage depends on.

    Args:
        plain: the resolved config.
        stages: its schedule, laid out.
        fingerprint: of its data.

    Returns:
        As many texts as there are stages; equal ones stand for equal states.
    """
    frame = {
        "code": code_sha256(),
        "environment": numeric_environment(),
        "fingerprint": fingerprint,
        "data": {k: v for k, v in plain["data"].items() if k not in ("dir", "workers")},
        **{field: plain[field] for field in SHARED_FIELDS},
    }
    keys, touched, quantized = [], [], set()
    done: list[dict[str, Any]] = []
    for stage in stages:
        for name in stage.nets:
            _touch(name, plain["nets"], touched, quantized)
        if stage.kind not in FLOAT_KINDS:
            quantized |= set(stage.nets)
        done.append(_stage(stage))
        nets = {name: _net(name, plain["nets"], quantized) for name in touched}
        text = json.dumps([frame, done, nets], sort_keys=True)
        keys.append(hashlib.sha256(text.encode()).hexdigest())
    return tuple(keys)


def _touch(name: str, nets: Mapping[str, Any], touched: list[str], quantized: set[str]) -> None:
    """Adds a net and those that it starts from, as `Run.init_net` does.

    A copy of a net that is quantized by now is quantized too.
    """
    if name in touched:
        return
    touched.append(name)
    for field in ("init_from", "head_from"):
        if nets[name].get(field) in nets:
            _touch(nets[name][field], nets, touched, quantized)
    if nets[name].get("init_from") in quantized:
        quantized.add(name)


def _stage(stage: Stage) -> dict[str, Any]:
    facts = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    return facts | {"data": None if stage.data is None else dataclasses.asdict(stage.data)}


def _net(name: str, nets: Mapping[str, Any], quantized: set[str]) -> dict[str, Any]:
    fields = nets[name]
    source = fields.get("init_from") or ""
    facts = dict(fields)
    if name not in quantized:
        facts = {key: value for key, value in fields.items() if key not in RULES}
        if source in nets:  # a net of equal rules is copied with its quantizers
            rules = [[n.get(field) for field in RULES] for n in (fields, nets[source])]
            facts["rules_of_source"] = rules[0] == rules[1]
    if source and source not in nets and weights.is_source(source):
        try:
            facts["init_from"] = _content(source)
        except (ValueError, OSError):  # gone since the run began: equal to no other
            facts["init_from"] = secrets.token_hex(32)
    return facts


@functools.lru_cache(maxsize=256)
def _content(source: str) -> str:
    return tree_sha256(weights.load(source))


def branch_points(
    keys: Mapping[str, Sequence[str]], stages: Mapping[str, Sequence[Stage]]
) -> dict[str, list[tuple[int, str]]]:
    """Returns which prefixes are worth keeping: [(number of stages, key)] of each run, ascending.

    These are the prefixes of two runs or more behind which they part.

    Args:
        keys: {run: of `prefix_keys`}.
        stages: {run: its schedule}.
    """
    groups: dict[str, set[str]] = {}
    for name, found in keys.items():
        for key in found:
            groups.setdefault(key, set()).add(name)
    points: dict[str, list[tuple[int, str]]] = {}
    for name, found in keys.items():
        points[name] = []
        for count, key in enumerate(found, 1):
            longer = groups[found[count]] if count < len(found) else set()
            slow = any(stage.kind not in QUICK for stage in stages[name][:count])
            if len(groups[key]) > 1 and groups[key] != longer and slow:
                points[name].append((count, key))
    return points
