"""Weights on the code grid: the small file that the report's histograms are drawn from."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qkd_jax import checks


def weight_histograms(layers: Mapping[str, Mapping[str, Any]], *, bins: int = 60) -> dict[str, Any]:
    """Returns what `model/histograms.json` holds: float weights and codes of each layer.

    Weights are counted in units of the step, w / scale, so that channels of different scale share
    one axis, and code c sits at c.

    Args:
        layers: {layer path: {"weight": float array, "codes": integer array of that shape, centred
            (zero is code 0), "scale": array that broadcasts against it, and optionally "before":
            the float weights before quantization-aware training, "label": e.g. "int2 lsq per
            channel"}}.
        bins: bins of the float weights.

    Returns:
        {"schema": 1, "layers": {path: {"edges": [bins + 1], "counts_float": [bins],
        "counts_before": [bins] or None, "codes": [...], "counts_codes": [...], "scale": mean,
        "scale_min", "scale_max", "label", "outside": weights beyond the plotted range}}}.

    Raises:
        ValueError: if shapes differ.
    """
    checks.integer_in("bins", bins, 2)
    return {
        "schema": 1,
        "layers": {path: _one(path, layer, bins) for path, layer in layers.items()},
    }


def _one(path: str, layer: Mapping[str, Any], bins: int) -> dict[str, Any]:
    weight = np.asarray(layer["weight"], np.float64)
    codes = np.asarray(layer["codes"]).astype(np.int64)
    scale = np.asarray(layer["scale"], np.float64)
    checks.same_shape(**{f"{path} weight": weight, f"{path} codes": codes})
    try:
        units = np.broadcast_to(scale, np.broadcast_shapes(scale.shape, weight.shape))
    except ValueError:
        units = np.empty(0)
    if units.shape != weight.shape:
        raise ValueError(
            f"{path} scale has shape {scale.shape}, which does not broadcast to the weight's "
            f"{weight.shape}; keep the reduced axes as 1."
        )
    before = layer.get("before")
    given = [weight / units]
    if before is not None:
        before = np.asarray(before, np.float64)
        checks.same_shape(**{f"{path} weight": weight, f"{path} before": before})
        given.append(before / units)
    values, counts = np.unique(codes, return_counts=True)
    # A few far weights must not squeeze the grid: the axis ends where 0.1 % are left on each side.
    low = min(float(values[0]) - 1, *(float(np.quantile(g, 0.001)) for g in given))
    high = max(float(values[-1]) + 1, *(float(np.quantile(g, 0.999)) for g in given))
    edges = np.linspace(low, high, bins + 1)
    histograms = [np.histogram(g, edges)[0] for g in given]
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts_float": histograms[0].tolist(),
        "counts_before": histograms[1].tolist() if len(histograms) > 1 else None,
        "codes": values.tolist(),
        "counts_codes": counts.tolist(),
        "scale": float(scale.mean()),
        "scale_min": float(scale.min()),
        "scale_max": float(scale.max()),
        "label": str(layer.get("label", "")),
        "outside": int(weight.size - histograms[0].sum()),
    }
