"""Reports: run folders in, tables for the terminal and self-contained HTML pages out.

`table` shows results.json; `write` makes report.html from whatever files the folder has;
`weight_histograms` makes what the page's histograms are drawn from (model/histograms.json).
`compare` makes the comparison of a folder of runs, in two steps `read_comparison` and
`write_comparison`, and `terminal` its tables for the terminal.
"""

from qkd_jax.report.comparison import Comparison
from qkd_jax.report.comparison_page import compare, read_comparison, write_comparison
from qkd_jax.report.comparison_terminal import terminal
from qkd_jax.report.histograms import weight_histograms
from qkd_jax.report.html import render, write
from qkd_jax.report.images import images
from qkd_jax.report.table import table

__all__ = [
    "Comparison",
    "compare",
    "images",
    "read_comparison",
    "render",
    "table",
    "terminal",
    "weight_histograms",
    "write",
    "write_comparison",
]
