"""The text of `--mode=inspect`: schedule, layers, coverage. Shapes only; nothing is computed."""

import functools
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.distillation.taps import features_of
from qkd_jax.experiment.config_checks import device_count, mesh_layout
from qkd_jax.experiment.settings import Settings, shapes
from qkd_jax.experiment.stages.train import plan_stage
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.inspection import coverage, layers
from qkd_jax.training import averages
from qkd_jax.training.mesh import bytes_on_a_device
from qkd_jax.training.optim import init_optimizer
from qkd_jax.training.state import split
from qkd_jax.trees import flatten

WIDTH = 118


def overview(settings: Settings) -> str:
    """Returns the text of `--mode=inspect`."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH, no_color=True, highlight=False, markup=False)
    console.print(_schedule(settings))
    for warning in settings.warnings():
        console.print(warning)
    for line in _devices(settings):
        console.print(line)
    for line in _watched(settings):
        console.print(line)
    seen: dict[QuantizedModel, str] = {}
    images = jax.ShapeDtypeStruct(settings.image_shape, np.float32)
    for name, net in settings.nets.items():
        fields = settings["nets"][name]
        start = fields.get("init_from") or "random weights"
        console.print(f"\n{name}: {fields['model']}, starts from {start}", style="bold")
        if net in seen:
            console.print(f"  the same layers and rules as {seen[net]}")
            continue
        seen[net] = name
        arguments = mode_arguments(net, False)
        variables = shapes(net, settings.image_shape)
        console.print(_layers(net, variables, images, arguments))
        console.print(_taps(net, settings.image_shape[1:]))
        if net.rules:
            console.print(str(coverage(net, variables, images, **arguments)))
    return buffer.getvalue()


def _watched(settings: Settings) -> list[str]:
    """Where a run is shown beside its record, and what is measured for it; nothing by default."""
    log, track = settings["log"], settings["track"]
    lines = []
    if track["trackers"]:
        lines.append(f"trackers: {', '.join(track['trackers'])}")
    measured = [*log["live"], *(["codes"] if log["codes_every_steps"] else [])]
    if measured:
        lines.append(f"live values: {', '.join(measured)}")
    return lines


def _schedule(settings: Settings) -> Table:
    table = Table(title="schedule", title_justify="left")
    for heading in ("", "stage", "kind", "steps", "nets", "what"):
        table.add_column(heading, justify="right" if heading in ("", "steps") else "left")
    for stage in settings.stages:
        if stage.trains:
            what = list(plan_stage(settings.nets, stage).describe())
            what += [
                f"{net}: continues {fields['continues']}"
                for net, fields in stage.fields["optim"].items()
                if fields.get("continues")
            ]
        else:
            what = [
                f"{key}={value!r}"
                for key, value in stage.fields.items()
                if key not in ("nets", "methods") and value not in ("", [])
            ]
        table.add_row(
            str(stage.index + 1),
            stage.name,
            stage.kind,
            str(stage.steps) if stage.trains else "",
            ", ".join(stage.nets),
            "\n".join(what),
        )
    trained = sum(stage.steps for stage in settings.stages if stage.trains)
    table.add_row("", "", "", str(trained), "", "")
    return table


def _devices(settings: Settings) -> list[str]:
    """The mesh, and what each device holds of the nets that learn, where it divides nets."""
    layout, count = mesh_layout(settings["parallel"]), device_count(settings["parallel"])
    if not layout.is_sharded:
        return []
    lines = [f"\n{layout.describe(count)}"]
    most: dict[str, tuple[int, str]] = {}
    for stage in settings.stages:
        plan = plan_stage(settings.nets, stage) if stage.trains else None
        for name in plan.learners if plan is not None else ():
            assert plan is not None
            variables = shapes(settings.nets[name], settings.image_shape)
            learned, _ = split(variables)
            options, what = plan.learner(name).optim, "parameters and optimizer"
            start = functools.partial(init_optimizer, options)
            tree = {"net": learned, "opt": jax.eval_shape(start, learned)}
            if options.ema:
                tree["ema"] = jax.eval_shape(averages.init, variables)
                what = "parameters, optimizer and average"
            specs = layout.specs(tree, count)
            whole, part = bytes_on_a_device(tree, specs, layout.sizes(count))
            divided = [any(spec) for spec in flatten(specs["net"]["params"]).values()]
            line = (
                f"  {name}: {whole:,} bytes of {what}, {part:,} on each device; "
                f"{sum(divided)} of {len(divided)} arrays are divided"
            )
            most[name] = max(most.get(name, (0, "")), (whole, line))  # of the stage with the most
    lines += [line for _, line in most.values()]
    return lines


def _taps(net: QuantizedModel, image: tuple[int, ...]) -> str:
    """The features that losses can tap by name."""
    sown = features_of(net, image).sown.items()
    named = [f"{name} {'x'.join(map(str, shape.shape[1:]))}" for name, shape in sown]
    return f"taps: {', '.join(named) or '(none sown)'}; also every path of a module"


def _layers(
    net: QuantizedModel,
    variables: Mapping[str, Any],
    images: Any,
    arguments: Mapping[str, bool],
) -> Table:
    table = Table()
    for heading in ("layer", "kind", "weight shape", "parameters", "weight", "input", "bytes"):
        right = heading in ("parameters", "bytes")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    params = stored = 0
    for layer in layers(net, variables, images, **arguments):
        table.add_row(
            layer.path,
            layer.kind,
            "x".join(map(str, layer.weight_shape)),
            f"{layer.params:,}",
            layer.weight.label if layer.weight else "float32",
            layer.input.label if layer.input else "float32",
            f"{-(-layer.bits // 8):,}",
        )
        params, stored = params + layer.params, stored + layer.bits
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables.get("params", {})))
    rest = total - params
    if rest:
        table.add_row("(norms and others)", "", "", f"{rest:,}", "float32", "", f"{4 * rest:,}")
    table.add_row("total", "", "", f"{total:,}", "", "", f"{-(-stored // 8) + 4 * rest:,}")
    return table
