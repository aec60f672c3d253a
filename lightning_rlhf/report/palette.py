"""Colors of the page and of runs, which are distinct on white and on black."""

from __future__ import annotations

RUNS = ("#2f7ed8", "#d97706", "#27a567", "#a05cd6", "#dd4b57", "#12a3b4", "#d6609f", "#8b9a23")
"""Colors of runs, used cyclically."""
INK = "#1d2430"
"""Color of text."""
FAINT = "#6a7484"
"""Color of explanations."""
GRID = "#dfe3ea"
"""Color of lines behind the data."""
PAPER = "#fefeff"
"""Color of the background."""
THEMED = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)", PAPER: "var(--paper)"}
"""CSS variables in place of these colors in an SVG inside the page."""


def color(place: int) -> str:
    """Color of a run by its index."""
    return RUNS[place % len(RUNS)]
