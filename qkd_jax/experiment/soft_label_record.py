"""The record of soft labels for the report: the nets of a distillation, their test logits."""

from pathlib import Path

import numpy as np

from qkd_jax import hierarchy
from qkd_jax.distillation.learn_table import as_sources
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.settings import Settings
from qkd_jax.record.json_files import write_json
from qkd_jax.report.soft_labels import collect

FILE = "soft_labels.json"


def distilled_nets(settings: Settings) -> tuple[list[str], float] | None:
    """Returns nets and temperature of the last stage in which a net learns from another, or None.

    The nets are the teacher, the student and, if there is one, a net like the student that learnt
    from labels alone.
    """
    for stage in reversed([stage for stage in settings.stages if stage.trains]):
        for student, terms in stage.fields["learn"].items():
            for row in terms.values():
                teachers = [n for n in as_sources(row.get("source")) if n in settings.nets]
                if not teachers:
                    continue
                temperature = row.get("temperature")
                known = isinstance(temperature, int | float) and temperature > 0
                nets = [teachers[0], student, *_alone(settings, student, teachers[0])]
                return nets, float(temperature) if known else 4.0
    return None


def _alone(settings: Settings, student: str, teacher: str) -> list[str]:
    """The first net of the student's model and rules that learns, and never from another net."""
    learns = {net for stage in settings.stages for net in stage.starts}
    pupils = {
        net
        for stage in settings.stages
        if stage.trains
        for net, terms in stage.fields["learn"].items()
        if any(row.get("source") for row in terms.values())
    }
    alike = (
        net
        for net in settings.nets
        if net in learns - pupils - {student, teacher}
        and settings.nets[net] == settings.nets[student]
    )
    return list(alike)[:1]


def write(run: Run, folder: Path) -> None:
    """Writes soft_labels.json of a run whose schedule has a net that learns from another."""
    distilled = distilled_nets(run.settings)
    if distilled is None:
        return
    nets, temperature = distilled
    named, order, distance = (), (), None
    if run.settings.tree:
        tree = hierarchy.find(run.settings.tree, run.dataset.num_classes)
        named = [str(tree.names[node]) for node in tree.classes]
        order, distance = np.argsort(tree.classes).tolist(), tree.heights
    write_json(
        folder / FILE,
        collect(
            run.dataset.test_images,
            run.dataset.test_labels,
            {net: run.evaluate(net).logits for net in nets},
            temperature=temperature,
            names=named,
            order=order,
            distance=distance,
        ),
    )
