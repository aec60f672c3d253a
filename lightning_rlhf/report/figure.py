"""A figure before it is drawn: marks, units, and a caption that says what one should see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rlhf.report.marks import Bars, Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One axis with its marks.

    Attributes:
        name: of its files.
        title: above it.
        x: label of the axis, with its unit.
        y: label of the axis, with its unit.
        marks: at least one.
        caption: below it: what is drawn, and how to read it.
        level: a value of y to draw a thin line at, such as a correlation of 0.
        span: of y, where it has natural ends; None for an end that the data sets.
    """

    name: str
    title: str
    x: str
    y: str
    marks: Sequence[Mark]
    caption: str
    level: float | None = None
    span: tuple[float, float | None] | None = None

    @property
    def alternative(self) -> str:
        """The figure in words, for those who can't see it."""
        told = [f"{mark.label}: {_way(mark)}" for mark in self.marks if mark.label and len(mark.x)]
        return f"{self.title}: {self.y} against {self.x}. {'; '.join(told)}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A figure that the logs do not give.

    Attributes:
        title: of the figure.
        remedy: what would give it, one sentence.
    """

    title: str
    remedy: str


def _way(mark: Mark) -> str:
    """First and last value of a mark, or its bars."""
    if isinstance(mark, Bars):
        return ", ".join(f"{mark.categories[round(x)]} {y:.3g}" for x, y in zip(mark.x, mark.y, strict=True))
    if len(mark.x) == 1:
        return f"{mark.y[0]:.3g} at {mark.x[0]:.3g}"
    return f"from {mark.y[0]:.3g} at {mark.x[0]:.3g} to {mark.y[-1]:.3g} at {mark.x[-1]:.3g}"
