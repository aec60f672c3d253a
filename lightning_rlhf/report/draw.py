"""Figures as PNG and as SVG with the colors and font of the surrounding page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.report.figure import Bars, Figure, Guide
from lightning_rlhf.report.palette import FAINT, GRID, INK, THEMED
from lightning_rlhf.text.escape import html

SIZE = (5.4, 3.4)
"""Size of a figure in inches; smaller makes larger letters, because a page scales all figures alike."""
ROOM = 74
"""Width of a legend's line in characters, six of them for each label's sign."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
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
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
Dot = tuple[float, float, str, float | str, float, float | None, float | None]
"""Position from the left and the top as shares of the figure; label; x, y and the interval of y."""
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Metadata left out of SVG files, so that the same logs give the same page."""


def require_matplotlib() -> None:
    """Raise if matplotlib is missing.

    Raises:
        ImportError: it is missing; says what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a report draws with matplotlib, which is missing: pip install matplotlib") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Drawn figure.

    Attributes:
        figure: that is drawn.
        svg: `<svg …>` without script, style sheet or address; words are text, neutral colors the page's.
        png: the file, on white.
        dots: every finite number of its marks, with its position.
    """

    figure: Figure
    svg: str
    png: bytes
    dots: tuple[Dot, ...]


def draw(figure: Figure) -> Drawing:
    """Draw a figure as SVG and PNG."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axis = canvas.subplots()
        _compose(axis, figure)
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=190, facecolor="white")
        axis.set_title("")  # the page has it as a heading
        written = io.StringIO()
        canvas.savefig(written, format="svg", transparent=True, metadata=METADATA)
        dots = tuple(_dots(axis, figure))
    return Drawing(figure=figure, svg=embedded(written.getvalue(), figure), png=png.getvalue(), dots=dots)


def _dots(axis: Any, figure: Figure) -> Iterator[Dot]:
    """Numbers of the marks with their positions in the last drawing."""
    place = axis.transData + axis.figure.transFigure.inverted()
    for mark in figure.marks:
        if isinstance(mark, Guide):
            continue
        for x, row in zip(mark.x, mark.rows(), strict=True):
            if math.isfinite(x) and math.isfinite(row[1]):
                left, up = place.transform((x, row[1]))
                yield round(float(left), 4), round(1 - float(up), 4), mark.label, *row


def _compose(axis: Any, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    if figure.level is not None:
        axis.axhline(figure.level, color=FAINT, linewidth=0.8, alpha=0.7, zorder=1)
    for mark in figure.marks:
        mark.draw(axis)
    if figure.span is not None:
        low, high = figure.span[0], axis.get_ylim()[1] if figure.span[1] is None else figure.span[1]
        axis.set_ylim(low - 0.02 * (high - low), high + 0.03 * (high - low))
    bars = next((mark for mark in figure.marks if isinstance(mark, Bars)), None)
    if bars is not None:
        axis.set_xticks(range(len(bars.categories)), bars.categories)
        axis.grid(visible=False, axis="x")
    elif all(float(x).is_integer() for mark in figure.marks for x in mark.x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axis, figure.marks)


def _legend(axis: Any, marks: Any) -> None:
    """Put a legend of several series above the axis, where it covers no data."""
    labels = [mark.label for mark in marks if mark.label]
    if len(labels) > 1:
        columns = next((n for n in ((2,) if len(labels) == 4 else (3, 2)) if _width(labels, n) <= ROOM), 1)
        where = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": columns, "borderaxespad": 0.3}
        axis.legend(**where, handlelength=1.6, columnspacing=1.4)
        lines = -(-len(labels) // columns)
        axis.set_title(axis.get_title(loc="left"), loc="left", pad=12 + 13 * lines)


def _width(labels: Sequence[str], columns: int) -> int:
    """Width of a legend in characters, filled column by column."""
    rows = -(-len(labels) // columns)
    return sum(max(map(len, labels[i : i + rows])) + 6 for i in range(0, len(labels), rows))


def embedded(svg: str, figure: Figure) -> str:
    """Rewrite matplotlib's SVG file as an element of a page.

    Left out are the XML head and the name spaces, which are addresses and which HTML implies; a style sheet that would
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
