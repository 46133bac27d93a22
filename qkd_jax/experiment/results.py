"""The results of a run: rows of the table, results.json, and their text for the terminal."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from qkd_jax import checks, metrics, report
from qkd_jax.experiment.run_state import Evaluation, Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.quantize.inspection import coverage, layers, size
from qkd_jax.record.folder import RunFolder
from qkd_jax.record.json_files import read_json


def agreement(logits: np.ndarray, others: np.ndarray) -> float:
    """Share of examples on which two nets have the same argmax."""
    return metrics.finish(jax.device_get(_agreement(logits, others)))["agree"]


_agreement = jax.jit(metrics.agreement)
_classification = jax.jit(metrics.classification)


def row(run: Run, name: str, method: str, evaluation: Evaluation, **more: Any) -> dict[str, Any]:
    """One row of results.json: no times in it."""
    net, variables, found = run.nets[name], run.variables[name], evaluation.metrics
    arguments = run.apply_arguments(name)
    sizes = size(net, variables, run.example, **arguments)
    weight_bits, activation_bits = 32, 32
    if variables.get("quant"):
        # A net is called by its lowest widths; the first and the last layer have more.
        infos = layers(net, variables, run.example, **arguments)
        weight_bits = min(x.width("weight") for x in infos)
        activation_bits = min(x.width("input") for x in infos)
    # With a class tree: None where no mistake was made.
    of_tree: dict[str, Any] = {"severity": found.get("severity")} if run.settings.tree else {}
    shared = ("top1", "top5", "loss", "count", "severity")
    rest = {key: value for key, value in found.items() if key not in shared}
    if rest:
        of_tree["hierarchy"] = rest
    return {
        "net": name,
        "method": method,
        "model": run.settings["nets"][name]["model"],
        "top1": found["top1"],
        "top5": found["top5"],
        "loss": found["loss"],
        **of_tree,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "student_steps": run.student_steps(name),
        "params": sizes.params,
        "weight_bytes": sizes.bytes,
        "bit_operations": coverage(net, variables, run.example, **arguments).bit_operations,
        "class_correct": _correct_by_class(run, evaluation.logits),
        "seed": run.settings["seed"],
        **more,
    }


def _correct_by_class(run: Run, logits: np.ndarray) -> list[int]:
    """How many test images of each class are right, as `metrics.classification` counts top-1."""
    labels = run.dataset.test_labels
    right = (np.argmax(logits, axis=-1) == labels) & ~np.isnan(logits).any(axis=-1)
    return np.bincount(labels[right], minlength=run.dataset.num_classes).tolist()


def ensemble_row(
    run: Run, stage: Stage, name: str, logits: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The row of several nets that answer with the mean of their probabilities.

    It costs what its members cost together: steps, parameters, bytes and bit operations are sums.
    """
    scores = np.stack([jax.nn.log_softmax(z) for z in logits.values()])
    mean = jax.nn.logsumexp(scores, axis=0) - np.log(len(logits))
    sums = jax.device_get(_classification(mean, run.dataset.test_labels))
    found = {**metrics.finish(sums), **run.severity(np.asarray(mean))}
    evaluation = Evaluation(found, np.asarray(mean))
    rows = [row(run, net, stage.name, evaluation) for net in logits]
    costs = ("student_steps", "params", "weight_bytes", "bit_operations")
    added = {key: sum(r[key] for r in rows) for key in costs}
    widths = {key: max(r[key] for r in rows) for key in ("weight_bits", "activation_bits")}
    models = " + ".join(dict.fromkeys(r["model"] for r in rows))
    method = f"mean of {len(rows)}"
    return {**rows[0], **added, **widths, "net": name, "method": method, "model": models} | dict(
        stage=stage.name, agreement=None, agreement_with=None
    )


def results_of(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of results.json."""
    return {
        "schema": 1,
        "seed": run.settings["seed"],
        "dataset": {
            "name": run.dataset.name,
            "train_examples": len(run.dataset.train_images),
            "test_examples": len(run.dataset.test_images),
            "class_examples": np.bincount(
                run.dataset.test_labels, minlength=run.dataset.num_classes
            ).tolist(),
        },
        "rows": rows,
    }


def printer(verbose: bool) -> Callable[[str], None]:
    """Returns a function that prints a text at once, or drops it."""
    return (
        (lambda text: print(checks.printable(text), flush=True)) if verbose else (lambda text: None)
    )


def show(results: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Prints the results table.

    Raises:
        ValueError: these are no results of a run.
    """
    try:
        table = report.table(results)
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"results.json does not hold the results of a run ({error}); restore it."
        ) from error
    say(_printed(table))


def _printed(table: Table) -> str:
    # Without colours: `say` writes out what a terminal would take for commands.
    console = Console(width=None if sys.stdout.isatty() else 160, color_system=None)
    with console.capture() as text:
        console.print(table)
    return text.get()


def show_comparison(found: report.Comparison, say: Callable[[str], None]) -> None:
    """Prints the tables and notes of a comparison."""
    for table in report.terminal(found):
        say(_printed(table))
    for note in found.notes:
        say(f"NOTE: {note}")
    if found.control is None:
        names = dict.fromkeys([arm.label for arm in found.arms if len(found.arms) > 1])
        names |= dict.fromkeys("/".join(row.key) for row in found.rows)
        say(f"no differences: name a control by --against=, one of {', '.join(names)}")


def times_text(timings: Mapping[str, Any]) -> str:
    """Returns how the seconds of a run divide, and the latencies, as text."""
    stages = timings.get("stages", {}).values()
    steps, first = (
        sum(stage.get(key, 0.0) for stage in stages)
        for key in ("train_seconds", "first_step_seconds")
    )
    lines = [
        f"{timings['seconds']:.0f} s: {steps:.0f} s of training steps, {first:.0f} s of first "
        "steps (compilation)"
    ]
    for entry in timings.get("shared", ()):
        lines.append(
            f"{', '.join(entry['stages'])}: trained by run {entry['run']!r} of the sweep, whose "
            f"{sum(stage.get('seconds', 0.0) for stage in entry['stages'].values()):.0f} s are not "
            "in here"
        )
    for entry in timings.get("latency", ()):
        lines.append(
            f"{entry['model']} on {entry['engine']}, batch {entry['batch']}: "
            f"{entry['median_ms']:.3f} ms (median of {entry['rounds']})"
        )
    return "\n".join(lines)


def target_lines(path: Path) -> list[str]:
    """Returns a text of <net>_target.json: what was written for a target, what stays in float."""
    made = read_json(path)
    if made is None:
        return []
    lines = [f"{made['file']} for {made['target']}, {made['bytes']:,} bytes"]
    for kind in ("products", "operations"):
        if f"float_{kind}" not in made:
            continue
        floats, count = made[f"float_{kind}"], len(made[f"integer_{kind}"])
        lines.append(
            f"  {count} of {count + len(floats)} {kind} run on integers"
            + (f"; in float: {', '.join(floats)}" if floats else "")
        )
    inside = ", ".join(made["inside_of_products"])
    lines.append(
        f"  products run on integers from {made['integers_from_bits']} bits on"
        + (f"; inside of them: {inside}" if inside else "")
    )
    by_table = ", ".join(made["stays_float_by_the_table"])
    lines.append(f"  float there, where a net has them: {by_table or 'nothing'}")
    if made["cannot_be_made_here"]:
        lines.append(f"  not made here: {made['cannot_be_made_here']}")
    return lines


def is_older(path: Path, other: Path) -> bool:
    """Whether a file is missing or older than another."""
    return not path.exists() or path.stat().st_mtime_ns < other.stat().st_mtime_ns


def write_report(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Writes report.html of a run folder."""
    say(f"report: {report.write(folder.path)}")
