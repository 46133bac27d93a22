"""Checks of a config's values that belong to neither a net nor one kind of stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qkd_jax import checks
from qkd_jax.data import DATASETS, augment, decoding
from qkd_jax.data.crops import image_size
from qkd_jax.data.views import LARGEST as LARGEST_VIEWS
from qkd_jax.data.workers import MOST as MOST_WORKERS
from qkd_jax.hierarchy import TREES, find
from qkd_jax.losses import TABLE
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.targets import TARGETS
from qkd_jax.record import trackers
from qkd_jax.training import plan
from qkd_jax.training.mesh import MeshLayout
from qkd_jax.training.parallel import MODES, check_processes

# What `config.log.live` may name.
LIVE = (*plan.LIVE, "ranges", "oscillating")


def mapping(where: str, value: Any, example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a value that must be a dict; `example` is one for the message."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; it must be a dict, such as {dict(example)!r}.")
    return value


def check_frame(plain: Mapping[str, Any]) -> None:
    """Checks the fields outside of `nets`, `stages` and `schedule`."""
    checks.one_of("config.data.name", plain["data"]["name"], DATASETS)
    checks.integer_in("config.data.train_examples", plain["data"]["train_examples"], 0)
    if plain["target"]:
        checks.one_of("config.target", plain["target"], TARGETS)
    try:
        augment.parse(plain["data"]["augment"])
    except ValueError as error:
        raise ValueError(f"config.data.augment: {error}") from error
    check_stream(plain["data"])
    checks.integer_in("config.seed", plain["seed"], 0, 2**32 - 1)
    checks.integer_in("config.eval_batch_size", plain["eval_batch_size"], 1)
    for key, value in plain["log"].items():
        if key != "live":
            checks.integer_in(f"config.log.{key}", value, 0)
    live = plain["log"]["live"]
    if isinstance(live, str):
        raise ValueError(f"config.log.live is {live!r}; give a tuple, such as ('ranges',).")
    for name in live:
        checks.one_of("config.log.live", name, LIVE)
    if "ranges" in live and not plain["log"]["quant_every_steps"]:
        raise ValueError(
            "config.log.live has 'ranges', which are logged every config.log.quant_every_steps "
            "steps, and that is 0; give an interval, such as 20."
        )
    trackers.check(plain["track"]["trackers"])
    project = plain["track"]["project"]
    if not isinstance(project, str) or not project or set(project) & set("/\\#?%:"):
        raise ValueError(
            f"config.track.project is {project!r}; give a name without any of / \\ # ? % :, "
            "such as 'qkd_jax'."
        )
    every = plain["checkpoint"]
    checks.in_range("config.checkpoint.every_seconds", every["every_seconds"], 0, float("inf"))
    checks.integer_in("config.checkpoint.every_steps", every["every_steps"], 0)
    checks.one_of("config.parallel.mode", plain["parallel"]["mode"], MODES)
    devices = plain["parallel"]["devices"]
    checks.integer_in("config.parallel.devices", devices, 0, len(jax.devices()))
    layout = mesh_layout(plain["parallel"])
    try:
        layout.check_devices(plain["parallel"]["mode"], device_count(plain["parallel"]))
        check_processes(plain["parallel"]["mode"], jax.devices()[: devices or None])
    except ValueError as error:
        raise ValueError(f"config.parallel: {error}") from error
    for key in ("nets", "stages"):
        mapping(f"config.{key}", plain[key], {"<name>": {}})
        checks.at_least_one(f"config.{key}", plain[key])
        for name in plain[key]:
            checks.name(f"config.{key}", name)


def device_count(parallel: Mapping[str, Any]) -> int:
    """Returns the number of devices of config.parallel."""
    return parallel["devices"] or len(jax.devices())


def mesh_layout(parallel: Mapping[str, Any]) -> MeshLayout:
    """Returns the layout of config.parallel.

    Raises:
        ValueError: as `MeshLayout`.
    """

    def tupled(value: Any) -> Any:
        return tuple(map(tupled, value)) if isinstance(value, list | tuple) else value

    rules = tupled(parallel["rules"])
    if not isinstance(rules, tuple):
        raise ValueError(
            f"config.parallel.rules is {rules!r}; it must be a tuple of (pattern, axes), such as "
            "(('head/kernel', ('model',)),)."
        )
    try:
        return MeshLayout(parallel["model"], rules)
    except ValueError as error:
        raise ValueError(f"config.parallel: {error}") from error


def check_rules_of_mesh(parallel: Mapping[str, Any], nets: Mapping[str, Any]) -> None:
    """Refuses rules of config.parallel that do not fit the nets: {name: shapes of variables}."""
    try:
        mesh_layout(parallel).check_nets(nets, device_count(parallel))
    except ValueError as error:
        raise ValueError(f"config.parallel: {error}") from error


def check_stream(data: Mapping[str, Any]) -> None:
    """Checks the fields of config.data that streamed sets alone have."""
    checks.integer_in("config.data.workers", data["workers"], 0, MOST_WORKERS)
    checks.integer_in("config.data.image_size", data["image_size"], 0)
    if DATASETS[data["name"]].is_streamed:
        if data["image_size"]:
            image_size("config.data.image_size", data["image_size"])
        try:
            decoding.check(data["decoder"])
        except ValueError as error:
            raise ValueError(f"config.data.{error}") from error
    elif data["image_size"] or data["decoder"] != "pillow":
        streamed = ", ".join(name for name, source in DATASETS.items() if source.is_streamed)
        raise ValueError(
            f"config.data.image_size is {data['image_size']!r} and config.data.decoder "
            f"{data['decoder']!r}; {data['name']!r} is in memory at its own size. Leave them at 0 "
            f"and 'pillow', or take a streamed set: {streamed}."
        )


def check_tree(data: Mapping[str, Any], classes: int) -> None:
    """Checks that the class tree of config.data has the classes of the data set."""
    if tree := tree_of(data):
        try:
            find(tree, classes)
        except ValueError as error:
            raise ValueError(f"config.data.tree: {error}") from error


def check_augment(name: str, fields: Mapping[str, Any], default: Any) -> None:
    """Refuses unknown augmentations in a train stage, and mixed images where they do not fit.

    Images in fixed views, or with labels that a loss reads, cannot be mixed.
    """
    checks.integer_in(f"stages.{name}.views", fields["views"], 0, LARGEST_VIEWS)
    own = fields["augment"]
    where = f"stages.{name}.augment" if own else "config.data.augment"
    try:
        parsed = augment.parse(own or default)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if all(entry.keeps_labels for entry, _ in parsed):
        return
    if fields["views"]:
        raise ValueError(
            f"{where} mixes the images of a batch, and stages.{name}.views fixes views of each "
            "image by itself; take the mixing out, or augment at every step (views=0)."
        )
    for net, terms in fields["learn"].items():
        for label, term in terms.items():
            loss = str(term.get("loss") or label)
            if term.get("weight") == 0 or loss not in TABLE:
                continue
            if "labels" in TABLE[loss].inputs:
                raise ValueError(
                    f"{where} mixes images, so that their labels are not theirs any more, and "
                    f"stages.{name}.learn.{net}.{label} learns from labels (loss {loss!r}). Take "
                    "the term out (a teacher alone teaches, as with kd), or the augmentation."
                )


def check_micro_batches(name: str, fields: Mapping[str, Any], parallel: Mapping[str, Any]) -> None:
    """Refuses an `accumulate` that does not cut every device's part of a batch evenly."""
    where, parts, rows = f"stages.{name}.accumulate", fields["accumulate"], fields["batch_size"]
    checks.integer_in(where, parts, 1)
    devices = device_count(parallel) // parallel["model"]
    if parts > 1 and rows % (parts * devices):
        raise ValueError(
            f"{where} is {parts}, and batches of {rows} examples on {devices} device(s) have no "
            f"{parts} equal parts on each. Take a batch_size that is a multiple of "
            f"{parts * devices}, or another accumulate."
        )


def tree_of(data: Mapping[str, Any]) -> str:
    """Returns the class tree of config.data: `tree`, else the data set's own; "" for none.

    A name is a key of `hierarchy.TREES` or a file, "tree.txt#classes.txt".
    """
    named = data["tree"] or (data["name"] if data["name"] in TREES else "")
    return "" if named == "none" else named


def with_tree(where: str, learn: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `learn` with the data's class tree in each term whose loss takes one and has none.

    Raises:
        ValueError: the data set has no tree either.
    """
    filled = {net: dict(terms) for net, terms in learn.items()}
    for net, terms in filled.items():
        for label, row in terms.items():
            loss = TABLE.get(str(row.get("loss") or label))
            if loss is None or "tree" not in loss.keywords or row.get("tree"):
                continue
            if not (tree := tree_of(data)):
                raise ValueError(
                    f"{where}.learn.{net}.{label} needs a class tree, and data set "
                    f"{data['name']!r} has none; name one as tree= there or as config.data.tree: "
                    f"{', '.join(TREES)}, or a file."
                )
            terms[label] = {**row, "tree": tree}
    return filled


def check_images(name: str, source: str, makers: Mapping[str, int], schedule: Sequence[str]) -> str:
    """Returns the stage that a stage's `images` names: an earlier one that makes images."""
    if source and source not in makers:
        late = " (it comes later in the schedule)" if source in schedule else ""
        raise ValueError(
            f"stages.{name}.images is {source!r}{late}; it must be '' (the training split) or an "
            f"earlier stage that makes images: {', '.join(makers) or '(none)'}."
            f"{checks.nearest(source, makers)}"
        )
    return source


def check_origins(nets: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses nets that start from one another in a circle."""
    for name in nets:
        chain = [name]
        while (source := nets[chain[-1]].get("init_from", "")) in nets:
            if source in chain:
                circle = " -> ".join([*chain[chain.index(source) :], source])
                raise ValueError(
                    f"nets.{source}.init_from goes in a circle, {circle}; let one of these nets "
                    "start from '' (random weights) or a file."
                )
            chain.append(source)


def check_rules(nets: Mapping[str, QuantizedModel], stage: Any) -> None:
    """Refuses nets without rules in a stage (a `Stage`) that needs quantizers."""
    for name in stage.nets:
        if not nets[name].rules:
            raise ValueError(
                f"stages.{stage.name}.nets has {name!r}, whose rules are float; give it others "
                f"(nets.{name}.rules='w4a4'), or take it out of the stage."
            )


def check_tables(where: str, fields: Mapping[str, Any]) -> None:
    """Refuses anything but dicts where `learn`, `optim`, `hygiene` of a train stage hold dicts."""
    row = {"loss": "ce", "weight": 1.0}
    for net, terms in mapping(f"{where}.learn", fields["learn"], {"<net>": {"ce": row}}).items():
        for label, term in mapping(f"{where}.learn.{net}", terms, {"ce": row}).items():
            checks.name(f"{where}.learn.{net}", label)
            mapping(f"{where}.learn.{net}.{label}", term, row)
    rates = {"name": "sgd", "lr": 0.05}
    for net, numbers in mapping(f"{where}.optim", fields["optim"], {"<net>": rates}).items():
        mapping(f"{where}.optim.{net}", numbers, rates)
    rows = {"<net>": {"freeze": 0.04}}
    for net, options in mapping(f"{where}.hygiene", fields.get("hygiene") or {}, rows).items():
        mapping(f"{where}.hygiene.{net}", options, rows["<net>"])
