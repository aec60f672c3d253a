"""Colors that tell runs apart on white and on black, and those of the page, which follow the reader's theme."""

from __future__ import annotations

RUNS = ("#2f7ed8", "#d97706", "#27a567", "#a05cd6", "#dd4b57", "#12a3b4", "#d6609f", "#8b9a23")
"""One after the other, and over again."""
INK, FAINT, GRID, PAPER = "#1d2430", "#6a7484", "#dfe3ea", "#fefeff"
"""Of text, of what explains, of lines behind the data, of the ground; the page sets its own (`THEMED`)."""
THEMED = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)", PAPER: "var(--paper)"}
"""What stands for them in an SVG inside the page."""


def color(place: int) -> str:
    """Color of a run by its place among the runs."""
    return RUNS[place % len(RUNS)]
