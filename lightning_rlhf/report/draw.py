"""Figures as PNG files, and as SVG that takes its colors and its font from the page around it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from lightning_rlhf.report.figure import Figure
from lightning_rlhf.report.marks import Bars
from lightning_rlhf.report.palette import FAINT, GRID, INK, THEMED
from lightning_rlhf.report.replacing import replacing
from lightning_rlhf.text.escape import html

SIZE = (6.4, 3.9)
"""Inches."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Left out of SVG files: the same logs give the same page."""


def require_matplotlib() -> None:
    """Raises ImportError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report draws with matplotlib, which is missing: pip install 'lightning-rlhf[plots]'"
        ) from error


def draw(figure: Figure, *, png: Path) -> str:
    """Write the figure as a PNG on white, and give it as an SVG element without a ground of its own.

    Args:
        figure: what to draw.
        png: path of the file.

    Returns:
        `<svg …>`, without a script, a style sheet or an address; its words are text, its neutral colors the page's.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axis = canvas.subplots()
        _compose(axis, figure)
        with replacing(png) as part:
            canvas.savefig(part, format="png", dpi=160, facecolor="white")
        axis.set_title("")  # the page has it as a heading
        written = io.StringIO()
        canvas.savefig(written, format="svg", transparent=True, metadata=METADATA)
    return embedded(written.getvalue(), figure)


def _compose(axis: Any, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    if figure.level is not None:
        axis.axhline(figure.level, color=FAINT, linewidth=0.8, alpha=0.7, zorder=1)
    for mark in figure.marks:
        mark.draw(axis)
    if figure.span is not None:
        low, high = figure.span
        axis.set_ylim(low, high + 0.03 * (high - low))
    bars = next((mark for mark in figure.marks if isinstance(mark, Bars)), None)
    if bars is not None:
        axis.set_xticks(range(len(bars.categories)), bars.categories)
        axis.grid(visible=False, axis="x")
    elif all(float(x).is_integer() for mark in figure.marks for x in mark.x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axis, figure.marks)


def _legend(axis: Any, marks: Any) -> None:
    """Above the axis, where it covers no data; none for one series, which the title names."""
    labels = [mark.label for mark in marks if mark.label]
    if len(labels) > 1:
        columns = 2 if max(map(len, labels)) > 18 or len(labels) == 4 else 3
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": columns, "borderaxespad": 0.3}
        axis.legend(**where, handlelength=1.6, columnspacing=1.4)
        lines = -(-len(labels) // columns)
        axis.set_title(axis.get_title(loc="left"), loc="left", pad=12 + 13 * lines)


def embedded(svg: str, figure: Figure) -> str:
    """matplotlib's file as an element of a page.

    What goes: the XML head and the name spaces, which are addresses and which HTML implies; a style sheet that would
    hold for the whole page; fonts; identifiers of groups, which would occur in every figure.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="(?:\w+_\d+|matplotlib[^"]*)"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for fixed, themed in THEMED.items():
        svg = svg.replace(fixed, themed)
    size = re.compile(r'<svg width="[^"]*" height="[^"]*"')
    described = html(figure.alternative)
    svg = size.sub(lambda _: f'<svg role="img" aria-label="{described}"', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg)
