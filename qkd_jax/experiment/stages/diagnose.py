"""The `diagnose` stage: ranges, clipping, SQNR and codes of every quantizer, for the report.

`diagnosis.json` in the run folder holds {stage: {net: [one dict an operand]}}, the fields being
those of `diagnostics.Diagnosed`; a number that is not finite (the ratio of an operand that lies on
its grid already) is null there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from qkd_jax import checks
from qkd_jax.experiment.config_checks import check_rules
from qkd_jax.experiment.run_state import Run
from qkd_jax.experiment.schedule import Stage
from qkd_jax.quantize import QuantizedModel
from qkd_jax.quantize.diagnostics import diagnose as diagnose_net
from qkd_jax.record.json_files import read_json, write_json

FILE = "diagnosis.json"


def diagnose(run: Run, stage: Stage, *, nets: Sequence[str], examples: int = 256) -> None:
    """Measures every quantized operand of each net on training images, without augmentation.

    Ranges, clipped share, SQNR and used codes by operand; and the share of a weight's codes that
    oscillate, where the net's last training stage tracked them (`hygiene.<net>.track`).
    """
    batches = run.images(examples, batch_size=256)
    records = {}
    for name in nets:
        if not run.variables[name].get("quant"):
            raise ValueError(
                f"stages.{stage.name}.nets has {name!r}, which is float: no calibrate stage has "
                "named it; calibrate it before diagnosing it."
            )
        diagnosis = diagnose_net(
            run.nets[name],
            run.variables[name],
            batches,
            oscillating=run.oscillating.get(name),
            **cast(dict[str, Any], run.apply_arguments(name)),
        )
        records[name] = diagnosis.records()
        if run.verbose:
            print(f"{stage.name}: {name}\n{diagnosis}", flush=True)
    if run.folder is not None:
        path = run.folder.path / FILE
        write_json(path, {**(read_json(path) or {}), stage.name: records})


def check_diagnose(nets: Mapping[str, QuantizedModel], stage: Stage) -> None:
    """Checks the fields of a `diagnose` stage."""
    checks.integer_in(f"stages.{stage.name}.examples", stage.fields["examples"], 0)
    check_rules(nets, stage)
