"""Style and layout of the report's figures, and their SVG text.

Colours are those of Okabe and Ito, which colour-blind readers can distinguish; lines differ in
style too. Text stays text in the SVG, so the page's own font is used and the file stays small.
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
LINES = ("-", "--", "-.", ":")
INK, QUIET, GRID, EDGE = "#1f2328", "#6b7280", "#e5e7eb", "#9ca3af"
BAND = "#f3f4f6"

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qkd_jax",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    # A fixed height: finding one looks at every label of every axis, a third of the drawing time.
    "axes.titley": 1.0,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def figure(
    rows: int,
    across: int,
    *,
    height: float,
    top: float = 0.3,
    bottom: float = 0.5,
    gap: tuple[float, float] = (0.45, 0.5),
    sharex: bool = False,
) -> tuple[Any, Any]:
    """Returns (figure, axes [rows, across]), 10 inches wide; all lengths in inches.

    Margins are given by hand: matplotlib's own layout engines take most of a small grid's time. The
    figure is made without pyplot, so the state of a user's session is left alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left, right, wide = 0.75, 0.25, 10.0
    down, between = gap
    tall = top + rows * height + (rows - 1) * down + bottom
    each = (wide - left - right - (across - 1) * between) / across
    figure = Figure(figsize=(wide, tall))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, across, squeeze=False, sharex=sharex)
    figure.subplots_adjust(
        left=left / wide,
        right=1 - right / wide,
        top=1 - top / tall,
        bottom=bottom / tall,
        hspace=down / height,
        wspace=between / each,
    )
    return figure, axes


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], *, inches: float) -> None:
    """Adds a legend in one row, `inches` below the figure's top (above its bottom if negative)."""
    tall = figure.get_size_inches()[1]
    anchor = 0.5, 1 - inches / tall if inches >= 0 else -inches / tall
    location = "upper center" if inches >= 0 else "lower center"
    figure.legend(
        handles, labels, loc=location, bbox_to_anchor=anchor, ncols=len(handles), borderaxespad=0
    )


def text(figure: Any, label: str) -> str:
    """Returns the figure as an <svg> element to be put into a page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text is drawn by the reader's fonts, which may have what matplotlib's own lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Paths in hundredths of a point are fine enough; numbers in the text stay as they are.
    text = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d{2})\d+", r"\1", d.group()), text)
    safe = label.replace("&", "and").replace('"', "'").replace("<", "").replace(">", "")
    return text.replace("<svg ", f'<svg role="img" aria-label="{safe}" ', 1)


def png(figure: Any, label: str) -> bytes:
    """Returns the figure as a PNG image, with `text`'s arguments, for what shows no SVG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="png", dpi=100, metadata={"Title": label})
    return buffer.getvalue()


def style() -> Any:
    """Returns the context in which the report's figures are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def name_axes(figure: Any, x: str, y: str = "", *, inches: float = 0.04) -> None:
    """Adds one name for all x axes, `inches` above the figure's bottom, and one for all y axes."""
    tall = figure.get_size_inches()[1]
    size = 9.5 if y else 9
    figure.text(0.5, inches / tall, x, ha="center", va="bottom", fontsize=size)
    if y:
        figure.text(0.004, 0.5, y, ha="left", va="center", rotation=90, fontsize=size)


def bare(axes: Any) -> None:
    """Removes the grid and the spines of axes that show an image."""
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
