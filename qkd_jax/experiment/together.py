"""Runs of several processes: what process 0 tells the others, and what all must agree on.

Process 0 walks the schedule. Before a training stage it sends the others its whole state, as a
checkpoint would hold it, so that every stage begins with the same bits everywhere and the others
need no file of the run. What one device does (calibration, post-training, evaluation, deployment)
it does alone, and the others wait.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from qkd_jax.data.dataset import Dataset
from qkd_jax.experiment.reading import load_data, read
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.experiment.settings import Settings, resolve
from qkd_jax.experiment.stages import STAGES
from qkd_jax.processes import Group, PeerError
from qkd_jax.record.environment import code_sha256, code_version, git_state, numeric_environment
from qkd_jax.record.folder import FREE_FIELDS, config_fields
from qkd_jax.record.packing import pack, unpack
from qkd_jax.record.restoring import Restored
from qkd_jax.record.stopping import GracefulStop
from qkd_jax.training.loop import NonFiniteError, Preempted
from qkd_jax.training.parallel import StepCache, enable_compilation_cache
from qkd_jax.training.profiling import Profile
from qkd_jax.trees import tree_sha256

# What a process's numbers may differ by; processors may differ where accelerators compute.
_ENVIRONMENT = ("versions", "xla_flags", "x64", "options", "variables")


def facts_of(plain: Mapping[str, Any], dataset: Dataset, git: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {what: value} of all that processes must agree on before the first step."""
    environment = numeric_environment()
    device = jax.local_devices()[0]
    facts: dict[str, Any] = {
        f"config.{name}": value for name, value in config_fields(plain, ignore=FREE_FIELDS).items()
    }
    facts["fingerprint of the data"] = dataset.fingerprint
    facts["code"] = code_version(git)
    facts["SHA-256 of the code"] = code_sha256()
    facts["kind of device"] = [device.platform, device.device_kind]
    for name in _ENVIRONMENT:
        value = environment[name]
        if isinstance(value, Mapping):
            facts |= {f"{name}: {key}": entry for key, entry in value.items()}
        else:
            facts[name] = value
    return facts


def send_state(run: Run, stage: Stage) -> None:
    """Sends the state before a training stage to the processes that follow."""
    if run.group is None:
        return
    tree, meta = run.snapshot()
    source = stage.fields["images"]
    if source:
        tree = {**tree, "images": run.synthetic_images(source)}
    stored, index, _, _ = pack(tree)
    parts = {name: stored[name] for name in sorted(stored)}
    sizes = {name: array.nbytes for name, array in parts.items()}
    message: dict[str, Any] = {
        "kind": "train",
        "step": run.step,
        "meta": meta,
        "index": index,
        "sizes": sizes,
    }
    if run.profile is not None:  # a traced step has names, and all compile the same program
        message["traced"] = [run.profile.first, run.profile.last]
    run.group.tell(message, b"".join(array.tobytes() for array in parts.values()))


def _take_state(run: Run, message: Mapping[str, Any], data: bytes) -> None:
    """Takes what `send_state` sent."""
    stored, offset = {}, 0
    for name, size in sorted(message["sizes"].items()):
        stored[name] = np.frombuffer(data, np.uint8, size, offset)
        offset += size
    tree, _ = unpack(stored, message["index"])
    images = {name: tree.pop(name) for name in list(tree) if name.startswith("images/")}
    run.load(Restored(message["step"], tree, message["meta"]))
    traced = message.get("traced")
    run.profile = Profile(traced[0], traced[1], Path()) if traced else None
    source = run.stage().fields["images"]
    if source:
        run.give_images(source, {n.removeprefix("images/"): array for n, array in images.items()})


def check_same(run: Run, stage: Stage) -> None:
    """Compares what processes have after a training stage; all of them call this.

    Raises:
        PeerError: they have different arrays.
    """
    if run.group is None:
        return
    have = {name: tree_sha256(run.variables[name]) for name in sorted(run.variables)}
    optimizers = {k: v for k, v in run.optimizers.items() if any(v.values())}
    if optimizers:
        have["optimizers"] = tree_sha256(optimizers)
    try:
        run.group.compare(have)
    except ValueError as error:
        raise PeerError(
            f"after stage {stage.name!r} {error} A device may be faulty, or a kernel of another "
            "choice: nothing was saved since; the same command resumes.",
            1,
        ) from error


def follow(
    config: Any, group: Group, steps: Callable[[Settings], StepCache], stop: GracefulStop
) -> NoReturn:
    """Computes the training stages of a run with process 0, until that ends it.

    Raises:
        Ended: process 0 has ended the run, well or not.
        ValueError: a mistake in the config; data that are not here; the processes differ.
    """
    plain = resolve(config)
    enable_compilation_cache()
    dataset = load_data(plain)
    settings = read(plain, dataset)
    group.compare(facts_of(plain, dataset, git_state()))
    run = Run(
        settings,
        dataset,
        None,
        None,
        steps(settings),
        stopping=lambda: stop.requested,
        verbose=False,
        group=group,
    )
    told = False

    def meanwhile() -> None:
        nonlocal told
        if stop.requested and not told:
            group.ask_stop()
            told = True

    while True:
        message, data = group.hear(meanwhile=meanwhile)
        _take_state(run, message, data)
        stage = run.stage()
        try:
            STAGES[stage.kind].run(run, stage, **stage.fields)
        except (Preempted, NonFiniteError):  # process 0 has it too, and says so
            continue
        check_same(run, stage)
