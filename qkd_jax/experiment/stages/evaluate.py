"""The `evaluate` stage: rows of the results table, of nets and of ensembles."""

from collections.abc import Mapping, Sequence

from qkd_jax import checks
from qkd_jax.experiment.head_rows import head_rows
from qkd_jax.experiment.results import agreement, ensemble_row, row
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.quantize import QuantizedModel


def evaluate(
    run: Run,
    stage: Stage,
    *,
    nets: Sequence[str],
    methods: Mapping[str, str],
    reference: str = "",
    ensembles: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Adds a row to the results for each net: quality on the test split, agreement, and size.

    `methods` gives the row's method by net; `reference` is the net with whose argmax agreement is
    counted, as it is at this stage. `ensembles` adds rows of several nets together, {name: nets}:
    the mean of their probabilities. A net's auxiliary classifiers (`byot`, `one`) have rows behind
    its own.
    """
    evaluations = {
        name: run.evaluate(name) for name in dict.fromkeys([*nets, *filter(None, [reference])])
    }
    for name in nets:
        run.rows.append(
            row(
                run,
                name,
                methods.get(name, stage.name),
                evaluations[name],
                stage=stage.name,
                agreement=agreement(evaluations[name].logits, evaluations[reference].logits)
                if reference not in ("", name)
                else None,
                agreement_with=reference or None,
            )
        )
        run.rows += head_rows(run, name, run.rows[-1])
        run.log(stage, 1, "test", {f"{name}/{k}": v for k, v in evaluations[name].metrics.items()})
    for name, members in (ensembles or {}).items():
        run.rows.append(
            ensemble_row(run, stage, name, {net: evaluations[net].logits for net in members})
        )


def check_evaluate(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of an `evaluate` stage."""
    for name, members in (stage.fields["ensembles"] or {}).items():
        where = f"stages.{stage.name}.ensembles.{name}"
        if name in nets:
            raise ValueError(f"{where} has the name of a net; give the ensemble one of its own.")
        checks.at_least_one(where, members)
        for net in members:
            if net not in stage.fields["nets"]:
                raise checks.unknown(f"net in {where}", net, stage.fields["nets"])
    for name in stage.fields["methods"]:
        if name not in stage.fields["nets"]:
            where = f"net in stages.{stage.name}.methods"
            raise checks.unknown(where, name, stage.fields["nets"])
