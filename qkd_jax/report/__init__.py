"""Reports: run folders in, a table for the terminal and one self-contained HTML page out.

`table` shows results.json; `write` makes report.html from whatever files the folder has;
`weight_histograms` makes what the page's histograms are drawn from (model/histograms.json).
"""

from qkd_jax.report.histograms import weight_histograms
from qkd_jax.report.html import render, write
from qkd_jax.report.table import table

__all__ = ["render", "table", "weight_histograms", "write"]
