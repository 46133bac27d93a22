"""The figures of a run's report as PNG images, for trackers."""

from pathlib import Path

from qkd_jax.record.json_files import read_json
from qkd_jax.record.metrics_log import read_metrics
from qkd_jax.report import plots, svg


def images(folder: str | Path) -> dict[str, bytes]:
    """Returns {"report/<figure>": PNG} of a run folder; figures of what it lacks are left out."""
    folder = Path(folder)
    rows = read_metrics(folder)
    keys = {key for row in rows if row["split"] == "quant" for key in row["values"]}
    found = {"curves": plots.curves(rows, draw=svg.png)}
    for net in sorted({key.partition("/")[0] for key in keys}):
        for operand in ("weight", "input", "output"):
            figure = plots.quantizer_paths(rows, operand, net=net, draw=svg.png)
            found[f"{net}_{operand}_quantizers"] = figure
    layers = (read_json(folder / "model" / "histograms.json") or {}).get("layers") or {}
    found["weights_on_the_code_grid"] = plots.histograms(layers, draw=svg.png)
    return {f"report/{name}": png for name, png in found.items() if png is not None}
